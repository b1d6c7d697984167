# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ``dha_attention``: prefill of MHA, GQA and DHA heads.

``mha`` is 32 heads of 128, ``gqa`` 32 query / 8 key and value heads, ``dha`` the same counts with maps in
no order (torch gets expanded keys and values, made outside the timing), ``smollm2`` 9 / 3 of 64. Causal.
FLOPs are the useful ones: half of 4 H S S D.
"""

from __future__ import annotations

from collections.abc import Iterator

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
        q=randn(s["h"]), k=randn(s["hkv"]), v=randn(s["hkv"]),
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


def cases() -> Iterator[Case]:
    """Causal prompts of three lengths."""
    for dtype in DTYPES:
        for name, heads in HEADS.items():
            for length in (512, 2048, 8192):
                peer = (
                    provider("eager:sdpa-expanded", _sdpa_expanded)
                    if name == "dha"
                    else provider("eager:sdpa", _sdpa)
                )
                yield Case(
                    op="dha_attention", variant=name, shape={**heads, "s": length}, dtype=dtype,
                    inputs=lambda s, t, device, n=name: _inputs(n, s, t, device),
                    bytes=_bytes, flops=_flops, peak=PEAK[dtype],
                    providers=[provider("tenfold", _ours), peer], reference=_float_rows,
                    tolerance=1e-4 if dtype == torch.float32 else 2e-2, quick=length == 512,
                )  # fmt: skip
