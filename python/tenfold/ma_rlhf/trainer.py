# SPDX-License-Identifier: Apache-2.0
"""PPO with a critic and macro actions: rollout, advantages, update, and going on after a kill.

What a step reads besides accelerate's state (weights, optimiser, KL weight, generators of every rank) is a
function of seed and step: prompts, the uniform numbers behind sampled tokens, random macro actions, the order of
minibatches. So a run that is killed anywhere and started again on its folder gives the same bits.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.critic import ActorCritic, Critic
from tenfold.ma_rlhf.experience import Experience, prepare
from tenfold.ma_rlhf.kl import kl_controller
from tenfold.ma_rlhf.metrics import Metrics, rollout_metrics
from tenfold.ma_rlhf.prompts import Prompts
from tenfold.ma_rlhf.record import RECORD_FILE, SAMPLES_FILE, PPORecord
from tenfold.ma_rlhf.rewards import Rewards
from tenfold.ma_rlhf.rollout import Roller, Rollout
from tenfold.ma_rlhf.samples import SampleFile, take_samples
from tenfold.ma_rlhf.segmenters import Segmenter, make_segmenter
from tenfold.ma_rlhf.update import Updater, make_optimizer
from tenfold.rlhf.generation import Generate, sampler
from tenfold.rlhf.trunks import plain_face, trunk_of, value_head
from tenfold.training.batches import model_digest
from tenfold.training.loop import (
    Callback,
    Progress,
    kept_random_state,
    load_checkpoint,
    make_accelerator,
    progress_bar,
    release,
    save_checkpoint,
)
from tenfold.training.lora import with_lora
from tenfold.training.sharding import Sharded, mesh_of, whole
from tenfold.training.store import WorkFolder

STAGE = "ppo"


class MAPPOTrainer:
    """Trains a causal LM, in place, on rewards of its own responses.

        trainer = MAPPOTrainer(policy, reward=my_reward, prompts=["Tell me", ...], tokenizer=tokenizer)
        record = trainer.train()

    Args:
        policy: a transformers causal LM, or one with PEFT adapters. With ``config.lora_rank`` it gets
            adapters: then ``trainer.policy`` is what trains and is saved.
        critic: a :class:`Critic`; ``"shared"`` (a value head on the policy's trunk); None: a copy of the reward
            model if that is the only reward and reads the policy's tokens, else of the policy's trunk, with
            values of 0. Not used where ``config.advantage`` needs none.
        reward: a function of TRL's or OpenRLHF's style, a reward model, or a list of these: see ``rewards``.
        prompts: a list of texts, chats or dicts with ``prompt`` and other columns, a dict of columns, or a
            ``datasets.Dataset``.
        tokenizer: of the policy. config: settings.
        ref: a frozen policy for the KL penalty; None: the policy as it is now (with adapters: without them);
            False: none, which needs ``beta=0`` and a termination other than ``"ppl"``.
        reward_weights: one per reward.
        generate: other than the trainer's own sampling, see ``generation``. segmenter: other than
            ``config.termination``'s; parser, callback_starts: for it, see ``make_segmenter``.
        folder: of checkpoints, ``samples.jsonl`` and ``record.json``; a run that was killed goes on there,
            with the same call on the same model.
        callback: told after every step. quiet: no progress bar.
        samples, sample_every: rows of the sample table, and steps between two.

    Several ranks (torchrun) are data-parallel: each holds policy, critic, reference and reward models whole. With FSDP2
    policy and critic are in shards but while responses are drawn.

    Raises:
        ValueError, TypeError: settings that do not go together, ranks that do not divide the batch, models
            sharded otherwise than by FSDP2, a folder of another run. ModuleNotFoundError: accelerate or peft is
            missing.
    """

    def __init__(
        self,
        policy: Any,
        critic: Critic | str | None = None,
        *,
        reward: Any,
        prompts: Any,
        tokenizer: Any,
        config: MARLHFConfig | None = None,
        ref: Any = None,
        reward_weights: Sequence[float] | None = None,
        generate: Generate | None = None,
        segmenter: Segmenter | None = None,
        parser: Callable[[str], Any] | None = None,
        callback_starts: Callable[..., Tensor] | None = None,
        folder: str | Path | None = None,
        callback: Callback | None = None,
        quiet: bool = True,
        samples: int = 4,
        sample_every: int = 10,
    ) -> None:
        self.config = config = config or MARLHFConfig()
        self.tokenizer, self.callback = tokenizer, callback
        self.rewards = Rewards(reward, reward_weights)
        self.prompts = Prompts(prompts, tokenizer, config.max_prompt, config.seed)
        self.eos, self.pad = end_tokens(policy, tokenizer)
        self.segmenter = segmenter or make_segmenter(
            config, tokenizer, parser=parser, callback=callback_starts
        )
        _check_reference(config, ref)
        self.accelerator = make_accelerator(config, next(policy.parameters()).device)
        _check_ranks(config, self.accelerator)
        self.quiet = quiet or not self.accelerator.is_main_process
        self.samples, self.sample_every = samples, sample_every
        made = _critic(critic, policy, self.rewards, config)
        self.folder = self._claimed(folder, policy, made)
        adapted = hasattr(policy, "disable_adapter") or config.lora_rank is not None
        self.reference = ref
        if ref is None and not adapted:
            self.reference = copy.deepcopy(policy)
        if config.lora_rank is not None:
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                policy = with_lora(policy, config.lora_rank, config.lora_alpha, config.lora_targets)
        self.module = ActorCritic(policy, made, config.temperature).to(self.accelerator.device)
        self._freeze()
        generate = generate or sampler(
            eos=self.eos, pad=self.pad, temperature=config.temperature, top_k=config.top_k,
            top_p=config.top_p,
        )  # fmt: skip
        self.roller = Roller(
            self.accelerator, config, self.prompts, self.rewards, generate, self.reference, self.eos,
            self.pad,
        )  # fmt: skip
        self.controller = kl_controller(config)

    @property
    def policy(self) -> Any:
        """What trains: the policy, with its adapters if it has any."""
        return self.module.policy

    @property
    def critic(self) -> Any:
        """The critic, the value head of a shared trunk, or None."""
        return self.module.critic

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``policy`` and ``critic`` below a folder, on the main process."""
        if not self.accelerator.is_main_process:
            return
        self.policy.save_pretrained(Path(folder) / "policy")
        if isinstance(self.critic, Critic):
            self.critic.save_pretrained(Path(folder) / "critic")

    def _claimed(
        self, folder: Any, policy: nn.Module, critic: nn.Module | None
    ) -> WorkFolder | None:
        if folder is None:
            return None
        made = WorkFolder(folder, self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        made.claim({
            "config": self.config.to_json(), "kind": STAGE, "model": model_digest(policy),
            "critic": None if critic is None else model_digest(critic), "data": self.prompts.digest(),
            "rewards": self.rewards.names, "reward_weights": self.rewards.weights,
        })  # fmt: skip
        self.accelerator.wait_for_everyone()
        return made

    def _freeze(self) -> None:
        """Dropout is off throughout, else old and new probabilities differ; only policy and critic train."""
        device = self.accelerator.device
        self.module.eval()
        for module in self.rewards.modules():
            module.to(device).eval().requires_grad_(False)
        if isinstance(self.reference, nn.Module):
            self.reference.to(device).eval().requires_grad_(False)
        if self.config.gradient_checkpointing:
            for part in (self.module.policy, getattr(self.module.critic, "trunk", None)):
                if part is not None:
                    part.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
                    if hasattr(part, "enable_input_require_grads"):
                        part.enable_input_require_grads()  # type: ignore[operator]

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """transformers recomputes activations only in layers that are training; nothing below them is."""
        layers = [m for m in self.module.modules() if getattr(m, "gradient_checkpointing", False)]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def train(self) -> PPORecord:
        """Trains for ``config.steps`` rollouts, from where an interrupted run on the folder was.

        Returns the record, also in the folder. Raises TrainingError if a loss is not a number.
        """
        record = self._new_record()
        with kept_random_state():
            torch.manual_seed(self.config.seed)
            self._run(record)
        if self.folder:
            self.accelerator.wait_for_everyone()
            if self.folder.main:
                record.write(self.folder.path / RECORD_FILE)
            self.folder.drop_checkpoints(STAGE)
            self.folder.release()
        return record

    def _new_record(self) -> PPORecord:
        parameters = list(self.module.parameters())
        return PPORecord(
            self.config.to_json(), self.rewards.names, ranks=self.accelerator.num_processes,
            parameters=sum(p.numel() for p in parameters),
            trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        )  # fmt: skip

    def _run(self, record: PPORecord) -> None:
        accelerator, config = self.accelerator, self.config
        model, optimizer = self._prepared()
        self.module.eval()
        accelerator.register_for_checkpointing(self.controller)
        first, record.curve = load_checkpoint(
            accelerator, self.folder, STAGE, model, optimizer, strict=False
        )
        path = None if self.folder is None else self.folder.path / SAMPLES_FILE
        table = SampleFile(path, accelerator.is_main_process)
        table.resume(first)
        updater = Updater(accelerator, config, model, optimizer)
        with progress_bar(STAGE, config.steps, first, not self.quiet) as advance:
            for step in range(first, config.steps):
                metrics, seconds = self._step(updater, table, step)
                record.curve.append(metrics)
                record.seconds.append(seconds)
                every = config.checkpoint_every
                due = every is not None and (step + 1) % every == 0 and step + 1 < config.steps
                if self.folder is not None and due:
                    save_checkpoint(
                        accelerator, self.folder, STAGE, step + 1, record.curve, model, optimizer
                    )
                advance(metrics)
                if self.callback is not None:
                    times = {f"time/{k}": v for k, v in seconds.items()}
                    self.callback(Progress(STAGE, step + 1, config.steps, metrics | times))
        record.samples = table.samples
        release(accelerator, model)

    def _prepared(self) -> tuple[Any, Any]:
        """(module, optimiser), over accelerate's ranks or in their shards."""
        accelerator, config, mesh = self.accelerator, self.config, mesh_of(self.accelerator)
        if mesh is None:
            model, optimizer = accelerator.prepare(self.module, make_optimizer(self.module, config))
            return model, optimizer
        model = Sharded(self.module, mesh, config.mixed_precision)
        return model, make_optimizer(self.module, config)

    def _step(
        self, updater: Updater, table: SampleFile, step: int
    ) -> tuple[Metrics, dict[str, float]]:
        config = self.config
        with whole(updater.model):  # responses of a rank may be longer than others'
            rollout = self.roller(self.module, step)
        start = time.perf_counter()
        beta = self.controller.beta
        exp = self.prepare(rollout, step, beta)
        metrics = rollout_metrics(rollout, exp, beta, self.rewards.names, config.critic_free)
        due = step % self.sample_every == 0 or step + 1 == config.steps
        table.add(take_samples(rollout, exp, self.tokenizer, step + 1, self.samples if due else 0))
        middle = time.perf_counter()
        with self._recomputing():
            metrics |= updater(rollout, exp, step)
        rows = int((~exp.dropped).sum())
        if rows:
            self.controller.update(float(exp.kl_response[~exp.dropped].double().mean()), rows)
        seconds = rollout.seconds | {
            "advantages": middle - start,
            "update": time.perf_counter() - middle,
        }
        return metrics, seconds

    def prepare(self, rollout: Rollout, step: int, beta: float) -> Experience:
        """Macro actions and advantages of a rollout."""
        config = self.config
        needs_group = config.critic_free or config.whiten_adv == "group"
        rows = torch.arange(config.batch_size) + step * config.batch_size
        return prepare(
            config, self.segmenter, ids=rollout.response, mask=rollout.response_mask,
            logp_old=rollout.logp_old, logp_ref=rollout.logp_ref, value_old=rollout.value_old,
            score=rollout.score, truncated=rollout.truncated, bootstrap=rollout.bootstrap,
            texts=rollout.completions, keys=rows, beta=beta,
            group=rollout.batch.group.to(rollout.ids.device) if needs_group else None,
        )  # fmt: skip


def end_tokens(policy: Any, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """(ids that end a response, id that fills rows) of a policy and its tokenizer.

    Masks are made without the filling id, so it may be one that ends. ValueError without any end.
    """
    settings = getattr(plain_face(policy), "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise ValueError(
            "neither the policy's generation_config nor the tokenizer has an eos_token_id, so no response "
            "could end"
        )
    eos = tuple(found) if isinstance(found, list | tuple) else (int(found),)
    pad = tokenizer.pad_token_id
    return eos, eos[0] if pad is None else int(pad)


def _check_reference(config: MARLHFConfig, ref: Any) -> None:
    if ref is False and (config.beta > 0 or config.kl_controller != "fixed"):
        raise ValueError(
            f"ref=False needs beta=0 and kl_controller='fixed', got beta={config.beta}"
        )
    if ref is False and config.termination == "ppl":
        raise ValueError("ref=False, but termination='ppl' looks at the reference's perplexity")
    if ref is not None and ref is not False and not isinstance(ref, nn.Module):
        raise TypeError(f"ref must be a model, None or False, got {type(ref).__name__}")


def _check_ranks(config: MARLHFConfig, accelerator: Any) -> None:
    ranks = accelerator.num_processes
    if config.batch_size % ranks:
        raise ValueError(
            f"batch_size must be a multiple of the number of ranks, got {config.batch_size} and {ranks}"
        )


def _critic(
    critic: Any, policy: Any, rewards: Rewards, config: MARLHFConfig
) -> Critic | nn.Linear | None:
    if config.critic_free:
        if critic is not None:
            raise ValueError(f"advantage={config.advantage!r} has no critic; give critic=None")
        return None
    if isinstance(critic, Critic):
        return critic
    if critic == "shared":
        return value_head(trunk_of(policy))
    if critic is not None:
        raise TypeError(f"critic must be a Critic, 'shared' or None, got {critic!r}")
    model = rewards.initial_critic()
    return Critic.from_policy(policy) if model is None else Critic.from_reward_model(model)
