# SPDX-License-Identifier: Apache-2.0
"""Cases of ``conv1d_planes``: part of the family ``diffusion``.

The first convolution of the net: stereo in, 128 channels out, kernel 5, with the 16 planes of the time embedding alone
and with the 768 of a text vector too. The plain form materialises them. Bytes: x read, the result written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider
from .gradients import pulled_back

SMALL = {"b": 4, "planes": 16, "l": 4096}
TIME = {"b": 2, "planes": 16, "l": 65_536}
TEXT = {"b": 1, "planes": 784, "l": 65_536}
ONE = {"b": 1, "planes": 16, "l": 65_536}
OUT, OWN, SIZE = 128, 2, 5


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=made).to(device, dtype)

    return Inputs(
        x=draw(s["b"], OWN, s["l"]), c=draw(s["b"], s["planes"]), weight=draw(OUT, OWN + s["planes"], SIZE) / 10,
        bias=draw(OUT), upstream=[draw(s["b"], OUT, s["l"])],
    )  # fmt: skip


def _materialised(i: Inputs) -> Tensor:
    planes = i.c[..., None].expand(*i.c.shape, i.x.shape[-1])
    return F.conv1d(torch.cat((i.x, planes), 1), i.weight, i.bias, padding=SIZE // 2)


def _ours(i: Inputs) -> Tensor:
    return ops.conv1d_planes(i.x, i.c, i.weight, i.bias)


def _defined(i: Inputs) -> Tensor:
    return reference.conv1d_planes(i.x, i.c, i.weight, i.bias)


def _case(s: Shape, gradient: bool = False) -> Case:
    names = ("x", "c", "weight", "bias")
    n = s["b"] * s["l"]
    if gradient:
        providers = [provider("tenfold", pulled_back(_ours, *names)),
                     provider("eager:materialised", pulled_back(_materialised, *names))]  # fmt: skip
    else:
        providers = [provider("tenfold", _ours), provider("eager:materialised", _materialised),
                     compiled(_materialised)]  # fmt: skip
    return Case(
        op="conv1d_planes", variant="gradient" if gradient else "", shape=s, dtype=torch.float32, inputs=_inputs,
        bytes=lambda s, size: (2 if gradient else 1) * n * (OWN + OUT) * size,
        flops=lambda s: (3 if gradient else 1) * 2 * n * OWN * OUT * SIZE, peak="fma_fp32",
        providers=providers, reference=pulled_back(_defined, *names) if gradient else _defined, tolerance=1e-4,
        quick=s == SMALL,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for s in (SMALL, ONE, TIME, TEXT):
        yield _case(s)
    yield _case(SMALL, gradient=True)
    yield _case(TIME, gradient=True)
