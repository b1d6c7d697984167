# SPDX-License-Identifier: Apache-2.0
"""What a run of half fine-tuning did: written to its folder, drawn by ``report``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenfold.hft.metrics import backward_transfer, overall_performance
from tenfold.hft.plan import Plan
from tenfold.training.store import write_text


def plan_summary(plan: Plan) -> dict[str, Any]:
    """A Plan without its names."""
    return {"round": plan.round, "seed": plan.seed, "strategy": plan.strategy, "ratio": plan.ratio,
            "layer_fraction": plan.layer_fraction, "fraction": plan.fraction, "digest": plan.digest(),
            "trained": len(plan.trained), "partial": len(plan.partial), "frozen": len(plan.frozen)}  # fmt: skip


@dataclass
class TuneRecord:
    """The numbers of one run.

    Attributes:
        kind: ``sft``, ``dpo`` or ``continual``. config: its settings.
        plans: summaries of the draws, in order. curves: metrics of every step, by round.
        losses: evaluations (nats), by moment. seconds: per round.
        tasks: names; scores: R[t][i] on task i after task t, by measure; start: scores before.
        trained_parameters, parameters: of the first round; state_bytes: of the optimiser at its end.
    """

    kind: str
    config: dict[str, Any]
    plans: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    start: dict[str, list[float]] = field(default_factory=dict)
    parameters: int = 0
    trained_parameters: int = 0

    def summary(self, measure: str) -> dict[str, float]:
        """OP and BWT (both forms) of a measure."""
        scores = self.scores[measure]
        found = {"op": overall_performance(scores), "bwt": backward_transfer(scores)}
        if len(scores) > 1:
            found["bwt_classic"] = backward_transfer(scores, "classic")
        return found

    def to_json(self) -> dict[str, Any]:
        """All fields, and OP and BWT."""
        done = [m for m, r in self.scores.items() if r and len(r) == len(self.tasks)]
        return asdict(self) | {"summary": {m: self.summary(m) for m in done}}

    def write(self, path: str | Path) -> None:
        """Writes :meth:`to_json` to a file."""
        write_text(Path(path), json.dumps(self.to_json()) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> TuneRecord:
        """Reads what :meth:`write` wrote."""
        values = json.loads(Path(path).read_text())
        values.pop("summary")
        return cls(**values)
