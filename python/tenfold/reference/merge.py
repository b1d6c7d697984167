# SPDX-License-Identifier: Apache-2.0
"""Definitions of the merge ops: DARE, TIES, linear and spherical merging, and the Gram matrix of deltas.

A task vector is ``d_e = expert_e - base``, flattened. Definitions compute in float32 (float64 if the inputs
are), experts in order, and round once to the dtype of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.reference.numbers import work
from tenfold.reference.random import name_stream, philox4x32_10

__all__ = [
    "dare_keep",
    "dare_merge",
    "dare_merge_",
    "delta_gram",
    "delta_gram_",
    "linear_merge",
    "linear_merge_",
    "slerp_merge",
    "slerp_merge_",
    "ties_keep",
    "ties_merge",
    "ties_merge_",
]


def _per_expert(x: float | Sequence[float], count: int) -> list[float]:
    return [float(x)] * count if isinstance(x, int | float) else list(x)


def dare_keep(
    n: int, drop: float, expert: int, seed: int, stream: int = 0, offset: int = 0
) -> Tensor:
    """Which of n elements DARE keeps, bool [n]; the first is element ``offset`` of its tensor.

    With t = round(drop 2^40), high = t >> 32 and low = t mod 2^32, element i is dropped if its byte u is below
    ``high``, or equal to it while its word v is below ``low``. Both are Philox draws with key ``seed``:

        u = byte i mod 16 at counter (i >> 4 low, i >> 4 high | expert << 16, stream low, stream high)
        v = word i mod 4 at counter (i >> 2 low, i >> 2 high | 1 << 15 | expert << 16, stream low, stream high)
    """
    i = torch.arange(offset, offset + n)
    t = min(math.floor(drop * 2**40 + 0.5), 2**40 - 1)
    low, high = (torch.tensor(s) for s in (stream, stream >> 32))
    first = philox4x32_10((i >> 4, i >> 36 | expert << 16, low, high), seed)
    u = torch.stack(first).gather(0, (i >> 2 & 3)[None])[0] >> 8 * (i & 3) & 255
    second = philox4x32_10((i >> 2, i >> 34 | 1 << 15 | expert << 16, low, high), seed)
    v = torch.stack(second).gather(0, (i & 3)[None])[0]
    return ~((u < t >> 32) | (u == t >> 32) & (v < t % 2**32))


def ties_keep(delta: Tensor, density: float) -> Tensor:
    """The ``floor(density n)`` elements of largest magnitude, bool; equal ones by index, NaN largest."""
    order = torch.sort(delta.flatten().abs(), descending=True, stable=True).indices
    keep = torch.zeros(delta.numel(), dtype=torch.bool)
    keep[order[: math.floor(density * delta.numel())]] = True
    return keep.view(delta.shape)


def _elected(
    kept: list[Tensor], weights: list[float], factors: list[float], normalize: bool
) -> Tensor:
    """The disjoint mean (or sum) of those task vectors whose sign has more mass, element by element."""
    v = [w * f * d for w, f, d in zip(weights, factors, kept)]
    zero = torch.zeros_like(v[0])
    positive = sum((x.clamp(min=0) for x in v), zero)
    negative = sum((x.clamp(max=0) for x in v), zero)
    up = positive + negative >= 0
    mass = torch.where(up, positive, negative)
    if not normalize:
        return mass
    share = sum((w * torch.where(up, x > 0, x < 0) for w, x in zip(weights, v)), zero)
    return mass / torch.where(share == 0, 1.0, share)


def _merged(base: Tensor, kept: list[Tensor], weights: list[float], factors: list[float], elect: bool,
            normalize: bool, lambda_: float) -> Tensor:  # fmt: skip
    used = [e for e, w in enumerate(weights) if w != 0]  # the others are not even looked at
    if not used:
        return base.clone()
    kept, weights, factors = ([x[e] for e in used] for x in (kept, weights, factors))
    if elect:
        return (work(base) + lambda_ * _elected(kept, weights, factors, normalize)).to(base.dtype)
    total = sum(weights) if normalize else 1.0
    delta = torch.zeros_like(kept[0])
    for d, w, f in zip(kept, weights, factors):
        delta = delta + w * f * lambda_ / total * d
    return (work(base) + delta).to(base.dtype)


def dare_merge(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    drop: float | Sequence[float],
    seed: int,
    stream: int | str = 0,
    *,
    offset: int = 0,
    rescale: str = "inv_keep",
    elect_sign: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """``base + lambda sum_e w_e f_e (keep_e * d_e)``, f = 1 / (1 - drop): DARE (arXiv 2311.03099).

    ``rescale``: f is 1 for ``"none"``; for ``"l1"`` and ``"l2"`` it gives each task vector the norm that it had
    before dropping. ``elect_sign``: signs are elected and disagreeing elements left out as in TIES.
    ``base + 1 d_e`` is e: one expert of weight 1 of which nothing is dropped comes back as it is.
    """
    number = name_stream(stream) if isinstance(stream, str) else stream
    rates = _per_expert(drop, len(experts))
    kept, factors = [], []
    for e, (x, p) in enumerate(zip(experts, rates, strict=True)):
        d = work(x) - work(base)
        keep = dare_keep(d.numel(), p, e, seed, number, offset).view(d.shape).to(d.device)
        left = torch.where(keep, d, 0.0)
        factor = 1.0 if rescale == "none" or p == 0 else 1 / (1 - p)
        if rescale in ("l1", "l2") and p > 0:
            before, after = (float(t.double().norm(p=int(rescale[1]))) for t in (d, left))
            factor = before / after if after > 0 else 1.0
        kept.append(left)
        factors.append(factor)
    used = [e for e, w in enumerate(weights) if w != 0]
    if len(used) == 1 and not elect_sign and not any(rates):
        w = weights[used[0]]
        if lambda_ * (1.0 if normalize else w) == 1:
            return experts[used[0]].clone()
    return _merged(base, kept, list(weights), factors, elect_sign, normalize, lambda_)


def ties_merge(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    density: float | Sequence[float],
    *,
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """TIES (arXiv 2306.01708): trim, elect signs, merge what agrees.

    Trim: of each ``d_e`` the ``floor(density n)`` largest magnitudes stay. Elect: the sign of ``sum_e w_e d_e``,
    + if it is 0. Disjoint mean: ``sum w_e d_e / sum w_e`` over the experts whose trimmed ``w_e d_e`` has that sign;
    without ``normalize`` the sum. The result is ``base + lambda`` times that.
    """
    deltas = [work(x) - work(base) for x in experts]
    rates = _per_expert(density, len(experts))
    kept = [torch.where(ties_keep(d, k), d, 0.0) for d, k in zip(deltas, rates, strict=True)]
    return _merged(base, kept, list(weights), [1.0] * len(kept), True, normalize, lambda_)


def linear_merge(
    tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True
) -> Tensor:
    """``sum_e w_e x_e``, divided by ``sum_e w_e`` with ``normalize``; weights of 0 are left out."""
    total = sum(weights) if normalize else 1.0
    used = [(x, w) for x, w in zip(tensors, weights, strict=True) if w != 0]
    out = torch.zeros_like(work(tensors[0]))
    for x, w in used:
        out = out + w / total * work(x)
    return out.to(tensors[0].dtype)


def slerp_merge(
    v0: Tensor, v1: Tensor, t: float, *, base: Tensor | None = None, dot_threshold: float = 0.9995
) -> Tensor:
    """From ``v0`` (t = 0) to ``v1`` (t = 1) along the great circle of the flattened tensors.

    With c the cosine of both and a = acos c: ``(sin((1 - t) a) v0 + sin(t a) v1) / sin a``. If ``|c|`` is above
    ``dot_threshold`` they are nearly parallel and it is ``(1 - t) v0 + t v1``; a vector of norm 0 (<= 1e-8) has
    c = 0. With ``base``, what is interpolated is ``v - base``, and base is added.
    """
    if t in (0.0, 1.0):
        return (v0 if t == 0 else v1).clone()
    origin = torch.zeros_like(work(v0)) if base is None else work(base)
    x, y = ((work(v) - origin) for v in (v0, v1))
    a, b = x.double(), y.double()
    norms = float(a.norm()), float(b.norm())
    c = float((a * b).sum()) / (norms[0] * norms[1]) if min(norms) > 1e-8 else 0.0
    if abs(c) <= dot_threshold:
        angle = math.acos(c)
        s0, s1 = (math.sin(s * angle) / math.sin(angle) for s in (1 - t, t))
    else:
        s0, s1 = 1 - t, t
    return (origin + s0 * x + s1 * y).to(v0.dtype)


def delta_gram(base: Tensor | None, experts: Sequence[Tensor]) -> Tensor:
    """``G[j, k] = <x_j - base, x_k - base>``, float64 [m, m]; without ``base``, of the tensors themselves."""
    deltas = torch.stack([x.double().flatten() for x in experts])
    if base is not None:
        deltas = deltas - base.double().flatten()
    return deltas @ deltas.T


def _into(f):
    def write(out: Tensor, *args, **kwargs) -> None:
        out.copy_(f(*args, **kwargs))

    write.__name__, write.__doc__ = f.__name__ + "_", f":func:`{f.__name__}` into ``out``."
    return write


dare_merge_, ties_merge_, linear_merge_, slerp_merge_ = map(
    _into, (dare_merge, ties_merge, linear_merge, slerp_merge)
)


def delta_gram_(gram: Tensor, base: Tensor | None, experts: Sequence[Tensor]) -> None:
    """Adds :func:`delta_gram` to ``gram``."""
    gram += delta_gram(base, experts)
