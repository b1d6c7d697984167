# SPDX-License-Identifier: Apache-2.0
"""Settings of training, checked when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from tenfold.ernie_music.config import WARPS
from tenfold.ernie_music.diffusion import SAMPLERS
from tenfold.training.checks import integers, not_negative, one_of, positive
from tenfold.training.recipe import SCHEDULES

PRECISIONS = ("no", "bf16", "fp16")
TEXTS = ("text", "texts", "tags")

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "learning_rate": 1e-3,
        "warmup": 0.02,
        "schedule": "cosine",
        "max_grad_norm": 1.0,
        "batch_size": 16,
        "steps": 1000,
        "mixed_precision": "no",
        "checkpoint_every": 200,
        "log_every": 50,
        "text": "texts",
        "condition_dropout": 0.1,
        "ema_early_epochs": 5,
    },
}
TRAIN_PRESETS = tuple(_PRESETS)


@dataclass(frozen=True)
class MusicTrainConfig:
    """Settings of :func:`~tenfold.ernie_music.train`; the defaults are the paper's (section 4 of the specification).

    Attributes:
        learning_rate, betas, eps, weight_decay: Adam's (with decay AdamW's). max_grad_norm: None: not clipped.
        schedule, warmup: ``constant``, ``cosine`` or ``linear``, after a linear warm-up (share of the steps).
        steps. batch_size: rows per step over all ranks. micro_batch_size: rows per forward and rank (None: all).
        ema_decay: of the averaged weights; ema_early_decay in the first ema_early_epochs epochs.
        condition_dropout: share of rows that are without text (0.1 where guidance is wanted).
        time_sampler: ``uniform`` or ``sobol``. time_warp: ``none`` or ``crash``.
        polarity_flip: probability that a crop is turned upside down.
        text: what is read of a row: its ``text``, one of its ``texts`` at random, or its ``tags``.
        time_bins: of the loss by time. log_every: steps between its entries. eval_every: between evaluations on
            held-out
            data (None: at the end only). demo_every: between demo sounds (None: none). demo_steps, demo_guidance: of
            them.
        mixed_precision: accelerate's. gradient_checkpointing. checkpoint_every: steps. seed.
    """

    learning_rate: float = 4e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    schedule: str = "constant"
    warmup: float = 0.0
    steps: int = 580_000
    batch_size: int = 96
    micro_batch_size: int | None = None
    ema_decay: float = 0.995
    ema_early_decay: float = 0.95
    ema_early_epochs: int = 25
    condition_dropout: float = 0.0
    time_sampler: str = "uniform"
    time_warp: str = "none"
    polarity_flip: float = 0.5
    text: str = "text"
    time_bins: int = 10
    log_every: int = 100
    eval_every: int | None = None
    demo_every: int | None = None
    demo_steps: int = 50
    demo_guidance: tuple[float, ...] = (1.0, 3.0)
    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 1000
    seed: int = 0
    preset: str = "paper"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("preset", TRAIN_PRESETS),
            ("schedule", SCHEDULES),
            ("time_sampler", SAMPLERS),
            ("time_warp", WARPS),
            ("text", TEXTS),
            ("mixed_precision", PRECISIONS),
        ):
            one_of(name, getattr(self, name), allowed)
        positive("learning_rate", self.learning_rate)
        if self.max_grad_norm is not None:
            positive("max_grad_norm", self.max_grad_norm)
        for name in ("eps", "weight_decay"):
            not_negative(name, getattr(self, name))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        for name in ("ema_decay", "ema_early_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("warmup", "condition_dropout", "polarity_flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        integers(
            self,
            {
                "steps": 1,
                "batch_size": 1,
                "micro_batch_size": 1,
                "ema_early_epochs": 0,
                "time_bins": 1,
                "log_every": 1,
                "eval_every": 1,
                "demo_every": 1,
                "demo_steps": 1,
                "checkpoint_every": 1,
                "seed": 0,
            },
            ("micro_batch_size", "eval_every", "demo_every"),
        )
        object.__setattr__(self, "demo_guidance", tuple(self.demo_guidance))

    def with_changes(self, **changes: Any) -> MusicTrainConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self) | {"betas": list(self.betas), "demo_guidance": list(self.demo_guidance)}

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> MusicTrainConfig:
        """``"paper"`` or ``"small"`` (minutes on a CPU), with some fields changed."""
        one_of("preset", name, TRAIN_PRESETS)
        return cls(**({"preset": name} | _PRESETS[name] | changes))
