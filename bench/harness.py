# SPDX-License-Identifier: Apache-2.0
"""Measures a case: builds providers, checks agreement, then times those that agree, interleaved.

    providers -> build (60 s limit) -> agreement (before any timing) -> interleaved samples -> numbers

Nothing is timed that gives a wrong answer, and no provider is left out silently: each ends with a
status (``ok``, ``n/a``, ``slower form``, ``disagrees``, ``error``) and a note.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .case import Case, Function, Inputs, NotAvailable, Provider, clone_inputs
from .timing import Clock, Limits, Rotation, interleave, make_clock, percentile

SLOWER_FORM = 1.5  # an eager form this many times slower than the best one is not sampled further


@dataclass(frozen=True)
class Options:
    """What to measure and how long."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False
    compile: bool = True
    compile_limit: float = 60.0
    memory_share: float = 0.25  # of the free memory, for a provider's intermediates
    limits: Limits = field(default_factory=Limits)


def quick_options(options: Options) -> Options:
    """Few samples, no compilation: for a look at a machine in a few minutes."""
    limits = Limits(seconds=0.15, min_samples=5, max_samples=20)
    return replace(options, quick=True, compile=False, limits=limits)


@dataclass
class Measured:
    """One provider in one case. Times are seconds per call; ``peak_bytes`` is what one call allocates."""

    kind: str
    status: str
    note: str = ""
    error: float | None = None
    build_s: float | None = None
    p20_s: float | None = None
    p50_s: float | None = None
    p80_s: float | None = None
    gb_s: float | None = None
    gflop_s: float | None = None
    share: float | None = None
    timing: str = ""
    calls: int = 0
    peak_bytes: int | None = None
    samples: list[float] = field(default_factory=list)


@dataclass
class Result:
    """A measured case, ready for JSON."""

    name: str
    op: str
    variant: str
    shape: dict[str, int]
    dtype: str
    mode: str
    warm: bool
    buffer_sets: int
    bytes: int
    flops: int
    peak: str | None
    bound: str
    tolerance: float
    providers: dict[str, Measured]
    ratios: dict[str, float]
    traffic: str = "copy"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def tenfold(self) -> Measured:
        return next(m for m in self.providers.values() if m.kind == "tenfold")


class TooSlow(Exception):
    """The time limit of :func:`time_limit` ran out."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupts the block after ``seconds``; where signals cannot be used it only checks at the end."""
    start = time.monotonic()
    alarm = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM")

    def stop(*_: Any) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop) if alarm else None
    if alarm:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
        if time.monotonic() - start > seconds:
            raise TooSlow
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


def _ran_out(error: BaseException | None) -> bool:
    """Whether it is :class:`TooSlow`, or was raised because of it: the compiler wraps what it meets."""
    while error is not None and not isinstance(error, TooSlow):
        error = error.__cause__ or error.__context__
    return error is not None


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now; on Linux without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) << 10


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _refusal(provider: Provider, options: Options) -> str:
    if provider.kind == "compile" and not options.compile:
        return "not asked for"
    budget = options.memory_share * free_memory(options.device)
    if provider.scratch > budget:
        return f"needs {provider.scratch / 2**30:.1f} GiB of intermediates"
    return ""


def _agreement(case: Case, provider: Provider, got: Any, want: Any, inputs: Inputs) -> float:
    try:
        return (provider.agree or case.agree)(got, want, inputs)
    except (ValueError, TypeError, RuntimeError):
        return math.inf


def prepare(
    case: Case, provider: Provider, inputs: Inputs, want: Any, options: Options
) -> tuple[Measured, Function | None]:
    """Builds a provider, runs it once on fresh inputs and judges the result; never times it."""
    measured = Measured(provider.kind, "n/a", _refusal(provider, options))
    if measured.note:
        return measured, None
    mine = clone_inputs(inputs)
    limit = options.compile_limit if provider.kind == "compile" else math.inf
    start = time.monotonic()
    try:
        with time_limit(limit) if math.isfinite(limit) else contextlib.nullcontext():
            function = provider.build(mine)
            got = case.result(mine, function(mine))
            _sync(options.device)
    except NotAvailable as reason:
        measured.note = str(reason)
        return measured, None
    except Exception as error:
        if _ran_out(error):
            measured.note = f"over {options.compile_limit:.0f} s to compile"
            return measured, None
        # A compiler's crash must not end the run; a crash of ours is reported and fails it later.
        first = (str(error) or type(error).__name__).splitlines()[0]
        measured.status, measured.note = "error", f"{type(error).__name__}: {first}"[:300]
        return measured, None
    measured.build_s = time.monotonic() - start
    if provider.kind == "bound":
        measured.status = "ok"
        return measured, function
    measured.error = _agreement(case, provider, got, want, inputs)
    if not measured.error <= case.tolerance:
        measured.status = "disagrees"
        measured.note = f"error {measured.error:.2e} is over the tolerance {case.tolerance:.0e}"
        return measured, None
    measured.status = "ok"
    return measured, function


def _drop_slower_forms(measured: dict[str, Measured], clocks: dict[str, Clock]) -> None:
    """Of several eager forms only the fastest matter; a clearly slower one keeps its one timing."""
    forms = {n: c for n, c in clocks.items() if measured[n].kind == "eager"}
    if len(forms) < 2:
        return
    best = min(c.estimate for c in forms.values())
    for name, clock in forms.items():
        if clock.estimate > SLOWER_FORM * best:
            measured[name].status = "slower form"
            measured[name].note = f"{clock.estimate:.3g} s once, not the fastest form"
            del clocks[name]


def floor_seconds(case: Case, ceilings: dict[str, Any]) -> tuple[float, str]:
    """Time no implementation can beat on this machine, and what sets it (``memory`` or ``compute``)."""
    size = torch.empty((), dtype=case.dtype).element_size()
    memory = case.bytes(case.shape, size) / (ceilings[case.traffic]["value"] * 1e9)
    compute = 0.0
    if case.peak:
        compute = case.flops(case.shape) / (ceilings[case.peak]["value"] * 1e9)
    return max(memory, compute), "compute" if compute > memory else "memory"


def _numbers(m: Measured, clock: Clock, case_bytes: int, flops: int, floor: float) -> None:
    m.samples = clock.samples
    m.timing, m.calls = clock.method, clock.calls
    m.p20_s, m.p50_s, m.p80_s = (percentile(clock.samples, q) for q in (0.2, 0.5, 0.8))
    m.gb_s = case_bytes / m.p50_s * 1e-9
    m.gflop_s = flops / m.p50_s * 1e-9
    m.share = floor / m.p50_s


def ratios(providers: dict[str, Measured]) -> dict[str, float]:
    """Speed-ups of tenfold (above 1: tenfold is faster) over the best of each kind and of all others.

    ``bound`` is the ratio to the fastest yardstick (1 means as fast as the plain copy).
    """
    ours = next(m for m in providers.values() if m.kind == "tenfold")
    if ours.p50_s is None:
        return {}
    found: dict[str, float] = {}
    timed = [m for m in providers.values() if m.p50_s is not None]
    for kind in ("eager", "compile", "peer", "bound"):
        times = [m.p50_s for m in timed if m.kind == kind]
        if times:
            found[kind] = min(times) / ours.p50_s
    others = [m.p50_s for m in timed if m.kind in ("eager", "compile", "peer")]
    if others:
        found["best_other"] = min(others) / ours.p50_s
    return found


def measure(case: Case, options: Options, ceilings: dict[str, Any]) -> Result:
    """Runs one case; see the module's docstring for the order of things."""
    device = options.device
    inputs = case.inputs(case.shape, case.dtype, device)
    size = torch.empty((), dtype=case.dtype).element_size()
    case_bytes, flops = case.bytes(case.shape, size), case.flops(case.shape)
    with torch.no_grad():
        fresh = clone_inputs(inputs)
        want = case.result(fresh, case.reference(fresh))
        measured: dict[str, Measured] = {}
        functions: dict[str, Function] = {}
        for entry in case.providers:
            measured[entry.name], function = prepare(case, entry, inputs, want, options)
            if function is not None:
                functions[entry.name] = function
        del want, fresh
        ring = Rotation(inputs, device, case.warm)
        graph = {entry.name: entry.graph for entry in case.providers}
        clocks = {
            n: make_clock(f, ring, device, options.limits, graph[n]) for n, f in functions.items()
        }
        _drop_slower_forms(measured, clocks)
        interleave(clocks, options.limits)
    floor, bound = floor_seconds(case, ceilings)
    for name, clock in clocks.items():
        _numbers(measured[name], clock, case_bytes, flops, floor)
    return Result(
        name=case.name, op=case.op, variant=case.variant, shape=dict(case.shape),
        dtype=case.dtype_name, mode=case.mode, warm=case.warm, buffer_sets=len(ring.sets),
        bytes=case_bytes, flops=flops, peak=case.peak, bound=bound, tolerance=case.tolerance,
        providers=measured, ratios=ratios(measured), traffic=case.traffic,
    )  # fmt: skip
