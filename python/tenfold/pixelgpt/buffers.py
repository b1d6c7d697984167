# SPDX-License-Identifier: Apache-2.0
"""Memory for large batches that is used again once nobody has it any more.

The C library maps memory of over 32 MB anew for every array, and the first write to each page of it costs more than
drawing the strips does. So the last buffers are kept, and given out again when only the pool refers to them.
"""

from __future__ import annotations

import math
import sys
import threading

import numpy as np

LEAST = 16 << 20  # bytes; smaller arrays are left to the C library
MOST = 2  # buffers that are kept: one in use, one being filled


def _references(held: list[np.ndarray], at: int) -> int:
    return sys.getrefcount(held[at])


# What is counted for an array that only a list refers to; views and tensors of it refer to it too.
_ALONE = _references([np.empty(1, np.uint8)], 0)


class BufferPool:
    """Hands out uninitialised uint8 arrays. Threads may share one."""

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of ``shape``. Its memory is not given out again while it, a view or a tensor of it lives."""
        size = math.prod(shape)
        if size < LEAST:
            return np.empty(shape, np.uint8)
        if not self._lock.acquire(blocking=False):  # never waits: a fork may have copied it locked
            return np.empty(shape, np.uint8)
        try:
            for at in range(len(self._held)):
                if self._held[at].size == size and _references(self._held, at) == _ALONE:
                    return self._held[at].reshape(shape)
            owner = np.empty(size, np.uint8)
            self._held = [owner, *self._held][:MOST]
            return owner.reshape(shape)
        finally:
            self._lock.release()
