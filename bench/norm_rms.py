# SPDX-License-Identifier: Apache-2.0
"""Cases of ``rms_norm``, its form into given tensors and its gradients: part of the family ``norm``.

Rows of a model while it is trained (4,096 tokens) and while it decodes (1 and 64). Bytes: x (and the residual) read,
y (and the sum) written; with gradients, what comes back read, h once more, the gradient of the rows written. Eager
forms are the module of transformers, and one that reads 16-bit rows without a float32 copy of them; the peer is torch's
own function, which rounds once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Function, Inputs, Provider, Shape, compiled, provider
from .gradients import compiled_and_pulled_back, pulled_back

FP32, BF16, FP16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {FP32: 1e-5, BF16: 1e-2, FP16: 2e-3}
TRAIN, WIDE = {"rows": 4096, "d": 1024}, {"rows": 4096, "d": 4096}
DECODE = ({"rows": 1, "d": 1024}, {"rows": 1, "d": 4096}, {"rows": 64, "d": 1024})
EPS = 1e-6
# Of inputs; the second argument: where y goes, if it is given.
Form = Callable[[Inputs, Tensor | None], tuple[Tensor, ...]]


def _inputs(residual: bool, weight: torch.dtype | None) -> Callable[..., Inputs]:
    def inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = torch.Generator().manual_seed(0)
        sizes = (s["rows"], s["d"])
        x, more, back = (torch.randn(sizes, generator=made).to(device, dtype) for _ in range(3))
        w = torch.rand(s["d"], generator=made).add_(0.5).to(device, weight or dtype)
        of_y = weight if weight is not None else dtype
        i = Inputs(x=x, weight=w, y=torch.zeros(sizes, dtype=of_y, device=device))
        if residual:
            i.residual, i.sum = more, torch.zeros_like(x)
        i.upstream = [back, back.flip(0)] if residual else [back]
        return i

    return inputs


def _added(i: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """h, and what is returned beside y."""
    if not hasattr(i, "residual"):
        return i.x, ()
    total = i.x + i.residual
    return total, (total,)


def module(i: Inputs, y: Tensor | None = None) -> tuple[Tensor, ...]:
    """LlamaRMSNorm, and T5LayerNorm: the normalised rows to the dtype of the weight, which is that of x or narrower."""
    x, more = _added(i)
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return torch.mul(i.weight, h.to(i.weight.dtype), out=y), *more


def vector_norm(i: Inputs, y: Tensor | None = None) -> tuple[Tensor, ...]:
    """Norms in float32 of rows as they are, and no float32 copy of them."""
    x, more = _added(i)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=FP32)
    rstd = torch.rsqrt(norm * norm / x.shape[-1] + EPS)
    return torch.mul((x * rstd).to(i.weight.dtype), i.weight, out=y), *more


def torchs(i: Inputs, y: Tensor | None = None) -> tuple[Tensor, ...]:
    """F.rms_norm."""
    x, more = _added(i)
    made = F.rms_norm(x, x.shape[-1:], i.weight.to(x.dtype), EPS).to(i.weight.dtype)
    return (made if y is None else y.copy_(made)), *more


FORMS: dict[str, Form] = {
    "eager:module": module, "eager:vector_norm": vector_norm, "peer:torch": torchs,
}  # fmt: skip


def _into(form: Form) -> Function:
    def run(i: Inputs) -> None:
        _, *more = form(i, i.y)
        if more:
            i.sum.copy_(more[0])

    return run


def _copies(into: bool, residual: bool) -> Provider:
    """A yardstick that moves as many bytes."""

    def run(i: Inputs) -> None:
        pairs = [(i.y, i.x), (i.sum, i.residual)] if residual else [(i.y, i.x)]
        for to, source in pairs:
            if into:
                to.copy_(source)
            else:
                source.clone()

    return provider("copy_" if into else "clone", run, "bound")


def _case(
    s: Shape, dtype: torch.dtype, residual: bool, into: bool = False, weight: torch.dtype | None = None,
) -> Case:  # fmt: skip
    order = "llama" if weight is None else "t5"

    def ours(i: Inputs) -> tuple[Tensor, ...]:
        made = ops.rms_norm(i.x, getattr(i, "residual", None), i.weight, EPS, order=order)
        return made[: 2 if residual else 1]

    def ours_into(i: Inputs) -> None:
        total, more = (i.sum, i.residual) if residual else (None, None)
        ops.rms_norm_(i.y, total, i.x, more, i.weight, EPS, order=order)

    def defined(i: Inputs) -> tuple[Tensor, ...]:
        made = reference.rms_norm(i.x, getattr(i, "residual", None), i.weight, EPS, order=order)
        made = made[: 2 if residual else 1]
        if into:
            i.y.copy_(made[0])
            if residual:
                i.sum.copy_(made[1])
        return made

    about: dict[str, Any] = {}
    if into:
        about = {"mode": "out", "mutates": ("y", "sum") if residual else ("y",)}
    narrow = torch.empty((), dtype=weight or dtype).element_size()
    return Case(
        op="rms_norm_" if into else "rms_norm", shape=s, dtype=dtype, inputs=_inputs(residual, weight),
        variant="/".join(v for v in ("residual" * residual, "t5" * (weight is not None)) if v),
        bytes=lambda s, size: s["rows"] * s["d"] * (size * (3 if residual else 1) + narrow) + s["d"] * narrow,
        providers=[provider("tenfold", ours_into if into else ours),
                   *(provider(n, _into(f) if into else f) for n, f in FORMS.items()),
                   compiled(_into(module) if into else module),
                   *([_copies(into, residual)] if weight is None and s["rows"] > 64 else [])],
        reference=defined, tolerance=TOLERANCE[weight or dtype],
        quick=s == TRAIN and dtype == BF16, memory=s == WIDE and not into, **about,
    )  # fmt: skip


def _gradient_case(s: Shape, dtype: torch.dtype, residual: bool) -> Case:
    names = ("x", "residual", "weight") if residual else ("x", "weight")

    def ours(i: Inputs) -> tuple[Tensor, ...]:
        return ops.rms_norm(i.x, getattr(i, "residual", None), i.weight, EPS)[: len(names) - 1]

    def defined(i: Inputs) -> tuple[Tensor, ...]:
        made = reference.rms_norm(i.x, getattr(i, "residual", None), i.weight, EPS)
        return made[: len(names) - 1]

    rows = 8 if residual else 5  # x, residual, sum, y; two upstream, h, one gradient
    return Case(
        op="rms_norm", variant="residual/gradient" if residual else "gradient", shape=s, dtype=dtype,
        inputs=_inputs(residual, None),
        bytes=lambda s, size: (s["rows"] * rows + 2) * s["d"] * size,
        providers=[provider("tenfold", pulled_back(ours, *names)),
                   *(provider(n, pulled_back(f, *names)) for n, f in FORMS.items()),
                   compiled_and_pulled_back(module, *names)],
        reference=pulled_back(defined, *names), tolerance=2 * TOLERANCE[dtype],
        quick=s == TRAIN and dtype == BF16,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for into in (True, False):
        for dtype in DTYPES:
            for residual in (False, True):
                yield _case(TRAIN, dtype, residual, into)
        yield _case(WIDE, FP32, False, into)
        yield _case(WIDE, BF16, True, into)
    for s in DECODE:
        for dtype in (FP32, BF16):
            for residual in (False, True):
                yield _case(s, dtype, residual)
        yield _case(s, BF16, True, True)
    for s in (TRAIN, DECODE[1]):
        yield _case(s, BF16, False, weight=BF16)
        yield _case(s, FP32, True, weight=BF16)
    for dtype in DTYPES:
        for residual in (False, True):
            yield _gradient_case(TRAIN, dtype, residual)
    for dtype in (FP32, BF16):
        yield _gradient_case(DECODE[2], dtype, True)
