# SPDX-License-Identifier: Apache-2.0
"""What a run of MA-PPO did: written to its folder, drawn by ``report``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenfold.training.store import write_text

RECORD_FILE = "record.json"
SAMPLES_FILE = "samples.jsonl"


@dataclass
class PPORecord:
    """The numbers of one run.

    Attributes:
        config: its settings. rewards: names of the rewards.
        curve: the metrics of every step (see ``metrics``), the same whether or not the run was interrupted.
        seconds: where the time of every step went; steps of an interrupted run are those since.
        samples: see ``samples``. ranks: processes. parameters, trained_parameters: of policy and critic.
    """

    config: dict[str, Any]
    rewards: list[str] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    ranks: int = 1
    parameters: int = 0
    trained_parameters: int = 0

    def series(self, name: str) -> list[float]:
        """One metric over the steps, NaN where a step lacks it."""
        return [m.get(name, math.nan) for m in self.curve]

    def last(self, name: str, steps: int = 10) -> float:
        """Mean of a metric over the last steps that have it; NaN if none does."""
        found = [x for x in self.series(name) if not math.isnan(x)][-steps:]
        return math.fsum(found) / len(found) if found else math.nan

    def time_shares(self) -> dict[str, float]:
        """Mean seconds per step of each part, without the first step if there are others."""
        rows = self.seconds[1:] or self.seconds
        names = list(dict.fromkeys(k for row in rows for k in row))
        return {n: sum(r.get(n, 0.0) for r in rows) / len(rows) for n in names}

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def write(self, path: str | Path) -> None:
        """Writes :meth:`to_json` to a file."""
        write_text(Path(path), json.dumps(self.to_json()) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> PPORecord:
        """Reads what :meth:`write` wrote."""
        return cls(**json.loads(Path(path).read_text()))
