# SPDX-License-Identifier: Apache-2.0
"""One kernel call of a step: what belongs together, brought into the form that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.optim.masks import Mask, is_dense, local
from tenfold.optim.states import MOMENTS, code_books


@dataclass(slots=True)
class Slot:
    """What does not change about a parameter from step to step.

    ``simple``: no shard and no view, so the kernels take it and its gradient as they are, where its
    states are (``device``). ``number``: its place in the optimiser. ``packed``, ``prefix``: of its mask, on
    that device.
    """

    param: Tensor
    state: dict[str, Any]
    mask: Mask | None
    packed: Tensor | None
    prefix: Tensor | None
    number: int
    device: torch.device
    simple: bool
    call: Call

    @classmethod
    def make(
        cls, p: Tensor, state: dict[str, Any], mask: Mask | None, prefix: Tensor | None,
        number: int, call: Call,
    ) -> Slot:  # fmt: skip
        """``prefix``: where on any device the mask's compact states are, if it has them."""
        device = state["step"].device
        return cls(
            p, state, mask, None if mask is None else mask.packed.to(device),
            None if prefix is None or call.coded else prefix.to(device), number, device,
            mask is None and not hasattr(p, "to_local"), call,
        )  # fmt: skip


@dataclass
class Call:
    """The lists of one kernel call: one group, device, kind of mask and of sharding.

    ``coded``: the states are 8-bit codes. ``sharded``: one of the parameters, where they are DTensors.
    ``copies``: (where it lives, its copy here) of offloaded parameters.
    """

    group: dict[str, Any]
    kind: str
    coded: bool
    sharded: Any = None
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    views: list[Mask | None] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    prefixes: list[Tensor | None] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def clear(self) -> None:
        """Empties the lists."""
        for entries in (self.params, self.grads, self.states, self.views, self.masks, self.prefixes,
                        self.ids, self.copies):  # fmt: skip
            entries.clear()

    def add(self, slot: Slot, grad: Tensor) -> None:
        """Takes in a parameter with its gradient."""
        here = slot.param
        if not slot.simple or here.device != slot.device:
            here, grad = local(here.detach()), local(grad)
            if here.device != slot.device:
                copy = here.to(slot.device, copy=True)
                self.copies.append((here, copy))
                here, grad = copy, grad.to(slot.device)
        if grad.stride() != here.stride() and is_dense(here):
            grad = torch.empty_like(here, dtype=grad.dtype).copy_(grad)
        if slot.mask is not None:
            here, grad = slot.mask.view(here), slot.mask.view(grad)
        self.params.append(here)
        self.grads.append(grad)
        self.states.append(slot.state)
        self.views.append(slot.mask)
        self.masks.append(slot.packed)
        self.prefixes.append(slot.prefix)
        self.ids.append(slot.number)

    def state(self, name: str) -> list[Tensor]:
        """One state of all parameters."""
        found = [s[name] for s in self.states]
        if self.sharded is not None:
            found = [local(t) for t in found]
        if name not in MOMENTS or self.kind != "row":
            return found
        return [t if m is None else m.view(t) for t, m in zip(found, self.views)]

    def run(self, scale: Any, found: Any, clip: Any, seed: int, scope: str, block: int) -> None:
        """Does the step. ``scale``, ``found``: GradScaler's; ``clip``: the factor of clipping."""
        group, device = self.group, self.states[0]["step"].device

        def here(x: Any) -> Any:
            return None if x is None else x.to(device=device, dtype=torch.float32).reshape(())

        lr = group["lr"]
        shared: dict[str, Any] = {
            "mask_kind": self.kind, "beta1": group["betas"][0], "beta2": group["betas"][1],
            "lr": lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64),
            "weight_decay": group["weight_decay"], "eps": group["eps"], "maximize": group["maximize"],
            "grad_scale": here(scale), "found_inf": here(found), "clip_coef": here(clip),
            "stochastic_round": group["stochastic_rounding"], "seed": seed, "block_size": block,
            "tensor_ids": self.ids,
        }  # fmt: skip
        masks: list[Tensor | None] = self.masks if self.kind != "none" else []
        m, v, steps = self.state("exp_avg"), self.state("exp_avg_sq"), self.state("step")
        if self.coded:
            ops.masked_adamw_8bit_(self.params, self.grads, m, v, steps, masks, self.state("absmax1"),
                                   self.state("absmax2"), *code_books(device), **shared)  # fmt: skip
        else:
            largest = self.state("max_exp_avg_sq") if group["amsgrad"] else []
            compact = any(p is not None for p in self.prefixes)
            ops.masked_adamw_(
                self.params, self.grads, m, v, steps, masks, largest, self.prefixes if compact else [],
                amsgrad=group["amsgrad"], mask_scope=scope, **shared,
            )  # fmt: skip
        for there, copy in self.copies:
            there.copy_(copy)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """The same objects in the same order; at the speed of C, as a step asks it of every tensor."""
    return len(a) == len(b) and all(map(is_, a, b))


class Settled:
    """The calls of the last step, for the next one to repeat with its gradients.

    Sorting parameters into calls costs more than a small tensor's update. Nothing is taken on trust: what
    may have been replaced from outside is compared, object by object.
    """

    def __init__(
        self, groups: list[dict[str, Any]], state: dict[Tensor, Any], params: list[Tensor],
        grads: list[Tensor | None], calls: list[Call],
    ) -> None:  # fmt: skip
        self.groups, self.params, self.calls = list(groups), params, calls
        self.keys = list(state)
        self.states, self.steps, self.about = self._look(groups, state, params, grads)
        self.strides = [g.stride() for g in grads if g is not None]

    @staticmethod
    def _look(
        groups: list[dict[str, Any]], state: dict[Tensor, Any], params: list[Tensor],
        grads: list[Tensor | None],
    ) -> tuple[list[Any], list[Any], list[Any]]:  # fmt: skip
        """States and their steps, and what of all else can be compared by value."""
        # torch lets users keep anything in an optimiser's state.
        states = [s for s in state.values() if isinstance(s, dict)]
        steps = [s.get("step") for s in states]
        about = [
            [len(g["params"]) for g in groups], [g is not None for g in grads],
            list(map(len, states)), [t.get_device() for t in steps if isinstance(t, Tensor)],
            list(map(Tensor.get_device, params)), list(map(Tensor.stride, params)),
        ]  # fmt: skip
        return states, steps, about

    @staticmethod
    def can_be(calls: list[Call], slots: dict[int, Slot]) -> bool:
        """Are parameters and gradients taken as they are, without a shard, view, copy or new order?"""
        return not any(c.copies for c in calls) and all(
            slots[n].simple and c.params[i] is slots[n].param and c.grads[i] is c.params[i].grad
            for c in calls
            for i, n in enumerate(c.ids)
        )

    def repeat(
        self, groups: list[dict[str, Any]], state: dict[Tensor, Any], params: list[Tensor],
        grads: list[Tensor | None],
    ) -> bool:  # fmt: skip
        """Puts ``grads`` into the calls, if all else is as it was; False: nothing was changed."""
        if not (
            _same(groups, self.groups) and _same(params, self.params)
            and _same(list(state), self.keys)
        ):  # fmt: skip
            return False
        states, steps, about = self._look(groups, state, params, grads)
        if not (
            _same(states, self.states) and _same(steps, self.steps) and about == self.about
        ):  # fmt: skip
            return False
        given = [g for g in grads if g is not None]
        if any(g.layout is not torch.strided for g in given):
            return False
        if list(map(Tensor.stride, given)) != self.strides:
            return False
        for call in self.calls:
            call.grads[:] = [g for n in call.ids if (g := grads[n]) is not None]
        return True
