# SPDX-License-Identifier: Apache-2.0
"""What a run did: its numbers, in a JSON file beside its model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tenfold.training.store import write_text

HELD_OUT = "held-out/"
R = TypeVar("R", bound="Record")


@dataclass
class Record:
    """The numbers of one run.

    Attributes:
        config: its settings. model: sizes of the model. curve: metrics of every step.
        validation: metrics over held-out data, with ``step``, in order. seconds: of training.
        parameters: all; trained: those that trained.
    """

    config: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    parameters: int = 0
    trained: int = 0

    def take_curve(self, curve: list[dict[str, float]]) -> None:
        """The loop's curve; what was found on held-out data on the way becomes ``validation``."""
        self.curve = curve
        for metrics in curve:
            names = [k for k in metrics if k.startswith(HELD_OUT)]
            if names:
                self.validation.append({k.removeprefix(HELD_OUT): metrics.pop(k) for k in names})

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def write(self, path: str | Path) -> None:
        """Writes all fields to a JSON file."""
        write_text(Path(path), json.dumps(self.to_json()) + "\n")

    @classmethod
    def read(cls: type[R], path: str | Path) -> R:
        """Reads what :meth:`write` wrote."""
        return cls(**json.loads(Path(path).read_text()))
