# SPDX-License-Identifier: Apache-2.0
"""Half fine-tuning in transformers' Trainer (and TRL's): one callback."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tenfold.hft.config import parse_reselect
from tenfold.hft.freeze import REWRAP, apply, current_plan
from tenfold.hft.plan import Plan
from tenfold.hft.selection import BALANCES, STRATEGIES, check_ratio, select
from tenfold.optim import MaskedAdamW
from tenfold.optim.active import (
    MISMATCH,
    check_optimizer,
    check_states,
    switch_optimizer,
    unwrapped,
)
from tenfold.training.checks import one_of

PLAN_FILE = "hft_plan.json"
# Names for configuration files -> MaskedAdamW's settings.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "masked_adamw": {},
    "masked_adamw_fp32": {"state_dtype": "fp32"},
    "masked_adamw_bf16": {"state_dtype": "bf16", "stochastic_rounding": True},
    "masked_adamw_8bit": {"state_dtype": "int8"},
}


def optimizer_cls_and_kwargs(
    args: Any, name: str = "masked_adamw", **changes: Any
) -> tuple[type, dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes, with the rates of its arguments.

    ``name``: one of ``OPTIMIZERS``. ``Trainer`` clips by itself (``max_grad_norm``), so it is not set here.
    """
    one_of("name", name, tuple(OPTIMIZERS))
    common = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return MaskedAdamW, common | OPTIMIZERS[name] | changes


class HalfFineTuneCallback(TrainerCallback, ExportableState):
    """Draws which half trains, freezes the rest, and lets the optimiser follow a new draw.

    The first draw is in force when the Trainer exists, so an optimiser that it makes holds the trained half
    (``reselect="epoch"`` and ``"steps:N"``: all parameters, with states for the trained ones). Plans are
    saved with checkpoints as ``hft_plan.json``, and a resumed run goes on with its own.

    Args:
        strategy, ratio, balance, seed, freeze_embeddings: of the draw, see ``select``.
        reselect: ``"round"``: a draw per ``Trainer``, see ``round``; ``"epoch"``, ``"steps:N"``: on the way,
            on one process or with FSDP2 only; ``"never"``.
        states: what happens to optimiser states at a draw on the way: ``drop``, ``keep``, ``hand_over``.
        round: number of this stage (SFT 0, DPO 1, ...; task t in continual learning).
        plan: a Plan (or its JSON) instead of a draw.
    """

    def __init__(
        self,
        strategy: str = "category",
        ratio: float = 0.5,
        reselect: str = "round",
        *,
        balance: str = "matrices",
        seed: int = 0,
        freeze_embeddings: bool = False,
        states: str = "drop",
        round: int = 0,
        plan: Any = None,
    ) -> None:
        one_of("strategy", strategy, STRATEGIES)
        one_of("balance", balance, BALANCES)
        check_ratio(ratio)
        check_states(states)
        self.rule, self.every = parse_reselect(reselect)
        self.reselect, self.states, self.round = reselect, states, round
        self.selection: dict[str, Any] = {"strategy": strategy, "ratio": ratio, "balance": balance, "seed": seed,
                          "freeze_embeddings": freeze_embeddings}  # fmt: skip
        self.given = Plan.from_json(plan) if isinstance(plan, dict) else plan
        self.drawn = round if self.rule == "round" else 0

    @property
    def moving(self) -> bool:
        """Are there new draws on the way?"""
        return self.rule in ("epoch", "steps")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        given = None if self.given is None else self.given.to_json()
        args = self.selection | {"reselect": self.reselect, "states": self.states, "round": self.round,
                                 "plan": given}  # fmt: skip
        return {"args": args, "attributes": {"drawn": self.drawn}}

    def _plan(self, model: Any) -> Plan:
        if self.given is not None:
            return self.given
        return select(model, self.drawn, **self.selection)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freezes before an optimiser is made; draws on the way wait for one over all parameters."""
        model = kwargs["model"]
        if self.moving:
            if args.world_size > 1 and not args.fsdp:
                raise RuntimeError(REWRAP.format(kind="DistributedDataParallel or DeepSpeed"))
            return
        apply(model, self._plan(model))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sees that optimiser and Plan belong together."""
        model, optimizer = kwargs["model"], unwrapped(kwargs["optimizer"])
        self._resume(state)
        plan = self._plan(model)
        held = current_plan(model)
        if held is None or held.digest() != plan.digest():
            apply(model, plan)
        self._follow(model, optimizer, plan, "keep")
        if plan.partial and not isinstance(optimizer, MaskedAdamW):
            raise RuntimeError(
                f"{MISMATCH}: the Plan trains parts of {len(plan.partial)} tensors, which needs "
                "tenfold.optim.MaskedAdamW (optimizer_cls_and_kwargs=hft.optimizer_cls_and_kwargs(args))"
            )
        check_optimizer(optimizer, model)

    def _resume(self, state: Any) -> None:
        """Takes the number of the draw from a checkpoint, whether or not Trainer restores callbacks."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        if saved is None:
            return
        mine = self.state()["args"]
        wrong = [k for k, v in saved["args"].items() if mine.get(k) != v]
        if wrong:
            raise ValueError(
                f"the checkpoint was drawn with {wrong[0]} {saved['args'][wrong[0]]!r}, this callback has "
                f"{mine.get(wrong[0])!r}; resume with the same settings"
            )
        self.drawn = saved["attributes"]["drawn"]

    def _follow(self, model: Any, optimizer: Any, plan: Plan, states: str) -> None:
        if isinstance(optimizer, MaskedAdamW):
            optimizer.switch(plan, states)
        else:
            switch_optimizer(optimizer, states)

    def _redraw(self, number: int, model: Any, optimizer: Any) -> None:
        if number == self.drawn or self.given is not None:
            return
        self.drawn = number
        plan = apply(model, self._plan(model))
        self._follow(model, unwrapped(optimizer), plan, self.states)
        check_optimizer(unwrapped(optimizer), model)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new draw per epoch."""
        if self.rule == "epoch":
            self._redraw(int((state.epoch or 0) + 1e-6), kwargs["model"], kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new draw every N steps."""
        if self.rule == "steps":
            self._redraw(state.global_step // self.every, kwargs["model"], kwargs["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the Plan beside the checkpoint."""
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        plan = current_plan(kwargs["model"])
        if state.is_world_process_zero and os.path.isdir(folder) and plan is not None:
            plan.write(os.path.join(folder, PLAN_FILE))
