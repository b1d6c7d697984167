# SPDX-License-Identifier: Apache-2.0
"""MA-RLHF's settings, checked when they are made (arXiv 2410.02743)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tenfold.rlhf import recipes
from tenfold.training.checks import integers, not_negative, one_of, positive

TERMINATIONS = ("fixed", "random", "ppl", "parsing", "sentence", "statement", "turn", "custom")
TAILS = ("one_segment", "recycle")
PPL_MODES = ("macro_prefix", "response_prefix", "token_rise", "token_rise_ref")
MISMATCHES = ("fixed", "error")
SPLITTERS = ("rule", "pysbd")
HOLES = ("bridge", "split", "error")
SIGMAS = ("equal", "unit", "position", "position_early")
REDUCTIONS = ("sum", "sigma")
DISCOUNTS = ("per_macro", "per_token")
RATIOS = ("token", "joint", "geo_mean")
WEIGHTS = ("macro", "length")
AGGREGATIONS = ("token_mean", "seq_mean_token_mean")
CRITIC_TARGETS = ("token", "macro")
WHITENINGS = ("none", "token", "macro", "group")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_CONTROLLERS = ("fixed", "adaptive")
ADVANTAGES = ("gae", "rloo", "grpo")
NON_FINITE = ("error", "drop")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("no", "bf16", "fp16")
PRESETS = ("default", "reference", "small", *recipes.NAMES)

# What each choice may be; every field here is checked by name.
_CHOICES = {
    "termination": TERMINATIONS, "tail": TAILS, "ppl_mode": PPL_MODES, "on_mismatch": MISMATCHES,
    "splitter": SPLITTERS, "holes": HOLES, "sigma": SIGMAS, "reward_reduce": REDUCTIONS,
    "discount": DISCOUNTS, "ratio": RATIOS, "weight": WEIGHTS, "agg": AGGREGATIONS,
    "critic_target": CRITIC_TARGETS, "whiten_adv": WHITENINGS, "kl": KL_ESTIMATORS,
    "kl_controller": KL_CONTROLLERS, "advantage": ADVANTAGES, "non_finite": NON_FINITE,
    "schedule": SCHEDULES, "mixed_precision": PRECISIONS, "preset": PRESETS,
}  # fmt: skip
_LEAST = {
    "n": 1, "repeat": 1, "parsing_cutoff": 1, "min_response": 1, "kl_horizon": 1, "batch_size": 1,
    "micro_batch_size": 1, "minibatches": 1, "ppo_epochs": 1, "group_size": 1, "steps": 1, "top_k": 0,
    "max_prompt": 1, "max_response": 1, "seed": 0, "checkpoint_every": 1, "lora_rank": 1, "lora_alpha": 1,
}  # fmt: skip
_OPTIONAL = ("n", "micro_batch_size", "lora_rank", "checkpoint_every")

_REFERENCE: dict[str, Any] = {
    "isolate_last": True, "reward_reduce": "sigma", "ratio": "token", "agg": "seq_mean_token_mean",
    "score_clip": 2.5, "whiten_adv": "none", "lengths": (1, 2, 3, 5, 10), "ppl_mode": "token_rise_ref",
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "batch_size": 16, "minibatches": 2, "ppo_epochs": 2, "steps": 60, "learning_rate": 1e-4,
    "critic_learning_rate": 3e-4, "max_prompt": 32, "max_response": 24, "temperature": 1.0, "top_k": 0,
    "checkpoint_every": 20, "warmup": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class MARLHFConfig:
    """All settings of macro-action PPO. Wrong ones raise ValueError or TypeError with what is allowed.

    Macro actions:
        termination: ``"fixed"`` (every ``n`` tokens; None: the whole response; 1: ordinary PPO),
            ``"random"`` (``lengths``, each ``repeat`` times, shuffled per row; what they do not cover is
            one macro action or, with ``tail="recycle"``, they begin anew), ``"ppl"`` (``ppl_mode``, see
            ``tenfold.ops.macro_segment_ppl``), ``"parsing"`` (constituents of fewer than
            ``parsing_cutoff`` tokens), ``"sentence"``, ``"statement"`` (of Python), ``"turn"`` (a run of
            valid tokens between holes of the mask), or ``"custom"`` (a callback).
        splitter: of sentences, ``"rule"`` or ``"pysbd"`` (extra ``parse``).
        on_mismatch: where a response cannot be parsed, ``"fixed"`` cuts that row every ``n`` tokens and counts it.
        holes: masked tokens inside a response are bridged by a macro action, split it, or are an error.
        isolate_last, phantom_step: the published code's last macro action of one token, and its bug of an
            empty one before it (fixed n-grams with ``isolate_last`` only; for reproduction).
    Advantages:
        sigma: weights of token values in a macro action's. reward_reduce: its token rewards are summed, or
            weighted by sigma. discount: ``gamma`` per macro action or per token.
        gamma, lam: of GAE. advantage: ``"gae"``, or without a critic ``"rloo"`` and ``"grpo"``: one
            advantage per response, against the other responses of its group of ``group_size``.
        whiten_adv: over tokens, macro actions, or macro actions within a group.
        kl, beta: estimator and weight of the KL penalty. kl_controller, kl_target, kl_horizon: ``"adaptive"``
            moves beta so that the KL per response (nats) meets the target.
        score_clip: of the reward model's score. bootstrap_truncated: a response that was cut off has the
            critic's value after its last token as its future. min_response: rows with fewer valid tokens
            are dropped. non_finite: rows with such inputs are an error, or dropped.
    Losses:
        ratio, weight, agg, eps_lo, eps_hi: see ``tenfold.ops.ma_ppo_policy_loss``. dual_clip: bound (> 1) of
            the ratio at negative advantages. value_clip: None does not clip.
        critic_target: token values, or macro values, regress on the macro return. vf_coef: weight of the
            value loss where policy and critic share an optimiser.
    Optimisation and rollout:
        batch_size: responses per step, over all ranks. micro_batch_size: per forward and rank (None: all).
            minibatches, ppo_epochs: of one rollout. steps: rollouts.
        learning_rate, critic_learning_rate, betas, weight_decay, max_grad_norm: AdamW. warmup: a share of
            the steps below 1, else steps; then ``schedule``.
        temperature, top_k (0: all), top_p: of sampling. max_prompt, max_response: tokens.
            missing_eos_penalty: subtracted from the score of a response without an end.
        mixed_precision, gradient_checkpointing, checkpoint_every (None: only at the end), seed.
        lora_rank (None: all weights train), lora_alpha, lora_targets: of the policy.
    """

    termination: str = "fixed"
    n: int | None = 5
    lengths: tuple[int, ...] = (2, 3, 5, 10)
    repeat: int = 3
    tail: str = "one_segment"
    ppl_mode: str = "macro_prefix"
    parsing_cutoff: int = 5
    splitter: str = "rule"
    on_mismatch: str = "fixed"
    holes: str = "bridge"
    isolate_last: bool = False
    phantom_step: bool = False
    sigma: str = "equal"
    reward_reduce: str = "sum"
    discount: str = "per_macro"
    gamma: float = 1.0
    lam: float = 0.95
    advantage: str = "gae"
    group_size: int = 1
    whiten_adv: str = "none"
    kl: str = "k1"
    beta: float = 0.05
    kl_controller: str = "fixed"
    kl_target: float = 6.0
    kl_horizon: int = 10_000
    score_clip: float = 2.5
    bootstrap_truncated: bool = False
    min_response: int = 2
    non_finite: str = "error"
    ratio: str = "token"
    weight: str = "macro"
    agg: str = "token_mean"
    eps_lo: float = 0.2
    eps_hi: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    critic_target: str = "token"
    vf_coef: float = 1.0
    batch_size: int = 64
    micro_batch_size: int | None = None
    minibatches: int = 1
    ppo_epochs: int = 1
    steps: int = 1000
    learning_rate: float = 1.5e-5
    critic_learning_rate: float = 1.5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.05
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    max_prompt: int = 512
    max_response: int = 512
    missing_eos_penalty: float | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = 200
    seed: int = 1234
    lora_rank: int | None = None
    lora_alpha: int = 32
    lora_targets: str | tuple[str, ...] = "all-linear"
    preset: str = "default"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            one_of(name, getattr(self, name), allowed)
        integers(self, _LEAST, _OPTIONAL)
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        if not self.lengths or not all(isinstance(x, int) and x >= 1 for x in self.lengths):
            raise ValueError(f"lengths must be integers of at least 1, got {self.lengths}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.eps_lo < 1:
            raise ValueError(f"eps_lo must be in [0, 1), got {self.eps_lo}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.dual_clip is not None and not (
            self.dual_clip > 1 and math.isfinite(self.dual_clip)
        ):
            raise ValueError(f"dual_clip must be above 1, or None, got {self.dual_clip}")
        for name in ("score_clip", "kl_target", "learning_rate", "critic_learning_rate", "max_grad_norm",
                     "temperature"):  # fmt: skip
            positive(name, getattr(self, name))
        for name in ("beta", "eps_hi", "vf_coef", "weight_decay", "warmup", "value_clip",
                     "missing_eos_penalty"):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                not_negative(name, value)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")

    def _check_together(self) -> None:
        if self.phantom_step:
            self._check_phantom()
        if self.critic_free:
            self._check_critic_free()
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size must be a multiple of minibatches, got {self.batch_size} and {self.minibatches}"
            )
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size must be a multiple of group_size, got {self.batch_size} and {self.group_size}"
            )
        if self.dilutes_score:
            warnings.warn(
                "reward_reduce='sigma' without isolate_last=True: the score is diluted by the weight of the "
                "last token in its macro action (use isolate_last=True or reward_reduce='sum')",
                UserWarning,
                stacklevel=4,
            )

    def _check_phantom(self) -> None:
        if self.critic_free:
            raise ValueError(f"phantom_step needs advantage='gae', got {self.advantage!r}")
        need = {"termination": "fixed", "isolate_last": True, "discount": "per_macro"}
        got = {name: getattr(self, name) for name in need}
        if got != need or self.holes == "split":
            raise ValueError(
                "phantom_step reproduces the published code's fixed n-grams: it needs termination='fixed', "
                "isolate_last=True, discount='per_macro', and holes other than 'split', got "
                + ", ".join(f"{k}={v!r}" for k, v in (got | {"holes": self.holes}).items())
            )

    def _check_critic_free(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"advantage={self.advantage!r} compares the responses to one prompt: group_size must be at "
                f"least 2, got {self.group_size}"
            )
        if self.reward_reduce != "sum" or self.critic_target != "token" or self.bootstrap_truncated:
            raise ValueError(
                f"advantage={self.advantage!r} has no critic: it needs reward_reduce='sum', "
                "critic_target='token' and bootstrap_truncated=False"
            )

    @property
    def critic_free(self) -> bool:
        """Whether advantages come without a critic."""
        return self.advantage != "gae"

    @property
    def dilutes_score(self) -> bool:
        """Whether a part of the score is lost in pooling (paper: never)."""
        single = (
            self.isolate_last
            or (self.termination == "fixed" and self.n == 1)
            or (self.termination == "ppl" and self.ppl_mode == "token_rise_ref")
        )
        return self.reward_reduce == "sigma" and self.sigma != "unit" and not single

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> MARLHFConfig:
        """``"default"``; ``"reference"`` (the published code's choices); ``"small"``; or a published run.

        The runs are ``recipes.NAMES``: ``"summarize-2b"`` (TL;DR, Gemma 2B) and so on; their reward
        model's and SFT's settings are in ``tenfold.rlhf.recipes``.
        """
        one_of("preset", name, PRESETS)
        fixed: dict[str, dict[str, Any]] = {
            "default": {},
            "reference": _REFERENCE,
            "small": _SMALL,
        }
        made = fixed[name] if name in fixed else recipes.ppo(name)
        return cls(**({"preset": name} | made | changes))

    def with_changes(self, **changes: Any) -> MARLHFConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MARLHFConfig:
        """The inverse of :meth:`to_json`."""
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)
