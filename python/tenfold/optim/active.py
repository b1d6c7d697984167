# SPDX-License-Identifier: Apache-2.0
"""Which Plan is in force for which parameter, so that an optimiser can see that it is not its own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

STATES = ("drop", "keep", "hand_over")
MISMATCH = "optimizer does not match the active Plan"
# Not an attribute of the parameters: that would be saved with them.
_active: Any = WeakTensorKeyDictionary()


class ActivePlan:
    """A Plan in force on a model's parameters, which are held weakly."""

    def __init__(self, plan: Any, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.plan, self.digest = plan, plan.digest()
        self._refs = {name: weakref.ref(p) for name, p in parameters}

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, those that still exist."""
        found = {name: ref() for name, ref in self._refs.items()}
        return {name: p for name, p in found.items() if p is not None}


def set_active(model: nn.Module, plan: Any) -> None:
    """Records ``plan`` for all parameters of a model; None: no Plan is in force any more."""
    named = list(model.named_parameters())
    made = None if plan is None else ActivePlan(plan, named)
    for _, parameter in named:
        if made is None:
            _active.pop(parameter, None)
        else:
            _active[parameter] = made


def active_plan(parameters: Iterable[torch.Tensor]) -> ActivePlan | None:
    """The Plan in force for the first of these parameters that has one."""
    if not len(_active):
        return None
    for parameter in parameters:
        found = _active.get(parameter)
        if found is not None:
            return found
    return None


def check_states(states: str) -> None:
    """ValueError unless ``states`` says what happens to optimiser states at a switch."""
    if states not in STATES:
        raise ValueError(f"states must be one of {', '.join(STATES)}, got {states!r}")


def unwrapped(optimizer: Any) -> Any:
    """The optimiser inside accelerate's wrappers."""
    while not hasattr(optimizer, "defaults") or type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """RuntimeError unless an optimiser (of any class) holds all that trains, and moves nothing else."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise RuntimeError(
            f"{MISMATCH}: {len(missing)} tensors train and are in no parameter group "
            f"({', '.join(missing[:3])}). Build the optimizer after the Plan was applied, or over all "
            "parameters"
        )
    stale = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    if stale:
        raise RuntimeError(
            f"{MISMATCH}: {len(stale)} frozen tensors have gradients ({', '.join(stale[:3])}); an "
            "optimizer would move them. Set p.grad = None for them"
        )


def switch_optimizer(optimizer: Any, states: str = "drop") -> int:
    """Adapts an optimiser to what trains now (``requires_grad``); returns the bytes of state freed.

    Parameter groups stay as they are, so schedulers go on; frozen parameters have no gradient and are
    skipped. ``states``: ``"drop"`` forgets all of them, ``"hand_over"`` those of frozen parameters,
    ``"keep"`` none.
    """
    check_states(states)
    freed = 0
    optimizer = unwrapped(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                parameter.grad = None
            if states == "drop" or (states == "hand_over" and not parameter.requires_grad):
                gone = optimizer.state.pop(parameter, {})
                freed += sum(t.nbytes for t in gone.values() if isinstance(t, torch.Tensor))
    return freed
