# SPDX-License-Identifier: Apache-2.0
"""UpIT's settings: of the dense half (collect, expand, seeds) here, of the mixture's half in ``options``; all in one.

Checked when they are made. Where the paper is silent (arXiv 2410.01610) defaults are those of the method's page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

from tenfold.training.checks import integers, not_negative, one_of, positive
from tenfold.upit.options import (
    DTYPES,
    SCHEDULES,
    AssemblyConfig,
    LoraExpertsConfig,
    PostTrainingConfig,
    RouterConfig,
    check_experts,
)

VARIANTS = ("ffn", "lora")
PICKS = ("last", "even")
SIMILARITIES = ("cosine", "weight_cosine", "l2", "none")
POLICIES = ("global", "no_repeat", "originals")
RESCALES = ("inv_keep", "l1", "l2", "none")
LORA_MERGES = ("factors", "peft", "delta")
ASSIGNS = ("argmin", "relative", "random")


@dataclass(frozen=True)
class CollectConfig:
    """The dense instruction tuning whose checkpoints become experts (S1).

    Attributes:
        epochs: over the data, unless ``steps`` says how many steps. save_every: epochs between two checkpoints; of
            ``steps`` the same share.
        pick: of more checkpoints than experts are wanted, the ``"last"`` ones, ``"even"`` ones, or those with these
            numbers (from 0). keep: how many experts are saved checkpoints (None: as many as there are, at most n).
        dtype: of the checkpoints.
        learning_rate, weight_decay, betas, eps, max_grad_norm: AdamW; norms and biases do not decay.
        schedule: after a linear ``warmup`` (share of the steps). batch_size: rows per step over all ranks;
            micro_batch_size: rows per forward and rank (None: all of them). sequence_length: tokens per row.
        targets: linear layers that LoRA experts adapt.
        mixed_precision: accelerate's. checkpoint_every: steps between states to resume from. seed: of
            everything random.
    """

    epochs: float = 2.0
    steps: int | None = None
    save_every: float = 0.25
    pick: str | tuple[int, ...] = "last"
    keep: int | None = None
    dtype: str = "bfloat16"
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.03
    batch_size: int = 128
    micro_batch_size: int | None = None
    sequence_length: int = 2048
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    mixed_precision: str = "no"
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        for name in ("epochs", "save_every", "learning_rate", "max_grad_norm"):
            positive(name, getattr(self, name))
        for name in ("eps", "weight_decay"):
            not_negative(name, getattr(self, name))
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], got {self.warmup}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.save_every > self.epochs:
            raise ValueError(f"save_every {self.save_every} epochs saves nothing in {self.epochs}")
        if not self.targets:
            raise ValueError("targets must name at least one linear layer")
        least = {"steps": 1, "keep": 1, "batch_size": 1, "micro_batch_size": 1, "sequence_length": 2,
                 "checkpoint_every": 1, "seed": 0}  # fmt: skip
        integers(self, least, ("steps", "keep", "micro_batch_size"))
        if isinstance(self.pick, str):
            one_of("pick", self.pick, PICKS)
            return
        numbers = list(self.pick)
        good = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in numbers)
        if not numbers or not good or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"pick must be 'last', 'even' or different numbers of checkpoints from 0, got {self.pick!r}"
            )


@dataclass(frozen=True)
class ExpandConfig:
    """How experts are merged into more of them (S2).

    Attributes:
        to: n, how many there are in the end (None: the method's number of experts).
        similarity: the pair that is least similar is merged: by the ``"cosine"`` of task vectors, ``"weight_cosine"``,
            ``"l2"`` (distance of task vectors), or ``"none"``: a random pair.
        policy: ``"global"``: any pair; ``"no_repeat"``: each pair once; ``"originals"``: two saved checkpoints.
        alpha: share of the first parent, the second has the rest (None: U(0, 1), drawn for each child).
        drop: rate of DARE in [0, 1), of the experts' weights; the others are merged linearly.
        rescale: of what is not dropped: ``"inv_keep"``: 1 / (1 - drop), ``"l1"`` or ``"l2"``: to the norm before, or
            ``"none"``. lambda_: scales the merged task vector.
        lora_merge: of LoRA experts: ``"factors"``, ``"peft"`` or ``"delta"``, see ``adapters``.
        experts_in: what the names of expert weights contain. seed: of shares and drops.
        allow_identical: the experts may all be the same.
    """

    to: int | None = None
    similarity: str = "cosine"
    policy: str = "global"
    alpha: float | None = None
    drop: float = 0.5
    rescale: str = "inv_keep"
    lambda_: float = 1.0
    lora_merge: str = "factors"
    experts_in: str = ".mlp."
    seed: int = 0
    allow_identical: bool = False

    def __post_init__(self) -> None:
        one_of("similarity", self.similarity, SIMILARITIES)
        one_of("policy", self.policy, POLICIES)
        one_of("rescale", self.rescale, RESCALES)
        one_of("lora_merge", self.lora_merge, LORA_MERGES)
        not_negative("lambda_", self.lambda_)
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {self.drop}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        integers(self, {"to": 2, "seed": 0}, ("to",))


@dataclass(frozen=True)
class SeedsConfig:
    """Which samples seed which expert's router (S3).

    Attributes:
        fraction: share of the training rows that is scored.
        assign: to the expert of ``"argmin"`` loss, of the least loss ``"relative"`` to each expert's mean, or
            ``"random"``.
        min_bucket: shorter buckets are filled (None: max(8, N / 4n), as far as N rows go). capacity: of a bucket; what
            is over goes to the next best expert.
        batch_size: rows per forward. seed: of the sample.
    """

    fraction: float = 0.01
    assign: str = "argmin"
    min_bucket: int | None = None
    capacity: int | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("assign", self.assign, ASSIGNS)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        least = {"min_bucket": 0, "capacity": 1, "batch_size": 1, "seed": 0}
        integers(self, least, ("min_bucket", "capacity"))


GROUPS: dict[str, type[Any]] = {
    "collect": CollectConfig,
    "expand": ExpandConfig,
    "seeds": SeedsConfig,
    "router": RouterConfig,
    "assembly": AssemblyConfig,
    "post": PostTrainingConfig,
    "lora": LoraExpertsConfig,
}
_SMALL: dict[str, dict[str, Any]] = {
    # A model of a few million parameters on a CPU.
    "collect": {"learning_rate": 1e-3, "batch_size": 16, "sequence_length": 128, "checkpoint_every": 50},
    "seeds": {"fraction": 0.1},
    "router": {"learning_rate": 1e-4, "router_learning_rate": 1e-2},
    "post": {"learning_rate": 1e-3, "batch_size": 16, "sequence_length": 128, "checkpoint_every": 50},
    "lora": {"rank": 8, "alpha": 16.0},
}  # fmt: skip
PRESETS = ("paper", "small")


@dataclass(frozen=True)
class UpITConfig:
    """All settings of a run. :meth:`make` fills the groups from a few common ones.

    Attributes:
        variant: ``"ffn"``: an expert is a whole FFN; ``"lora"``: LoRA pairs on a shared, frozen one.
        num_experts: n. experts_per_token: k. seed: of everything random.
        collect, expand, seeds, router, assembly, post, lora: the stages' own settings.
    """

    variant: str = "ffn"
    num_experts: int = 4
    experts_per_token: int = 2
    seed: int = 0
    collect: CollectConfig = field(default_factory=CollectConfig)
    expand: ExpandConfig = field(default_factory=ExpandConfig)
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    assembly: AssemblyConfig = field(default_factory=AssemblyConfig)
    post: PostTrainingConfig = field(default_factory=PostTrainingConfig)
    lora: LoraExpertsConfig = field(default_factory=lambda: LoraExpertsConfig(experts=4))

    def __post_init__(self) -> None:
        one_of("variant", self.variant, VARIANTS)
        integers(self, {"num_experts": 1, "experts_per_token": 1, "seed": 0})
        check_experts(self.num_experts, self.experts_per_token)
        keep, pick = self.collect.keep, self.collect.pick
        wanted = len(pick) if isinstance(pick, tuple) else (keep or 1)
        if max(wanted, keep or 1) > self.num_experts:
            raise ValueError(
                f"num_experts must be at least the number of saved experts, got {self.num_experts} and "
                f"{max(wanted, keep or 1)}"
            )
        same: dict[str, tuple[Any, Any]] = {
            "num_experts and expand.to": (self.num_experts, self.expand.to or self.num_experts),
            "num_experts and lora.experts": (self.num_experts, self.lora.experts),
            "experts_per_token and lora.experts_per_token": (self.experts_per_token, self.lora.experts_per_token),
            "experts_per_token and assembly.experts_per_token": (
                self.experts_per_token, self.assembly.experts_per_token),
        }  # fmt: skip
        for name, (a, b) in same.items():
            if a != b:
                raise ValueError(f"{name} must be equal, got {a} and {b}")

    @classmethod
    def make(cls, preset: str = "paper", **given: Any) -> UpITConfig:
        """Settings from a preset and changes: fields of this class, groups as dictionaries of their fields.

        ``preset``: ``"paper"``, of the variant, or ``"small"``. What several groups have (seed, n, k, LoRA's higher
        learning rate) is said once.

        Raises:
            ValueError: a value, or a field that does not exist. TypeError: a type.
        """
        one_of("preset", preset, PRESETS)
        scalars = {"variant", "num_experts", "experts_per_token", "seed"}
        if unknown := sorted(set(given) - scalars - set(GROUPS)):
            every = ", ".join([*sorted(scalars), *GROUPS])
            raise ValueError(f"unknown setting {unknown[0]!r}; there are: {every}")
        own: dict[str, dict[str, Any]] = {}
        for name, kind in GROUPS.items():
            group = given.get(name) or {}
            if not isinstance(group, Mapping):
                raise ValueError(f"{name} must be settings and values, got {group!r}")
            known = [f.name for f in fields(kind)]
            if unknown := sorted(set(group) - set(known)):
                raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known)}")
            own[name] = {k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}
        variant, seed = given.get("variant", "ffn"), given.get("seed", 0)
        count = given.get("num_experts", own["expand"].get("to") or (8 if variant == "lora" else 4))
        per_token = given.get("experts_per_token", own["assembly"].get("experts_per_token", 2))
        common = {"num_experts": count, "experts_per_token": per_token, "seed": seed}
        integers(SimpleNamespace(**common), {"num_experts": 1, "experts_per_token": 1, "seed": 0})
        check_experts(count, per_token)
        base: dict[str, dict[str, Any]] = {g: {"seed": seed} for g in GROUPS if g != "router"}
        base["router"] = {}
        base["lora"] |= {"experts": count, "experts_per_token": per_token}
        base["assembly"] |= {"experts_per_token": per_token}
        if preset == "small":
            base = {g: base[g] | _SMALL.get(g, {}) for g in GROUPS}
        elif variant == "lora":
            for g in ("collect", "router", "post"):
                base[g]["learning_rate"] = 2e-4
        groups = {g: kind(**(base[g] | own[g])) for g, kind in GROUPS.items()}
        return cls(variant, count, per_token, seed, **groups)

    def with_changes(self, **changes: Any) -> UpITConfig:
        """A copy with some fields changed, checked again; groups may be dictionaries of changed fields."""
        made = {k: replace(getattr(self, k), **v) if k in GROUPS and isinstance(v, Mapping) else v
                for k, v in changes.items()}  # fmt: skip
        return replace(self, **made)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> UpITConfig:
        """The inverse of :meth:`to_json`."""
        made = dict(values)
        for name, kind in GROUPS.items():
            made[name] = kind(
                **{k: tuple(v) if isinstance(v, list) else v for k, v in made[name].items()}
            )
        return cls(**made)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
