# SPDX-License-Identifier: Apache-2.0
"""The relative tolerance rule: a kernel may be at most twice as wrong as plain PyTorch.

Both are judged against a float64 reference: ``max|out - ref| <= 2 max|lowp - ref| + floor``, and means
with 1.5, where ``lowp`` is eager PyTorch in the tested dtype and ``floor`` is that dtype's rounding
step at the largest ``|ref|``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MANTISSA = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10, torch.float64: 52}
_MIN_EXPONENT = {
    torch.float32: -126,
    torch.bfloat16: -126,
    torch.float16: -14,
    torch.float64: -1022,
}


_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}


class PlainSums(TorchFunctionMode):
    """Matrix products as plain sums of products, term by term in order.

    For the plain side of float32: what a BLAS makes of such a sum, and so how wrong it is, differs from CPU to CPU.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        """Products of two float32 matrices or stacks of them; all else as it is."""
        if func not in _PRODUCTS or any(x.dim() < 2 or x.dtype != torch.float32 for x in args):
            return func(*args, **(kwargs or {}))
        a, b = args
        terms = (a[..., k : k + 1] * b[..., k : k + 1, :] for k in range(a.shape[-1]))
        return sum(terms, a.new_zeros(()))


def ulp_floor(ref: Tensor, dtype: torch.dtype) -> float:
    """Rounding step of ``dtype`` at the largest finite ``|ref|``."""
    finite = ref[torch.isfinite(ref)]
    top = float(finite.abs().max()) if finite.numel() else 0.0
    exponent = math.floor(math.log2(top)) if top > 0 else _MIN_EXPONENT[dtype]
    return 2.0 ** (max(exponent, _MIN_EXPONENT[dtype]) - _MANTISSA[dtype])


def assert_same_pattern(out: Tensor, ref: Tensor, what: str = "output") -> None:
    """NaN, +inf and -inf must stand at the same places."""
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(out) != test(ref)
        if bool(wrong.any()):
            raise AssertionError(f"{what}: {name} differs from the reference at {int(wrong.sum())} "
                                 f"of {wrong.numel()} places, first at {wrong.nonzero()[0].tolist()}")  # fmt: skip


def assert_close_to_ref(
    out: Tensor,
    ref64: Tensor,
    lowp: Tensor | None = None,
    dtype: torch.dtype | None = None,
    what: str = "output",
) -> None:
    """The rule above. ``lowp`` defaults to ``ref64`` rounded to ``dtype`` (default: ``out.dtype``)."""
    dtype = dtype or out.dtype
    if out.shape != ref64.shape:
        raise AssertionError(f"{what}: shape {tuple(out.shape)}, reference {tuple(ref64.shape)}")
    assert_same_pattern(out, ref64, what)
    if out.numel() == 0:
        return
    lowp = ref64.to(dtype) if lowp is None else lowp
    ok = torch.isfinite(ref64)
    mine = (out.double() - ref64)[ok].abs()
    theirs = (lowp.double() - ref64)[ok].abs()
    theirs = theirs[torch.isfinite(theirs)]
    if mine.numel() == 0:
        return
    floor = ulp_floor(ref64, dtype)
    worst, mean = (float(f(theirs)) if theirs.numel() else 0.0 for f in (torch.max, torch.mean))
    limits = {
        "max": (float(mine.max()), 2 * worst + floor),
        "mean": (float(mine.mean()), 1.5 * mean + floor),
    }
    for name, (got, limit) in limits.items():
        if not got <= limit:
            raise AssertionError(
                f"{what}: {name} error {got:.3e} exceeds {limit:.3e} ({dtype}; plain PyTorch: max "
                f"{worst:.3e}, mean {mean:.3e}, rounding {floor:.3e})"
            )
