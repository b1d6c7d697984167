# SPDX-License-Identifier: Apache-2.0
"""Ids of examples, and the rows that they have in a table: never mixed up, never guessed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Id = int | str


class UnknownId(KeyError, ValueError):
    """An id that a table has no row for. A ``KeyError``; the message names the id."""

    def __str__(self) -> str:
        return str(self.args[0])


class IdIndex:
    """The rows of ids.

    Args:
        ids: the id of every row, integers or strings, no one twice. what: of what they are, for messages.

    Raises:
        ValueError: an id that comes twice. TypeError: an id that is neither an integer nor a string.
    """

    def __init__(self, ids: Iterable[Any], what: str = "ids") -> None:
        self.ids: tuple[Id, ...] = tuple(checked(i, what) for i in ids)
        self.what = what
        self._rows = {name: row for row, name in enumerate(self.ids)}
        if len(self._rows) < len(self.ids):
            twice = next(n for row, n in enumerate(self.ids) if self._rows[n] != row)
            raise ValueError(f"{what}: the id {twice!r} comes twice")

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, name: Id) -> int:
        """The row of an id; UnknownId without one."""
        try:
            return self._rows[name]
        except KeyError:
            raise UnknownId(f"{self.what}: no row for the id {name!r}") from None

    def rows(self, names: Iterable[Id]) -> Tensor:
        """The rows int64 [N] of ids; UnknownId names the first that has none."""
        return torch.tensor([self.row(checked(n, self.what)) for n in names], dtype=torch.int64)


def checked(name: Any, what: str) -> Id:
    """An id as it is compared: numpy's integers become Python's. TypeError for anything else."""
    if isinstance(name, bool) or not isinstance(name, int | str | np.integer):
        raise TypeError(
            f"{what}: ids are integers or strings, got {name!r} ({type(name).__name__})"
        )
    return int(name) if isinstance(name, np.integer) else name


def order_tensor(order: Any, what: str = "order") -> Tensor:
    """Checked rows of a curriculum, int32, -1 where a batch is padded.

    Args:
        order: integers [T, B] or [R, T, B], as a tensor, an array or nested lists; ragged batches (lists of
            different lengths) are padded here.

    Raises:
        TypeError: numbers that are not integers. ValueError: another shape, a row below -1.
    """
    if not isinstance(order, Tensor):
        order = _padded(order, what)
    if order.is_floating_point() or order.is_complex() or order.dtype == torch.bool:
        raise TypeError(f"{what} must hold integers, got {order.dtype}")
    if order.ndim not in (2, 3):
        raise ValueError(f"{what} must be [T, B] or [R, T, B], got shape {list(order.shape)}")
    if order.numel() and int(order.min()) < -1:
        raise ValueError(f"{what} must be >= -1 (-1: no example), got {int(order.min())}")
    return order.to(torch.int32).contiguous()


def _padded(order: Any, what: str) -> Tensor:
    if isinstance(order, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(order))
    steps = [list(step) for step in order]
    if steps and steps[0] and isinstance(steps[0][0], Sequence | np.ndarray | Tensor):
        made = [_padded(run, what) for run in order]
        if len({len(m) for m in made}) > 1:
            raise ValueError(
                f"{what}: runs have {sorted({len(m) for m in made})} steps; all must have as many"
            )
        width = max(m.shape[1] for m in made)
        return torch.stack([widened(m, width) for m in made])
    for name in (name for step in steps for name in step):
        if isinstance(name, bool) or not isinstance(name, int | np.integer):
            raise TypeError(f"{what} must hold integers, got {name!r} ({type(name).__name__})")
    width = max((len(step) for step in steps), default=0) or 1
    return torch.tensor(
        [[*step, *[-1] * (width - len(step))] for step in steps], dtype=torch.int64
    ).view(-1, width)


def widened(order: Tensor, width: int) -> Tensor:
    """``order`` [..., B] with -1 appended up to ``width`` places."""
    return torch.nn.functional.pad(order, (0, width - order.shape[-1]), value=-1)
