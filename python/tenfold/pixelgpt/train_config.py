# SPDX-License-Identifier: Apache-2.0
"""Settings of pre-training and of fine-tuning, checked when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from tenfold.pixelgpt.config import MODALITIES, VARIANTS
from tenfold.training.checks import integers, not_negative, one_of, positive
from tenfold.training.recipe import SCHEDULES

PRECISIONS = ("no", "bf16", "fp16")
Self = TypeVar("Self", bound="_Settings")

_PRETRAIN: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"learning_rate": 1e-3, "warmup": 0.05, "schedule": "cosine", "batch_size": 16, "length": 64,
              "steps": 400, "mixed_precision": "no", "checkpoint_every": 200, "eval_every": 100},
}  # fmt: skip
_FINETUNE: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"learning_rate": 1e-3, "warmup_steps": 10, "batch_size": 32, "length": 32, "steps": 150,
              "eval_every": 50, "checkpoint_every": 200},
}  # fmt: skip
PRETRAIN_PRESETS, FINETUNE_PRESETS = tuple(_PRETRAIN), tuple(_FINETUNE)


@dataclass(frozen=True)
class _Settings:
    """What both have: AdamW, the schedule, sizes, checkpoints."""

    learning_rate: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "linear"
    steps: int = 1000
    batch_size: int = 64
    micro_batch_size: int | None = None
    length: int = 1024
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 500
    eval_every: int | None = None
    seed: int = 42
    preset: str = "paper"

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        for name in ("learning_rate", "max_grad_norm"):
            positive(name, getattr(self, name))
        for name in ("eps", "weight_decay"):
            not_negative(name, getattr(self, name))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        integers(self, {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "length": 2, "checkpoint_every": 1,
                        "eval_every": 1, "seed": 0}, ("micro_batch_size", "eval_every"))  # fmt: skip

    def with_changes(self: Self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self) | {"betas": list(self.betas)}


@dataclass(frozen=True)
class PretrainConfig(_Settings):
    """Settings of pre-training; the defaults are the paper's as far as it says them (section 4 of the specification).

    Attributes:
        variant: ``"textgpt"``, ``"pixelgpt"``, ``"monogpt"`` or ``"dualgpt"``: which streams are trained on.
        weights: how often a step is of each stream, by name; the published ratios are unknown: equal by default.
        length: patches of a strip, and tokens of a row of text. pair_patches, pair_tokens: of pairs (None: half each).
        learning_rate, betas, eps, weight_decay, max_grad_norm: AdamW; vectors do not decay.
        schedule: after a linear ``warmup`` (share of the steps). steps. batch_size: rows per step over all ranks;
            micro_batch_size: rows per forward and rank (None: all of them).
        mixed_precision: accelerate's. gradient_checkpointing. checkpoint_every: steps.
        eval_every: steps between evaluations on held-out rows (None: before and after only). seed.
    """

    variant: str = "pixelgpt"
    weights: dict[str, float] = field(default_factory=dict)
    pair_patches: int | None = None
    pair_tokens: int | None = None
    weight_decay: float = 0.1
    warmup: float = 0.004  # 200 of about 50,000 steps
    steps: int = 51_750
    batch_size: int = 4096
    mixed_precision: str = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("preset", self.preset, PRETRAIN_PRESETS)
        one_of("variant", self.variant, tuple(VARIANTS))
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], got {self.warmup}")
        integers(self, {"pair_patches": 2, "pair_tokens": 2}, ("pair_patches", "pair_tokens"))
        for name, value in self.weights.items():
            one_of(f"a stream of {self.variant} in weights", name, self.streams)
            not_negative(f"weights[{name!r}]", value)
        if not any(self.weights.get(name, 1.0) for name in self.streams):
            raise ValueError("weights are all 0: there is nothing to train on")

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the variant's streams."""
        return VARIANTS[self.variant]

    @property
    def pair_lengths(self) -> tuple[int, int]:
        """(patches, tokens) of a pair."""
        half = max(2, self.length // 2)
        return self.pair_patches or half, self.pair_tokens or half

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> PretrainConfig:
        """``"paper"`` or ``"small"`` (minutes on a CPU), with some fields changed."""
        one_of("preset", name, PRETRAIN_PRESETS)
        return cls(**({"preset": name} | _PRETRAIN[name] | changes))


@dataclass(frozen=True)
class FineTuneConfig(_Settings):
    """Settings of fine-tuning; what the paper's tasks have in common; :func:`~tenfold.pixelgpt.recipe` has the rest.

    Attributes:
        modality: ``"pixel"``, ``"text"`` or ``"pair"``: what the classifier reads.
        length: patches of a strip, or tokens of a row; both in a pair.
        warmup_steps: of the linear schedule. patience: evaluations without a better metric before it ends (0: never).
        render_mode: ``"rgb"``, ``"gray"`` or ``"binary"``, of the strips. learning_rate ... seed: as in pre-training.
    """

    modality: str = "pixel"
    learning_rate: float = 5e-5
    warmup_steps: int = 100
    patience: int = 8
    render_mode: str = "rgb"
    steps: int = 8000
    length: int = 768
    eval_every: int | None = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("preset", self.preset, FINETUNE_PRESETS)
        one_of("modality", self.modality, MODALITIES)
        one_of("render_mode", self.render_mode, ("rgb", "gray", "binary"))
        integers(self, {"warmup_steps": 0, "patience": 0})

    @property
    def warmup(self) -> float:
        """The warm-up as a share of the steps."""
        return min(1.0, self.warmup_steps / self.steps)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> FineTuneConfig:
        """``"paper"`` or ``"small"`` (a model of a few million parameters on a CPU), with some fields changed."""
        one_of("preset", name, FINETUNE_PRESETS)
        return cls(**({"preset": name} | _FINETUNE[name] | changes))
