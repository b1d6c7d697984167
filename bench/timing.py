# SPDX-License-Identifier: Apache-2.0
"""Timing: cold-cache rotation, interleaved rounds, CPU clock and CUDA graph replay.

Samples of all providers are interleaved, so that a change of clock or a noisy neighbour hits all of
them; every call reads buffers that have left the cache since they were last touched.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .case import Function, Inputs, clone_inputs, input_bytes

MAX_SETS = 8192
_DEFAULT_CACHE = 32 << 20
_LONG_SAMPLE = 0.5  # seconds; a GPU sample covers all buffer sets unless that takes longer


@dataclass(frozen=True)
class Limits:
    """How much to measure. ``seconds`` is the time per provider and case, rounded up to whole samples."""

    seconds: float = 1.0
    min_samples: int = 5
    max_samples: int = 60
    slow_call: float = 1.0  # calls above this many seconds get 3 samples at least, not min_samples
    min_sample_seconds: float = 2e-4


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: L2 of a GPU, the largest cache of CPU 0."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=_DEFAULT_CACHE)


class Rotation:
    """Copies of one set of inputs; ``next()`` hands out the one that was used longest ago.

    Together the copies are over twice the last-level cache, so none is still cached when its turn
    comes. ``warm=True`` keeps a single copy.
    """

    def __init__(self, inputs: Inputs, device: torch.device, warm: bool = False) -> None:
        one = max(input_bytes(inputs), 1)
        sets = 1 if warm else min(max(math.ceil(2 * cache_bytes(device) / one) + 1, 2), MAX_SETS)
        self.sets = [inputs] + [clone_inputs(inputs) for _ in range(sets - 1)]
        self._at = 0

    def next(self) -> Inputs:
        self._at = (self._at + 1) % len(self.sets)
        return self.sets[self._at]


@dataclass
class Clock:
    """Times one provider; ``sample()`` returns seconds per call."""

    sample: Callable[[], float]
    estimate: float
    calls: int
    method: str
    samples: list[float] = field(default_factory=list)


def cpu_clock(function: Function, ring: Rotation, limits: Limits) -> Clock:
    """Wall clock around enough calls to fill ``min_sample_seconds``."""

    def run(calls: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            function(ring.next())
        return (time.perf_counter_ns() - start) * 1e-9 / calls

    estimate = run(1)
    if estimate < limits.slow_call:  # the first call of a process pays for threads and page faults
        estimate = min(estimate, run(2))
    calls = max(1, math.ceil(limits.min_sample_seconds / max(estimate, 1e-8)))
    return Clock(lambda: run(calls), estimate, calls, "perf_counter")


def _event_seconds(work: Callable[[], Any]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def cuda_clock(function: Function, ring: Rotation, limits: Limits, capture: bool = True) -> Clock:
    """CUDA events around the replay of a graph that calls the provider once per buffer set.

    A provider that cannot be captured (it synchronises) is timed by events around plain calls, which
    then include launch overhead; ``method`` says which. ``capture=False``: it is known not to be.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function(ring.next())
    torch.cuda.synchronize()
    one = _event_seconds(lambda: function(ring.next()))
    calls = min(len(ring.sets), max(2, math.ceil(_LONG_SAMPLE / max(one, 1e-7))))

    def many() -> None:
        for _ in range(calls):
            function(ring.next())

    events = Clock(lambda: _event_seconds(many) / calls, one, calls, "events")
    if not capture:
        return events
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Outputs stay alive during the capture: calls must not write into the same cached block.
            _ = [function(ring.next()) for _ in range(calls)]
    except RuntimeError:
        torch.cuda.synchronize()
        return events
    graph.replay()
    return Clock(lambda: _event_seconds(graph.replay) / calls, one, calls, "graph")


def make_clock(
    function: Function, ring: Rotation, device: torch.device, limits: Limits, capture: bool = True
) -> Clock:
    if device.type == "cuda":
        return cuda_clock(function, ring, limits, capture)
    return cpu_clock(function, ring, limits)


def sample_count(clock: Clock, limits: Limits) -> int:
    per_sample = clock.estimate * clock.calls
    least = 3 if clock.estimate > limits.slow_call else limits.min_samples
    return max(least, min(limits.max_samples, int(limits.seconds / max(per_sample, 1e-9))))


def interleave(clocks: dict[str, Clock], limits: Limits, seed: int = 0) -> None:
    """Fills ``samples`` of every clock; slow providers take part in evenly spread rounds only.

    The order inside a round is shuffled: nobody always runs after the same neighbour.
    """
    counts = {name: sample_count(clock, limits) for name, clock in clocks.items()}
    rounds = max(counts.values(), default=0)
    order = list(clocks)
    shuffle = random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shuffle(order)
            for name in order:
                due = math.ceil((turn + 1) * counts[name] / rounds)
                if len(clocks[name].samples) < due:
                    clocks[name].samples.append(clocks[name].sample())
    finally:
        if collecting:
            gc.enable()


def percentile(samples: list[float], q: float) -> float:
    """Linear interpolation between order statistics, ``q`` in [0, 1]."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
