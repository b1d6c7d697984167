# SPDX-License-Identifier: Apache-2.0
"""What the scripts that run emulated kernels share: arguments for ctypes, and two schedules."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import pytest
import torch

OPS = Path(__file__).resolve().parents[1] / "ops"
LIBRARY = torch.library.Library("tenfold", "IMPL")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # with_dtype of entry.h


def ptr(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def numbers(*values):
    return (ctypes.c_int64 * len(values))(*(int(v) for v in values))


def pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def rows_of(t):
    """``t``, or a copy of it whose rows are contiguous."""
    return t if t.numel() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def row_stride(t):
    return t.stride(0) if t.numel() else 0


def stand_in(functions):
    """They take the place of the CPU kernels of their names."""
    for function in functions:
        LIBRARY.impl(function.__name__, function, "CPU", allow_override=True)


def run_tests(file, *choice):
    """Tests of a file of ``tests/ops``; those of argument checks are not the kernels'."""
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(
            ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", str(OPS / file), *choice]
        )
    assert code == 0, code


def index_args(tensors):
    """(pointers, which are int64) of index tensors, some of them None."""
    pointers = (ctypes.c_void_p * len(tensors))(
        *(None if t is None else t.data_ptr() for t in tensors)
    )
    return pointers, numbers(*(t is not None and t.dtype == torch.int64 for t in tensors))


def shifted(t):
    """``t`` at a storage offset of one element: no 16-byte loads."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def far_apart(t, folder):
    """``t`` with 2^31 elements between its rows, in a file of holes."""
    stride = 1 << 31
    path = f"{folder}/{t.dtype}"
    size = (len(t) - 1) * stride + t.shape[1]
    rows = torch.from_file(path, shared=True, size=size, dtype=t.dtype).as_strided(
        t.shape, (stride, 1)
    )
    return rows.copy_(t)


def twice(library, run, schedules=(1, 77)):
    """The result of ``run``, a tensor or several, under two schedules of threads: asserted equal."""
    results = []
    for seed in schedules:
        library.emu_schedule(seed)
        results.append(run())
    for other in results[1:]:
        one, two = ([r] if isinstance(r, torch.Tensor) else r for r in (results[0], other))
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.nan_to_num(nan=7.5), b.nan_to_num(nan=7.5)), (
                "depends on the schedule"
            )
    return results[0]


_calls = 0


def scheduled(library, run):
    """``twice``, in one call of four: the others would find the same."""
    global _calls
    _calls += 1
    return twice(library, run) if _calls % 4 == 1 else run()
