# SPDX-License-Identifier: Apache-2.0
"""The mixture layers of a model, what their routers said in a forward, and routers that run through our gate."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold import ops

# Routers that are a softmax, the k largest, and weights that are divided by their sum or not.
_SOFTMAX_ROUTERS = ("MixtralTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter",
                    "OlmoeTopKRouter", "ExpertRouter")  # fmt: skip


@dataclass(frozen=True)
class MixtureLayer:
    """Where a layer's experts are chosen, and what they are.

    Attributes:
        name: of the block. router: its forward gives logits [T, n], weights and index [T, k].
        experts: the module with the experts' parameters.
    """

    name: str
    router: nn.Module
    experts: nn.Module

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.router.weight.shape[0]  # type: ignore[union-attr, return-value]

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self.router.top_k)  # type: ignore[arg-type]


def mixture_layers(model: nn.Module) -> list[MixtureLayer]:
    """The mixture layers of a model in their order: blocks with a router (``gate``) and ``experts``."""
    found = []
    for name, block in model.named_modules():
        router, experts = getattr(block, "gate", None), getattr(block, "experts", None)
        if not isinstance(router, nn.Module) or not isinstance(experts, nn.Module):
            continue
        weight = getattr(router, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(router, "top_k"):
            found.append(MixtureLayer(name, router, experts))
    return found


@dataclass(frozen=True)
class Routing:
    """What a router said of T tokens.

    Attributes:
        logits: [T, n]. weights, index: [T, k].
    """

    logits: Tensor
    weights: Tensor
    index: Tensor

    def counts(self, mask: Tensor | None) -> Tensor:
        """Slots of each expert, int32 [n], of the tokens where ``mask`` [T] is not 0."""
        n, index = self.logits.shape[-1], self.index
        if mask is not None:
            index = index.masked_fill(mask.reshape(-1, 1) == 0, n)
        return ops.moe_sort(index, n, allow_sentinel=True)[2]


@contextlib.contextmanager
def routings(layers: Sequence[MixtureLayer]) -> Iterator[list[Routing]]:
    """A list that holds, after a forward inside the context, the routing of every layer in turn."""
    said: list[Routing] = []

    def listen(module: nn.Module, args: Any, out: Any) -> None:
        said.append(Routing(*out))

    hooks = [layer.router.register_forward_hook(listen) for layer in layers]
    try:
        yield said
    finally:
        for hook in hooks:
            hook.remove()


def renormalizes(router: nn.Module) -> bool:
    """Are the weights of a router divided by their sum? A Mixtral's always are."""
    return bool(getattr(router, "norm_topk_prob", True))


def _gate(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight: Any = self.weight
    rows = hidden_states.reshape(-1, weight.shape[1])
    if rows.dtype != weight.dtype and weight.dtype != torch.float32:
        rows = rows.to(weight.dtype)
    logits, weights, index = ops.moe_gate_linear(rows, weight, self.top_k, renormalizes(self))  # type: ignore[arg-type]
    return logits, weights, index.long()


def fuse_routers(
    layers: Sequence[MixtureLayer], renormalize: bool | None = None
) -> list[nn.Module]:
    """Lets routers run through ``moe_gate_linear``: logits and weights in float32, in one pass over the tokens.

    Args:
        renormalize: whether weights are divided by their sum from now on; None: as before.

    Returns:
        The routers that do; others (of models with other rules) are left as they are.

    Raises:
        TypeError: ``renormalize`` is given and a router follows other rules.
    """
    fused = []
    for layer in layers:
        router = layer.router
        if type(router).__name__ not in _SOFTMAX_ROUTERS:
            if renormalize is not None:
                raise TypeError(
                    f"{layer.name}: renormalize cannot be set for {type(router).__name__}; it can for "
                    f"{', '.join(_SOFTMAX_ROUTERS)}"
                )
            continue
        if renormalize is not None:
            router.norm_topk_prob = renormalize  # type: ignore[assignment]
        router.forward = types.MethodType(_gate, router)  # type: ignore[method-assign]
        fused.append(router)
    return fused


def restore_routers(routers: Sequence[nn.Module]) -> None:
    """Undoes :func:`fuse_routers`."""
    for router in routers:
        router.__dict__.pop("forward", None)
