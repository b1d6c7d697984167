# SPDX-License-Identifier: Apache-2.0
"""Feature tables: one row per example, found by id, kept outside of a simulator's checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.gptfluence.ids import Id, IdIndex


class Features:
    """Frozen features of examples.

    Args:
        ids: of the N examples. table: float32 [N, D]. encoder: what made them; features of two encoders do not go
            together.

    Raises:
        ValueError: another shape, features that are not finite, an id that comes twice. TypeError: no
            floating-point numbers.
    """

    def __init__(self, ids: Iterable[Id], table: Tensor, encoder: str = "given") -> None:
        self.index = IdIndex(ids, "features")
        self.encoder = encoder
        if not table.is_floating_point():
            raise TypeError(f"features must be floating-point numbers, got {table.dtype}")
        if table.ndim != 2 or len(table) != len(self.index):
            raise ValueError(
                f"features must be [N, D] with a row for each of {len(self.index)} ids, got shape {list(table.shape)}"
            )
        if not table.isfinite().all():
            bad = int((~table.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"the features of {self.index.ids[bad]!r} are not finite")
        # float64 stays what it is: tests of the recurrence use it.
        self.table = table if table.dtype == torch.float64 else table.float()

    @classmethod
    def of_texts(
        cls, ids: Iterable[Id], texts: Sequence[Any], encoder: Callable[[Sequence[Any]], Tensor]
    ) -> Features:  # fmt: skip
        """The features of texts; the encoder's ``name`` says what made them."""
        return cls(ids, encoder(texts), getattr(encoder, "name", type(encoder).__name__))

    @property
    def ids(self) -> tuple[Id, ...]:
        """In the order of the rows."""
        return self.index.ids

    @property
    def width(self) -> int:
        """D."""
        return self.table.shape[1]

    def __len__(self) -> int:
        return len(self.index)

    def take(self, ids: Iterable[Id]) -> Features:
        """The features of these ids, in their order. UnknownId for one that has none."""
        names = list(ids)
        return Features(names, self.table[self.index.rows(names)], self.encoder)

    def digest(self) -> str:
        """Identifies ids and table."""
        made = hashlib.sha256(json.dumps([self.encoder, self.ids]).encode())
        made.update(self.table.contiguous().view(torch.uint8).numpy().tobytes())
        return made.hexdigest()[:16]

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file: ``table``, with ids and encoder in its header."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        about = {"ids": json.dumps(self.ids), "encoder": self.encoder}
        save_file({"table": self.table.contiguous()}, temporary, metadata=about)
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """What :meth:`save` wrote. ValueError for another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                return cls(json.loads(about["ids"]), file.get_tensor("table"), about["encoder"])
        except (SafetensorError, KeyError):
            raise ValueError(f"{path} is no file of features") from None


def check_together(train: Features, test: Features, shared: bool) -> None:
    """ValueError if towers are shared and the two tables cannot go through one."""
    if shared and train.width != test.width:
        raise ValueError(
            f"shared towers need features of one width, got {train.width} for training "
            f"and {test.width} for test examples"
        )
    if shared and train.encoder != test.encoder:
        raise ValueError(
            f"shared towers need features of one encoder, got {train.encoder!r} for training and {test.encoder!r} for "
            "test examples"
        )
