"""Benchmarks of ``dha_attention``: prefill of MHA, GQA and DHA heads, and its backward.

``mha`` is 32 heads of 128, ``gqa`` 32 query / 8 key and value heads, ``dha`` the same counts with maps in
no order (torch gets expanded keys and values, made outside the timing), ``smollm2`` 9 / 3 of 64. Causal.
FLOPs are the useful ones: half of 4 H S S D forward, 2.5 times that backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops

from .case import Case, Inputs, Shape, provider

DTYPES = (torch.float32, torch.bfloat16)
PEAK = {torch.float32: "fma_fp32", torch.bfloat16: "dot_bf16"}
HEADS = {
    "mha": {"h": 32, "hkv": 32, "d": 128},
    "gqa": {"h": 32, "hkv": 8, "d": 128},
    "dha": {"h": 32, "hkv": 8, "d": 128},
    "smollm2": {"h": 9, "hkv": 3, "d": 64},
}


def _inputs(name: str, s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)

    def randn(heads: int) -> Tensor:
        return torch.randn(1, heads, s["s"], s["d"], generator=made).to(device, dtype)

    grouped = torch.arange(s["h"]) // (s["h"] // s["hkv"])
    kmap, vmap = grouped, grouped
    if name == "dha":
        kmap, vmap = (grouped[torch.randperm(s["h"], generator=made)] for _ in range(2))
    i = Inputs(
        q=randn(s["h"]), k=randn(s["hkv"]), v=randn(s["hkv"]), dout=randn(s["h"]),
        kmap=kmap.to(device, torch.int32), vmap=vmap.to(device, torch.int32),
    )  # fmt: skip
    if name == "dha":
        i.wide_k, i.wide_v = i.k[:, kmap.to(device)], i.v[:, vmap.to(device)]
    return i


def _bytes(s: Shape, size: int) -> int:
    return s["s"] * (size * s["d"] * (2 * s["h"] + 2 * s["hkv"]) + 4 * s["h"])


def _flops(s: Shape) -> int:
    return 2 * s["h"] * s["s"] * (s["s"] + 1) * s["d"]


def _ours(i: Inputs) -> Tensor:
    return ops.dha_attention(i.q, i.k, i.v, i.kmap, i.vmap)[0]


def _sdpa(i: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(i.q, i.k, i.v, is_causal=True, enable_gqa=True)


def _sdpa_expanded(i: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(i.q, i.wide_k, i.wide_v, is_causal=True)


def _float_rows(i: Inputs) -> Tensor:
    """The definition in float32, a few rows of logits at a time: judges every provider."""
    k, v = (x.float()[:, m.long()] for x, m in ((i.k, i.kmap), (i.v, i.vmap)))
    length, out = i.q.shape[2], torch.empty_like(i.q, dtype=torch.float32)
    for at in range(0, length, 256):
        end = min(at + 256, length)
        logits = i.q[:, :, at:end].float() @ k[:, :, :end].mT * i.q.shape[-1] ** -0.5
        hidden = torch.ones(end - at, end, dtype=torch.bool, device=k.device).triu_(at + 1)
        out[:, :, at:end] = logits.masked_fill_(hidden, float("-inf")).softmax(-1) @ v[:, :, :end]
    return out


def _grads(forward: Any, names: tuple[str, str, str]) -> Any:
    """Forward and backward through autograd."""

    def run(i: Inputs) -> tuple[Tensor, ...]:
        leaves = [getattr(i, n).detach().requires_grad_() for n in names]
        traced = Inputs(**(vars(i) | dict(zip(names, leaves))))
        return torch.autograd.grad(forward(traced), leaves, i.dout)

    return run


def _summed(i: Inputs, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of expanded heads summed to those of the shared ones."""
    dq, dk, dv = grads
    sums = []
    for wide, like, heads in ((dk, i.k, i.kmap), (dv, i.v, i.vmap)):
        sums.append(torch.zeros_like(like).index_add_(1, heads.long(), wide))
    return (dq, *sums)


def _cases(backward: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for name, heads in HEADS.items():
            for length in (512, 2048) if backward else (512, 2048, 8192):
                peer = (
                    ("eager:sdpa-expanded", _sdpa_expanded)
                    if name == "dha"
                    else ("eager:sdpa", _sdpa)
                )
                wide = ("q", "wide_k", "wide_v") if name == "dha" else ("q", "k", "v")
                ours, theirs, judge = _ours, peer[1], _float_rows
                if backward:
                    ours, judge = (
                        _grads(_ours, ("q", "k", "v")),
                        _grads(_float_rows, ("q", "k", "v")),
                    )
                    grads = _grads(peer[1], wide)
                    theirs = (lambda i, g=grads: _summed(i, g(i))) if name == "dha" else grads
                yield Case(
                    op="dha_attention_backward" if backward else "dha_attention",
                    variant=name, shape={**heads, "s": length}, dtype=dtype,
                    inputs=lambda s, t, device, n=name: _inputs(n, s, t, device),
                    bytes=lambda s, size, n=3 if backward else 1: n * _bytes(s, size),
                    flops=lambda s, n=7 if backward else 2: n * _flops(s) // 2,
                    peak=PEAK[dtype],
                    providers=[provider("tenfold", ours), provider(peer[0], theirs)],
                    reference=judge,
                    tolerance=1e-4 if dtype == torch.float32 else 2e-2,
                    quick=length == 512,
                )  # fmt: skip


def cases() -> list[Case]:
    """Forward, then forward and backward together."""
    return [*_cases(backward=False), *_cases(backward=True)]
