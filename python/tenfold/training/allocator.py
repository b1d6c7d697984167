# SPDX-License-Identifier: Apache-2.0
"""glibc's allocator, for measurements."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_freed_memory() -> None:
    """From now on the process keeps what it frees, if the C library is glibc.

    Else large tensors are given back at once, and a step that allocates a gigabyte waits for a gigabyte of fresh pages,
    which on a virtual machine takes up to 6 ms per megabyte.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
