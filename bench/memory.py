"""What one call allocates at its peak: its results and everything that it needs in between.

On a GPU the caching allocator says it. On Linux the kernel does: the resident memory's high-water
mark starts anew, after glibc has given back what earlier calls left, so that native scratch counts
like tensors. That is good to a few hundred kB: for large tensors, not for small ops.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from typing import Any

import torch


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10


def _give_back() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes of one call at its peak, its results included; None where the system does not say."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    _give_back()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark falls to what is resident now
        before = _status("VmRSS:")
        call()
        return max(0, _status("VmHWM:") - before)
    except (OSError, StopIteration):
        return None
