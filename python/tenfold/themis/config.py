# SPDX-License-Identifier: Apache-2.0
"""Settings of Themis training, checked when they are made."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

from tenfold.training.checks import integers, not_negative, one_of, positive
from tenfold.training.recipe import SCHEDULES

LM_REDUCE = ("token_mean", "component_sum")
POOLING = ("last", "mean")
INPUTS = ("trace", "plain")

# What each preset changes. The published learning rates, and the small one that a CPU trains in minutes.
_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {"rm_coef": 0.5},
    "paper": {"lm_reduce": "component_sum"},
    "lora": {"learning_rate": 1e-4, "lora_rank": 8},
    "plain": {"alpha": 0.0, "beta": 0.0, "omega": 0.0, "inputs": "plain", "require_trace": False},
    "small": {"learning_rate": 1e-3, "batch_size": 16, "max_length": 256, "weight_decay": 0.01,
              "checkpoint_every": 50},
}  # fmt: skip
PRESETS = tuple(_PRESETS)


@dataclass(frozen=True)
class ThemisConfig:
    """All settings of the loss ``rm_coef L_RM + alpha L_LM`` and of training on it.

    The defaults are the paper's where it says them (section 4 and 8 of the method's specification).

    Attributes:
        alpha, rm_coef: weights of the two losses. beta, omega: weights of observation and rationale tokens.
        lm_reduce: ``"token_mean"`` (one mean over all targets, the published code) or ``"component_sum"`` (per
            row the means of tool calls, observations and rationale, added up; the paper's formula).
        lm_on_positive: the answers of preferred rows are targets, too.
        center: weight of the mean (r+ + r-)^2, which keeps rewards around 0.
        pooling: reward of the ``"last"`` token's hidden state, or of the ``"mean"`` over all.
        obs_dropout: share of observations that are replaced by the failure sentence in training.
        drop_rationale: the rationale is no input either (the published code's ``--no_work``).
        inputs: ``"trace"``, or ``"plain"``: question and answer alone, an ordinary reward model.
        require_trace: warn if no weight is left for the traces.
        learning_rate, betas, eps, weight_decay, max_grad_norm: AdamW; norms do not decay.
        schedule: after a linear ``warmup`` (share of the steps).
        epochs: unless ``steps`` says how many. batch_size: pairs per step over all ranks; micro_batch_size:
            pairs per forward and rank (None: all of them).
        max_length: tokens of a row. on_bad: ``"raise"``, or ``"skip"`` pairs that cannot be encoded in it.
        packed: rows are read behind one another instead of padded.
        lora_rank: 0 for full fine-tuning; lora_alpha, lora_dropout, lora_targets: of PEFT. Value head, LM head
            and embeddings train fully.
        dropout: False turns the model's own dropout off (LoRA's stays).
        mixed_precision: accelerate's. gradient_checkpointing. checkpoint_every: steps.
        eval_every: steps between evaluations on the held-out pairs (None: once per epoch). seed.
    """

    alpha: float = 1.0
    beta: float = 1.0
    omega: float = 1.0
    rm_coef: float = 1.0
    lm_reduce: str = "token_mean"
    lm_on_positive: bool = True
    center: float = 0.0
    pooling: str = "last"
    obs_dropout: float = 0.01
    drop_rationale: bool = False
    inputs: str = "trace"
    require_trace: bool = True
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.01
    epochs: float = 5.0
    steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int | None = None
    max_length: int = 512
    on_bad: str = "raise"
    packed: bool = False
    lora_rank: int = 0
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: bool = False
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 200
    eval_every: int | None = None
    seed: int = 42
    preset: str = "default"

    def __post_init__(self) -> None:
        one_of("lm_reduce", self.lm_reduce, LM_REDUCE)
        one_of("pooling", self.pooling, POOLING)
        one_of("inputs", self.inputs, INPUTS)
        one_of("on_bad", self.on_bad, ("raise", "skip"))
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        one_of("preset", self.preset, PRESETS)
        for name in ("learning_rate", "max_grad_norm", "epochs"):
            positive(name, getattr(self, name))
        for name in ("alpha", "beta", "omega", "rm_coef", "center", "eps", "weight_decay"):
            not_negative(name, getattr(self, name))
        for name in ("obs_dropout", "lora_dropout", "warmup"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        integers(self, {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "max_length": 8, "lora_rank": 0,
                        "lora_alpha": 1, "checkpoint_every": 1, "eval_every": 1, "seed": 0},
                 ("steps", "micro_batch_size", "eval_every"))  # fmt: skip
        if self.rm_coef == 0 and self.alpha == 0:
            raise ValueError("rm_coef and alpha are both 0: there is nothing to train")
        if self.inputs == "plain" and self.alpha > 0:
            raise ValueError(
                f"inputs='plain' has no trace to train on; alpha must be 0, got {self.alpha}"
            )
        if self.require_trace and self.alpha == self.beta == self.omega == 0:
            warnings.warn(
                "alpha, beta and omega are 0: the traces are read but not trained on; "
                "require_trace=False says that this is meant",
                stacklevel=3,
            )

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> ThemisConfig:
        """A preset with some fields changed.

        ``"default"``, ``"reference"`` (the published code's rm_coef), ``"paper"`` (its formula's reduction),
        ``"lora"``, ``"plain"`` (an ordinary reward model) or ``"small"`` (minutes on a CPU).
        """
        one_of("preset", name, PRESETS)
        return cls(**({"preset": name} | _PRESETS[name] | changes))

    def with_changes(self, **changes: Any) -> ThemisConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self) | {"betas": list(self.betas), "lora_targets": list(self.lora_targets)}
