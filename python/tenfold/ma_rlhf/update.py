# SPDX-License-Identifier: Apache-2.0
"""PPO's update on one rollout: minibatches over epochs, in micro-batches, on any number of ranks.

Every rank has the whole rollout and takes its share of each minibatch. Losses are divided by the counts of
the whole minibatch, so how rows are dealt to ranks and micro-batches changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.critic import ActorCritic, Output
from tenfold.ma_rlhf.experience import Experience
from tenfold.ma_rlhf.losses import policy_loss, value_loss
from tenfold.ma_rlhf.metrics import Metrics, Sums
from tenfold.ma_rlhf.rollout import Rollout, seeded
from tenfold.training.errors import TrainingError
from tenfold.training.recipe import decay_groups, scheduled
from tenfold.training.sharding import Sharded, computed, gathered, unsynced

PARTS = ("policy", "critic")


def make_optimizer(module: ActorCritic, config: MARLHFConfig) -> torch.optim.Optimizer:
    """AdamW with groups of their own rate for policy and critic (``part``); matrices decay, vectors do not.

    One optimiser, because a scaler of half-precision gradients can serve only one; AdamW's update of a parameter
    does not know the others.
    """
    rates = {"policy": config.learning_rate, "critic": config.critic_learning_rate}
    groups = []
    for part in PARTS:
        owner = getattr(module, part)
        trained = [] if owner is None else [p for p in owner.parameters() if p.requires_grad]
        made = decay_groups(trained, rates[part], config.weight_decay)
        groups += [g | {"part": part} for g in made]
    return torch.optim.AdamW(groups, betas=config.betas, eps=1e-8, fused=True)


def rate_factor(step: int, config: MARLHFConfig) -> float:
    """Learning rate of a step as a share of its peak."""
    warm = config.warmup if config.warmup < 1 else config.warmup / config.steps
    return scheduled(step, config.steps, config.schedule, warm)


def shares(rows: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's rows of a minibatch: every ``ranks``-th."""
    return rows[rank::ranks]


def _read(model: Any, ids: Tensor, mask: Tensor, prompt: int) -> Output:
    return model(ids, mask, prompt)


class Updater:
    """Takes PPO's steps.

    Args:
        accelerator, model, optimizer: prepared by accelerate, or in shards; ``model`` wraps the :class:`ActorCritic`.
        config: the settings.
    """

    def __init__(self, accelerator: Any, config: MARLHFConfig, model: Any, optimizer: Any) -> None:
        self.accelerator, self.config = accelerator, config
        self.model, self.optimizer = model, optimizer
        self.sharded = isinstance(model, Sharded)

    def __call__(self, rollout: Rollout, exp: Experience, step: int) -> Metrics:
        """All epochs and minibatches of a rollout; the metrics of the update, the same on all ranks.

        Dropped rows have no part in it. Raises TrainingError if a loss is not a number.
        """
        config = self.config
        rate = rate_factor(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        usable = (~exp.dropped & (exp.nseg > 0)).nonzero()[:, 0].cpu()
        sums, updates = Sums(), 0
        for epoch in range(config.ppo_epochs if len(usable) else 0):
            order = torch.randperm(len(usable), generator=seeded(config.seed, "order", step, epoch))
            for rows in usable[order].tensor_split(config.minibatches):
                if len(rows):
                    self._minibatch(rollout, exp, rows, sums, updates, step)
                    updates += 1
        made = {"lr": config.learning_rate * rate, "episode": float((step + 1) * config.batch_size)}
        if not config.critic_free:
            made["critic/lr"] = config.critic_learning_rate * rate
        return made | self._metrics(sums, updates)

    def _minibatch(
        self, rollout: Rollout, exp: Experience, rows: Tensor, sums: Sums, update: int, step: int
    ) -> None:
        accelerator = self.accelerator
        counts = exp.rows(rows).counts()
        mine = shares(rows, accelerator.process_index, accelerator.num_processes)
        # A rank without rows runs one anyway, for nothing: the others wait for its gradients.
        size = self.config.micro_batch_size or len(rows)
        pieces = [(piece, False) for piece in mine.split(size) if len(piece)]
        # In shards, forwards are collectives: all ranks make as many as the one with most rows, the first.
        least = -(-len(shares(rows, 0, accelerator.num_processes)) // size) if self.sharded else 1
        pieces += [(rows[:1], True)] * (least - len(pieces))
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for i, (piece, idle) in enumerate(pieces, 1):
            last = i == len(pieces)
            with contextlib.nullcontext() if last else unsynced(accelerator, self.model):
                loss = self._forward(rollout, exp.rows(piece), piece, counts, sums, update, idle)
                # Data parallelism takes the mean over ranks of what is a share of a sum.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        if isinstance(self.model, Sharded):
            self.model.finish_backward()
        value = float(accelerator.reduce(total, "sum"))
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} at step {step + 1}; training stopped. Lower the learning rates, or "
                "look at the rewards"
            )
        if not self.sharded:
            accelerator.unscale_gradients(self.optimizer)
        for part in PARTS:
            trained = [
                p for g in self.optimizer.param_groups if g["part"] == part for p in g["params"]
            ]
            if trained:
                norm = nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)
                sums.add(f"{part}/grad_norm", gathered(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _forward(
        self, rollout: Rollout, exp: Experience, rows: Tensor, counts: dict[str, int], sums: Sums,
        update: int, idle: bool,
    ) -> Tensor:  # fmt: skip
        config = self.config
        at = rows.to(rollout.ids.device)
        with self.accelerator.autocast():
            out = computed(self.model, _read, rollout.ids[at], rollout.mask[at], rollout.prompt)
        loss, found = policy_loss(config, exp, out.logp, **counts)
        terms = {"loss/policy_avg": loss}
        errors: dict[str, Tensor] = {}
        if not config.critic_free:
            value, errors = value_loss(config, exp, out.value, **counts)
            terms["loss/value_avg"] = value
            loss = loss + config.vf_coef * value
        if idle:
            return loss * 0.0
        for name, term in terms.items():
            sums.add(name, term, 1.0)
        self._observe(exp, out, found, errors, sums, update)
        return loss

    def _observe(
        self, exp: Experience, out: Output, found: dict[str, Tensor], errors: dict[str, Tensor],
        sums: Sums, update: int,
    ) -> None:  # fmt: skip
        on = exp.mask
        tokens, terms = on.sum(), found["count"]
        assert out.logp is not None and out.entropy is not None
        d = torch.where(on, out.logp.detach() - exp.logp_old, 0.0)
        sums.add("policy/approxkl_avg", 0.5 * d.square().sum() / tokens.clamp_min(1), tokens)
        entropy = torch.where(on, out.entropy.detach(), 0.0).sum()
        sums.add("policy/entropy_avg", entropy / tokens.clamp_min(1), tokens)
        sums.add("policy/clipfrac_avg", found["clip_high"] + found["clip_low"], terms)
        sums.add(f"ratio {update}", found["ratio_mean"], terms)
        sums.top("policy/ratio_max", found["ratio_max"])
        if "dual_clip" in found:
            sums.add("policy/dual_clipfrac_avg", found["dual_clip"], tokens)
        if errors:
            sums.add("val/clipfrac_avg", errors["clip"], errors["count"])
            sums.add("critic/error", errors["error"], errors["count"])

    def _metrics(self, sums: Sums, updates: int) -> Metrics:
        if not updates:
            return {}
        names, totals, top = sums.reduced(self.accelerator)
        # A rank's losses are shares of a sum over the minibatch; norms are known to every rank.
        summed = {"loss/policy_avg", "loss/value_avg"}
        made: Metrics = {}
        ratios = []
        for name, (total, weight) in zip(names, totals.tolist()):
            mean = total / updates if name in summed else total / weight if weight else 0.0
            if name.startswith("ratio "):
                ratios.append(mean)
            else:
                made[name] = mean
        center = math.fsum(ratios) / len(ratios)
        spread = math.fsum((r - center) ** 2 for r in ratios) / max(1, len(ratios) - 1)
        loss = made["loss/policy_avg"] + self.config.vf_coef * made.get("loss/value_avg", 0.0)
        return made | top | {"val/ratio": center, "val/ratio_var": spread, "loss": loss}
