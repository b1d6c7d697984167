"""One kernel call of a step: what belongs together, brought into the form that the kernels take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.optim.masks import Mask, is_dense, local
from tenfold.optim.states import MOMENTS, code_books


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

    def add(
        self,
        p: Tensor,
        state: dict[str, Any],
        mask: Mask | None,
        prefix: Tensor | None,
        number: int,
    ) -> None:
        """Takes in a parameter with a gradient; ``number`` is its place in the optimiser."""
        here, grad = local(p.detach()), local(p.grad)  # type: ignore[arg-type]
        device = state["step"].device
        if device != here.device:
            copy = here.to(device, copy=True)
            self.copies.append((here, copy))
            here, grad = copy, grad.to(device)
        if grad.stride() != here.stride() and is_dense(here):
            grad = torch.empty_like(here, dtype=grad.dtype).copy_(grad)
        if mask is not None:
            here, grad = mask.view(here), mask.view(grad)
        self.params.append(here)
        self.grads.append(grad)
        self.states.append(state)
        self.views.append(mask)
        self.masks.append(None if mask is None else mask.packed.to(device))
        self.prefixes.append(None if prefix is None or self.coded else prefix.to(device))
        self.ids.append(number)

    def state(self, name: str) -> list[Tensor]:
        """One state of all parameters."""
        found = [local(s[name]) for s in self.states]
        if name not in MOMENTS:
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
