# SPDX-License-Identifier: Apache-2.0
"""Settings of pre-training and fine-tuning, checked when they are made."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

from tenfold.training.checks import integers, not_negative, one_of, positive
from tenfold.training.recipe import SCHEDULES

PRECISIONS = ("no", "bf16", "fp16")
OPTIMIZERS = ("adafactor", "adamw")
DIRECTIONS = ("forward", "backward", "random", "both")

# Starting points for fine-tuning are CodeT5's scripts (section 4 of the specification).
_TUNED: dict[str, Any] = {"optimizer": "adamw", "steps": None, "max_grad_norm": 1.0, "checkpoint_every": 1000,
                          "directions": "forward"}  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    "l512": {},
    "l1024": {"max_inputs": 1024, "max_targets": 1024, "batch_size": 1920, "rows_per_draw": 4},
    "small": {
        "optimizer": "adamw", "learning_rate": 2e-3, "warmup_steps": 100, "max_grad_norm": 1.0, "steps": 1000,
        "batch_size": 32, "rows_per_draw": 16, "max_inputs": 96, "max_targets": 96, "mixed_precision": "no",
        "dropout": 0.0, "checkpoint_every": 200, "log_every": 50,
    },
    "summarise": _TUNED | {"max_inputs": 256, "max_targets": 128, "batch_size": 48, "learning_rate": 5e-5,
                           "epochs": 15.0, "patience": 2},
    "refine-small": _TUNED | {"max_inputs": 130, "max_targets": 120, "batch_size": 32, "learning_rate": 5e-5,
                              "epochs": 50.0, "patience": 5},
    "refine-medium": _TUNED | {"max_inputs": 240, "max_targets": 240, "batch_size": 32, "learning_rate": 5e-5,
                               "epochs": 50.0, "patience": 5},
    "concode": _TUNED | {"max_inputs": 320, "max_targets": 150, "batch_size": 32, "learning_rate": 1e-4,
                         "epochs": 30.0, "patience": 3},
    "finetune-small": _TUNED | {"max_inputs": 128, "max_targets": 64, "batch_size": 16, "learning_rate": 1e-3,
                                "warmup_steps": 10, "epochs": 3.0, "mixed_precision": "no", "dropout": 0.0,
                                "rows_per_draw": 16, "checkpoint_every": 100, "log_every": 20},
}  # fmt: skip
TRAIN_PRESETS = tuple(_PRESETS)


@dataclass(frozen=True)
class CodeTrainConfig:
    """Settings of :func:`~tenfold.ernie_code.train`; the defaults are the paper's L512 pre-training.

    Attributes:
        optimizer: ``adafactor`` (no relative step, no momentum; update clipped to RMS ``clip_threshold``, decay
            ``decay_rate``, rates times the RMS of a weight with ``scale_parameter``) or ``adamw`` (``betas``, ``eps``).
        learning_rate: at its peak. schedule, warmup_steps: ``linear``, ``cosine`` or ``constant`` after a linear rise.
        weight_decay. max_grad_norm: None: gradients are not clipped.
        steps: None: ``epochs`` over the rows. patience: evaluations without improvement after which training stops
            (None: never); the best weights are kept then.
        batch_size: rows per step over all ranks. rows_per_draw: rows that are drawn from one corpus at a time.
        micro_batch_size: rows per forward and rank (None: a draw); a step's gradient is that of one batch whatever it
            is.
        max_inputs, max_targets: tokens, EOS included. density, mean_span: of span corruption. alpha: corpora are
            drawn with ``p^alpha``. directions: of pairs, as of ``PivotTranslationCollator``. dropout: None: as the
            model has it.
        mixed_precision: accelerate's. gradient_checkpointing. eval_every: steps between evaluations on held-out rows
            (None: an epoch, or at the end only). log_every. checkpoint_every: steps. seed.
    """

    optimizer: str = "adafactor"
    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup_steps: int = 1000
    scale_parameter: bool = False
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    steps: int | None = 100_000
    epochs: float = 1.0
    patience: int | None = None
    batch_size: int = 3840
    rows_per_draw: int = 8
    micro_batch_size: int | None = None
    max_inputs: int = 512
    max_targets: int = 512
    density: float = 0.15
    mean_span: float = 3.0
    alpha: float = 0.3
    directions: str = "random"
    dropout: float | None = 0.1
    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = False
    eval_every: int | None = None
    log_every: int = 100
    checkpoint_every: int = 500
    seed: int = 0
    preset: str = "l512"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("preset", TRAIN_PRESETS),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("mixed_precision", PRECISIONS),
            ("directions", DIRECTIONS),
        ):
            one_of(name, getattr(self, name), allowed)
        for name in ("learning_rate", "clip_threshold", "epochs"):
            positive(name, getattr(self, name))
        if self.max_grad_norm is not None:
            positive("max_grad_norm", self.max_grad_norm)
        for name in ("eps", "weight_decay", "alpha"):
            not_negative(name, getattr(self, name))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not -1 <= self.decay_rate < 0:
            raise ValueError(f"decay_rate must be in [-1, 0), got {self.decay_rate}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.density < 1:
            raise ValueError(f"density must be in [0, 1), got {self.density}")
        if not self.mean_span >= 1:
            raise ValueError(f"mean_span must be >= 1, got {self.mean_span}")
        integers(
            self,
            {
                "warmup_steps": 0, "steps": 1, "patience": 1, "batch_size": 1, "rows_per_draw": 1,
                "micro_batch_size": 1, "max_inputs": 2, "max_targets": 2, "eval_every": 1, "log_every": 1,
                "checkpoint_every": 1, "seed": 0,
            },
            ("steps", "patience", "micro_batch_size", "eval_every"),
        )  # fmt: skip
        if self.batch_size % self.rows_per_draw:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of rows_per_draw {self.rows_per_draw}: a draw is of "
                "one corpus"
            )
        if self.mixed_precision == "fp16":
            warnings.warn(
                "T5 models overflow in float16 (all of them were trained in bfloat16); use mixed_precision='bf16'",
                stacklevel=3,
            )
        object.__setattr__(self, "betas", tuple(self.betas))

    def with_changes(self, **changes: Any) -> CodeTrainConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> CodeTrainConfig:
        """A preset (``l512``, ``l1024``: the paper's; ``summarise``, ``refine-small``, ``refine-medium``, ``concode``:
        fine-tuning; ``small``, ``finetune-small``: minutes on a CPU), with some fields changed."""
        one_of("preset", name, TRAIN_PRESETS)
        return cls(**({"preset": name} | _PRESETS[name] | changes))
