# SPDX-License-Identifier: Apache-2.0
"""Cases of ``swiglu`` and ``gated_gelu``, their forms into a given tensor and their gradients: part of ``norm``.

Rows of PixelGPT's feed-forward layer (2,816) while it is trained and while it decodes. Bytes: both inputs read, the
result written; with gradients, both and what comes back read, both gradients written. ``halves``: of one tensor, as a
layer with gate and up in one matrix gives them. The peer is transformers' form of T5's activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, NotAvailable, Provider, Shape, compiled, provider
from .gradients import compiled_and_pulled_back, pulled_back
from .norm_rms import BF16, DTYPES, FP32, TOLERANCE

TRAIN = {"rows": 4096, "f": 2816}
DECODE = ({"rows": 1, "f": 2816}, {"rows": 64, "f": 2816})
GATES = {
    "swiglu": ("swiglu", {}),
    "tanh": ("gated_gelu", {"approximate": "tanh"}),
    "erf": ("gated_gelu", {"approximate": "none"}),
}


def _inputs(halves: bool) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    def inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = torch.Generator().manual_seed(0)
        sizes = (s["rows"], s["f"])

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=made).to(device, dtype)

        back, out = draw(*sizes), torch.zeros(sizes, dtype=dtype, device=device)
        if halves:
            return Inputs(both=draw(s["rows"], 2 * s["f"]), out=out, upstream=[back])
        return Inputs(a=draw(*sizes), b=draw(*sizes), out=out, upstream=[back])

    return inputs


def _parts(i: Inputs) -> tuple[Tensor, Tensor]:
    return i.both.chunk(2, -1) if hasattr(i, "both") else (i.a, i.b)


def _activation(gate: str) -> Callable[[Tensor], Tensor]:
    if gate == "swiglu":
        return F.silu
    return lambda a: F.gelu(a, approximate=GATES[gate][1]["approximate"])


def _multiplied(gate: str, out: bool) -> Callable[[Inputs], Any]:
    """Activation, then product, as models have it."""
    activation = _activation(gate)

    def run(i: Inputs) -> Tensor:
        a, b = _parts(i)
        return torch.mul(activation(a), b, out=i.out if out else None)

    return run


def _in_place(gate: str) -> Callable[[Inputs], Any]:
    """The product over the activation: one tensor fewer, without a gradient."""
    activation = _activation(gate)

    def run(i: Inputs) -> Tensor:
        a, b = _parts(i)
        return activation(a).mul_(b)

    return run


def _peer(out: bool) -> Provider:
    def build(_: Inputs) -> Callable[[Inputs], Any]:
        try:
            from transformers.activations import NewGELUActivation
        except ImportError as error:
            raise NotAvailable("needs transformers") from error
        act = NewGELUActivation()

        def run(i: Inputs) -> Tensor:
            a, b = _parts(i)
            return torch.mul(act(a), b, out=i.out if out else None)

        return run

    return Provider("peer:transformers", "peer", build)


def _copies(into: bool) -> Provider:
    """A yardstick that moves as many bytes: of one tensor and a half."""

    def run(i: Inputs) -> None:
        half = slice(0, len(i.b) // 2)
        for source, out in ((i.a, i.out), (i.b[half], i.out[half])):
            if into:
                out.copy_(source)
            else:
                source.clone()

    return provider("copy_" if into else "clone", run, "bound")


def _case(
    s: Shape, dtype: torch.dtype, gate: str, into: bool = False, halves: bool = False
) -> Case:
    name, kwargs = GATES[gate]

    def ours(i: Inputs) -> Tensor:
        return getattr(ops, name)(*_parts(i), **kwargs)

    def ours_into(i: Inputs) -> None:
        getattr(ops, name + "_")(i.out, *_parts(i), **kwargs)

    def defined(i: Inputs) -> Tensor:
        made = getattr(reference, name)(*_parts(i), **kwargs)
        return i.out.copy_(made) if into else made

    forms = [provider("eager:product", _multiplied(gate, into))]
    if not into:
        forms.append(provider("eager:in_place", _in_place(gate)))
    if gate == "tanh":
        forms.append(_peer(into))
    about: dict[str, Any] = {"mode": "out", "mutates": ("out",)} if into else {}
    return Case(
        op=name + "_" * into, shape=s, dtype=dtype, inputs=_inputs(halves),
        variant="/".join(v for v in (gate if name == "gated_gelu" else "", "halves" * halves) if v),
        bytes=lambda s, size: 3 * s["rows"] * s["f"] * size,
        providers=[provider("tenfold", ours_into if into else ours), *forms,
                   compiled(_multiplied(gate, into)), *([_copies(into)] if s == TRAIN and not halves else [])],
        reference=defined, tolerance=TOLERANCE[dtype], quick=s == TRAIN and dtype == BF16, **about,
    )  # fmt: skip


def _gradient_case(s: Shape, dtype: torch.dtype, gate: str) -> Case:
    name, kwargs = GATES[gate]

    def ours(i: Inputs) -> Tensor:
        return getattr(ops, name)(i.a, i.b, **kwargs)

    def defined(i: Inputs) -> Tensor:
        return getattr(reference, name)(i.a, i.b, **kwargs)

    form = _multiplied(gate, False)
    return Case(
        op=name, variant="gradient" if gate == "swiglu" else f"{gate}/gradient", shape=s, dtype=dtype,
        inputs=_inputs(False), bytes=lambda s, size: 8 * s["rows"] * s["f"] * size,
        providers=[provider("tenfold", pulled_back(ours, "a", "b")),
                   provider("eager", pulled_back(form, "a", "b")),
                   compiled_and_pulled_back(form, "a", "b")],
        reference=pulled_back(defined, "a", "b"), tolerance=2 * TOLERANCE[dtype],
        quick=s == TRAIN and dtype == BF16,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for gate in GATES:
        for into in (True, False):
            for dtype in DTYPES:
                yield _case(TRAIN, dtype, gate, into)
    for dtype in (FP32, BF16):
        yield _case(TRAIN, dtype, "swiglu", halves=True)
    for s in DECODE:
        for gate in GATES:
            for dtype in (FP32, BF16):
                yield _case(s, dtype, gate)
        yield _case(s, BF16, "swiglu", True)
    for dtype in DTYPES:
        for gate in ("swiglu", "tanh"):
            yield _gradient_case(TRAIN, dtype, gate)
    yield _gradient_case(TRAIN, FP32, "erf")
    yield _gradient_case(DECODE[1], BF16, "swiglu")
