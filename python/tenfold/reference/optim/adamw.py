# SPDX-License-Identifier: Apache-2.0
"""Definitions of masked AdamW, with states in float32, bfloat16 or float16, and in 8 bits.

The arithmetic is that of ``torch.optim.AdamW(fused=True)``: all in float32, scalars in double rounded
once. It is spelled out here so that the result is exact, bit by bit, on every machine:

    p  = p * f32(1 - lr * wd)                     only if wd != 0
    m  = fma(f32(1 - b1), g - m, m)               if f32(1 - b1) < 0.5, else g - b1 * (g - m)
    v  = fma(f32(1 - b2) * g, g, v * f32(b2))
    d  = sqrt(v) / f32(sqrt(1 - b2^t)) + f32(eps)
    p  = p + (f32(-lr / (1 - b1^t)) * m) / d
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.reference.optim.masks import storage_flat, trained_elements
from tenfold.reference.random import philox4x32_10

__all__ = [
    "STATE_BLOCK",
    "dequantize",
    "dynamic_code",
    "fma",
    "masked_adamw_",
    "masked_adamw_8bit_",
    "nearest_code",
    "random_halves",
    "stochastic_bf16",
]

STATE_BLOCK = 256  # elements that share one absmax of an 8-bit state


def f32(x: float) -> Tensor:
    """A double rounded to float32, 0-d."""
    return torch.tensor(x, dtype=torch.float32)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32, rounded once.

    In float64 the product is exact and the sum is not, and rounding it twice may be wrong by one unit.
    So the sum is rounded to odd first: if it is inexact, to that neighbour whose last bit is set.
    Then the second rounding sees on which side of a tie the exact value was (Boldo, Melquiond 2008).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)  # total + error is exact (Knuth)
    even = total.view(torch.int64) & 1 == 0
    neighbour = torch.nextafter(total, torch.copysign(torch.full_like(total, math.inf), error))
    wrong = even & (error != 0) & total.isfinite()
    return torch.where(wrong, neighbour, total).float()


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded; torch's own in float32 is not, on some machines. float64 has bits to spare."""
    return x.double().sqrt().float()


@dataclass(frozen=True)
class Update:
    """The hyper-parameters of one call, and the arithmetic for float32 vectors."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    maximize: bool
    grad_scale: Tensor | None
    clip_coef: Tensor | None

    def gradient(self, g: Tensor) -> Tensor:
        """Sign, then loss scale, then clipping."""
        g = -g.float() if self.maximize else g.float()
        g = g if self.grad_scale is None else g / self.grad_scale.float()
        return g if self.clip_coef is None else g * self.clip_coef.float()

    def __call__(
        self, t: int, p: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """p, m, v (and the largest v so far) after step number ``t``, the first being 1."""
        g = self.gradient(g)
        if self.weight_decay != 0:
            p = p * f32(1 - self.lr * self.weight_decay)
        weight = f32(1 - self.beta1)
        small = float(weight) < 0.5
        m = fma(weight, g - m, m) if small else fma(-f32(self.beta1), g - m, g)
        v = fma(f32(1 - self.beta2) * g, g, v * f32(self.beta2))
        v_max = None if v_max is None else torch.maximum(v_max, v)
        root = sqrt(v if v_max is None else v_max)
        d = root / f32(math.sqrt(1 - self.beta2**t)) + f32(self.eps)
        p = p + (f32(-self.lr / (1 - self.beta1**t)) * m) / d
        return p, m, v, v_max


def random_halves(index: Tensor, seed: int, tensor_id: int, t: int) -> Tensor:
    """16 random bits for each storage index: eight of them in one Philox block, low halves first."""
    row = index >> 3
    tail = (torch.tensor(x, device=index.device) for x in (tensor_id, t))
    words = torch.stack(philox4x32_10((row, row >> 32, *tail), seed))
    half = index & 7
    return words.gather(0, (half >> 1)[None])[0] >> (16 * (half & 1)) & 0xFFFF


def stochastic_bf16(x: Tensor, r: Tensor) -> Tensor:
    """float32 -> bfloat16: up with the probability of the cut-off part; Inf and NaN stay."""
    bits = (x.view(torch.int32).long() & 0xFFFFFFFF) + r & 0xFFFF0000
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)  # as a signed number
    rounded = bits.int().view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _rounded(p: Tensor, dtype: torch.dtype, index: Tensor, seed: int | None, tensor_id: int, t: int
             ) -> Tensor:  # fmt: skip
    if seed is None or dtype != torch.bfloat16:
        return p.to(dtype)
    return stochastic_bf16(p, random_halves(index, seed, tensor_id, t))


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    max_exp_avg_sqs: Sequence[Tensor] = (),
    prefixes: Sequence[Tensor | None] = (),
    *,
    mask_kind: str,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool = False,
    amsgrad: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
    stochastic_round: bool = False,
    seed: int = 0,
    mask_scope: str = "all",
    block_size: int = 256,
    tensor_ids: Sequence[int] = (),
) -> None:
    """AdamW on the trained elements, gathered in storage order; everything else stays.

    With a prefix the states of a tensor hold its trained elements only (compact states). With
    ``mask_scope="param_only"`` m and v of all elements are updated and only p is masked.
    """
    if found_inf is not None and float(found_inf) != 0:
        return
    update = Update(float(lr), beta1, beta2, weight_decay, eps, maximize, grad_scale, clip_coef)
    for i, p in enumerate(params):
        steps[i].add_(1)
        t = int(steps[i])
        mask = masks[i] if len(masks) else None
        trained = trained_elements(p, mask, mask_kind, block_size)
        moving = torch.ones_like(trained) if mask_scope == "param_only" else trained
        compact = len(prefixes) > 0 and prefixes[i] is not None
        states = [exp_avgs[i], exp_avg_sqs[i]] + ([max_exp_avg_sqs[i]] if amsgrad else [])
        flat = [storage_flat(s) for s in states]
        old = [s.float() if compact else s[moving].float() for s in flat]
        p_flat, index = storage_flat(p), moving.nonzero()[:, 0]
        p_new, *new = update(
            t, p_flat[moving].float(), storage_flat(grads[i])[moving], old[0], old[1],
            old[2] if amsgrad else None,
        )  # fmt: skip
        p_new = _rounded(p_new, p.dtype, index, seed if stochastic_round else None,
                         tensor_ids[i] if len(tensor_ids) else i, t)  # fmt: skip
        p_flat[trained] = p_new[trained[moving]]
        for s, x in zip(flat, new):
            s[slice(None) if compact else moving] = x.to(s.dtype)


def dynamic_code(signed: bool) -> Tensor:
    """Dettmers' dynamic code book of 256 float32 values, ascending (arXiv 2110.02861; bitsandbytes').

    The first bits of a code count leading zeros and stand for a power of ten, 1e-6 to 1; the rest are a
    linear fraction in (0.1, 1): fewer bits for smaller powers. 0 and 1 are codes of their own. Signed: the
    negative values too, with half as many fractions (-1 itself is missing).
    """
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (power + (not signed)) + 1)
        fractions = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (power - 6) * fractions).tolist()
        if signed:
            values += (-(10 ** (power - 6)) * fractions).tolist()
    return torch.tensor(sorted(values))


def dequantize(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """float32 values of a flat uint8 state whose blocks of ``STATE_BLOCK`` share one ``absmax``."""
    scale = absmax.repeat_interleave(STATE_BLOCK)[: codes.numel()]
    return code[codes.long()] * scale


def nearest_code(x: Tensor, code: Tensor) -> Tensor:
    """uint8 index of the nearest value of the ascending book ``code``; ties to the lower index."""
    middle = (code[:-1].double() + code[1:].double()) / 2
    return torch.searchsorted(middle, x.double().contiguous()).to(torch.uint8)


def _requantize_(codes: Tensor, absmax: Tensor, code: Tensor, trained: Tensor, x: Tensor) -> None:
    """Stores the new values ``x`` of the trained elements; only they count for the new absmax."""
    block = trained.nonzero()[:, 0] // STATE_BLOCK
    live = block.unique()
    largest = torch.zeros_like(absmax)
    largest.scatter_reduce_(0, block, x.abs(), "amax")
    absmax[live] = largest[live]
    scale = absmax[block]
    codes[trained] = nearest_code(torch.where(scale == 0, torch.zeros_like(x), x / scale), code)


def masked_adamw_8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    code1: Tensor,
    code2: Tensor,
    *,
    mask_kind: str,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
    stochastic_round: bool = False,
    seed: int = 0,
    block_size: int = 256,
    tensor_ids: Sequence[int] = (),
) -> None:
    """The same with uint8 states: dequantise, update in float32, quantise the trained elements again.

    A frozen element keeps its byte, but its block may get another absmax from its trained neighbours:
    its state is rescaled then. Only blocks without a trained element stay as they are.
    """
    if found_inf is not None and float(found_inf) != 0:
        return
    update = Update(float(lr), beta1, beta2, weight_decay, eps, maximize, grad_scale, clip_coef)
    for i, p in enumerate(params):
        steps[i].add_(1)
        t = int(steps[i])
        mask = masks[i] if len(masks) else None
        trained = trained_elements(p, mask, mask_kind, block_size)
        p_flat, index = storage_flat(p), trained.nonzero()[:, 0]
        q1, q2 = storage_flat(exp_avgs[i]), storage_flat(exp_avg_sqs[i])
        m = dequantize(q1, absmax1[i], code1)[trained]
        v = dequantize(q2, absmax2[i], code2)[trained]
        p_new, m, v, _ = update(
            t, p_flat[trained].float(), storage_flat(grads[i])[trained], m, v, None
        )
        p_flat[trained] = _rounded(p_new, p.dtype, index, seed if stochastic_round else None,
                                   tensor_ids[i] if len(tensor_ids) else i, t)  # fmt: skip
        _requantize_(q1, absmax1[i], code1, trained, m)
        _requantize_(q2, absmax2[i], code2, trained, v)
