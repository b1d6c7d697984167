# SPDX-License-Identifier: Apache-2.0
"""The fusion operator in training: projections whose heads are learned mixtures of their group's.

A head's fused weight is ``Wt^h[i, :] = sum_j omega[h, j, i] * W^j[i, :]`` over the heads j of its group,
i the dimension (paper eq. 4, per-dimension form). It acts on weights: W and x are multiplied once, and
``ops.fuse_heads`` reads each group's weights once. Because key and value projections are linear this
equals mixing the states before RoPE; after RoPE only if omega is tied within each rotary pair.
Everything else of the model stays a stock Llama forward with H key and value heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold import ops, reference
from tenfold.dha.config import ConversionError
from tenfold.dha.grouping import maps
from tenfold.training.sharding import gathered


def start_omega(groups: Tensor, source: Tensor) -> Tensor:
    """Operators [N, g, g] with which nothing changes: identity, or the mean of a head's copies.

    ``source`` [Hb] names the head that each base head is a copy of (a GQA checkpoint expanded to H
    heads has copies). Copies start with the same row, so their distance is 0 from the start.
    """
    of = source[groups]
    same = (of[:, :, None] == of[:, None, :]).float()
    return same / same.sum(-1, keepdim=True)


def operator_distances(omega: Tensor) -> Tensor:
    """M [g, g]: mean over j and d of (omega[h, j] - omega[h', j])^2, of one group [1, g, g, d] (eq. 6)."""
    rows = omega.detach()[0].flatten(1).double()
    squares = (rows[:, None] - rows[None]).square().sum(-1)
    return (squares / rows.shape[1]).float()


def margin(step: int, steps: int, base: float = 0.995, end: float = 0.8) -> float:
    """t(step) = max(0, b^step * (1 - step / k)) with k = end * steps (paper section 3.3)."""
    k = end * steps
    return max(0.0, base**step * (1 - step / k)) if k > 0 else 0.0


def fuse_states(states: Tensor, omega: Tensor, groups: Tensor, after_rope: bool = False) -> Tensor:
    """The operator on states [B, H, S, d] instead of weights: what the paper's appendix writes.

    Args:
        states: keys or values of all base heads. omega: [N, g, g, d]. groups: [N, g].
        after_rope: the states are rotated already.

    Raises:
        ValueError: ``after_rope`` with an omega that is not the same for dimensions i and i + d/2.
    """
    half = omega.shape[-1] // 2
    if after_rope and not torch.equal(omega[..., :half], omega[..., half:]):
        raise ValueError(
            "fuse_states: omega must be equal for the dimensions i and i + d/2 that RoPE rotates "
            "together to act after RoPE; use coefficients='tied', or fuse before RoPE"
        )
    groups = groups.long()
    grouped = states[:, groups.flatten()].unflatten(1, groups.shape)
    fused = reference.fuse_states(grouped, omega).flatten(1, 2)
    return torch.empty_like(fused).index_copy(1, groups.flatten(), fused)


class HeadProjection(nn.Module):
    """A key or value projection with its own number of base heads, optionally under fusion.

    The output has one head per query head, in query order, so that any stock attention can read it.

    Args:
        linear: its weight [Hb * d, m] and bias are taken over (not copied).
        query_map: [H] base head of every query head. source: see :func:`start_omega`.
    """

    query_map: Tensor
    source: Tensor

    def __init__(self, linear: Any, head_dim: int, query_map: Tensor, source: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.head_dim = head_dim
        device = self.weight.device
        self.register_buffer("query_map", query_map.to(device), persistent=False)
        self.register_buffer("source", source.to(device), persistent=False)
        self.register_buffer("groups", None, persistent=False)
        self.register_buffer("order", None, persistent=False)
        self.omega: nn.Parameter | None = None
        self.coefficients = "full"
        self.mse: Tensor | None = None
        self._locate(query_map.to(device))

    @property
    def base_heads(self) -> int:
        """Heads of the weight."""
        return self.weight.shape[0] // self.head_dim

    def _locate(self, order: Tensor) -> None:
        """``order`` [H]: the row of the projected heads that each query head reads."""
        trivial = torch.equal(order, torch.arange(self.base_heads, device=order.device))
        self.order = None if trivial else order

    def set_groups(self, groups: Tensor, coefficients: str = "full") -> None:
        """Starts fusion inside ``groups`` [N, g] of base heads; the function does not change."""
        device = self.weight.device
        groups = groups.long().to(device)
        place = torch.empty(self.base_heads, dtype=torch.int64, device=device)
        place[groups.flatten()] = torch.arange(self.base_heads, device=device)
        self._locate(place[self.query_map])
        self.groups = groups.int()
        self.coefficients = coefficients
        width = {"full": self.head_dim, "scalar": 1, "tied": self.head_dim // 2}[coefficients]
        start = start_omega(groups, self.source)[..., None].repeat(1, 1, 1, width)
        self.omega = nn.Parameter(start.contiguous())

    def full_omega(self) -> Tensor:
        """omega [N, g, g, d] float32, whatever the coefficients' form; of FSDP2's shards the whole."""
        assert self.omega is not None
        omega = gathered(self.omega)
        if self.coefficients == "tied":
            return torch.cat([omega, omega], -1)
        return omega.expand(*omega.shape[:3], self.head_dim).contiguous()

    def _blocks(self, tensor: Tensor) -> Tensor:
        """A weight or bias as [Hb, d, m] (m = 1 for a bias)."""
        return tensor.view(self.base_heads, self.head_dim, -1)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., m] -> [..., H * d]."""
        weight, bias = self.weight, self.bias
        if self.omega is not None:
            omega = self.full_omega()
            self.mse = ops.fusion_mse(omega)
            fused = ops.fuse_heads(self._blocks(weight), omega, self.groups)
            weight = fused.reshape(weight.shape)
            if bias is not None:
                fused = ops.fuse_heads(self._blocks(bias), omega, self.groups)
                bias = fused.reshape(bias.shape)
        out = F.linear(x, weight, bias)
        if self.order is None:
            return out
        heads = out.unflatten(-1, (-1, self.head_dim))
        return heads.index_select(-2, self.order).flatten(-2)

    @torch.no_grad()
    def mean_mse(self) -> float:
        """Mean over the groups of the fusion mse; 0 without groups of two or more."""
        if self.omega is None or self.omega.shape[1] < 2:
            return 0.0
        return float(ops.fusion_mse(self.full_omega()).mean())

    def drop_groups(self) -> None:
        """Ends fusion without collapsing: the weights are what they were trained to, omega is gone."""
        self.groups, self.omega, self.mse = None, None, None
        self._locate(self.query_map)

    @torch.no_grad()
    def collapse(self) -> None:
        """One head per group, by the mean of the group's operators; ends fusion (paper eq. 8)."""
        if self.omega is None:
            return
        omega, groups = self.full_omega().detach(), self.groups
        whole = {n: t for n in ("weight", "bias") if (t := getattr(self, n)) is not None}
        blocks = {n: self._blocks(t.data) for n, t in whole.items()}
        for name, block in blocks.items():
            made = ops.collapse_heads(block, omega, groups)
            shape = (-1, *whole[name].shape[1:])
            setattr(self, name, nn.Parameter(made.reshape(shape).contiguous()))
        query_map = maps(groups.long().cpu(), self.query_map.cpu()).to(self.query_map.device)
        self.query_map = query_map
        self.source = torch.arange(len(groups), device=query_map.device)
        self.drop_groups()


def attention_layers(model: Any) -> list[Any]:
    """The self-attention modules of a Llama model, in order."""
    return [layer.self_attn for layer in model.model.layers]


def projections(model: Any) -> Iterator[HeadProjection]:
    """All components' projections: keys and values of layer 0, of layer 1, ..."""
    for attention in attention_layers(model):
        yield attention.k_proj
        yield attention.v_proj


def check_source(model: Any) -> None:
    """Raises TypeError for a model that cannot be converted, naming what can."""
    from tenfold.dha.export import _source_config

    _source_config(model)  # raises TypeError
    if not all(type(m) is nn.Linear for a in attention_layers(model) for m in (a.k_proj, a.v_proj)):
        raise TypeError(
            "convert needs k_proj and v_proj to be plain torch.nn.Linear layers; merge adapters and "
            "dequantise first"
        )


def working_copy(parent: Any, gqa: str = "expand", dtype: torch.dtype = torch.float32) -> Any:
    """A trainable copy of the parent whose key and value projections are :class:`HeadProjection`.

    gqa ``"expand"``: every query head gets a base head of its own (copies, for a GQA checkpoint);
    ``"group"``: the base heads are the checkpoint's KV heads.
    """
    check_source(parent)
    heads, had = parent.config.num_attention_heads, parent.config.num_key_value_heads
    model = copy.deepcopy(parent).to(dtype)
    model.config.num_key_value_heads = heads
    if model.config._attn_implementation not in ("sdpa", "eager"):
        model.set_attn_implementation("sdpa")
    of_query = torch.arange(heads) // (heads // had)
    for attention in attention_layers(model):
        d = attention.head_dim
        attention.num_key_value_groups = 1
        for name in ("k_proj", "v_proj"):
            linear = getattr(attention, name)
            if gqa == "expand":
                for part in ("weight", "bias"):
                    tensor = getattr(linear, part, None)
                    if tensor is not None:
                        rows = tensor.data.view(had, d, *tensor.shape[1:])[of_query]
                        setattr(linear, part, nn.Parameter(rows.flatten(0, 1).contiguous()))
                made = HeadProjection(linear, d, torch.arange(heads), of_query)
            else:
                made = HeadProjection(linear, d, of_query, torch.arange(had))
            setattr(attention, name, made)
    return model.requires_grad_(True)


class FusionModel(nn.Module):
    """LM loss plus, in the fusion stage, the Lagrangian's penalty; one module, so that DDP sees all.

    forward(batch, t) -> (loss, lm loss, penalty without its multiplier, mean mse).
    """

    def __init__(self, model: Any, lambda_init: float, kind: str, penalised: bool) -> None:
        super().__init__()
        self.model = model
        self.kind, self.penalised = kind, penalised
        start = torch.tensor(float(lambda_init), device=next(model.parameters()).device)
        self.multiplier = nn.Parameter(start, requires_grad=penalised)

    def forward(self, batch: dict[str, Tensor], t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """LM loss + lambda * penalty; the penalty's gradient ascends lambda."""
        lm = self.model(**batch, use_cache=False).loss
        mses = [
            p.mse for p in projections(self.model) if p.mse is not None and p.groups.shape[1] > 1
        ]
        if not mses:
            zero = lm.new_zeros(())
            return lm + zero * self.multiplier, lm, zero, zero
        mse = torch.cat(mses)
        if self.kind == "summed":
            penalty = (mse.sum() - t).clamp(min=0)
        else:
            penalty = (mse - t).clamp(min=0).sum()
        loss = lm + self.multiplier * penalty if self.penalised else lm
        return loss, lm.detach(), penalty.detach(), mse.mean().detach()

    @torch.no_grad()
    def clamp_multiplier(self) -> None:
        """lambda >= 0. Raises ConversionError if it is not a number."""
        value = float(self.multiplier)
        if not math.isfinite(value):
            raise ConversionError(
                f"the Lagrange multiplier became {value}: training stopped. Lower lambda_lr, omega_lr "
                "or learning_rate, and look at the last losses"
            )
        self.multiplier.clamp_(min=0)


def fusion_mse_by_layer(model: Any) -> list[float]:
    """Mean fusion mse of every layer's groups, keys and values together."""
    each = [p.mean_mse() for p in projections(model)]
    return [(k + v) / 2 for k, v in zip(each[::2], each[1::2])]


@torch.no_grad()
def mean_mse(model: Any) -> float:
    """Mean of the fusion mse over all groups of two or more heads; 0 if there are none."""
    found = [
        ops.fusion_mse(p.full_omega())
        for p in projections(model)
        if p.omega is not None and p.omega.shape[1] > 1
    ]
    return float(torch.cat(found).mean()) if found else 0.0
