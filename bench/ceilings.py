# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, measured in the same run: the denominators of every share of ceiling.

| name | CPU | GPU |
|---|---|---|
| copy | GB/s of a streaming copy, bytes read plus bytes written | the same |
| read | GB/s of one pass over memory that nothing writes to | sum of a large tensor |
| update | GB/s of ``mul_``, bytes read plus bytes written: nothing is fetched only to be overwritten | the same |
| fma_fp32 | GFLOP/s of independent fp32 FMAs in registers | torch matmul, TF32 off |
| dot_bf16 | GFLOP/s of bf16 dot products in registers, of fp32 FMAs where a CPU has none | torch matmul |

On the CPU the native ``torch.ops.tenfold._peak`` measures; a ceiling is the best of several tries,
before and after the cases. A ceiling below torch's own matmul of that dtype is no ceiling: the run is
void.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .timing import _event_seconds, cache_bytes

Ceilings = dict[str, dict[str, Any]]
_MATMUL = {"fma_fp32": torch.float32, "dot_bf16": torch.bfloat16}
_TRY_SECONDS = 0.1
_LONG_MATMUL = 0.05  # seconds, of a size that is not doubled any more


def _best_rate(work: Callable[[], Any], amount: float, device: torch.device, tries: int) -> float:
    """Highest ``amount`` per second of a call, in units of 1e9."""
    best = 0.0
    work()
    for _ in range(tries):
        if device.type == "cuda":
            seconds = _event_seconds(work)
        else:
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        best = max(best, amount / seconds * 1e-9)
    return best


def torch_matmul(dtype: torch.dtype, device: torch.device, tries: int = 5) -> float:
    """GFLOP/s of a large square ``torch.matmul`` on random data.

    Smaller on CPUs that take long: without instructions for bf16 the 2,048 rows of others are minutes a call.
    """
    sizes = {("cuda", torch.bfloat16): (8192,), ("cuda", torch.float32): (4096,)}.get(
        (device.type, dtype), (256, 512, 1024, 2048)
    )
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        work = partial(torch.matmul, a, b, out=torch.empty_like(a))
        operations = 2.0 * n**3
        if (
            n == sizes[-1]
            or operations * 1e-9 / _best_rate(work, operations, device, 2) > _LONG_MATMUL
        ):
            break
    return _best_rate(work, operations, device, tries)


def torch_copy(device: torch.device, tries: int = 10) -> float:
    """GB/s, read plus written, of ``copy_`` into memory that is mapped already and far over the cache."""
    num_bytes = max(2 * cache_bytes(device), 256 << 20)
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    return _best_rate(lambda: target.copy_(source), 2.0 * source.nbytes, device, tries)


def torch_read(device: torch.device, tries: int = 10) -> float:
    """GB/s of a sum over memory far over the cache."""
    num_bytes = max(2 * cache_bytes(device), 256 << 20)
    source = torch.ones(num_bytes // 4, device=device)
    return _best_rate(source.sum, source.nbytes, device, tries)


def torch_update(device: torch.device, tries: int = 10) -> float:
    """GB/s, read plus written, of an update in place of memory far over the cache."""
    num_bytes = max(2 * cache_bytes(device), 256 << 20)
    target = torch.ones(num_bytes // 4, device=device)
    return _best_rate(lambda: target.mul_(1.0), 2.0 * target.nbytes, device, tries)


def native_peak(kind: str, tries: int = 5) -> float | None:
    """Best of several runs of ``torch.ops.tenfold._peak``; None where the build has no such op, 0 where the CPU has
    no such instructions.
    """
    op = getattr(torch.ops.tenfold, "_peak", None)
    if op is None:
        return None
    iters, seconds = 1, 0.0
    while seconds < _TRY_SECONDS and iters < 1 << 40:
        start = time.perf_counter()
        op(kind, iters)
        seconds = time.perf_counter() - start
        iters *= 2 if seconds > _TRY_SECONDS / 8 else 8
    return max(op(kind, iters) for _ in range(tries))


def _entry(value: float, unit: str, source: str, matmul: float | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"value": value, "unit": unit, "source": source}
    if matmul is not None:
        entry["torch_matmul"] = matmul
    return entry


def _bandwidth(kind: str, by_torch: float, how: str, cpu: bool) -> dict[str, Any]:
    """Both ways are attainable: the ceiling is the faster one."""
    native = native_peak(kind) if cpu else None
    if native is None or native < by_torch:
        return _entry(by_torch, "GB/s", f"torch {how}")
    return _entry(native, "GB/s", "tenfold._peak")


def measure_ceilings(device: torch.device) -> Ceilings:
    """All ceilings of ``device``; each entry has value, unit, source and, if any, torch's matmul."""
    cpu = device.type == "cpu"
    found = {
        kind: _bandwidth(kind, torch_way(device), how, cpu)
        for kind, torch_way, how in (("copy", torch_copy, "copy_"), ("read", torch_read, "sum"))
    }
    found["update"] = _entry(torch_update(device), "GB/s", "torch mul_")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        for kind, dtype in _MATMUL.items():
            matmul = torch_matmul(dtype, device)
            peak = native_peak(kind) if cpu else None
            if peak == 0:  # no such instructions: bf16 is widened, and multiplied as fp32
                found[kind] = dict(found["fma_fp32"], torch_matmul=matmul)
            elif peak is None:
                why = "torch matmul" if not cpu else "torch matmul (this build has no _peak op)"
                found[kind] = _entry(matmul, "GFLOP/s", why, matmul)
            else:
                found[kind] = _entry(peak, "GFLOP/s", "tenfold._peak", matmul)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return found


def merge(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher of two measurements of the same run, entry by entry."""
    merged: Ceilings = {}
    for name, entry in first.items():
        best = dict(max(entry, second[name], key=lambda e: e["value"]))
        if "torch_matmul" in entry:
            best["torch_matmul"] = max(entry["torch_matmul"], second[name]["torch_matmul"])
        merged[name] = best
    return merged


def void_reason(ceilings: Ceilings) -> str:
    """Why these ceilings cannot be trusted, or ''."""
    for name, entry in ceilings.items():
        if entry["value"] < entry.get("torch_matmul", 0.0):
            return (
                f"{name} measured {entry['value']:.0f} {entry['unit']}, below torch's matmul "
                f"({entry['torch_matmul']:.0f}): the machine was busy or the peak kernel is wrong"
            )
    return ""
