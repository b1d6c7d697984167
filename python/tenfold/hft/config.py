# SPDX-License-Identifier: Apache-2.0
"""HFT's settings, checked when they are made (arXiv 2404.18466)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tenfold.training.checks import integers, not_negative, one_of, positive

METHODS = ("hft", "full", "lora", "lisa")
RESELECT = ("round", "epoch", "steps:N", "never")
PRESETS = ("sft", "dpo", "trace", "small")
SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("masked_adamw", "adamw")
_PRESETS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"learning_rate": 5e-7, "warmup": 0.1, "epochs": 3.0, "batch_size": 32},
    "trace": {"learning_rate": 1e-5, "schedule": "cosine", "warmup": 0.0, "epochs": 5.0,
              "batch_size": 256},
    "small": {"learning_rate": 1e-4, "schedule": "cosine", "epochs": 1.0, "batch_size": 8,
              "sequence_length": 128, "checkpoint_every": 50},
}  # fmt: skip


def parse_reselect(rule: str) -> tuple[str, int]:
    """(``round``, ``epoch``, ``never`` or ``steps``, steps between two draws)."""
    found = re.fullmatch(r"steps:([1-9]\d*)", rule) if isinstance(rule, str) else None
    if found:
        return "steps", int(found[1])
    if rule not in ("round", "epoch", "never"):
        raise ValueError(f"reselect must be one of {', '.join(RESELECT)}, got {rule!r}")
    return rule, 0


@dataclass(frozen=True)
class HFTConfig:
    """All settings of half fine-tuning. The defaults are the paper's draw and Tulu-2's SFT recipe.

    Attributes:
        method: ``"hft"``, or a baseline with the same interface: ``"full"`` fine-tuning, ``"lora"``
            (PEFT, all linear layers), ``"lisa"`` (a few random layers, drawn again every few steps).
        strategy, ratio, balance, freeze_embeddings: of the draw, see ``select``.
        reselect: a new draw per ``"round"`` (SFT or DPO stage, or task), ``"epoch"``, ``"steps:N"``, or
            ``"never"``. states: what happens to optimiser states at a new draw inside a round:
            ``"drop"``, ``"keep"`` or ``"hand_over"`` (of what trains before and after). Between rounds
            they are dropped.
        soft_freeze: None freezes; a number is the weight of a penalty on what is not selected instead.
        learning_rate, betas, eps, weight_decay, max_grad_norm: AdamW; norms and biases do not decay.
        schedule: ``"linear"``, ``"cosine"`` or ``"constant"`` after a linear ``warmup`` (share of steps).
        optimizer: ``"masked_adamw"``, or torch's fused ``"adamw"``. state_dtype, stochastic_rounding: of
            ``MaskedAdamW``.
        epochs: per round, unless ``steps`` says how many. batch_size: rows per step over all ranks;
            micro_batch_size: rows per forward and rank (None: all of them). sequence_length: of token streams.
        beta: of the DPO loss. share_reference: frozen tensors of policy and reference are one.
        lora_rank, lora_alpha, lora_lr; lisa_layers, lisa_every: of the baselines.
        mixed_precision: accelerate's. checkpoint_every: steps. seed: of everything random.
    """

    method: str = "hft"
    strategy: str = "category"
    ratio: float = 0.5
    balance: str = "matrices"
    freeze_embeddings: bool = False
    reselect: str = "round"
    states: str = "drop"
    soft_freeze: float | None = None
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.03
    optimizer: str = "masked_adamw"
    state_dtype: str = "fp32"
    stochastic_rounding: bool = False
    epochs: float = 2.0
    steps: int | None = None
    batch_size: int = 128
    micro_batch_size: int | None = None
    sequence_length: int = 2048
    beta: float = 0.1
    share_reference: bool = True
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_lr: float = 2e-4
    lisa_layers: int = 2
    lisa_every: int = 20
    mixed_precision: str = "no"
    checkpoint_every: int = 200
    seed: int = 0
    preset: str = field(default="sft")

    def __post_init__(self) -> None:
        from tenfold.hft.selection import BALANCES, STRATEGIES, check_ratio

        one_of("method", self.method, METHODS)
        one_of("strategy", self.strategy, STRATEGIES)
        one_of("balance", self.balance, BALANCES)
        check_ratio(self.ratio)
        parse_reselect(self.reselect)
        one_of("states", self.states, ("drop", "keep", "hand_over"))
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("state_dtype", self.state_dtype, ("param", "fp32", "bf16", "int8"))
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        one_of("preset", self.preset, PRESETS)
        for name in ("learning_rate", "max_grad_norm", "epochs", "beta", "lora_lr"):
            positive(name, getattr(self, name))
        for name in ("eps", "weight_decay"):
            not_negative(name, getattr(self, name))
        if self.soft_freeze is not None:
            not_negative("soft_freeze", self.soft_freeze)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], got {self.warmup}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        least = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "sequence_length": 2,
                 "lora_rank": 1, "lora_alpha": 1, "lisa_layers": 1, "lisa_every": 1,
                 "checkpoint_every": 1, "seed": 0}  # fmt: skip
        integers(self, least, ("steps", "micro_batch_size"))
        if self.optimizer == "adamw" and (
            self.stochastic_rounding or self.state_dtype in ("bf16", "int8")
        ):
            raise ValueError("stochastic_rounding and narrow states need optimizer='masked_adamw'")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> HFTConfig:
        """``"sft"`` and ``"dpo"`` (Tulu 2's recipes), ``"trace"`` (the benchmark's), or ``"small"``."""
        one_of("preset", name, PRESETS)
        return cls(**({"preset": name} | _PRESETS[name] | changes))

    def with_changes(self, **changes: Any) -> HFTConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def selection(self, layers: int) -> dict[str, Any]:
        """The arguments of ``select`` for a model of so many layers; baselines are draws, too."""
        common = {
            "balance": self.balance,
            "freeze_embeddings": self.freeze_embeddings,
            "seed": self.seed,
        }
        if self.method == "full":
            return {"ratio": 1.0, "seed": self.seed}
        if self.method == "lisa":
            return {
                "strategy": "layer",
                "ratio": min(1.0, self.lisa_layers / layers),
                "seed": self.seed,
            }
        return common | {"strategy": self.strategy, "ratio": self.ratio}

    def draws(self) -> tuple[str, int]:
        """The rule of re-selection, :func:`parse_reselect`'s form."""
        return (
            ("steps", self.lisa_every) if self.method == "lisa" else parse_reselect(self.reselect)
        )

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HFTConfig:
        """The inverse of :meth:`to_json`."""
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)
