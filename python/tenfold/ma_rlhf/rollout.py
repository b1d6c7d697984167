# SPDX-License-Identifier: Apache-2.0
"""One rollout: responses of the policy, their log-probabilities, values and scores, the same on every rank.

Each rank answers, reads and judges its share of the prompts; then all get everything, which is small
([B, R] numbers). What follows (macro actions, advantages, whitening, minibatches) so works on the whole
batch everywhere and cannot depend on how many ranks there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.critic import ActorCritic
from tenfold.ma_rlhf.prompts import PromptBatch, Prompts
from tenfold.ma_rlhf.rewards import Answers, Rewards
from tenfold.rlhf.generation import Generate, response_tokens


def seeded(seed: int, *names: Any) -> torch.Generator:
    """A CPU generator that belongs to some names: the same in any process, at any time."""
    text = " ".join(map(str, (seed, *names))).encode()
    mixed = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    return torch.Generator().manual_seed(mixed)


@dataclass(frozen=True)
class Rollout:
    """All responses of a step, of all ranks.

    Attributes:
        batch: the prompts. ids, mask: int64 and bool [B, P + R], padding on both sides. prompt: P.
        logp_old, logp_ref: float32 [B, R]; value_old the same, or None. bootstrap: [B] or None, the value
            after the last token of ``truncated`` responses (bool [B], those without an end), else 0.
        score: float32 [B], after the penalty of a missing end; parts: [B, F], of each reward, NaN where it
            does not apply. completions: texts. logs: what rewards log. seconds: where the time went.
    """

    batch: PromptBatch
    ids: Tensor
    mask: Tensor
    prompt: int
    logp_old: Tensor
    logp_ref: Tensor
    value_old: Tensor | None
    bootstrap: Tensor | None
    truncated: Tensor
    score: Tensor
    parts: Tensor
    completions: list[str]
    logs: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def response(self) -> Tensor:
        """Tokens of the responses, int64 [B, R]."""
        return self.ids[:, self.prompt :]

    @property
    def response_mask(self) -> Tensor:
        """Which of them count, bool [B, R]."""
        return self.mask[:, self.prompt :]


class Roller:
    """Makes rollouts.

    Args:
        accelerator: of the trainer. config, prompts, rewards, generate: what is asked, how it is judged and
            answered. reference: a frozen policy; None: the policy without its adapters; False: none.
        eos: ids that end a response. pad: id that fills rows.
    """

    def __init__(
        self, accelerator: Any, config: MARLHFConfig, prompts: Prompts, rewards: Rewards, generate: Generate,
        reference: Any, eos: tuple[int, ...], pad: int,
    ) -> None:  # fmt: skip
        self.accelerator, self.config, self.prompts = accelerator, config, prompts
        self.rewards, self.generate, self.eos, self.pad = rewards, generate, eos, pad
        self.adapters = reference is None
        self.reference: ActorCritic | None = None
        if isinstance(reference, nn.Module):
            self.reference = ActorCritic(reference, None, config.temperature)
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    @torch.no_grad()
    def __call__(self, module: ActorCritic, step: int) -> Rollout:
        """The rollout of a step (from 0), by the policy as it is."""
        config, accelerator = self.config, self.accelerator
        self._seconds = {}
        size, ranks = config.batch_size, accelerator.num_processes
        each = size // ranks
        mine = slice(accelerator.process_index * each, (accelerator.process_index + 1) * each)
        batch = self.prompts.take("rollout", step, size, config.group_size)
        draws = torch.rand(size, config.max_response, generator=seeded(config.seed, "draws", step))
        with self._timed("generate"):
            ids, mask, truncated = self._respond(module, batch, draws, mine, step)
        known = self._read(module, ids, mask, batch.ids.shape[1], truncated)
        with self._timed("reward"):
            answers = self._answers(batch, ids, mask, mine)
            judged = self.rewards(answers)
        if config.missing_eos_penalty is not None:
            penalty = config.missing_eos_penalty * truncated.cpu().float()
            judged.score.sub_(penalty)
        parts: dict[str, Any] = known | {
            "ids": ids, "mask": mask, "truncated": truncated,
            "score": judged.score.to(ids.device), "parts": judged.parts.to(ids.device),
        }  # fmt: skip
        logs, completions = [judged.logs], answers.completions
        if ranks > 1:
            from accelerate.utils import gather_object

            parts = {k: None if v is None else accelerator.gather(v) for k, v in parts.items()}
            logs, completions = gather_object(logs), gather_object(completions)
        names = sorted({k for found in logs for k in found})
        mean = {n: sum(found.get(n, 0.0) for found in logs) / len(logs) for n in names}
        return Rollout(batch=batch, prompt=batch.ids.shape[1], completions=completions, logs=mean,
                       seconds=self._seconds, **parts)  # fmt: skip

    def _respond(
        self, module: ActorCritic, batch: PromptBatch, draws: Tensor, mine: slice, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, mask [b, P + R], truncated [b]) of this rank's rows; R is the longest of all ranks."""
        device = self.accelerator.device
        prompt, on = batch.ids[mine].to(device), batch.mask[mine].to(device)
        # For whoever draws from the global generator; `sampler` has its numbers.
        rank = self.accelerator.process_index
        torch.manual_seed(seeded(self.config.seed, "generate", step, rank).initial_seed())
        with self.accelerator.autocast():
            made = self.generate(module.policy, prompt, on, draws[mine].to(device))
        limit = draws.shape[1]
        if made.ndim != 2 or len(made) != len(prompt) or made.shape[1] > limit or not made.shape[1]:
            raise ValueError(
                f"generate must give responses [{len(prompt)}, 1..{limit}], got {list(made.shape)}"
            )
        answered, truncated = response_tokens(made, self.eos)
        width = answered.sum(1).max()
        if self.accelerator.num_processes > 1:
            width = self.accelerator.gather(width[None]).max()
        keep = int(width)
        made = torch.where(answered, made, self.pad)[:, :keep]
        fill = (0, keep - made.shape[1])
        ids = nn.functional.pad(made, fill, value=self.pad)
        answered = nn.functional.pad(answered[:, :keep], fill, value=False)
        return torch.cat([prompt, ids], 1), torch.cat([on, answered], 1), truncated

    def _read(
        self, module: ActorCritic, ids: Tensor, mask: Tensor, prompt: int, truncated: Tensor
    ) -> dict[str, Tensor | None]:
        """Log-probabilities, values, and values after the last token of truncated rows (else 0).

        ``micro_batch_size`` rows at a time.
        """
        config = self.config
        found: dict[str, list[Tensor]] = {"logp_old": [], "logp_ref": []}
        if module.critic is not None:
            found |= {"value_old": []} | ({"bootstrap": []} if config.bootstrap_truncated else {})
        size = config.micro_batch_size or len(ids)
        for at in range(0, len(ids), size):
            part, on, cut = (x[at : at + size] for x in (ids, mask, truncated))
            with self.accelerator.autocast():
                with self._timed("policy and values"):
                    out = module(part, on, prompt)
                    found["logp_old"].append(out.logp)
                    if "value_old" in found:
                        found["value_old"].append(out.value)
                    if "bootstrap" in found:
                        after = torch.zeros(len(part), device=part.device)
                        if bool(cut.any()):
                            after[cut] = module.value_after(part[cut], on[cut])
                        found["bootstrap"].append(after)
                with self._timed("reference"):
                    found["logp_ref"].append(self._referred(module, part, on, prompt, out.logp))
        return {"value_old": None, "bootstrap": None} | {k: torch.cat(v) for k, v in found.items()}

    def _referred(
        self, module: ActorCritic, ids: Tensor, mask: Tensor, prompt: int, logp: Tensor
    ) -> Tensor:
        if self.reference is not None:
            return self.reference(ids, mask, prompt, value=False).logp
        if self.adapters:
            with module.policy.disable_adapter():  # type: ignore[operator]
                return module(ids, mask, prompt, value=False).logp
        return logp

    def _answers(self, batch: PromptBatch, ids: Tensor, mask: Tensor, mine: slice) -> Answers:
        prompt = batch.ids.shape[1]
        response, on = ids[:, prompt:].cpu(), mask[:, prompt:].cpu()
        texts = [
            self.prompts.tokenizer.decode(row[m].tolist(), skip_special_tokens=True)
            for row, m in zip(response, on)
        ]
        columns = {name: values[mine] for name, values in batch.columns.items()}
        return Answers(batch.prompts[mine], batch.texts[mine], texts, ids, mask, prompt, columns)
