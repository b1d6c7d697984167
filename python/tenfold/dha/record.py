# SPDX-License-Identifier: Apache-2.0
"""What a conversion found and did: kept with the model, written to the work folder, drawn by ``report``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.training.store import write_text


@dataclass
class ConversionRecord:
    """The numbers of one conversion.

    Attributes:
        config: its settings. layers, query_heads, head_dim: the model's.
        key_heads, value_heads: heads of every layer. budget_heads: what was allowed in all.
        plans: groups, sizes and costs of each round (one, unless ``progressive``).
        curves: per stage, the metrics of every step. losses: evaluations (nats), by moment.
        mse_by_layer: before collapsing. seconds: per stage.
        distances: M [base, base] of every component in the last round; cka: [H, H] of the parent's.
    """

    config: dict[str, Any]
    layers: int
    query_heads: int
    head_dim: int
    key_heads: list[int] = field(default_factory=list)
    value_heads: list[int] = field(default_factory=list)
    budget_heads: int = 0
    plans: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    mse_by_layer: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    distances: list[Tensor] = field(default_factory=list)
    cka: list[Tensor] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Key + value heads kept, as a share of 2 * H per layer."""
        kept = sum(self.key_heads) + sum(self.value_heads)
        return kept / (2 * self.layers * self.query_heads)

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Cache bytes of one token over all layers."""
        return (sum(self.key_heads) + sum(self.value_heads)) * self.head_dim * itemsize

    def to_json(self) -> dict[str, Any]:
        """All fields, matrices as nested lists rounded to 6 digits."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("distances", "cka")}
        for name in ("distances", "cka"):
            plain[name] = [
                [[float(f"{x:.6g}") for x in row] for row in m.tolist()]
                for m in getattr(self, name)
            ]
        return plain | {"ratio": self.ratio}

    def write(self, path: str | Path) -> None:
        """Writes :meth:`to_json` to a file."""
        write_text(Path(path), json.dumps(self.to_json()) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> ConversionRecord:
        """Reads what :meth:`write` wrote."""
        values = json.loads(Path(path).read_text())
        values.pop("ratio")
        for name in ("distances", "cka"):
            values[name] = [torch.tensor(m) for m in values[name]]
        return cls(**values)
