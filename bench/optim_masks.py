# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the mask operations of ``optim``: packed masks, selections, norms, copies, row gradients.

Sizes are those of a large matrix (2^24 elements), of one Llama-like layer of width 2048, and of
SmolLM2-135M. Bytes count each input once and each output once, frozen rows not at all. NumPy is the peer
where it has the operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold import ops

from .case import Case, Inputs, NotAvailable, Provider, Shape, compiled, provider

DTYPES = (torch.float32, torch.bfloat16)
PEAK = {torch.float32: "fma_fp32", torch.bfloat16: "dot_bf16"}
LARGE, SMALL = 1 << 24, 1 << 16


def numpy_peer(function: Callable[[Inputs], Any]) -> Provider:
    """On the CPU, NumPy's form; tensors share memory with its arrays."""

    def build(inputs: Inputs) -> Callable[[Inputs], Any]:
        if any(v.is_cuda for v in vars(inputs).values() if isinstance(v, Tensor)):
            raise NotAvailable("NumPy has no GPU")
        return function

    return Provider("peer:numpy", "peer", build)


# -- packed masks ------------------------------------------------------------------------------------


def _mask_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    mask = torch.rand(s["n"], generator=made) < 0.5
    bytes_of = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return Inputs(
        mask=mask.to(device),
        packed=_packed(mask).to(device),
        bits=bytes_of.bool().to(device),
        counts=bytes_of.sum(1).to(torch.uint8).to(device),
    )


def _packed(mask: Tensor) -> Tensor:
    """Eight booleans are one int64, and one product moves their bits into its top byte."""
    return (
        torch.mul(mask.view(torch.int64), 0x0102040810204080).view(torch.uint8)[7::8].contiguous()
    )


def _shifted(mask: Tensor) -> Tensor:
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.view(-1, 8) * powers).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, bits: Tensor) -> Tensor:
    return bits.index_select(0, packed.int()).view(-1)


def _unshifted(packed: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> places & 1).bool().view(-1)


def _counted(packed: Tensor, counts: Tensor) -> Tensor:
    return counts.index_select(0, packed.int()).sum()


def _prefixed(packed: Tensor, counts: Tensor) -> Tensor:
    of_blocks = counts.index_select(0, packed.int()).view(-1, 32).sum(1, dtype=torch.int32)
    return of_blocks.cumsum(0, dtype=torch.int32) - of_blocks


def _numpy_prefix(packed: Tensor) -> Tensor:
    words = np.bitwise_count(packed.numpy().view(np.uint64)).reshape(-1, 4)
    of_blocks = words.sum(1, dtype=np.int32)
    return torch.from_numpy(np.cumsum(of_blocks, dtype=np.int32) - of_blocks)


def _bit_cases() -> Iterator[Case]:
    for n in (LARGE, SMALL):
        common = {"shape": {"n": n}, "dtype": torch.uint8, "inputs": _mask_inputs, "tolerance": 0.0,
                  "quick": n == SMALL}  # fmt: skip
        yield Case(
            op="pack_mask", bytes=lambda s, _: s["n"] + s["n"] // 8, traffic="read",
            providers=[
                provider("tenfold", lambda i: ops.pack_mask(i.mask)),
                provider("eager:product", lambda i: _packed(i.mask)),
                provider("eager:shifts", lambda i: _shifted(i.mask)),
                compiled(lambda i: _packed(i.mask)),
                numpy_peer(lambda i: torch.from_numpy(np.packbits(i.mask.numpy(), bitorder="little"))),
            ],
            reference=lambda i: _shifted(i.mask), **common,
        )  # fmt: skip
        yield Case(
            op="unpack_mask", bytes=lambda s, _: s["n"] + s["n"] // 8,
            providers=[
                provider("tenfold", lambda i: ops.unpack_mask(i.packed, i.mask.numel())),
                provider("eager:table", lambda i: _unpacked(i.packed, i.bits)),
                provider("eager:shifts", lambda i: _unshifted(i.packed)),
                compiled(lambda i: _unshifted(i.packed)),
                numpy_peer(lambda i: torch.from_numpy(
                    np.unpackbits(i.packed.numpy(), bitorder="little").view(np.bool_))),
                provider("clone", lambda i: i.mask.clone(), "bound"),
            ],
            reference=lambda i: i.mask, **common,
        )  # fmt: skip
        yield Case(
            op="mask_popcount", bytes=lambda s, _: s["n"] // 8, traffic="read",
            providers=[
                provider("tenfold", lambda i: ops.mask_popcount(i.packed)),
                provider("eager:table", lambda i: _counted(i.packed, i.counts)),
                compiled(lambda i: _counted(i.packed, i.counts)),
                numpy_peer(lambda i: torch.tensor(
                    int(np.bitwise_count(i.packed.numpy().view(np.uint64)).sum(dtype=np.int64)))),
            ],
            reference=lambda i: i.mask.sum(), **common,
        )  # fmt: skip
        yield Case(
            op="mask_prefix", bytes=lambda s, _: s["n"] // 8 + s["n"] // 64, traffic="read",
            providers=[
                provider("tenfold", lambda i: ops.mask_prefix(i.packed)),
                provider("eager:table", lambda i: _prefixed(i.packed, i.counts)),
                compiled(lambda i: _prefixed(i.packed, i.counts)),
                numpy_peer(lambda i: _numpy_prefix(i.packed)),
            ],
            reference=lambda i: _prefixed(i.packed, i.counts), **common,
        )  # fmt: skip


# -- selections --------------------------------------------------------------------------------------


def _score_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    return Inputs(score=torch.randn(s["n"], generator=made).to(device, dtype))


def topk_mask(score: Tensor, k: int) -> Tensor:
    """Which elements torch.topk takes; among equal ones it takes any."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[torch.topk(score, k, sorted=False).indices] = True
    return _packed(mask)


def _first_of_equal(score: Tensor, cut: Tensor, k: int) -> Tensor:
    """What is above the cut, and the first of what is equal to it."""
    above = score > cut
    equal = (score == cut).nonzero().view(-1)
    above[equal[: k - int(above.sum())]] = True
    return _packed(above)


def kth_mask(score: Tensor, k: int) -> Tensor:
    return _first_of_equal(score, torch.kthvalue(score, score.numel() - k + 1).values, k)


def sorted_mask(score: Tensor, k: int) -> Tensor:
    order = torch.sort(score, descending=True, stable=True).indices
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[:k]] = True
    return _packed(mask)


def numpy_mask(score: Tensor, k: int) -> Tensor:
    values = score.float().numpy()
    cut = np.partition(values, values.size - k)[values.size - k]
    return _first_of_equal(score, torch.tensor(cut), k)


def _same_count(got: Tensor, want: Tensor, _: Inputs) -> float:
    counts = [int(ops.mask_popcount(x)) for x in (got, want)]
    return 0.0 if counts[0] == counts[1] else math.inf


def random_permuted(n: int, k: int, device: torch.device) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool, device=device)
    mask[torch.randperm(n, device=device)[:k]] = True
    return _packed(mask)


def _selection_cases() -> Iterator[Case]:
    for n, dtype in ((LARGE, torch.float32), (LARGE, torch.bfloat16), (SMALL, torch.float32)):
        k = n // 2
        yield Case(
            op="mask_topk", shape={"n": n}, dtype=dtype, inputs=_score_inputs, traffic="read",
            bytes=lambda s, size: s["n"] * size + s["n"] // 8,
            providers=[
                provider("tenfold", lambda i: ops.mask_topk(i.score, 0.5)),
                # torch.topk breaks ties its own way, so only the number of bits can agree.
                provider("eager:topk", lambda i, k=k: topk_mask(i.score, k), agree=_same_count),
                provider("eager:kthvalue", lambda i, k=k: kth_mask(i.score, k), graph=False),
                provider("eager:sort", lambda i, k=k: sorted_mask(i.score, k)),
                numpy_peer(lambda i, k=k: numpy_mask(i.score, k)),
            ],
            reference=lambda i, k=k: sorted_mask(i.score, k), tolerance=0.0, quick=n == SMALL,
        )  # fmt: skip
    for n in (LARGE, SMALL):
        k = n // 2
        yield Case(
            op="mask_random", shape={"n": n}, dtype=torch.uint8, bytes=lambda s, _: s["n"] // 8,
            inputs=lambda s, dtype, device: Inputs(like=torch.zeros(1, device=device)),
            providers=[
                provider("tenfold",
                         lambda i, n=n: ops.mask_random(n, 0.5, 7, device=i.like.device)),
                provider("eager:randperm", lambda i, n=n, k=k: random_permuted(n, k, i.like.device)),
                provider("eager:kthvalue",
                         lambda i, n=n, k=k: kth_mask(torch.rand(n, device=i.like.device), k),
                         graph=False),
            ],
            reference=lambda i, n=n, k=k: random_permuted(n, k, i.like.device), agree=_same_count,
            tolerance=0.0, quick=n == SMALL,
        )  # fmt: skip


# -- norms and copies over lists ---------------------------------------------------------------------

# (rows, columns) of the matrices of one layer, and how many layers: Llama-like, SmolLM2-135M.
WIDE = ([(2048, 2048)] * 4 + [(5632, 2048)] * 2 + [(2048, 5632)], 1)
SMOLLM2 = (
    [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)],
    30,
)
MODELS = {"wide-layer": WIDE, "smollm2": SMOLLM2}


def _sizes(name: str) -> list[tuple[int, int]]:
    layer, count = MODELS[name]
    return layer * count


def _numel(name: str) -> int:
    return sum(r * c for r, c in _sizes(name))


def _list_inputs(name: str, kind: str, names: tuple[str, ...]) -> Callable[..., Inputs]:
    """Matrices ``<name>0, <name>1, ...``, their masks ``m0``, packed, and ``u0``, of booleans."""

    def make(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = torch.Generator().manual_seed(0)
        found = {}
        for at, (rows, cols) in enumerate(_sizes(name)):
            for letter in names:
                values = torch.randn(rows, cols, generator=made).to(device, dtype)
                found[f"{letter}{at}"] = values
            if kind == "none":
                continue
            units = rows if kind == "row" else rows * cols
            mask = torch.rand(units, generator=made) < 0.5
            if kind == "row":  # a range, as in fused weights
                mask = torch.zeros(units, dtype=torch.bool)
                mask[rows // 4 : rows // 4 + rows // 2] = True
            found[f"m{at}"] = ops.pack_mask(mask).to(device)
            found[f"u{at}"] = mask.view(-1, 1 if kind == "row" else cols).to(device)
        return Inputs(**found)

    return make


def _all(i: Inputs, letter: str, name: str) -> list[Tensor]:
    return [getattr(i, f"{letter}{at}") for at in range(len(_sizes(name)))]


def foreach_norm(grads: list[Tensor]) -> Tensor:
    """What clip_grad_norm_ computes with foreach."""
    return torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(grads, 2)]))


def each_norm(grads: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads])
    )


def exact_norm(grads: list[Tensor]) -> Tensor:
    return sum(g.double().square().sum() for g in grads).sqrt().float()


def _norm_cases() -> Iterator[Case]:
    for name in MODELS:
        for dtype in DTYPES:
            # of torch's sums over 10^7 numbers
            tolerance = 1e-3 if dtype == torch.float32 else 5e-3
            yield Case(
                op="grad_norm", variant=name, shape={"p": _numel(name)}, dtype=dtype,
                inputs=_list_inputs(name, "none", ("g",)), traffic="read",
                bytes=lambda s, size: s["p"] * size, quick=name == "smollm2", tolerance=tolerance,
                providers=[
                    provider("tenfold", lambda i, m=name: ops.grad_norm(_all(i, "g", m), [])),
                    provider("eager:foreach", lambda i, m=name: foreach_norm(_all(i, "g", m))),
                    provider("eager:norms", lambda i, m=name: each_norm(_all(i, "g", m))),
                ],
                reference=lambda i, m=name: exact_norm(_all(i, "g", m)),
            )  # fmt: skip
    for kind, m in (("row", "wide-layer"), ("element", "wide-layer")):
        read = (lambda s, size: s["p"] * size // 2) if kind == "row" else (
            lambda s, size: s["p"] * size + s["p"] // 8)  # fmt: skip
        yield Case(
            op="grad_norm", variant=f"{m}-{kind}", shape={"p": _numel(m)}, dtype=torch.bfloat16,
            inputs=_list_inputs(m, kind, ("g",)), traffic="read", bytes=read, tolerance=5e-3,
            providers=[
                provider("tenfold", lambda i, k=kind, m=m: ops.grad_norm(
                    _all(i, "g", m), _all(i, "m", m), mask_kind=k)),
                provider("eager:product", lambda i, m=m: foreach_norm(
                    torch._foreach_mul(_all(i, "g", m), _all(i, "u", m)))),
                *([provider("eager:rows", lambda i, m=m: each_norm(
                    [g[u.view(-1)] for g, u in zip(_all(i, "g", m), _all(i, "u", m))]))]
                  if kind == "row" else []),
            ],
            reference=lambda i, m=m: each_norm(torch._foreach_mul(_all(i, "g", m), _all(i, "u", m))),
        )  # fmt: skip


def _copy_inputs(kind: str) -> Callable[..., Inputs]:
    def make(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = torch.Generator().manual_seed(0)
        rows, cols = s["rows"], s["cols"]
        dst, src = (torch.randn(rows, cols, generator=made).to(device, dtype) for _ in range(2))
        mask = torch.rand(rows if kind == "row" else rows * cols, generator=made) < 0.5
        if kind == "row":
            mask = torch.arange(rows) % 64 < 32  # whole heads
        chosen = mask.view(-1, 1 if kind == "row" else cols)
        return Inputs(dst=dst, src=src, mask=ops.pack_mask(mask).to(device),
                      chosen=chosen.to(device), rows=mask.nonzero().view(-1).to(device))  # fmt: skip

    return make


def _copy_cases() -> Iterator[Case]:
    for kind in ("row", "element"):
        for dtype in DTYPES:
            moved = 1 if kind == "row" else 2  # halves of the matrix
            yield Case(
                op="masked_copy_", variant=kind, shape={"rows": 4096, "cols": 4096}, dtype=dtype,
                inputs=_copy_inputs(kind), mode="inplace", mutates=("dst",), tolerance=0.0,
                quick=kind == "row" and dtype == torch.float32,
                bytes=lambda s, size, h=moved, k=kind: s["rows"] * s["cols"] * size * h
                + (s["rows"] * s["cols"] // 8 if k == "element" else 0),
                providers=[
                    provider("tenfold", lambda i, k=kind: ops.masked_copy_(
                        [i.dst], [i.src], [i.mask], mask_kind=k)),
                    provider("eager:where",
                             lambda i: torch.where(i.chosen, i.src, i.dst, out=i.dst)),
                    *([provider("eager:rows",
                                lambda i: i.dst.index_copy_(0, i.rows, i.src.index_select(0, i.rows)))]
                      if kind == "row" else
                      [provider("eager:scatter",
                                lambda i: i.dst.masked_scatter_(i.chosen, i.src[i.chosen]))]),
                    compiled(lambda i: i.dst.copy_(torch.where(i.chosen, i.src, i.dst))),
                    provider("copy_", lambda i, k=kind: i.dst[: 2048 if k == "row" else 4096].copy_(
                        i.src[: 2048 if k == "row" else 4096]), "bound"),
                ],
                reference=lambda i: i.dst.copy_(torch.where(i.chosen, i.src, i.dst)),
            )  # fmt: skip


# -- linear_wgrad_rows -------------------------------------------------------------------------------


def _wgrad_inputs(spread: bool) -> Callable[..., Inputs]:
    def make(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = torch.Generator().manual_seed(0)
        rows = torch.randperm(s["out"], generator=made)[: s["r"]].sort().values
        if not spread:
            rows = torch.arange(s["r"]) + s["out"] // 4 // 64 * 64
        return Inputs(
            dy=torch.randn(s["t"], s["out"], generator=made).to(device, dtype),
            x=torch.randn(s["t"], s["in"], generator=made).to(device, dtype),
            rows=rows.to(device),
        )

    return make


def gathered_mm(dy: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    return dy.index_select(1, rows).t() @ x


def _wgrad_cases() -> Iterator[Case]:
    shapes = [("llama", {"t": 2048, "out": 4096, "in": 4096, "r": 2048}, True),
              ("llama-range", {"t": 2048, "out": 4096, "in": 4096, "r": 2048}, False),
              ("llama-eighth", {"t": 2048, "out": 4096, "in": 4096, "r": 512}, True),
              ("smollm2", {"t": 2048, "out": 1536, "in": 576, "r": 768}, True)]  # fmt: skip
    for dtype in DTYPES:
        for name, shape, spread in shapes:
            yield Case(
                op="linear_wgrad_rows", variant=name, shape=shape, dtype=dtype,
                inputs=_wgrad_inputs(spread), peak=PEAK[dtype], quick=name == "smollm2",
                flops=lambda s: 2 * s["t"] * s["r"] * s["in"],
                bytes=lambda s, size: size * (s["t"] * (s["r"] + s["in"]) + s["r"] * s["in"]),
                providers=[
                    provider("tenfold", lambda i: ops.linear_wgrad_rows(i.dy, i.x, i.rows)),
                    provider("eager:gather", lambda i: gathered_mm(i.dy, i.x, i.rows)),
                    provider("eager:whole", lambda i: (i.dy.t() @ i.x).index_select(0, i.rows)),
                    compiled(lambda i: gathered_mm(i.dy, i.x, i.rows)),
                ],
                reference=lambda i: gathered_mm(i.dy.float(), i.x.float(), i.rows),
                tolerance=1e-4 if dtype == torch.float32 else 1e-2,
            )  # fmt: skip


def cases() -> list[Case]:
    """All cases of the group, in the order of the table."""
    made: tuple[Callable[[], Iterator[Case]], ...] = (
        _bit_cases, _selection_cases, _norm_cases, _copy_cases, _wgrad_cases,
    )  # fmt: skip
    return [case for part in made for case in part()]
