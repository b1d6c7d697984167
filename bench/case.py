# SPDX-License-Identifier: Apache-2.0
"""What a benchmark case is: inputs, bytes, FLOPs, providers, and how their agreement is judged.

A case is data and small functions; ``harness.measure`` does everything else. The result of an in-place
or ``out`` provider is what it left in the inputs named by ``Case.mutates``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

Shape = Mapping[str, int]
Inputs = SimpleNamespace
Function = Callable[[Inputs], Any]

# "bound" does other, easier work on the same bytes (copy_, clone): a yardstick, not a competitor.
KINDS = ("tenfold", "eager", "compile", "peer", "bound")
MODES = ("functional", "inplace", "out")


class NotAvailable(Exception):
    """Raised by a provider's ``build`` when it cannot run here (package missing, too much memory)."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Args:
        name: unique in the case; several ``eager`` forms are named ``eager:<form>``.
        kind: one of ``KINDS``.
        build: takes example inputs, returns the function to time; may raise :class:`NotAvailable`.
            Its time plus the first call is the provider's compile time.
        scratch: bytes of intermediates that the form needs; above the memory budget it is n/a.
        agree: overrides the case's agreement (a provider that draws its own random numbers, say).
        graph: False for a form that waits for the GPU: no CUDA graph of it is tried.
    """

    name: str
    kind: str
    build: Callable[[Inputs], Function]
    scratch: int = 0
    agree: Callable[[Any, Any, Inputs], float] | None = None
    graph: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"provider {self.name}: kind must be one of {KINDS}, got {self.kind!r}"
            )


def provider(name: str, function: Function, kind: str | None = None, **extra: Any) -> Provider:
    """Provider of a ready function; the kind defaults to the part of the name before a colon."""
    return Provider(name, kind or name.split(":")[0], lambda _: function, **extra)


def compiled(function: Function, name: str = "compile", **extra: Any) -> Provider:
    """``torch.compile`` of an eager form that takes and returns tensors."""

    def build(_: Inputs) -> Function:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return Provider(name, "compile", build, **extra)


def relative_error(got: Any, want: Any, _: Inputs | None = None) -> float:
    """Largest ``|got - want| / |want|`` (2-norms, float64) over the outputs; NaN or a shape gives inf.

    Integer tensors must be equal.
    """
    worst = 0.0
    pairs = list(zip(_flatten(got), _flatten(want), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            return math.inf
        if not b.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a.to(b.dtype), b) else math.inf)
            continue
        a, b = a.double(), b.double()
        norm = torch.linalg.vector_norm(b).item()
        error = torch.linalg.vector_norm(a - b).item()
        relative = error / norm if norm > 0 else error
        worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def _flatten(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in _flatten(v)]


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype, with everything that is timed against each other.

    Args:
        inputs: makes fresh inputs on a device, same values each time: ``inputs(shape, dtype, device)``.
        bytes: compulsory traffic, each input read once and each output written once.
        flops: useful floating-point operations, counted once.
        reference: the result that every provider must agree with.
        agree: error of an output against the reference's; at most ``tolerance`` agrees.
        peak: name of the arithmetic ceiling (see ``ceilings``), or None for a pure data movement.
        traffic: name of the bandwidth that the bytes count against: ``read`` where next to nothing is
            written, ``update`` where what is written has been read, else ``copy``.
        warm: leave the data in the cache; the case is labelled so.
        memory: also find what a call of each provider allocates at its peak.
    """

    op: str
    shape: Shape
    dtype: torch.dtype
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    bytes: Callable[[Shape, int], int]
    providers: Sequence[Provider]
    reference: Function
    flops: Callable[[Shape], int] = field(default=lambda shape: 0)
    agree: Callable[[Any, Any, Inputs], float] = relative_error
    tolerance: float = 1e-4
    mode: str = "functional"
    mutates: tuple[str, ...] = ()
    peak: str | None = None
    traffic: str = "copy"
    variant: str = ""
    quick: bool = False
    warm: bool = False
    memory: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"{self.op}: mode must be one of {MODES}, got {self.mode!r}")
        if (self.mode == "functional") == bool(self.mutates):
            raise ValueError(
                f"{self.op}: mutates names the written inputs of inplace and out modes"
            )
        names = [p.name for p in self.providers]
        if len(set(names)) != len(names):
            raise ValueError(f"{self.op}: provider names must be unique, got {names}")
        if [p.kind for p in self.providers].count("tenfold") != 1:
            raise ValueError(f"{self.op}: exactly one provider must be of kind 'tenfold'")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """Unique in the family, stable over runs: results are matched by it."""
        sizes = "-".join(f"{k}{v}" for k, v in self.shape.items())
        parts = [self.op, self.variant, self.dtype_name, sizes, "warm" if self.warm else ""]
        return "/".join(p for p in parts if p)

    def result(self, inputs: Inputs, returned: Any) -> Any:
        """The tensors that a call produced: what it returned, or what it wrote."""
        return tuple(getattr(inputs, m) for m in self.mutates) if self.mutates else returned


def _clone(value: Any) -> Any:
    if isinstance(value, list):
        return [_clone(v) for v in value]
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value).copy_(value)  # empty_like keeps a dense permutation
    return value


def clone_inputs(inputs: Inputs) -> Inputs:
    """Copies every tensor, also in lists, keeping strides; other values are shared."""
    return Inputs(**{name: _clone(value) for name, value in vars(inputs).items()})


def _nbytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_nbytes, value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def input_bytes(inputs: Inputs) -> int:
    return sum(map(_nbytes, vars(inputs).values()))
