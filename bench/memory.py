# SPDX-License-Identifier: Apache-2.0
"""What one call allocates at its peak: its results, and all that lives at once in between.

On a GPU torch's allocator says it. On a CPU native code takes memory of its own, so it is the growth of
the resident memory, in a process whose every large block is mapped for itself: elsewhere a call may
find, or tear to pieces, what earlier calls gave back. The native kernels' scratch of up to 4 MB, which a
thread keeps from call to call, does not count.

    python -m bench.memory FAMILY --device cpu < names.json      {case: [provider]} -> {case: {provider: bytes}}
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .case import Case

Peaks = dict[str, dict[str, int]]
# Read by glibc at the start of a process.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes of one call, which has been made before; on a CPU under ``MAPPED``."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark falls to what is resident now
    before = _status("VmRSS:")
    call()
    return max(0, _status("VmHWM:") - before)


def peaks_of(case: Case, names: Iterable[str], device: torch.device) -> dict[str, int]:
    """The peaks of a case's providers."""
    found = {}
    inputs = case.inputs(case.shape, case.dtype, device)
    with torch.no_grad():
        for entry in (p for p in case.providers if p.name in names):
            function = entry.build(inputs)
            function(inputs)
            found[entry.name] = peak_memory(lambda f=function: f(inputs), device)  # type: ignore[misc]
    return found


def measure_peaks(family: str, names: Mapping[str, list[str]], device: torch.device) -> Peaks:
    """Peaks of the named providers of the named cases, in a process of its own; {} but on Linux."""
    if not names or not sys.platform.startswith("linux"):
        return {}
    command = [sys.executable, "-m", f"{__package__}.memory", family, "--device", str(device)]
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        command, input=json.dumps(names), capture_output=True, text=True,
        env={**os.environ, **MAPPED, "PYTHONPATH": path},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"memory of {family} could not be measured: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    from .runner import cases_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args(arguments)
    names, device = json.load(sys.stdin), torch.device(chosen.device)
    cases = [c for c in cases_of(chosen.family) if c.name in names]
    print(json.dumps({c.name: peaks_of(c, names[c.name], device) for c in cases}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
