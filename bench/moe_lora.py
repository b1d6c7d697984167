# SPDX-License-Identifier: Apache-2.0
"""Cases of ``moe_lora_swiglu_mlp``: part of the family ``moe``.

Experts that are LoRA pairs on one shared, frozen block. Useful FLOPs: those of the shared block once per token,
6 T d f, and 6 r (d + f) per slot of the pairs; their gradients once more those, and the block's by its input.
``eager:loop`` does so too; ``peer:peft`` is what PEFT's layers would do, expert by expert, with base and pair.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops

from .case import Case, Inputs, Shape, provider, relative_error
from .gradients import autograd, with_gradients
from .moe_batch import BF16, DTYPES, FP32, PEAK, randn, routed, slots, widened
from .moe_experts import gradients_agree, weighted

BASE = {"n": 8, "k": 2, "d": 1024, "f": 2816}
TOKENS = (1, 128, 2048)
RANKS = (16, 64)
SCALE = 2.0
PARTS = ("gate", "up", "down")
PAIRS = tuple(f"{ab}_{part}" for ab in "ab" for part in PARTS)
LEAVES = ("x", *PAIRS, "weight")


def _sizes(s: Shape, part: str) -> tuple[int, int]:
    """(out, in)"""
    return (s["d"], s["f"]) if part == "down" else (s["f"], s["d"])


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    weight, index = routed(s["t"], s["n"], s["k"])
    # A single token's gradients of its weights are two sums, which under this seed do not nearly cancel.
    made = {"x": randn(s["t"], s["d"], seed=1), "grad": randn(s["t"], s["d"], seed=12)}
    for seed, part in enumerate(PARTS, 3):
        rows, cols = _sizes(s, part)
        made[f"w_{part}"] = randn(rows, cols, seed=seed, scale=cols**-0.5)
        made[f"a_{part}"] = randn(s["n"], s["r"], cols, seed=seed + 3, scale=cols**-0.5)
        made[f"b_{part}"] = randn(s["n"], rows, s["r"], seed=seed + 6, scale=0.3 * s["r"] ** -0.5)
    return Inputs(weight=weight.to(device), index=index.to(device),
                  **{name: t.to(device, dtype) for name, t in made.items()})  # fmt: skip


def ours(i: Inputs) -> Tensor:
    a, b = ([getattr(i, f"{ab}_{part}") for part in PARTS] for ab in "ab")
    return ops.moe_lora_swiglu_mlp(i.x, i.w_gate, i.w_up, i.w_down, a, b, SCALE, i.index, i.weight)


def _grouped(i: Inputs) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens and weights of the sorted slots, and how many each expert has."""
    order = i.index.flatten().argsort(stable=True)
    counts = torch.bincount(i.index.flatten(), minlength=i.a_gate.shape[0]).tolist()
    factors = i.weight.flatten().index_select(0, order)[:, None].to(i.x.dtype)
    return order.div(i.index.shape[1], rounding_mode="floor"), factors, counts


def _low(rows: Tensor, i: Inputs, part: str, counts: list[int]) -> Tensor:
    """``SCALE * B[e] A[e] row`` of sorted rows."""
    pairs = zip(rows.split(counts), getattr(i, f"a_{part}").unbind(0),
                getattr(i, f"b_{part}").unbind(0))  # fmt: skip
    return torch.cat([F.linear(F.linear(x, a), b) for x, a, b in pairs if x.shape[0]]) * SCALE


def loop(i: Inputs) -> Tensor:
    """The shared products once per token; only the pairs are made expert by expert."""
    token, factors, counts = _grouped(i)
    rows = i.x.index_select(0, token)
    gate = F.linear(i.x, i.w_gate).index_select(0, token) + _low(rows, i, "gate", counts)
    up = F.linear(i.x, i.w_up).index_select(0, token) + _low(rows, i, "up", counts)
    a = F.silu(gate) * up * factors
    summed = torch.zeros_like(a[: i.x.shape[0]]).index_add(0, token, a)
    return F.linear(summed, i.w_down).index_add(0, token, _low(a, i, "down", counts))


def peft(i: Inputs) -> Tensor:
    """A block of three LoRA layers per expert."""
    token, factors, counts = _grouped(i)
    parts = []
    for e, x in enumerate(i.x.index_select(0, token).split(counts)):
        if x.shape[0] == 0:
            continue

        def layer(x: Tensor, part: str, e: int = e) -> Tensor:
            a, b = (getattr(i, f"{ab}_{part}")[e] for ab in "ab")
            return F.linear(x, getattr(i, f"w_{part}")) + F.linear(F.linear(x, a), b) * SCALE

        parts.append(layer(F.silu(layer(x, "gate")) * layer(x, "up"), "down"))
    return torch.zeros_like(i.x).index_add(0, token, torch.cat(parts) * factors)


def _flops(s: Shape, gradient: bool) -> int:
    block, pairs = 6 * s["t"] * s["d"] * s["f"], 6 * slots(s) * s["r"] * (s["d"] + s["f"])
    return 2 * block + 3 * pairs if gradient else block + pairs


def _bytes(s: Shape, size: int, gradient: bool) -> int:
    pairs = 3 * s["n"] * s["r"] * (s["d"] + s["f"])
    moved = 3 * s["d"] * s["f"] + pairs + 2 * s["t"] * s["d"]
    return size * (moved + (pairs + 2 * s["t"] * s["d"] if gradient else 0)) + 12 * slots(s)


def _case(tokens: int, rank: int, dtype: torch.dtype, gradient: bool) -> Case:
    if gradient:
        forms = [autograd("tenfold", weighted(ours), *LEAVES),
                 autograd("eager:loop", weighted(loop), *LEAVES),
                 autograd("peer:peft", weighted(peft), *LEAVES)]  # fmt: skip
    else:
        forms = [provider("tenfold", ours), provider("eager:loop", loop), provider("peer:peft", peft)]  # fmt: skip
    defined = with_gradients(weighted(loop), *LEAVES) if gradient else loop
    return Case(
        op="moe_lora_swiglu_mlp", variant="gradient" if gradient else "",
        shape={"t": tokens, **BASE, "r": rank}, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: _bytes(s, size, gradient), flops=lambda s: _flops(s, gradient),
        traffic="copy" if gradient else "read", peak=PEAK[dtype], providers=forms,
        reference=lambda i: defined(widened(i)),
        agree=gradients_agree if gradient else relative_error,
        tolerance=1e-4 if dtype == FP32 else 2e-2,
        quick=tokens == 128 and rank == RANKS[0] and dtype == BF16 and not gradient,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for gradient in (False, True):
        for dtype in DTYPES:
            for tokens in TOKENS:
                for rank in RANKS if tokens == TOKENS[-1] else RANKS[:1]:
                    yield _case(tokens, rank, dtype, gradient)
