"""What one call allocates at its peak: its results, and all tensors in between that live at once.

Torch's allocator says it, on the CPU through its profiler: exact, and the same on every machine. Memory
that native code takes elsewhere does not count; the ops' own is bounded by tests
(``tenfold.testing.peak_growth``), because the resident memory of a process that has measured before
says little.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler's native code writes a line at every start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes of one call at its peak, its results included."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with (
        _no_stderr(),
        torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as trace,
    ):
        result = call()
    del result
    found = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
