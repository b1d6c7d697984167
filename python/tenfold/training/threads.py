# SPDX-License-Identifier: Apache-2.0
"""How many threads torch takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs with that many torch threads.

    One is best for models of a few hundred thousand parameters: their operations are too short to be shared, and where
    other work has a core, each of them waits for its second thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_text() -> str:
    """How many threads torch has, in words."""
    count = torch.get_num_threads()
    return f"{count} thread" if count == 1 else f"{count} threads"
