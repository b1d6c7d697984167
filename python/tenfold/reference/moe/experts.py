# SPDX-License-Identifier: Apache-2.0
"""Expert blocks and the grouped products they are made of, expert by expert."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.reference.numbers import work

__all__ = ["grouped_gemm", "grouped_gemm_wgrad", "moe_lora_swiglu_mlp", "moe_swiglu_mlp"]


def grouped_gemm(
    a: Tensor, w: Tensor, offsets: Tensor, trans_w: bool = True, gather: Tensor | None = None
) -> Tensor:
    """Rows [offsets[i], offsets[i + 1]) of ``a`` (or of ``a[gather]``) times ``w[i].T`` (or ``w[i]``).

    a [R, K], w [n, N, K] (or [n, K, N]) -> [S, N]; rows that no group has are 0.
    """
    rows = work(a) if gather is None else work(a)[gather.long()]
    ends = offsets.tolist()
    parts = [rows[i:j] @ (work(m).T if trans_w else work(m))
             for i, j, m in zip(ends, ends[1:], w)]  # fmt: skip
    out = torch.cat([rows.new_zeros(0, w.shape[1 if trans_w else 2]), *parts])
    return F.pad(out, (0, 0, 0, rows.shape[0] - out.shape[0])).to(a.dtype)


def grouped_gemm_wgrad(
    dy: Tensor, a: Tensor, offsets: Tensor, gather: Tensor | None = None
) -> Tensor:
    """``dy[rows].T @ a[rows]`` of each group's rows: dy [S, N], a [S, K] -> [n, N, K]; 0 for no rows."""
    rows = work(a) if gather is None else work(a)[gather.long()]
    ends = offsets.tolist()
    parts = [work(dy)[i:j].T @ rows[i:j] for i, j in itertools.pairwise(ends)]
    none = rows.new_zeros(0, dy.shape[1], a.shape[1])
    return (torch.stack(parts) if parts else none).to(a.dtype)


def _mixture(
    x: Tensor, index: Tensor, weight: Tensor, experts: int, allow_sentinel: bool,
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """``out[t]`` = the sum over choices j of ``weight[t, j] * expert(index[t, j], x[t])``."""
    if ((index < 0) | (index >= experts)).any() and not (allow_sentinel and (index >= 0).all()):
        raise IndexError(f"index must be in [0, {experts})")
    out = torch.zeros_like(x)
    for e in range(experts):
        token, choice = (index == e).nonzero(as_tuple=True)
        y = expert(e, x[token]) * weight[token, choice, None].to(x.dtype)
        out = out.index_add(0, token, y)
    return out


def moe_swiglu_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, *,
    allow_sentinel: bool = False,
) -> Tensor:  # fmt: skip
    """The sum over j of ``weight[t, j] * down[e] @ (silu(g) * u)``.

    With e = ``index[t, j]`` and [g, u] = ``gate_up[e] @ x[t]``.

    x [..., d], gate_up [n, 2 f, d] (gate rows first), down [n, d, f], index and weight [..., k].
    """
    rows = work(x).reshape(-1, x.shape[-1])

    def expert(e: int, x: Tensor) -> Tensor:
        gate, up = (x @ work(gate_up[e]).T).chunk(2, -1)
        return (F.silu(gate) * up) @ work(down[e]).T

    chosen, share = (t.reshape(len(rows), t.shape[-1]) for t in (index, weight))
    out = _mixture(rows, chosen, share, gate_up.shape[0], allow_sentinel, expert)
    return out.view(x.shape).to(x.dtype)


def moe_lora_swiglu_mlp(
    x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor], scale: float, index: Tensor, weight: Tensor, *,
    allow_sentinel: bool = False,
) -> Tensor:  # fmt: skip
    """The same with experts ``W + scale * B[e] @ A[e]`` on one shared block: the naive form, slot by slot.

    wg, wu [f, d], wd [d, f]; lora_a: [n, r, in] of gate, up and down, lora_b: [n, out, r].
    """
    rows = work(x).reshape(-1, x.shape[-1])

    def linear(e: int, part: int, x: Tensor) -> Tensor:
        low = x @ work(lora_a[part][e]).T
        return x @ work((wg, wu, wd)[part]).T + scale * (low @ work(lora_b[part][e]).T)

    def expert(e: int, x: Tensor) -> Tensor:
        return linear(e, 2, F.silu(linear(e, 0, x)) * linear(e, 1, x))

    chosen, share = (t.reshape(len(rows), t.shape[-1]) for t in (index, weight))
    out = _mixture(rows, chosen, share, lora_a[0].shape[0], allow_sentinel, expert)
    return out.view(x.shape).to(x.dtype)
