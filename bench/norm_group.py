# SPDX-License-Identifier: Apache-2.0
"""Cases of ``gn1_gelu``, with a residual and without, its form into a given tensor and its gradients: part of ``norm``.

Levels of a waveform U-Net: long rows of 128 channels, shorter ones of 512. Bytes: x (and the residual) read, y written;
with gradients, x and what comes back read again, the gradient written. The second reading of x is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider
from .gradients import compiled_and_pulled_back, pulled_back

SMALL = {"b": 4, "c": 512, "l": 160}
DEEP = {"b": 2, "c": 512, "l": 5120}
LONG = {"b": 1, "c": 128, "l": 163_840}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=made).to(device, dtype)

    sizes = (s["b"], s["c"], s["l"])
    x, residual = draw(*sizes), draw(*sizes)
    return Inputs(x=x, residual=residual, weight=1 + 0.1 * draw(s["c"]), bias=0.1 * draw(s["c"]),
                  y=torch.zeros_like(x), upstream=[draw(*sizes)])  # fmt: skip


def _case(
    s: Shape, dtype: torch.dtype, adds: bool, into: bool = False, gradient: bool = False
) -> Case:
    n = s["b"] * s["c"] * s["l"]

    def more(i: Inputs) -> Tensor | None:
        return i.residual if adds else None

    def ours(i: Inputs) -> Any:
        if into:
            return ops.gn1_gelu_(i.y, i.x, i.weight, i.bias, more(i))
        return ops.gn1_gelu(i.x, i.weight, i.bias, more(i))[0]

    def plain(i: Inputs) -> Tensor:
        y = F.gelu(F.group_norm(i.x, 1, i.weight, i.bias))
        return y + i.residual if adds else y

    def placed(form: Any) -> Any:
        return (lambda i: i.y.copy_(form(i))) if into else form

    def defined(i: Inputs) -> Tensor:
        return reference.gn1_gelu(i.x, i.weight, i.bias, more(i))[0]

    names = ("x", "weight", "bias", "residual") if adds else ("x", "weight", "bias")
    if gradient:
        providers = [provider("tenfold", pulled_back(ours, *names)), provider("eager", pulled_back(plain, *names)),
                     compiled_and_pulled_back(plain, *names)]  # fmt: skip
        wanted: Any = pulled_back(defined, *names)
    else:
        copy = [provider("copy_", lambda i: i.y.copy_(i.x), "bound")] if into and not adds else []
        providers = [
            provider("tenfold", ours),
            provider("eager", placed(plain)),
            compiled(placed(plain)),
            *copy,
        ]
        wanted = placed(defined)
    variant = "/".join(v for v in ("residual" * adds, "gradient" * gradient) if v)
    return Case(
        op="gn1_gelu" + "_" * into, variant=variant, shape=s, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: (2 + adds + 3 * gradient) * n * size, providers=providers, reference=wanted,
        tolerance=(10 if gradient else 1) * TOLERANCE[dtype], mode="out" if into else "functional",
        mutates=("y",) if into else (), quick=s == SMALL or (into and dtype == torch.bfloat16),
        memory=gradient and s == LONG and dtype == torch.float32,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in TOLERANCE:
        for s in (SMALL, DEEP, LONG):
            for adds in (False, True):
                yield _case(s, dtype, adds)
            yield _case(s, dtype, False, gradient=True)
        yield _case(LONG, dtype, False, into=True)
