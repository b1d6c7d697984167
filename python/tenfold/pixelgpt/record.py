# SPDX-License-Identifier: Apache-2.0
"""What runs did: written to their folders, drawn by ``report``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tenfold.training.record import Record


@dataclass
class PretrainRecord(Record):
    """Of pre-training: the curve has ``loss``, ``npp``, ``ntp`` and ``stream`` (a number; names are in ``streams``).

    Attributes:
        streams: names. rows: per stream. baselines: regression losses that need no model, on held-out strips.
    """

    streams: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)


@dataclass
class FineTuneRecord(Record):
    """Of fine-tuning.

    Attributes:
        task: its name, labels and metric. examples: trained on.
        best: the validation entry whose weights were kept. scores: on test sets, by name, at the end.
    """

    task: dict[str, Any] = field(default_factory=dict)
    examples: int = 0
    best: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def model_summary(config: Any) -> dict[str, Any]:
    """A model's sizes, of its config."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "patch_size", "num_channels", "norm_pix_loss", "eos_in_loss",
             "max_position_embeddings")  # fmt: skip
    return {n: getattr(config, n) for n in names}
