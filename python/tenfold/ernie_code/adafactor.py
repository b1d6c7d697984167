# SPDX-License-Identifier: Apache-2.0
"""Adafactor on FSDP2's shards: the same steps as transformers' on whole weights, up to the rounding of sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tenfold.optim.closure import evaluated


class ShardedAdafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern) without momentum and relative steps, for DTensors sharded along dimension 0.

    A rank keeps the means of its own rows, and of all columns; what goes over rows is added up over ranks, by two
    transfers per step and group, whatever the number of tensors.

    Args:
        params: vectors and matrices. lr, clip_threshold, decay_rate, scale_parameter, weight_decay: as transformers'
            ``Adafactor`` has them; eps: of squared gradients, and the least scale of a weight.

    Raises:
        ValueError: a parameter of more than two dimensions, or one that is not sharded, where the step meets it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        scale_parameter: bool = False,
        weight_decay: float = 0.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
    ) -> None:
        defaults = {"lr": lr, "clip_threshold": clip_threshold, "decay_rate": decay_rate,
                    "scale_parameter": scale_parameter, "weight_decay": weight_decay, "eps": eps}  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` evaluates the model again, with gradients."""
        loss = evaluated(closure)
        for group in self.param_groups:
            self._step(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _step(self, group: dict[str, Any], params: list[Any]) -> None:
        if not params:
            return
        ranks = params[0].device_mesh.get_group() if hasattr(params[0], "device_mesh") else None
        grads, parts = [], []
        for p in params:
            if p.ndim > 2 or not hasattr(p, "to_local"):
                raise ValueError(
                    f"Adafactor in shards takes sharded vectors and matrices, got {type(p).__name__} {list(p.shape)}"
                )
            grads.append(p.grad.to_local().float())
            parts.append(self._observe(group, p, grads[-1]))
        found = torch.cat(parts)
        dist.all_reduce(found, group=ranks)
        means = found.split([len(part) for part in parts])
        updates = [self._update(p, g, m) for p, g, m in zip(params, grads, means)]
        squares = torch.stack([u.square().sum() for u in updates])
        dist.all_reduce(squares, group=ranks)
        for p, update, square, mean in zip(params, updates, squares, means):
            clip = ((square / p.numel()).sqrt() / group["clip_threshold"]).clamp(min=1.0)
            rate: Any = group["lr"]
            if group["scale_parameter"]:
                rate = rate * mean[-1].sqrt().clamp(min=group["eps"][1])
            here = p.to_local()
            kept = here.float() * (1 - group["weight_decay"] * rate)
            here.copy_(kept - update / clip * rate)

    def _observe(self, group: dict[str, Any], p: Any, grad: Tensor) -> Tensor:
        """Takes a gradient in; what is to be summed over ranks: means of columns, of the rows' means, of p squared."""
        state = self.state[p]
        square = grad.square() + group["eps"][0]
        if not state:
            state["step"] = 0
            sizes = (
                {"row": len(square), "col": p.shape[-1]} if p.ndim == 2 else {"all": len(square)}
            )
            state.update({name: square.new_zeros(size) for name, size in sizes.items()})
        state["step"] += 1
        state["decay"] = 1 - state["step"] ** group["decay_rate"]
        weights = p.to_local().float().square().sum().reshape(1) / p.numel()
        if p.ndim == 1:
            state["all"].lerp_(square, 1 - state["decay"])
            return weights
        state["row"].lerp_(square.mean(1), 1 - state["decay"])
        rows = p.shape[0]
        return torch.cat([square.sum(0) / rows, state["row"].sum().reshape(1) / rows, weights])

    def _update(self, p: Any, grad: Tensor, mean: Tensor) -> Tensor:
        state = self.state[p]
        if p.ndim == 1:
            return state["all"].rsqrt() * grad
        state["col"].lerp_(mean[:-2], 1 - state["decay"])
        return (state["row"] / mean[-2]).rsqrt()[:, None] * state["col"].rsqrt() * grad
