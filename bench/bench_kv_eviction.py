# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ``kv_eviction``: NACL's scores, selection, cache moves, and ragged decode.

``llama`` is 32 query / 8 KV heads of 128, ``smollm2`` 9 / 3 of 64. Bytes count each input once and
each output once; FLOPs of the scores are the useful ones, 2 Hq W L D, once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider, relative_error

LLAMA = {"hq": 32, "hkv": 8, "d": 128}
SMOLLM2 = {"hq": 9, "hkv": 3, "d": 64}
DTYPES = (torch.float32, torch.bfloat16)
PEAK = {torch.float32: "fma_fp32", torch.bfloat16: "dot_bf16"}
KEPT = 0.2


def _randn(*sizes: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=made).to(device, dtype)


# -- proxy_scores ------------------------------------------------------------------------------------


def _score_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return Inputs(
        q=_randn(1, s["hq"], s["w"], s["d"], dtype=dtype, device=device),
        k=_randn(1, s["hkv"], s["l"], s["d"], dtype=dtype, device=device, seed=1),
    )


def _score_bytes(s: Shape, size: int) -> int:
    kv = s["hkv"] * s["l"]
    return size * (kv * s["d"] + s["hq"] * s["w"] * s["d"]) + 4 * (kv + s["hq"] * s["w"])


def grouped_scores(q: Tensor, k: Tensor, first: int | None = None) -> Tensor:
    """Scores [B, Hkv, L] by one grouped bmm; ``first``: slot of the first proxy."""
    b, hq, w, d = q.shape
    _, hkv, length, _ = k.shape
    first = length - w if first is None else first
    grouped = q.view(b, hkv, -1, d) * d**-0.5
    logits = torch.matmul(grouped, k.transpose(-1, -2)).view(b, hkv, hq // hkv, w, length)
    hidden = torch.ones(w, length - first, dtype=torch.bool, device=q.device).triu_(1)
    logits[..., first:].masked_fill_(hidden, float("-inf"))
    return logits.softmax(-1, dtype=torch.float32).sum((2, 3)) / (hq // hkv)


def repeated_scores(q: Tensor, k: Tensor) -> Tensor:
    """The way it is mostly written: K repeated to all query heads."""
    groups, w, length = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    repeated = k.repeat_interleave(groups, 1)
    logits = torch.matmul(q, repeated.transpose(2, 3)) * q.shape[-1] ** -0.5
    hidden = torch.ones(w, w, dtype=torch.bool, device=q.device).triu_(1)
    logits[..., length - w :].masked_fill_(hidden, float("-inf"))
    scores = logits.softmax(-1, dtype=torch.float32).sum(2)
    return scores.view(q.shape[0], -1, groups, length).mean(2)


def chunked_scores(q: Tensor, k: Tensor, rows: int = 16) -> Tensor:
    """Grouped bmm over a few proxies at a time: the intermediates stay small."""
    w, length = q.shape[2], k.shape[2]
    total = q.new_zeros((k.shape[0], k.shape[1], length), dtype=torch.float32)
    for at in range(0, w, rows):
        part = q[:, :, at : at + rows].contiguous()
        n, first = part.shape[2], length - w + at
        logits = torch.matmul(
            part.view(q.shape[0], k.shape[1], -1, q.shape[3]) * q.shape[3] ** -0.5,
            k.transpose(2, 3),
        ).view(*k.shape[:2], -1, n, length)
        hidden = torch.ones(n, length - first, dtype=torch.bool, device=q.device).triu_(1)
        logits[..., first:].masked_fill_(hidden, float("-inf"))
        total += logits.softmax(-1, dtype=torch.float32).sum((2, 3))
    return total / (q.shape[1] // k.shape[1])


def _score_cases() -> Iterator[Case]:
    shapes = [
        ("llama", LLAMA, 4096, 40), ("llama", LLAMA, 4096, 409), ("llama", LLAMA, 16384, 163),
        ("llama", LLAMA, 32768, 327), ("llama", LLAMA, 32768, 3276), ("smollm2", SMOLLM2, 4096, 40),
        ("smollm2", SMOLLM2, 4096, 409), ("smollm2", SMOLLM2, 8000, 800),
    ]  # fmt: skip
    for dtype in DTYPES:
        size = dtype.itemsize
        for name, heads, length, w in shapes:
            shape = {**heads, "l": length, "w": w}
            whole = heads["hq"] * w * length * (size + 8)
            small = length <= 4096
            yield Case(
                op="proxy_scores", variant=name, shape=shape, dtype=dtype, inputs=_score_inputs,
                bytes=_score_bytes,
                flops=lambda s: 2 * s["hq"] * s["w"] * s["l"] * s["d"],
                peak=PEAK[dtype],
                providers=[
                    provider("tenfold", lambda i: ops.proxy_scores(i.q, i.k)[0]),
                    provider("eager:grouped", lambda i: grouped_scores(i.q, i.k), scratch=whole),
                    provider("eager:chunked", lambda i: chunked_scores(i.q, i.k)),
                    provider("eager:repeat", lambda i: repeated_scores(i.q, i.k), scratch=whole),
                    *([compiled(lambda i: grouped_scores(i.q, i.k), scratch=whole)] if small else []),
                ],
                reference=lambda i: chunked_scores(i.q.float(), i.k.float(), 64),
                # bf16 rounds logits in the eager forms; tenfold accumulates them in fp32.
                tolerance=1e-4 if dtype == torch.float32 else 2e-2,
                quick=length == 4096 and w == 40,
            )  # fmt: skip


# -- nacl_select -------------------------------------------------------------------------------------


def _counts(length: int) -> tuple[int, int, int, int]:
    """(sink, recent, topk, random) of the paper's 20 % row: 30 % of the budget top-k, 60 % random."""
    keep = int(KEPT * length)
    ends = keep // 10
    return ends // 2, ends - ends // 2, int(0.3 * keep), int(0.6 * keep)


def _select_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    return Inputs(scores=(2 * torch.rand(1, s["h"], s["l"], generator=made)).to(device, dtype))


def numpy_select(scores: Tensor, counts: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """The published code's way: a Python loop over heads, numpy's choice without replacement."""
    sink, recent, topk, random = counts
    made, out = np.random.default_rng(seed), []
    for row in scores.flatten(0, 1).cpu().numpy():
        inner = row[sink : len(row) - recent]
        best = np.argpartition(-inner, topk)[:topk]
        rest = np.setdiff1d(np.arange(len(inner)), best, assume_unique=True)
        weight = np.exp(inner[rest] - inner[rest].max())
        drawn = made.choice(rest, random, replace=False, p=weight / weight.sum())
        ends = np.arange(sink), np.arange(len(row) - recent, len(row))
        out.append(np.sort(np.concatenate([ends[0], best + sink, drawn + sink, ends[1]])))
    return torch.from_numpy(np.stack(out)).view(*scores.shape[:2], -1)


def torch_select(scores: Tensor, counts: tuple[int, int, int, int]) -> Tensor:
    """Plain torch: top-k, then Gumbel top-k of the rest, then a sort."""
    sink, recent, topk, random = counts
    length = scores.shape[-1]
    inner = scores[..., sink : length - recent]
    best = inner.topk(topk, sorted=False).indices
    noisy = inner - torch.empty_like(inner).exponential_().log_()
    noisy.scatter_(-1, best, float("-inf"))
    drawn = noisy.topk(random, sorted=False).indices
    at = torch.arange(length, device=scores.device).expand(*scores.shape[:2], -1)
    first, last = at[..., :sink], at[..., length - recent :]
    return torch.cat([first, best + sink, drawn + sink, last], -1).sort(-1).values


def _same_rule(got: Tensor, want: Tensor, inputs: Inputs) -> float:
    """Draws differ between generators: what must agree is everything that is not drawn."""
    if got.shape != want.shape or not bool((got.diff(dim=-1) > 0).all()):
        return float("inf")
    scores = inputs.scores
    sink, recent, topk, _ = _counts(scores.shape[-1])
    inner = scores[..., sink : scores.shape[-1] - recent]
    best = inner.topk(topk).indices + sink
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, got.to(scores.device), True)
    fixed = kept[..., :sink].all() & kept[..., scores.shape[-1] - recent :].all()
    return 0.0 if bool(fixed & kept.gather(-1, best).all()) else float("inf")


def _select_cases() -> Iterator[Case]:
    for length in (4096, 32768, 131072):
        counts = _counts(length)
        yield Case(
            op="nacl_select", variant="paper_20", shape={"h": 8, "l": length}, dtype=torch.float32,
            inputs=_select_inputs,
            bytes=lambda s, size: s["h"] * (size * s["l"] + 8 * sum(_counts(s["l"]))),
            providers=[
                provider("tenfold", lambda i, c=counts: ops.nacl_select(i.scores, *c)[0]),
                provider("eager:torch", lambda i, c=counts: torch_select(i.scores, c)),
                provider("peer:numpy", lambda i, c=counts: numpy_select(i.scores, c), graph=False),
            ],
            reference=lambda i, c=counts: reference.nacl_select(i.scores, *c)[0],
            agree=_same_rule, tolerance=0.0, quick=length == 4096,
        )  # fmt: skip


# -- kv_gather, kv_compact_ --------------------------------------------------------------------------


def _move_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    h, length, d, c = s["h"], s["l"], s["d"], s["c"]
    made = torch.Generator().manual_seed(2)
    idx = torch.rand(1, h, length, generator=made).argsort(-1)[..., :c].sort(-1).values
    flat = (idx + torch.arange(h)[None, :, None] * length).view(-1)
    return Inputs(
        k=_randn(1, h, length, d, dtype=dtype, device=device),
        v=_randn(1, h, length, d, dtype=dtype, device=device, seed=1),
        idx=idx.to(device), flat=flat.to(device),
    )  # fmt: skip


def _move_bytes(s: Shape, size: int) -> int:
    return 4 * s["h"] * s["c"] * s["d"] * size + 8 * s["h"] * s["c"]


def _index_select(i: Inputs) -> tuple[Tensor, Tensor]:
    (b, h, _, d), c = i.k.shape, i.idx.shape[-1]
    taken = (t.view(-1, d).index_select(0, i.flat) for t in (i.k, i.v))
    k, v = (t.view(b, h, c, d) for t in taken)
    return k, v


def _gather(i: Inputs) -> tuple[Tensor, Tensor]:
    where = i.idx[..., None].expand(-1, -1, -1, i.k.shape[-1])
    return i.k.gather(2, where), i.v.gather(2, where)


def _clone(i: Inputs) -> tuple[Tensor, Tensor]:
    """As many bytes, from one contiguous place."""
    rows, d = i.flat.shape[0], i.k.shape[-1]
    return i.k.view(-1, d)[:rows].clone(), i.v.view(-1, d)[:rows].clone()


def _copy_into_place(i: Inputs) -> None:
    """As many bytes, contiguous, from the cache's back half into its front half."""
    rows, d = i.flat.shape[0], i.k.shape[-1]
    for t in (i.k, i.v):
        flat = t.view(-1, d)
        flat[:rows].copy_(flat[flat.shape[0] - rows :])


def _compact_by_index(i: Inputs) -> None:
    for t, new in zip((i.k, i.v), _index_select(i)):
        t[:, :, : new.shape[2]].copy_(new)


def _head_of(got: Any, want: Any, inputs: Inputs) -> float:
    """In place: only the first C slots are defined."""
    c = inputs.idx.shape[-1]
    return relative_error([t[:, :, :c] for t in got], [t[:, :, :c] for t in want])


def _compact_reference(i: Inputs) -> None:
    reference.kv_compact_(i.k, i.v, i.idx)


def _move_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for name, heads, length in (
            ("llama", LLAMA, 4096), ("llama", LLAMA, 32768), ("smollm2", SMOLLM2, 4096),
        ):  # fmt: skip
            shape = {"h": heads["hkv"], "d": heads["d"], "l": length, "c": int(KEPT * length)}
            common: dict[str, Any] = {
                "variant": name, "shape": shape, "dtype": dtype, "inputs": _move_inputs,
                "bytes": _move_bytes, "tolerance": 0.0, "quick": length == 4096,
            }  # fmt: skip
            yield Case(
                op="kv_gather",
                providers=[
                    provider("tenfold", lambda i: ops.kv_gather(i.k, i.v, i.idx)),
                    provider("eager:index_select", _index_select),
                    provider("eager:index_select+clone",
                             lambda i: tuple(t.clone() for t in _index_select(i)), "bound"),
                    provider("eager:gather", _gather),
                    provider("clone", _clone, "bound"),
                    *([compiled(_index_select)] if length == 4096 else []),
                ],
                reference=lambda i: reference.kv_gather(i.k, i.v, i.idx), **common,
            )  # fmt: skip
            yield Case(
                op="kv_compact_", mode="inplace", mutates=("k", "v"), agree=_head_of,
                providers=[
                    provider("tenfold", lambda i: ops.kv_compact_(i.k, i.v, i.idx)),
                    provider("eager:index_select", _compact_by_index),
                    provider("copy_", _copy_into_place, "bound"),
                ],
                reference=_compact_reference, **common,
            )  # fmt: skip


# -- nacl_evict --------------------------------------------------------------------------------------


def _evict_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return Inputs(
        **vars(_score_inputs(s, dtype, device)),
        v=_randn(1, s["hkv"], s["l"], s["d"], dtype=dtype, device=device, seed=3),
    )


def _evict_eager(i: Inputs) -> tuple[Tensor, Tensor]:
    scores = chunked_scores(i.q, i.k)
    idx = torch_select(scores, _counts(i.k.shape[2]))
    where = idx[..., None].expand(-1, -1, -1, i.k.shape[-1])
    return i.k.gather(2, where), i.v.gather(2, where)


def _same_shapes(got: Any, want: Any, _: Inputs) -> float:
    """The draws differ: shapes and dtypes agree, and every kept row is finite."""
    pairs = zip(got, want, strict=True)
    good = all(g.shape == w.shape and g.dtype == w.dtype and g.isfinite().all() for g, w in pairs)
    return 0.0 if good else float("inf")


def _evict_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for name, heads, length, w in (("llama", LLAMA, 32768, 32), ("smollm2", SMOLLM2, 4096, 32)):
            shape = {**heads, "l": length, "w": w}
            sink, recent, topk, random = _counts(length)
            parts = {"n_sink": sink, "n_recent": recent, "n_topk": topk, "n_random": random}

            def run(i: Inputs, parts: dict[str, int] = parts) -> tuple[Tensor, Tensor]:
                return ops.nacl_evict(i.q, i.k, i.v, **parts)[:2]

            yield Case(
                op="nacl_evict", variant=name, shape=shape, dtype=dtype, inputs=_evict_inputs,
                bytes=lambda s, size: size * s["hkv"] * s["d"] * (s["l"] + 4 * int(KEPT * s["l"])),
                flops=lambda s: 2 * s["hq"] * s["w"] * s["l"] * s["d"], peak=PEAK[dtype],
                providers=[
                    provider("tenfold", run),
                    provider("eager:chunked", _evict_eager, agree=_same_shapes),
                ],
                reference=run, tolerance=0.0, quick=length == 4096,
            )  # fmt: skip


# -- ragged_decode -----------------------------------------------------------------------------------


def _decode_inputs(
    s: Shape, dtype: torch.dtype, device: torch.device, equal: bool = True
) -> Inputs:
    heads, d = s["hkv"], s["d"]
    made = torch.Generator().manual_seed(5)
    lens = torch.full((heads,), s["c"])
    if not equal:  # per-head budgets from half to one and a half of the mean
        lens = (s["c"] * (0.5 + torch.rand(heads, generator=made))).long()
        lens[-1] += s["c"] * heads - lens.sum()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])
    total, longest = int(offsets[-1]), int(lens.max())
    k = _randn(total, d, dtype=dtype, device=device)
    v = _randn(total, d, dtype=dtype, device=device, seed=1)
    inputs = Inputs(
        q=_randn(1, s["hq"], 1, d, dtype=dtype, device=device, seed=2), k=k, v=v,
        offsets=offsets.to(device), bounds=offsets.tolist(),
    )  # fmt: skip
    if not equal:  # what a rectangular cache would hold
        inputs.pk, inputs.pv = (t.new_zeros(1, heads, longest, d) for t in (k, v))
        for h, (a, b) in enumerate(itertools.pairwise(offsets)):
            inputs.pk[0, h, : b - a], inputs.pv[0, h, : b - a] = k[a:b], v[a:b]
        slot = torch.arange(longest)
        inputs.mask = (slot >= lens[:, None])[None, :, None].to(device)
    return inputs


def _bmm_decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped: the query heads of a KV head are the rows of one small matrix product."""
    b, hq, _, d = q.shape
    grouped = q.view(b, k.shape[1], -1, d) * d**-0.5
    logits = torch.matmul(grouped, k.transpose(-1, -2))
    if mask is not None:
        logits.masked_fill_(mask, float("-inf"))
    weights = logits.softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(weights, v).view(b, hq, 1, -1)


def _rectangle(i: Inputs) -> tuple[Tensor, Tensor]:
    heads, d = len(i.bounds) - 1, i.k.shape[-1]
    return i.k.view(1, heads, -1, d), i.v.view(1, heads, -1, d)


def _sdpa_decode(i: Inputs) -> Tensor:
    k, v = _rectangle(i)
    return torch.nn.functional.scaled_dot_product_attention(i.q, k, v, enable_gqa=True)


def _loop_decode(i: Inputs) -> Tensor:
    """One small attention per KV head."""
    groups = i.q.shape[1] // (len(i.bounds) - 1)
    parts = []
    for h, (a, b) in enumerate(zip(i.bounds, i.bounds[1:])):
        q = i.q[:, h * groups : (h + 1) * groups]
        parts.append(_bmm_decode(q, i.k[None, None, a:b], i.v[None, None, a:b]))
    return torch.cat(parts, 1)


def _decode_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for name, heads, kept, equal in (
            ("llama", LLAMA, 6553, True), ("llama-ragged", LLAMA, 6553, False),
            ("smollm2", SMOLLM2, 819, True), ("smollm2-ragged", SMOLLM2, 819, False),
        ):  # fmt: skip
            shape = {**heads, "c": kept}
            forms = [provider("eager:loop", _loop_decode)]
            if equal:
                forms += [
                    provider("eager:bmm", lambda i: _bmm_decode(i.q, *_rectangle(i))),
                    provider("eager:sdpa", _sdpa_decode),
                    compiled(lambda i: _bmm_decode(i.q, *_rectangle(i))),
                ]
            else:
                forms.append(
                    provider("eager:padded", lambda i: _bmm_decode(i.q, i.pk, i.pv, i.mask))
                )
            yield Case(
                op="ragged_decode", variant=name, shape=shape, dtype=dtype,
                inputs=functools.partial(_decode_inputs, equal=equal),
                bytes=lambda s, size: 2 * s["hkv"] * s["c"] * s["d"] * size
                + 2 * s["hq"] * s["d"] * size + 4 * s["hq"],
                flops=lambda s: 4 * s["hq"] * s["c"] * s["d"], peak=PEAK[dtype],
                providers=[
                    provider("tenfold", lambda i: ops.ragged_decode(i.q, i.k, i.v, i.offsets)[0]),
                    *forms,
                ],
                reference=lambda i: reference.ragged_decode(
                    i.q.float(), i.k.float(), i.v.float(), i.offsets)[0],
                tolerance=1e-4 if dtype == torch.float32 else 2e-2,
                quick=name.startswith("smollm2"),
            )  # fmt: skip


def cases() -> list[Case]:
    """All cases of the family, in the order of the table."""
    made: tuple[Callable[[], Iterator[Case]], ...] = (
        _score_cases, _select_cases, _move_cases, _evict_cases, _decode_cases,
    )  # fmt: skip
    return [case for part in made for case in part()]
