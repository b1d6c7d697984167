# SPDX-License-Identifier: Apache-2.0
"""Settings of reward-model training, checked when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from tenfold.rlhf import recipes
from tenfold.rlhf.reward_losses import RM_LOSSES
from tenfold.training.checks import integers, not_negative, one_of, positive
from tenfold.training.recipe import SCHEDULES

PRESETS = ("default", "small", *(n for n in recipes.NAMES if recipes.reward_model(n)))
_SMALL: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 16, "sequence_length": 128, "epochs": 2.0,
                          "checkpoint_every": 50}  # fmt: skip


@dataclass(frozen=True)
class RewardConfig:
    """All settings. The defaults are the published run script's (Gemma 2B).

    Attributes:
        rm_loss: one of ``reward_losses.RM_LOSSES``. center: weight of the mean (chosen + rejected)^2, which
            keeps scores around 0 (last-token loss only).
        learning_rate, betas, eps, weight_decay, max_grad_norm: AdamW; norms do not decay.
        schedule: after a linear ``warmup`` (share of the steps).
        epochs: unless ``steps`` says how many. batch_size: pairs per step over all ranks; micro_batch_size:
            pairs per forward and rank (None: all of them).
        sequence_length: tokens of prompt and answer; more are cut off at the end.
        dropout: False turns the model's dropout off, as the published runs do.
        mixed_precision: accelerate's. gradient_checkpointing. checkpoint_every: steps. seed.
    """

    rm_loss: str = "bradley_terry"
    center: float = 0.0
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.1
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int | None = None
    sequence_length: int = 1024
    dropout: bool = False
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 200
    seed: int = 1234
    preset: str = "default"

    def __post_init__(self) -> None:
        one_of("rm_loss", self.rm_loss, RM_LOSSES)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        one_of("preset", self.preset, PRESETS)
        for name in ("learning_rate", "max_grad_norm", "epochs"):
            positive(name, getattr(self, name))
        for name in ("center", "eps", "weight_decay"):
            not_negative(name, getattr(self, name))
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], got {self.warmup}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        integers(self, {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "sequence_length": 2,
                        "checkpoint_every": 1, "seed": 0}, ("steps", "micro_batch_size"))  # fmt: skip
        if self.center and self.rm_loss != "bradley_terry":
            raise ValueError(f"center needs rm_loss='bradley_terry', got {self.rm_loss!r}")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> RewardConfig:
        """``"default"``, ``"small"`` (minutes on a CPU), or a published run as ``"summarize-2b"``."""
        one_of("preset", name, PRESETS)
        made = _SMALL if name == "small" else recipes.reward_model(name) if "-" in name else {}
        return cls(**({"preset": name} | (made or {}) | changes))

    def with_changes(self, **changes: Any) -> RewardConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self) | {"betas": list(self.betas)}
