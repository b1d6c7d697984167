# SPDX-License-Identifier: Apache-2.0
"""Cases of ``dha_attention_backward``: part of the family ``attention``.

``llama`` is 32 heads of 128: all heads, groups of four, and a DHA layer with a quarter of them (4 key
heads, 12 value heads, maps that are no groups). FLOPs are the useful ones of the five products,
2 (3 D + 2 DV) per pair of query and key that the mask shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Function, Inputs, Provider, Shape, compiled, provider

DTYPES = (torch.float32, torch.bfloat16)
PEAK = {torch.float32: "fma_fp32", torch.bfloat16: "dot_bf16"}
LAYERS = {
    "mha": {"h": 32, "hk": 32, "hv": 32, "d": 128},
    "gqa": {"h": 32, "hk": 8, "hv": 8, "d": 128},
    "dha_25": {"h": 32, "hk": 4, "hv": 12, "d": 128},
}


def _maps(s: Shape) -> tuple[Tensor, Tensor]:
    heads = torch.arange(s["h"])
    kmap, vmap = heads * s["hk"] // s["h"], heads * s["hv"] // s["h"]
    if s["hk"] == s["hv"]:
        return kmap, vmap
    made = torch.Generator().manual_seed(5)  # DHA: every head used, in no order
    return kmap[torch.randperm(s["h"], generator=made)], vmap[
        torch.randperm(s["h"], generator=made)
    ]


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    sizes = {"q": "h", "k": "hk", "v": "hv", "dout": "h"}
    i = Inputs(
        **{
            name: torch.randn(s["b"], s[heads], s["s"], s["d"], generator=made).to(device, dtype)
            for name, heads in sizes.items()
        }
    )
    i.kmap, i.vmap = (x.to(device) for x in _maps(s))
    i.causal = bool(s["causal"])
    with torch.no_grad():
        i.out, i.lse = ops.dha_attention(i.q, i.k, i.v, i.kmap, i.vmap, causal=i.causal)
    return i


def _pairs(s: Shape) -> int:
    return s["s"] * (s["s"] + 1) // 2 if s["causal"] else s["s"] ** 2


def _bytes(s: Shape, size: int) -> int:
    rows = 4 * s["h"] + 2 * s["hk"] + 2 * s["hv"]  # q, out, dout, dq; k, v and their gradients
    return s["b"] * s["s"] * (size * rows * s["d"] + 4 * s["h"])


def _tenfold(i: Inputs) -> Any:
    return ops.dha_attention_backward(
        i.dout, i.q, i.k, i.v, i.out, i.lse, i.kmap, i.vmap, causal=i.causal
    )


def _sdpa(
    expand: Callable[[Inputs, Tensor, Tensor], dict[str, Any]],
) -> Callable[[Inputs], Function]:
    """Backward alone of ``scaled_dot_product_attention``: the graph of one forward is kept."""

    def build(i: Inputs) -> Function:
        leaves = [x.detach().clone().requires_grad_() for x in (i.q, i.k, i.v)]
        out = F.scaled_dot_product_attention(
            leaves[0], is_causal=i.causal, **expand(i, leaves[1], leaves[2])
        )
        return lambda now: torch.autograd.grad(out, leaves, now.dout, retain_graph=True)

    return build


def _by_map(i: Inputs, k: Tensor, v: Tensor) -> dict[str, Any]:
    heads = i.q.shape[1]
    return {
        "key": k if k.shape[1] == heads else k[:, i.kmap],
        "value": v if v.shape[1] == heads else v[:, i.vmap],
    }


def _by_group(_: Inputs, k: Tensor, v: Tensor) -> dict[str, Any]:
    return {"key": k, "value": v, "enable_gqa": True}


def matmul_backward(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The five products written out; stores P and dS whole."""
    scale = i.q.shape[-1] ** -0.5
    k, v = i.k[:, i.kmap], i.v[:, i.vmap]
    logits = torch.matmul(i.q, k.transpose(-1, -2)).float() * scale
    p = torch.exp(logits - i.lse[..., None])
    if i.causal:
        p = p.tril_()
    delta = (i.dout.float() * i.out.float()).sum(-1, keepdim=True)
    ds = (p * (torch.matmul(i.dout, v.transpose(-1, -2)).float() - delta) * scale).to(i.q.dtype)
    p = p.to(i.q.dtype)
    dq = torch.matmul(ds, k)
    dk = torch.zeros_like(i.k).index_add_(1, i.kmap, torch.matmul(ds.transpose(-1, -2), i.q))
    dv = torch.zeros_like(i.v).index_add_(1, i.vmap, torch.matmul(p.transpose(-1, -2), i.dout))
    return dq, dk, dv


def _by_head(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, head by head: its [Sq, Sk] matrices of all heads would not fit."""
    dq = torch.zeros_like(i.q, dtype=torch.float32)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (i.k, i.v))
    zero = torch.zeros(1, dtype=torch.int64, device=i.q.device)
    for h in range(i.q.shape[1]):
        at = [int(m[h]) for m in (i.kmap, i.vmap)]
        q, k, v, dout, out, lse = (
            x[:, j : j + 1].float()
            for x, j in ((i.q, h), (i.k, at[0]), (i.v, at[1]), (i.dout, h), (i.out, h), (i.lse, h))
        )
        got = reference.dha_attention_backward(dout, q, k, v, out, lse, zero, zero, causal=i.causal)
        dq[:, h : h + 1] = got[0]
        dk[:, at[0] : at[0] + 1] += got[1]
        dv[:, at[1] : at[1] + 1] += got[2]
    return dq, dk, dv


def _providers(s: Shape, layer: str) -> list[Provider]:
    matrices = 4 * 4 * s["b"] * s["h"] * s["s"] ** 2
    made = [
        provider("tenfold", _tenfold),
        Provider("eager:sdpa", "eager", _sdpa(_by_map), graph=False),
        provider("eager:matmul", matmul_backward, scratch=matrices),
    ]
    if layer == "gqa":
        made.append(Provider("eager:sdpa_gqa", "eager", _sdpa(_by_group), graph=False))
    if s["s"] <= 512:
        made.append(compiled(matmul_backward, scratch=matrices))
    return made


def cases() -> Iterator[Case]:
    """Causal at two lengths; whole attention at one."""
    for dtype in DTYPES:
        for layer, heads in LAYERS.items():
            for length, causal in ((512, 1), (2048, 0), (4096, 1)):
                shape = {"b": 1, **heads, "s": length, "causal": causal}
                yield Case(
                    op="dha_attention_backward", variant=layer, shape=shape, dtype=dtype,
                    inputs=_inputs, bytes=_bytes,
                    flops=lambda s: 10 * s["b"] * s["h"] * s["d"] * _pairs(s),
                    peak=PEAK[dtype], providers=_providers(shape, layer), reference=_by_head,
                    # bf16: P and dS are rounded before the last products, as in SDPA.
                    tolerance=1e-4 if dtype == torch.float32 else 2e-2,
                    quick=length == 512,
                )  # fmt: skip
