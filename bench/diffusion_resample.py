# SPDX-License-Identifier: Apache-2.0
"""Cases of ``fir_down2`` and ``fir_up2_cat``: part of the family ``diffusion``.

Levels of the full net: 512 channels, and the widest activation that fits a benchmark. ``eager:dense`` is the reference
code's form, a C x C x 8 weight that is zero but on its diagonals, made at every call; ``eager:grouped`` a convolution
of one group per channel, the best plain form. Bytes: the input (and the skip connection) read, the output written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Provider, Shape, compiled, provider
from .gradients import pulled_back

SMALL = {"b": 1, "c": 512, "l": 1280}
DEEP = {"b": 2, "c": 512, "l": 5120}
LONG = {"b": 1, "c": 128, "l": 163_840}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def _taps(like: Tensor) -> Tensor:
    half = torch.tensor(reference.diffusion.FIR_TAPS)
    return torch.cat((half, half.flip(0))).to(like)


def _dense(x: Tensor) -> Tensor:
    weight = x.new_zeros(x.shape[1], x.shape[1], 8)
    at = torch.arange(x.shape[1], device=x.device)
    weight[at, at] = _taps(x)
    return weight


def _grouped(x: Tensor) -> Tensor:
    return _taps(x).expand(x.shape[1], 1, 8)


def _down(weight: Callable[[Tensor], Tensor], groups: bool) -> Callable[[Inputs], Tensor]:
    def run(i: Inputs) -> Tensor:
        padded = F.pad(i.x, (3, 3), "reflect")
        return F.conv1d(padded, weight(i.x), stride=2, groups=i.x.shape[1] if groups else 1)

    return run


def _up(weight: Callable[[Tensor], Tensor], groups: bool) -> Callable[[Inputs], Tensor]:
    def run(i: Inputs) -> Tensor:
        made = F.conv_transpose1d(F.pad(i.x, (2, 2), "reflect"), 2 * weight(i.x), stride=2, padding=7,
                                  groups=i.x.shape[1] if groups else 1)  # fmt: skip
        return torch.cat((made, i.skip), 1)

    return run


def _inputs(op: str) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    def inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = torch.Generator().manual_seed(0)

        def draw(channels: int, length: int) -> Tensor:
            return torch.randn(s["b"], channels, length, generator=made).to(device, dtype)

        x = draw(s["c"], s["l"])
        if op == "fir_down2":
            out = torch.zeros(s["b"], s["c"], s["l"] // 2, dtype=dtype, device=device)
            return Inputs(x=x, out=out, upstream=[draw(s["c"], s["l"] // 2)])
        out = torch.zeros(s["b"], 2 * s["c"], 2 * s["l"], dtype=dtype, device=device)
        return Inputs(
            x=x, skip=draw(s["c"], 2 * s["l"]), out=out, upstream=[draw(2 * s["c"], 2 * s["l"])]
        )

    return inputs


def _moved(op: str, s: Shape, gradient: bool) -> int:
    n = s["b"] * s["c"] * s["l"]
    once = n + n // 2 if op == "fir_down2" else n + 2 * n + 4 * n
    back = n + n // 2 if op == "fir_down2" else n + 2 * n
    return once + gradient * back


def _case(
    op: str, s: Shape, dtype: torch.dtype, into: bool = False, gradient: bool = False
) -> Case:
    down = op == "fir_down2"
    form = _down if down else _up

    def args(i: Inputs) -> tuple[Any, ...]:
        return (i.x,) if down else (i.x, i.skip)

    def ours(i: Inputs) -> Any:
        return getattr(ops, op + "_")(i.out, *args(i)) if into else getattr(ops, op)(*args(i))

    def defined(i: Inputs) -> Any:
        made = getattr(reference, op)(*args(i))
        return i.out.copy_(made) if into else made

    names = ("x",) if down else ("x", "skip")
    wrap = (lambda f: pulled_back(f, *names)) if gradient else (lambda f: f)

    def plain(f: Callable[[Inputs], Tensor]) -> Any:
        return (lambda i: i.out.copy_(f(i))) if into else wrap(f)

    dense, grouped = form(_dense, False), form(_grouped, True)
    providers: list[Provider] = [provider("tenfold", ours if into else wrap(ours))]
    if s is not LONG:
        providers.append(provider("eager:dense", plain(dense)))
    providers.append(provider("eager:grouped", plain(grouped)))
    if not (gradient or into):
        providers.append(compiled(grouped))
    if into and down:
        providers.append(provider("copy_", lambda i: i.out.copy_(i.x[..., : s["l"] // 2]), "bound"))
    return Case(
        op=op + "_" * into, variant="gradient" if gradient else "", shape=s, dtype=dtype, inputs=_inputs(op),
        bytes=lambda s, size: _moved(op, s, gradient) * size, providers=providers, reference=wrap(defined),
        tolerance=TOLERANCE[dtype], mode="out" if into else "functional", mutates=("out",) if into else (),
        quick=s == SMALL or (into and dtype == torch.float32),
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for op in ("fir_down2", "fir_up2_cat"):
        for dtype in TOLERANCE:
            for s in (SMALL, DEEP, LONG):
                yield _case(op, s, dtype)
            yield _case(op, DEEP, dtype, into=True)
        yield _case(op, SMALL, torch.float32, gradient=True)
        yield _case(op, DEEP, torch.float32, gradient=True)
