# SPDX-License-Identifier: Apache-2.0
"""Half fine-tuning's part of the training loop: what trains when, the optimiser, the penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenfold.hft.architecture import describe
from tenfold.hft.config import HFTConfig
from tenfold.hft.freeze import SoftFreeze, apply, current_plan, release
from tenfold.hft.plan import Plan
from tenfold.hft.selection import select
from tenfold.optim import MaskedAdamW
from tenfold.optim.active import switch_optimizer
from tenfold.training.loop import Trainer
from tenfold.training.recipe import decay_groups, scheduled


def rate_factor(step: int, steps: int, config: HFTConfig) -> float:
    """Learning rate of a step as a share of its peak."""
    return scheduled(step, steps, config.schedule, config.warmup)


def parameter_groups(
    module: nn.Module, config: HFTConfig, lora: bool = False
) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors do not.

    All parameters are in them, frozen ones without state and gradient, so that a later draw finds its
    tensors; with LoRA only the adapters.
    """
    named = [p for _, p in module.named_parameters() if p.requires_grad or not lora]
    rate = config.lora_lr if lora else config.learning_rate
    return decay_groups(named, rate, config.weight_decay)


class Draws:
    """Which draw is in force at a step of a round: a function of the position alone.

    Args:
        round: number of the round. before: steps in earlier rounds; epoch: steps per epoch of this one;
        epochs_before: epochs in earlier rounds.
    """

    def __init__(
        self,
        config: HFTConfig,
        round: int = 0,
        before: int = 0,
        epoch: int = 1,
        epochs_before: int = 0,
    ) -> None:
        self.rule, self.every = config.draws()
        self.round, self.before, self.epoch, self.epochs_before = (
            round,
            before,
            epoch,
            epochs_before,
        )

    def at(self, step: int) -> int:
        """Number of the draw at a step of this round."""
        if self.rule == "never":
            return 0
        if self.rule == "round":
            return self.round
        if self.rule == "epoch":
            return self.epochs_before + step // self.epoch
        return (self.before + step) // self.every


class HalfTrainer(Trainer):
    """Runs rounds of half fine-tuning, or of a baseline."""

    config: HFTConfig
    draws: Draws
    plans: dict[int, Plan]
    soft: SoftFreeze | None

    def begin(self, draws: Draws) -> None:
        """Starts a round."""
        self.draws, self.plans, self.soft = draws, {}, None

    def plan(self, number: int, module: nn.Module) -> Plan:
        """The Plan of a draw."""
        if number not in self.plans:
            layers = len(describe(module).layers)
            self.plans[number] = select(module, number, **self.config.selection(layers))
        return self.plans[number]

    def enter(self, stage: str, step: int, module: nn.Module) -> None:
        """Puts the Plan of the first step in force."""
        self.soft = None
        if self.config.method == "lora":
            return
        plan = apply(module, self.plan(self.draws.at(step), module))
        if self.config.soft_freeze is not None:
            self.soft = SoftFreeze(module, plan, self.config.soft_freeze)

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW over all parameters, with the masks of the Plan in force."""
        config, lora = self.config, self.config.method == "lora"
        groups = parameter_groups(module, config, lora)
        common: dict[str, Any] = {"betas": config.betas, "eps": config.eps}
        if config.optimizer == "adamw":
            plan = current_plan(module)
            if plan is not None and plan.partial:
                raise ValueError(
                    f"the Plan trains parts of {len(plan.partial)} tensors, which optimizer='adamw' cannot; "
                    "use 'masked_adamw'"
                )
            return torch.optim.AdamW(groups, fused=True, **common)
        # None: the masks of the Plan in force. A penalty needs the gradients of everything.
        masks: Any = None if self.soft is None else {}
        return MaskedAdamW(
            groups, masks=masks, state_dtype=config.state_dtype, seed=config.seed,
            stochastic_rounding=config.stochastic_rounding, max_grad_norm=config.max_grad_norm, **common,
        )  # fmt: skip

    def rate(self, step: int, steps: int) -> float:
        """The schedule."""
        return rate_factor(step, steps, self.config)

    def after_backward(self, module: nn.Module) -> None:
        """Adds the gradient of the penalty."""
        if self.soft is not None:
            self.soft.add_gradients()

    def clip(self, optimizer: Any) -> None:
        """Nothing for ``MaskedAdamW``, which clips in its step."""
        if self.config.optimizer == "adamw":
            trained = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm)

    def changes(self, stage: str, step: int) -> bool:
        """Is there a new draw?"""
        return self.config.method != "lora" and self.draws.at(step) != self.draws.at(step - 1)

    def change(self, stage: str, step: int, module: nn.Module, optimizer: Any) -> None:
        """Applies the new Plan and lets the optimiser follow."""
        if self.soft is not None:
            release(module)
        plan = apply(module, self.plan(self.draws.at(step), module))
        if self.config.soft_freeze is not None:
            self.soft = SoftFreeze(module, plan, self.config.soft_freeze)
        if isinstance(optimizer, MaskedAdamW):
            optimizer.switch(plan, self.config.states)
        else:
            switch_optimizer(optimizer, self.config.states)


def lm_step(model: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The ordinary loss of a causal LM on the labels."""
    return model(**batch, use_cache=False).loss, {}
