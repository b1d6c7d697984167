# SPDX-License-Identifier: Apache-2.0
"""Cases of ``macro_pool``, ``macro_gae``, ``gae`` and ``ma_ppo_prepare``: part of the family ``rl``.

Macro actions have five tokens, rows half to all of their width. Peers are the loops of the method's
published code (a macro action at a time) and of trainers (a column at a time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Function, Inputs, Provider, Shape, compiled, provider
from .rl_batch import (
    BETA,
    GAMMA,
    LAM,
    SCORE_CLIP,
    SIZES,
    lengths,
    mask_of,
    num_segments,
    randn,
    segments_of,
)
from .rl_scans import Scan, chunked_scan, column_scan, filter_scan, next_of, padded

FP32 = torch.float32
C = GAMMA * LAM
LONG = {"b": 64, "r": 4096}
RULE = {"gamma": GAMMA, "lam": LAM}


def _built(name: str, form: Callable[[Inputs, Scan], Any],
           scan_of: Callable[[Inputs], Scan], **extra: Any) -> Provider:  # fmt: skip
    """A form around one of the scans, whose matrices are made beforehand."""

    def build(i: Inputs) -> Function:
        scan = scan_of(i)
        return lambda now: form(now, scan)

    return Provider(name, name.split(":")[0], build, **extra)


def _scans(form: Callable[[Inputs, Scan], Any], width: int, compiles: bool,
           graph: bool = True) -> list[Provider]:  # fmt: skip
    """The form with each scan."""

    def chunks(i: Inputs) -> Scan:
        return chunked_scan(C, width, i.value.device)

    def build(i: Inputs) -> Function:
        scan = chunks(i)
        return compiled(lambda now: form(now, scan)).build(i)

    found = [
        _built("eager:chunks", form, chunks, graph=graph),
        _built("eager:columns", form, lambda _: column_scan(C), graph=graph),
        _built("peer:lfilter", form, filter_scan(C), graph=False),
    ]
    return [*found, Provider("compile", "compile", build)] if compiles else found


# -- macro_pool --------------------------------------------------------------------------------------


def _pool_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    seg, _ = segments_of(s)
    return Inputs(
        x=randn(s["b"], s["r"], seed=1).to(device, dtype), seg=seg.to(device), num=num_segments(s)
    )


def _places(seg: Tensor, bin_at: int) -> Tensor:
    """Where tokens are added up: masked ones in a bin behind the segments."""
    return torch.where(seg >= 0, seg, bin_at).long()


def pool_eager(i: Inputs) -> Tensor:
    """Sums and lengths by ``scatter_add_``."""
    at = _places(i.seg, i.num)
    total = i.x.new_zeros(at.shape[0], i.num + 1).scatter_add_(1, at, i.x)
    count = torch.zeros_like(total).scatter_add_(1, at, torch.ones_like(i.x))
    return (total / count.clamp_min_(1))[:, : i.num]


def pool_mean(i: Inputs) -> Tensor:
    """``scatter_reduce_`` with means."""
    out = i.x.new_zeros(i.x.shape[0], i.num + 1)
    at = _places(i.seg, i.num)
    return out.scatter_reduce_(1, at, i.x, "mean", include_self=False)[:, : i.num]


def pool_loop(i: Inputs) -> Tensor:
    out = i.x.new_zeros(i.x.shape[0], i.num)
    for row, (x, seg) in enumerate(zip(i.x, i.seg)):
        _, counts = seg[seg >= 0].unique_consecutive(return_counts=True)
        for number, part in enumerate(x[seg >= 0].split(counts.tolist())):
            out[row, number] = part.mean()
    return out


def _pool_cases() -> Iterator[Case]:
    for shape in SIZES:
        first = shape == SIZES[0]
        yield Case(
            op="macro_pool", variant="equal", shape=shape, dtype=FP32, inputs=_pool_inputs,
            bytes=lambda s, size: s["b"] * (s["r"] * (size + 4) + num_segments(s) * size),
            providers=[
                provider("tenfold", lambda i: ops.macro_pool(i.x, i.seg, i.num, validate=False)),
                provider("eager:scatter", pool_eager), provider("eager:mean", pool_mean),
                *([provider("peer:loop", pool_loop, graph=False), compiled(pool_eager)]
                  if first else []),
            ],
            reference=lambda i: reference.macro_pool(i.x, i.seg, i.num), quick=first,
        )  # fmt: skip


# -- macro_gae, gae ----------------------------------------------------------------------------------


def _gae_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Values and rewards of steps; ``mask`` and ``nseg`` say the same."""
    value, reward = (randn(s["b"], s["r"], seed=k).to(device, dtype) for k in (1, 2))
    mask = mask_of(s)
    if s.get("holes"):
        drawn = torch.rand(s["b"], s["r"], generator=torch.Generator().manual_seed(3))
        mask &= drawn > 0.1
    return Inputs(value=value, reward=reward, mask=mask.to(device),
                  nseg=lengths(s["b"], s["r"]).int().to(device))  # fmt: skip


def _gae(value: Tensor, reward: Tensor, mask: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
    """Without holes. What is not valid becomes zero steps behind the end."""
    v = torch.where(mask, value, 0.0)
    adv = scan(torch.where(mask, reward + GAMMA * next_of(v) - v, 0.0))
    return adv, adv + v


def gae_masked(i: Inputs, scan: Scan) -> tuple[Tensor, Tensor]:
    return _gae(i.value, i.reward, i.mask, scan)


def gae_counted(i: Inputs, scan: Scan) -> tuple[Tensor, Tensor]:
    at = torch.arange(i.value.shape[1], device=i.value.device)
    return _gae(i.value, i.reward, at < i.nseg[:, None], scan)


def gae_holes(i: Inputs, scan: Scan) -> tuple[Tensor, Tensor]:
    """Valid steps moved together, then back."""
    width = i.mask.shape[1]
    at = torch.where(i.mask, i.mask.cumsum(1) - 1, width)
    v, r = (x.new_zeros(x.shape[0], width + 1).scatter_(1, at, x)[:, :width]
            for x in (i.value, i.reward))  # fmt: skip
    there = torch.arange(width, device=at.device) < i.mask.sum(1, keepdim=True)
    made = _gae(v, r, there, scan)
    return tuple(torch.nn.functional.pad(x, (0, 1)).gather(1, at) for x in made)  # type: ignore[return-value]


def gae_loop(i: Inputs) -> tuple[Tensor, Tensor]:
    """A column at a time; at a masked step value and advantage of the next one are carried on."""
    mask = i.mask.float()
    value, reward = torch.where(i.mask, i.value, 0.0), torch.where(i.mask, i.reward, 0.0)
    later, carry, columns = torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0]), []
    for t in reversed(range(value.shape[1])):
        m = mask[:, t]
        adv = reward[:, t] + GAMMA * later - value[:, t] + C * carry
        later = value[:, t] * m + (1 - m) * later
        carry = adv * m + (1 - m) * carry
        columns.append(adv)
    adv = torch.stack(columns[::-1], 1) * mask
    return adv, adv + value


def _reference_gae(i: Inputs) -> tuple[Tensor, Tensor]:
    """The definition visits every step of every row from Python; the loop over columns equals it."""
    return gae_loop(Inputs(value=i.value.double(), reward=i.reward.double(), mask=i.mask))


def _gae_cases() -> Iterator[Case]:
    for shape in (*SIZES, LONG):
        first = shape == SIZES[0]
        common: dict[str, Any] = {
            "shape": shape, "dtype": FP32, "inputs": _gae_inputs, "reference": _reference_gae,
            "quick": first,
        }  # fmt: skip
        yield Case(
            op="macro_gae", bytes=lambda s, size: s["b"] * (4 * s["r"] * size + 4),
            providers=[
                provider("tenfold",
                         lambda i: ops.macro_gae(i.value, i.reward, i.nseg, None, **RULE)),
                *_scans(gae_counted, shape["r"], first), provider("peer:loop", gae_loop),
            ], **common,
        )  # fmt: skip
        yield _gae_case(gae_masked, first, **common)
    yield _gae_case(gae_holes, False, **common | {"shape": {**SIZES[0], "holes": 1}})


def _gae_case(form: Callable[[Inputs, Scan], Any], compiles: bool, **about: Any) -> Case:
    return Case(
        op="gae", bytes=lambda s, size: s["b"] * s["r"] * (4 * size + 1),
        providers=[
            provider("tenfold", lambda i: ops.gae(i.value, i.reward, i.mask, **RULE)),
            *_scans(form, about["shape"]["r"], compiles), provider("peer:loop", gae_loop),
        ], **about,
    )  # fmt: skip


# -- ma_ppo_prepare ----------------------------------------------------------------------------------


def _prepare_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    sizes = (s["b"], s["r"])
    seg, nseg = segments_of(s)
    old = -randn(*sizes, seed=1).abs()
    made = Inputs(old=old, ref=old + 0.2 * randn(*sizes, seed=2), value=randn(*sizes, seed=3),
                  score=2 * randn(s["b"], seed=4))  # fmt: skip
    made = Inputs(**{name: x.to(device, dtype) for name, x in vars(made).items()})
    made.seg, made.nseg, made.num = seg.to(device), nseg.to(device), num_segments(s)
    return made


def prepare_eager(i: Inputs, scan: Scan) -> tuple[Tensor, ...]:
    """Scatter to macro actions, one scan, gather; no wider than the longest row's macro actions."""
    rows, width = i.seg.shape
    num = padded(i.num + 1)
    at = _places(i.seg, num - 1)
    zeros = i.old.new_zeros(rows, num)
    k, v, count = (
        zeros.scatter_add(1, at, x) for x in (i.old - i.ref, i.value, torch.ones_like(i.old))
    )
    for x in (k, v, count):
        x[:, -1] = 0.0
    value = v / count.clamp_min(1)
    reward = (-BETA * k).scatter_add_(
        1, i.nseg.long()[:, None] - 1, i.score.clamp(-SCORE_CLIP, SCORE_CLIP)[:, None]
    )
    adv_m = scan(reward + GAMMA * next_of(value) - value)
    ret_m = adv_m + value
    wide = [torch.nn.functional.pad(x[:, : i.num], (0, width - i.num)) for x in (adv_m, ret_m)]
    return adv_m.gather(1, at), ret_m.gather(1, at), *wide, k.sum(1) / count.sum(1)


def _packed_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The valid tokens of the rows, one row after the other."""
    i, mask = _prepare_inputs(s, dtype, device), mask_of(s).to(device)
    tokens = {name: getattr(i, name)[mask] for name in ("old", "ref", "value", "seg")}
    cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return Inputs(**{**vars(i), **tokens}, cu=cu, width=s["r"])


def _padded(i: Inputs) -> tuple[Inputs, Tensor]:
    """Rows of the packed tokens, and which of their places are filled."""
    at = torch.arange(i.width, device=i.cu.device)
    mask = at < i.cu.diff()[:, None]

    def rows(x: Tensor) -> Tensor:
        fill = 0 if x.is_floating_point() else -1
        return x.new_full(mask.shape, fill).masked_scatter_(mask, x)

    tokens = {name: rows(getattr(i, name)) for name in ("old", "ref", "value", "seg")}
    return Inputs(**{**vars(i), **tokens}), mask


def _unpadded(found: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
    """Macro actions, too, are packed into the places of their row."""
    return *(x[mask] for x in found[:4]), found[4]


def packed_eager(i: Inputs, scan: Scan) -> tuple[Tensor, ...]:
    """To rows and back."""
    rows, mask = _padded(i)
    return _unpadded(prepare_eager(rows, scan), mask)


def packed_loop(i: Inputs) -> tuple[Tensor, ...]:
    rows, mask = _padded(i)
    return _unpadded(prepare_loop(rows), mask)


def prepare_loop(i: Inputs) -> tuple[Tensor, ...]:
    """Row by row and macro action by macro action, as the method's code does it for one row."""
    adv, ret, adv_m, ret_m = (torch.zeros_like(i.old) for _ in range(4))
    kl_row = torch.zeros_like(i.score)
    for b, num in enumerate(i.nseg.tolist()):
        on = i.seg[b] >= 0
        k, value = (i.old[b] - i.ref[b])[on], i.value[b][on]
        sizes = i.seg[b][on].unique_consecutive(return_counts=True)[1].tolist()
        values = [x.mean().item() for x in value.split(sizes)]
        rewards = [-BETA * x.sum().item() for x in k.split(sizes)]
        rewards[-1] += i.score[b].clamp(-SCORE_CLIP, SCORE_CLIP).item()
        carry, later, found = 0.0, 0.0, []
        for v, r in zip(reversed(values), reversed(rewards)):
            carry, later = r + GAMMA * later - v + C * carry, v
            found.append(carry)
        adv_m[b, :num] = torch.tensor(found[::-1])
        ret_m[b, :num] = adv_m[b, :num] + torch.tensor(values)
        counts = torch.tensor(sizes)
        adv[b, on] = adv_m[b, :num].repeat_interleave(counts)
        ret[b, on] = ret_m[b, :num].repeat_interleave(counts)
        kl_row[b] = k.mean()
    return adv, ret, adv_m, ret_m, kl_row


def _prepare_case(shape: Shape, variant: str = "") -> Case:
    packed, first = variant == "packed", shape == SIZES[0]
    form, loop = (packed_eager, packed_loop) if packed else (prepare_eager, prepare_loop)

    def run(i: Inputs) -> tuple[Tensor, ...]:
        extra = {"cu_seqlens": i.cu} if packed else {}
        return ops.ma_ppo_prepare(
            i.old, i.ref, i.value, i.score, i.seg, i.nseg, BETA, score_clip=SCORE_CLIP,
            validate=variant == "checked", **RULE, **extra,
        )  # fmt: skip

    def tokens(s: Shape) -> int:
        return int(lengths(s["b"], s["r"]).sum()) if packed else s["b"] * s["r"]

    return Case(
        op="ma_ppo_prepare", variant=variant, shape=shape, dtype=FP32,
        inputs=_packed_inputs if packed else _prepare_inputs,
        bytes=lambda s, size: tokens(s) * (7 * size + 4) + s["b"] * (2 * size + 4),
        providers=[
            provider("tenfold", run, graph=variant != "checked"),
            # Boolean masks wait for a GPU.
            *_scans(form, padded(num_segments(shape) + 1), first and not variant, not packed),
            *([provider("peer:loop", loop, graph=False)] if shape != LONG and not variant else []),
        ],
        reference=loop, quick=first,
    )  # fmt: skip


def _prepare_cases() -> Iterator[Case]:
    for variant in ("", "checked", "packed"):
        yield _prepare_case(SIZES[0], variant)
    for shape in ({"b": 256, "r": 512}, LONG):
        yield _prepare_case(shape)


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    yield from _pool_cases()
    yield from _gae_cases()
    yield from _prepare_cases()
