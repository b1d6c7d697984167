# SPDX-License-Identifier: Apache-2.0
"""DHA's conversion settings, checked when they are made (paper sections 3-4; arXiv 2406.06567v2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tenfold.training.checks import integers, not_negative, one_of, positive
from tenfold.training.errors import TrainingError


class ConversionError(TrainingError):
    """A conversion cannot go on: a wrong start, a loss that is no number, heads that have not fused."""


METHODS = ("dha", "gqa_mean", "cka_mean", "dha_mean")
PRESETS = ("paper", "small")
# Everything that is cut for a small model on a small machine. The rates are those at which the
# operators can travel from identity to 1 / g within so few steps.
_SMALL: dict[str, Any] = {
    "search_steps": 60, "fusion_steps": 200, "recovery_steps": 200, "sequence_length": 256,
    "batch_size": 8, "recovery_batch_size": 8, "learning_rate": 3e-4, "omega_lr": 3e-2,
    "lambda_lr": 3e-2, "margin_base": 0.98, "margin_end": 0.6, "checkpoint_every": 50,
    # So few steps may end between the two: fusion aims at stop_mse, and an hour is not thrown away.
    "collapse_mse": 1e-2,
}  # fmt: skip


@dataclass(frozen=True)
class DhaConfig:
    """All settings of a conversion. The defaults are the paper's where it states them.

    Attributes:
        budget: key + value heads kept, as a share of 2 * H per layer (H query heads), in (0, 1].
            From a GQA checkpoint the share is still of the query heads: 9 query and 3 KV heads are
            1/3 before anything is converted.
        method: ``"dha"``, or a baseline with the same interface: ``"gqa_mean"`` (contiguous groups,
            the same everywhere, mean-pooled), ``"cka_mean"`` (groups by CKA of the weights,
            mean-pooled), ``"dha_mean"`` (DHA's groups and budgets, mean-pooled).
        search_steps, fusion_steps, recovery_steps: optimiser steps of each stage.
        sequence_length: tokens per row. batch_size, recovery_batch_size: rows per step over all
            ranks; micro_batch_size: rows per forward and rank (None: all of them).
        learning_rate: of the model's weights. omega_lr, lambda_lr: of the fusion operators and of
            the multiplier (0: the multiplier stays at ``lambda_init``, the appendix's version).
        betas, weight_decay, clip, warmup, final_lr: AdamW, gradient norm, share of steps, and the
            cosine's last value as a share of its peak.
        lambda_init: of the Lagrange multiplier. fusion_loss: ``"per_group"``, one hinge per group, or
            ``"summed"``, one hinge on the sum.
        margin_base, margin_end: t(step) = max(0, b ** step * (1 - step / k)), k = margin_end * steps.
        stop_mse: fusion ends when the mean mse is below it. collapse_mse: collapsing above it raises
            unless ``force`` (the preset ``"small"``: 1e-2).
        coefficients: ``"full"`` (one per head pair and dimension), ``"scalar"`` (one per pair), or
            ``"tied"`` (keys share them between the two dimensions that RoPE rotates together).
        grouping: what groups heads: ``"search"``, ``"cka"``, or ``"contiguous"`` (GQA's order).
        solver, restarts: of ``ops.group_heads``.
        allocation: ``"dp"``, ``"greedy"``, ``"uniform"``, ``"loss_weighted"``; see ``grouping.py``.
        sizes: allowed head counts per layer (None: all divisors). min_heads: the smallest of them.
        nested: value groups are unions of key groups, or the reverse.
        tp_size: heads are grouped only inside each of so many equal blocks, one per rank.
        gqa: from a GQA checkpoint, ``"expand"`` to one key and value head per query head (lossless),
            or ``"group"`` the heads that are there.
        init: ``"identity"``, or ``"aligned"``: heads are rotated to agree first (function unchanged).
        progressive: halve the heads repeatedly, searching again each time, instead of once.
        keep_search_weights: fusion starts from the weights after search, not from the parent's.
        distill: weight of the KL divergence from the parent in recovery, in [0, 1]; the LM loss has
            the rest. temperature: of both distributions.
        check_equivalence: compare the logits at the start of search and fusion with the parent's.
        sort_heads: reorder query heads so that key groups are contiguous (function unchanged).
        attention: of the converted model while it is trained; the result has transformers' usual
            choice, ``"tenfold"``.
        force: collapse in any case. mixed_precision: accelerate's; the weights trained are float32.
        checkpoint_every: steps between checkpoints in the work folder. seed: of everything random.
    """

    budget: float = 0.25
    method: str = "dha"
    search_steps: int = 240
    fusion_steps: int = 1000
    recovery_steps: int = 50_000
    sequence_length: int = 4096
    batch_size: int = 64
    recovery_batch_size: int = 256
    micro_batch_size: int | None = None
    learning_rate: float = 1e-4
    omega_lr: float = 1e-2
    lambda_lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.03
    final_lr: float = 0.1
    lambda_init: float = 1.0
    fusion_loss: str = "per_group"
    margin_base: float = 0.995
    margin_end: float = 0.8
    stop_mse: float = 1e-3
    collapse_mse: float = 1e-3
    coefficients: str = "full"
    grouping: str = "search"
    solver: str = "swap"
    restarts: int = 20
    allocation: str = "dp"
    sizes: tuple[int, ...] | None = None
    min_heads: int = 1
    nested: bool = False
    tp_size: int = 1
    gqa: str = "expand"
    init: str = "identity"
    progressive: bool = False
    keep_search_weights: bool = False
    distill: float = 0.0
    temperature: float = 1.0
    check_equivalence: bool = True
    sort_heads: bool = False
    attention: str = "sdpa"
    force: bool = False
    mixed_precision: str = "no"
    checkpoint_every: int = 100
    seed: int = 0
    preset: str = field(default="paper")

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not 0 < self.budget <= 1:
            raise ValueError(
                f"budget must be in (0, 1], the share of 2 * H heads per layer, got {self.budget}"
            )
        self._check_integers()
        for name in ("learning_rate", "omega_lr", "clip", "temperature", "stop_mse",
                     "collapse_mse"):  # fmt: skip
            positive(name, getattr(self, name))
        for name in ("lambda_lr", "weight_decay", "lambda_init"):
            not_negative(name, getattr(self, name))
        for name in ("warmup", "final_lr", "distill"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("margin_base", "margin_end"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        one_of("method", self.method, METHODS)
        one_of("fusion_loss", self.fusion_loss, ("per_group", "summed"))
        one_of("coefficients", self.coefficients, ("full", "scalar", "tied"))
        one_of("grouping", self.grouping, ("search", "cka", "contiguous"))
        one_of("solver", self.solver, ("swap", "paper_sa", "contiguous"))
        one_of("allocation", self.allocation, ("dp", "greedy", "uniform", "loss_weighted"))
        one_of("gqa", self.gqa, ("expand", "group"))
        one_of("init", self.init, ("identity", "aligned"))
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        one_of("preset", self.preset, PRESETS)
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 1):
            raise ValueError(f"sizes must be head counts >= 1, got {self.sizes}")

    def _check_integers(self) -> None:
        least = {
            "search_steps": 0, "fusion_steps": 0, "recovery_steps": 0, "sequence_length": 2,
            "batch_size": 1, "recovery_batch_size": 1, "micro_batch_size": 1, "restarts": 1,
            "min_heads": 1, "tp_size": 1, "checkpoint_every": 1, "seed": 0,
        }  # fmt: skip
        integers(self, least, ("micro_batch_size",))

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> DhaConfig:
        """``"paper"`` (the defaults) or ``"small"``: minutes for a small model on a CPU."""
        one_of("preset", name, PRESETS)
        return cls(**({"preset": name} | (_SMALL if name == "small" else {}) | changes))

    def with_changes(self, **changes: Any) -> DhaConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DhaConfig:
        """The inverse of :meth:`to_json`."""
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)
