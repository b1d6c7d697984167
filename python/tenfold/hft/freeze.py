# SPDX-License-Identifier: Apache-2.0
"""Putting a Plan in force on a model, and taking it off again."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.hft.plan import Plan
from tenfold.hft.selection import select
from tenfold.optim.active import active_plan, set_active
from tenfold.optim.masks import Mask, local

# model -> names that its owner had frozen before the first Plan; they stay frozen
_owners: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()

REWRAP = (
    "re-selection changes which parameters have gradients, which {kind} fixed when it wrapped the model. "
    "Apply the Plan to the bare model and wrap it again (tenfold's own loops do)"
)


def wrapper_of(model: nn.Module) -> str | None:
    """Name of the wrapper that has fixed what trains, if the model is in one."""
    for kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"):
        if any(c.__name__ == kind for c in type(model).__mro__):
            return kind
    return None


def apply(model: nn.Module, plan: Plan | None = None, **selection: Any) -> Plan:
    """Freezes what a Plan does not train: no gradient is computed for it, and it has none left.

    Tensors that train in part keep ``requires_grad``; their masks work in ``MaskedAdamW`` only. Linear
    layers that train in rows compute the gradient of those rows only (``optim.half_linear``).

    Args:
        model: the bare model, or one sharded by FSDP2; not yet wrapped by DDP.
        plan: what to put in force; or ``selection``: the arguments of :func:`select`, to draw it here.

    Returns:
        The Plan.

    Raises:
        KeyError: a Plan of another model. RuntimeError: a wrapped model.
    """
    if plan is None:
        plan = select(model, **selection)
    elif selection:
        raise TypeError("apply takes a Plan or the arguments of a draw, not both")
    kind = wrapper_of(model)
    if kind is not None:
        raise RuntimeError(REWRAP.format(kind=kind))
    plan.check(model)
    owned = _owners.setdefault(
        model, frozenset(n for n, p in model.named_parameters() if not p.requires_grad)
    )
    trainable = set(plan.trainable) - owned
    if not trainable:
        raise ValueError("nothing is left to train: the model's owner froze what the Plan trains")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
        if name not in trainable:
            # Left over, it would still move the weight, and momentum with it.
            parameter.grad = None
    _restore_forwards(model)
    _row_forwards(model, plan)
    set_active(model, plan)
    return plan


def _restore_forwards(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _RowForward):
            del module.forward


class _RowForward:
    """Forward of a linear layer whose weight trains in some rows: only their gradient is computed."""

    def __init__(self, module: nn.Linear, rows: Tensor) -> None:
        self.module, self.rows = weakref.ref(module), rows

    def __call__(self, input: Tensor) -> Tensor:
        from tenfold.optim.half_linear import half_linear

        module: Any = self.module()
        if self.rows.device != module.weight.device:
            self.rows = self.rows.to(module.weight.device)
        return half_linear(input, module.weight, module.bias, self.rows)

    # A copy of the layer has its own; a pickled one the ordinary forward.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _RowForward(memo.get(id(self.module()), self.module()), self.rows.clone())

    def __reduce__(self) -> Any:
        return functools.partial, (nn.Linear.forward, self.module())


def _row_forwards(model: nn.Module, plan: Plan) -> None:
    """Linear layers that train in rows compute the gradient of those rows alone."""
    for name, module in model.named_modules():
        part = plan.partial.get(f"{name}.weight")
        if type(module) is nn.Linear and part is not None and part.kind == "row" and part.ranges:
            rows = torch.cat([torch.arange(*r, dtype=torch.int32) for r in part.ranges])
            module.forward = _RowForward(module, rows.to(module.weight.device))  # type: ignore[assignment]


def current_plan(model: nn.Module) -> Plan | None:
    """The Plan in force."""
    found = active_plan(p for _, p in model.named_parameters())
    return found.plan if found else None


def release(model: nn.Module) -> None:
    """Takes the Plan off: everything trains again but what the owner had frozen."""
    owned = _owners.pop(model, frozenset())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in owned)
    _restore_forwards(model)
    set_active(model, None)


class SoftFreeze:
    """The penalty ``weight * ||(I - M)(theta - theta0)||^2`` instead of a freeze.

    What the Plan does not train stays trainable and is drawn back to where it was. Half fine-tuning
    minimises an upper bound of the loss with this penalty.
    """

    def __init__(self, model: nn.Module, plan: Plan, weight: float) -> None:
        if not weight >= 0:
            raise ValueError(f"soft_freeze must be a number >= 0, got {weight}")
        plan.check(model)
        _restore_forwards(model)
        self.weight = weight
        self._held: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        parameters = dict(model.named_parameters())
        for name in (*plan.frozen, *plan.partial):
            p = parameters[name].requires_grad_(True)
            part = plan.partial.get(name)
            free = None
            if part is not None:
                here = local(p)  # of FSDP2's shards this rank's
                bits = Mask(part.mask(p), part.kind).shard(p).elements(here)
                free = ~bits.view(here.shape)
            self._held.append((p, p.detach().clone(), free))

    def penalty(self) -> Tensor:
        """The penalty as a loss (0-d), differentiable. ValueError for a model in shards."""
        total = torch.zeros(())
        for p, start, free in self._held:
            if hasattr(p, "to_local"):
                raise ValueError("penalty() needs whole weights, got shards: use add_gradients()")
            square = (p.float() - start.float()).square()
            total = total.to(square.device) + (square if free is None else square * free).sum()
        return self.weight * total

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Adds the penalty's gradient to what a backward has left; call it once before each step."""
        for p, start, free in self._held:
            pull = 2 * self.weight * (p - start)
            if free is not None:
                local(pull).mul_(free)
            p.grad = pull if p.grad is None else p.grad.add_(pull)
