# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ``dha_decode``: one new token over a cache of decoupled heads.

DHA at 25 % of 32 query heads (8 + 8 heads with arbitrary maps, or 4 key and 12 value heads), GQA 32/8,
MHA 32/32, and SmolLM2's 9/3 of 64. Bytes are the shared heads' keys and values once (plus queries and
output); they are read, so the ceiling is the read bandwidth. Shared machines' bandwidth changes from minute to
minute: the yardstick is a sum over the same heads in turns with the op.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Provider, Shape, provider

DTYPES = (torch.float32, torch.bfloat16)
PEAK = {torch.float32: "fma_fp32", torch.bfloat16: "dot_bf16"}
FULL = {"h": 32, "d": 128}
# name: sizes, key groups and value groups equal and contiguous
HEADS = {
    "dha-8-8": ({**FULL, "hk": 8, "hv": 8}, False),
    "dha-4-12": ({**FULL, "hk": 4, "hv": 12}, False),
    "gqa": ({**FULL, "hk": 8, "hv": 8}, True),
    "mha": ({**FULL, "hk": 32, "hv": 32}, True),
    "smollm2": ({"h": 9, "d": 64, "hk": 3, "hv": 3}, True),
}
LENGTHS = {"mha": (4096, 16384), "smollm2": (4096, 8192)}


def _randn(*sizes: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=made).to(device, dtype)


def _map(q_heads: int, heads: int, shuffled: bool, seed: int) -> Tensor:
    """Query head -> head, in groups as equal as possible; shuffled: arbitrary groups."""
    groups = torch.arange(q_heads) * heads // q_heads
    made = torch.Generator().manual_seed(seed)
    return groups[torch.randperm(q_heads, generator=made)] if shuffled else groups


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device, grouped: bool) -> Inputs:
    h, d, length = s["h"], s["d"], s["l"]
    kmap, vmap = (_map(h, s[x], not grouped, i) for i, x in enumerate(("hk", "hv")))
    return Inputs(
        q=_randn(1, h, d, dtype=dtype, device=device, seed=2),
        k=_randn(1, s["hk"], length, d, dtype=dtype, device=device, seed=0),
        v=_randn(1, s["hv"], length, d, dtype=dtype, device=device, seed=1),
        kmap=kmap.to(device), vmap=vmap.to(device), lens=torch.tensor([length], device=device),
        kgroups=[(kmap == i).nonzero()[:, 0].to(device) for i in range(s["hk"])],
        vgroups=[(vmap == i).nonzero()[:, 0].to(device) for i in range(s["hv"])],
    )  # fmt: skip


def _bytes(s: Shape, size: int) -> int:
    return (s["hk"] + s["hv"]) * s["l"] * s["d"] * size + 2 * s["h"] * s["d"] * size + 4 * s["h"]


def _softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.softmax(-1, dtype=torch.float32).to(dtype)


def bmm_decode(i: Inputs) -> Tensor:
    """Equal contiguous groups: the query heads of a head are the rows of one small matrix product."""
    (b, h, d), heads = i.q.shape, i.k.shape[1]
    logits = torch.matmul(i.q.view(b, heads, -1, d) * d**-0.5, i.k.transpose(-1, -2))
    return torch.matmul(_softmax(logits, i.v.dtype), i.v).view(b, h, -1)


def grouped_decode(i: Inputs) -> Tensor:
    """Any maps, no head copied: one small matrix product per key head and per value head."""
    b, h, d = i.q.shape
    q = i.q * d**-0.5
    logits = i.q.new_empty(b, h, i.k.shape[2])
    for head, rows in enumerate(i.kgroups):
        logits[:, rows] = torch.matmul(q[:, rows], i.k[:, head].transpose(1, 2))
    weights = _softmax(logits, i.v.dtype)
    out = torch.empty_like(i.q)
    for head, rows in enumerate(i.vgroups):
        out[:, rows] = torch.matmul(weights[:, rows], i.v[:, head])
    return out


def gather_decode(i: Inputs) -> Tensor:
    """The way it is mostly written: keys and values gathered to all query heads."""
    b, h, d = i.q.shape
    logits = torch.matmul(i.q.view(b, h, 1, d) * d**-0.5, i.k[:, i.kmap].transpose(2, 3))
    return torch.matmul(_softmax(logits, i.v.dtype), i.v[:, i.vmap]).view(b, h, -1)


def sdpa_decode(i: Inputs) -> Tensor:
    """SDPA with its own groups."""
    q = i.q[:, :, None]
    return torch.nn.functional.scaled_dot_product_attention(q, i.k, i.v, enable_gqa=True)[:, :, 0]


def sdpa_expanded(i: Inputs) -> Tensor:
    """SDPA on gathered heads."""
    k, v = i.k[:, i.kmap], i.v[:, i.vmap]
    return torch.nn.functional.scaled_dot_product_attention(i.q[:, :, None], k, v)[:, :, 0]


def read_heads(i: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values read once, as what they are not: a sum of their bits as float32."""
    return i.k.view(torch.float32).sum(), i.v.view(torch.float32).sum()


def _forms(grouped: bool, expanded: int) -> list[Provider]:
    gather = provider("eager:gather", gather_decode, scratch=expanded)
    if grouped:
        return [provider("eager:bmm", bmm_decode), provider("eager:sdpa", sdpa_decode), gather]
    return [
        provider("eager:grouped", grouped_decode),
        provider("eager:sdpa", sdpa_expanded, scratch=expanded),
        gather,
    ]


def _case(name: str, length: int, dtype: torch.dtype) -> Case:
    sizes, grouped = HEADS[name]
    shape = {**sizes, "l": length}
    expanded = 2 * sizes["h"] * length * sizes["d"] * dtype.itemsize
    return Case(
        op="dha_decode", variant=name, shape=shape, dtype=dtype,
        inputs=lambda s, t, where: _inputs(s, t, where, grouped),
        bytes=_bytes, flops=lambda s: 4 * s["h"] * s["l"] * s["d"], peak=PEAK[dtype],
        traffic="read",
        providers=[
            provider("tenfold",
                     lambda i: ops.dha_decode(i.q, i.k, i.v, i.kmap, i.vmap, i.lens)[0]),
            *_forms(grouped, expanded), provider("sum", read_heads, "bound"),
        ],
        reference=lambda i: reference.dha_decode(
            i.q.float(), i.k.float(), i.v.float(), i.kmap, i.vmap, i.lens)[0],
        # the eager forms round logits and weights to bf16
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,
        quick=length == 4096 and name in ("dha-8-8", "smollm2"),
    )  # fmt: skip


# -- dha_cache_append_ -------------------------------------------------------------------------------


def _append_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(1)

    def randn(heads: int, rows: int) -> Tensor:
        return torch.randn(1, heads, rows, s["d"], generator=made).to(device, dtype)

    return Inputs(
        k=randn(s["hk"], s["l"]), v=randn(s["hv"], s["l"]), new_k=randn(s["hk"], s["s"]),
        new_v=randn(s["hv"], s["s"]), slots=torch.arange(7, 7 + s["s"], device=device),
    )  # fmt: skip


def _append(i: Inputs) -> tuple[Tensor, Tensor]:
    ops.dha_cache_append_(i.k, i.v, i.new_k, i.new_v, i.slots[None])
    return i.k, i.v


def _append_by_index(i: Inputs) -> tuple[Tensor, Tensor]:
    return i.k.index_copy_(2, i.slots, i.new_k), i.v.index_copy_(2, i.slots, i.new_v)


def _append_reference(i: Inputs) -> None:
    reference.dha_cache_append_(i.k, i.v, i.new_k, i.new_v, i.slots[None])


def _append_case(dtype: torch.dtype) -> Case:
    return Case(
        op="dha_cache_append_", variant="dha-4-12", dtype=dtype, mode="inplace", mutates=("k", "v"),
        shape={"hk": 4, "hv": 12, "d": 128, "l": 8192, "s": 512}, inputs=_append_inputs,
        bytes=lambda s, size: 2 * (s["hk"] + s["hv"]) * s["s"] * s["d"] * size,
        providers=[
            provider("tenfold", _append), provider("eager:index_copy", _append_by_index),
        ],
        reference=_append_reference, tolerance=0.0, quick=True,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the decode group, in the order of the table."""
    for dtype in DTYPES:
        for name in HEADS:
            for length in LENGTHS.get(name, (4096, 16384, 32768)):
                yield _case(name, length, dtype)
    for dtype in DTYPES:
        yield _append_case(dtype)
