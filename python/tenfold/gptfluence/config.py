# SPDX-License-Identifier: Apache-2.0
"""Settings of recorded runs and of simulators, checked when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from tenfold.training.checks import integers, not_negative, one_of, positive
from tenfold.training.recipe import SCHEDULES

TOWERS, PROJECTIONS, INTERACTIONS = ("separate", "shared"), ("mlp", "linear"), ("product", "concat")
HISTORIES, REDUCTIONS, SPARSE = ("zeros", "repeat"), ("sum", "mean"), ("block", "pairs")
MODES, OPTIMIZERS = ("teacher_forced", "free_running"), ("adam", "adamw")
CONCAT_WIDTH = 100  # of the last layer before the heads, as published
Self = TypeVar("Self", bound="_Settings")

_SIMULATOR: dict[str, dict[str, Any]] = {
    "default": {},
    # Fine-tuning of the publication; its towers are one, and the sum of the factors has to learn to be about 1.
    "reference": {"towers": "shared", "residual": False, "sparse": "pairs", "batch_size": 128, "epochs": 300,
                  "learning_rate": 1e-4, "warmup_steps": 200, "validate_every": 1},
    "reference-instruction": {"towers": "shared", "residual": False, "sparse": "pairs", "batch_size": 128, "epochs": 50,
                              "learning_rate": 1e-5, "warmup_steps": 200, "validate_every": 1},
}  # fmt: skip
_RECORD: dict[str, dict[str, Any]] = {
    "reference": {},
    "small": {"learning_rate": 1e-3, "examples": 64, "epochs": 2.0, "length": 128, "runs": 24},
}
SIMULATOR_PRESETS, RECORD_PRESETS = tuple(_SIMULATOR), tuple(_RECORD)


@dataclass(frozen=True)
class _Settings:
    seed: int = 42
    preset: str = "default"

    def with_changes(self: Self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls: type[Self], given: dict[str, Any]) -> Self:
        """What :meth:`to_json` made."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class SimulatorConfig(_Settings):
    """What a simulator is, and how it is fitted (sections 3.1 to 3.5 and 4 of the specification).

    Attributes:
        order: n of the Markov recurrence. history: what stands before the first measurement: ``"zeros"``, or
            ``"repeat"`` of it.
        towers: ``"separate"`` projections of training and test examples, or one ``"shared"`` by both.
        projection: ``"mlp"`` (Linear-ReLU-Linear), or ``"linear"`` without bias. width: of the projections (None:
        the features').
        interaction: ``"product"`` of the projections, or ``"concat"``: a network over both features, a head per plane.
        residual: alpha_1 is 1 plus its factors, which then start at 0 (separate towers) or near it.
        reduction: factors of a batch are its examples' ``"sum"`` or ``"mean"``. With sums, another batch size needs
        another fit.
        sparse: steps between measurements: ``"block"``, all their examples are one batch; or ``"pairs"``, as published.
        mode: ``"teacher_forced"``: each step from recorded values; ``"free_running"``: through the whole recurrence.
        batch_size: (run, step, test) tuples per optimiser step; None: all of them. epochs: over all tuples.
        optimizer: ``"adam"`` (weight decay is coupled, as published) or ``"adamw"``. learning_rate, betas, eps,
        weight_decay.
        l2: weight of the squared norm of all parameters as a term of the loss. warmup_steps: of the linear schedule.
        patience: validations without a better result before the fit ends (0: never). validate_every: epochs. seed.
    """

    order: int = 1
    history: str = "zeros"
    towers: str = "separate"
    projection: str = "mlp"
    width: int | None = None
    interaction: str = "product"
    residual: bool = True
    reduction: str = "sum"
    sparse: str = "block"
    mode: str = "teacher_forced"
    batch_size: int | None = None
    epochs: int = 1500
    optimizer: str = "adam"
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-5
    l2: float = 0.0
    warmup_steps: int = 50
    patience: int = 10
    validate_every: int = 25

    def __post_init__(self) -> None:
        one_of("preset", self.preset, SIMULATOR_PRESETS)
        for name, allowed in (
            ("towers", TOWERS), ("projection", PROJECTIONS), ("interaction", INTERACTIONS), ("history", HISTORIES),
            ("reduction", REDUCTIONS), ("sparse", SPARSE), ("mode", MODES), ("optimizer", OPTIMIZERS),
        ):  # fmt: skip
            one_of(name, getattr(self, name), allowed)
        integers(self, {"order": 1, "width": 1, "batch_size": 1, "epochs": 1, "warmup_steps": 0, "patience": 0,
                        "validate_every": 1, "seed": 0}, ("width", "batch_size"))  # fmt: skip
        positive("learning_rate", self.learning_rate)
        for name in ("eps", "weight_decay", "l2"):
            not_negative(name, getattr(self, name))
        _check_betas(self.betas)
        if self.mode == "free_running" and self.batch_size is not None:
            raise ValueError("free_running goes through whole runs; batch_size must be None")
        if self.mode == "free_running" and self.sparse == "pairs":
            raise ValueError('free_running needs sparse="block": pairs of measurements are no runs')

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> SimulatorConfig:
        """``"default"``, or as published ``"reference"`` and ``"reference-instruction"``; some fields changed."""
        one_of("preset", name, SIMULATOR_PRESETS)
        return cls(**({"preset": name} | _SIMULATOR[name] | changes))


@dataclass(frozen=True)
class RecordConfig(_Settings):
    """How runs are made: many fine-tunings of one model, each on other examples in another order.

    The defaults are those of the publication's fine-tunings (section 4 of the specification).

    Attributes:
        runs: how many. examples: of each run, drawn from all of them. epochs: over these. batch_size: examples per
            step.
        concentration: of a Dirichlet distribution over groups of examples, from which each run draws how many it
            takes of which
            group; None: all examples are as likely. Uniform draws are hard to tell from their mean.
        every: steps between measurements. subset: tests that one of them measures (None: all; first and last always
        all).
        length: tokens of a row. learning_rate, betas, eps, weight_decay, max_grad_norm, schedule, warmup (share of
        the steps): AdamW.
        generate: tokens that are generated for BLEU and ROUGE-L (0: neither). mixed_precision, micro_batch_size,
            checkpoint_every: of the loop. seed: of subsets and orders.
    """

    runs: int = 32
    examples: int = 128
    epochs: float = 3.0
    batch_size: int = 4
    concentration: float | None = None
    every: int = 1
    subset: int | None = None
    length: int = 2048
    learning_rate: float = 5e-7
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 1e-3
    max_grad_norm: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.0
    generate: int = 0
    mixed_precision: str = "no"
    micro_batch_size: int | None = None
    checkpoint_every: int = 500
    preset: str = "reference"

    def __post_init__(self) -> None:
        one_of("preset", self.preset, RECORD_PRESETS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        integers(
            self,
            {
                "runs": 1,
                "examples": 1,
                "batch_size": 1,
                "every": 1,
                "subset": 1,
                "length": 2,
                "generate": 0,
                "micro_batch_size": 1,
                "checkpoint_every": 1,
                "seed": 0,
            },
            ("subset", "micro_batch_size"),
        )
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            positive(name, getattr(self, name))
        for name in ("eps", "weight_decay"):
            not_negative(name, getattr(self, name))
        if self.concentration is not None:
            positive("concentration", self.concentration)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], got {self.warmup}")
        _check_betas(self.betas)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> RecordConfig:
        """``"reference"`` (as published) or ``"small"`` (a small model on a CPU), some fields changed."""
        one_of("preset", name, RECORD_PRESETS)
        return cls(**({"preset": name} | _RECORD[name] | changes))


def _check_betas(betas: tuple[float, float]) -> None:
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
