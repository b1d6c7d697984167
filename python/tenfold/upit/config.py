"""UpIT's settings, checked when they are made (arXiv 2410.01610)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tenfold.training.checks import integers, not_negative, one_of, positive
from tenfold.training.recipe import SCHEDULES

VARIANTS = ("ffn", "lora")
PRESETS = ("ffn", "lora", "small")
PICKS = ("last", "even")
SIMILARITIES = ("cosine", "weight_cosine", "l2", "none")
POLICIES = ("global", "no_repeat", "originals")
RESCALES = ("inv_keep", "l1", "l2", "none")
LORA_MERGES = ("factors", "peft", "delta")
ASSIGNS = ("argmin", "relative", "random")
ROUTER_TRAINS = ("joint", "router")
NORMALIZES = ("none", "unit")
RESTS = ("mean", "last", "base")
ROUTINGS = ("block", "linear")
LB_NORMS = ("slots", "tokens")
LAYOUTS = ("stacked", "classic")
DTYPES = ("float32", "bfloat16", "float16")
_LORA = {"variant": "lora", "num_experts": 8, "learning_rate": 2e-4}
_PRESETS: dict[str, dict[str, Any]] = {
    "ffn": {},
    "lora": _LORA,
    # A few thousand parameters on a CPU: rates and batches of a small model.
    "small": {"learning_rate": 1e-3, "batch_size": 16, "sequence_length": 128, "lora_rank": 8,
              "lora_alpha": 16, "seed_fraction": 0.1, "checkpoint_every": 50},
}  # fmt: skip


@dataclass(frozen=True)
class TuneSettings:
    """What the training loop reads of one stage's settings (``tenfold.training``)."""

    learning_rate: float
    epochs: float
    steps: int | None
    batch_size: int
    micro_batch_size: int | None
    sequence_length: int
    schedule: str
    warmup: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float
    mixed_precision: str
    checkpoint_every: int
    seed: int


@dataclass(frozen=True)
class UpITConfig:
    """All settings of UpIT. Defaults are the paper's FFN variant; where it is silent, see the method's page.

    Attributes:
        variant: ``"ffn"``: an expert is gate, up and down projection; ``"lora"``: LoRA pairs on a shared, frozen FFN.
        num_experts: n. experts_per_token: k.

        epochs, steps: of dense tuning (S1). save_every: epochs between checkpoints. pick: which become experts where
            more were saved: ``"last"``, ``"even"``, or numbers from 0. saved_experts: m; None: all, at most n.
        checkpoint_dtype: of what is saved.

        similarity: of pairs (S2): ``"cosine"`` of task vectors, ``"weight_cosine"``, ``"l2"`` (distance of task
            vectors), ``"none"``: random pairs. pair_policy: ``"global"``, ``"no_repeat"`` (a pair once),
            ``"originals"`` (parents are S1's). alpha: share of the first parent; None: U(0, 1) for each child.
        drop: rate of DARE, in [0, 1). rescale: of what is kept: ``"inv_keep"`` 1 / (1 - drop), ``"l1"``, ``"l2"``,
            ``"none"``. merge_lambda: scales the merged task vector. lora_merge: ``"factors"``, ``"peft"`` or
            ``"delta"``. expand_seed: None: ``seed``. allow_identical: experts may all be equal.

        seed_fraction: share of the training rows that seeds routers (S3). assign: ``"argmin"``, ``"relative"`` (less
            each expert's mean) or ``"random"``. min_bucket: None: max(8, N / 4n), as far as rows go. capacity: most
            rows of a bucket. score_batch: rows per forward.

        router_train: ``"joint"`` (router vector and expert) or ``"router"`` (S4). router_alpha: weight of the language
            model's loss. router_epochs: over a bucket, of which router_equal_steps takes the mean over experts, unless
            router_steps says how many. router_batch_size, router_learning_rate (None: learning_rate), router_init_std.
            normalize: ``"unit"``: vectors of norm 1. negatives: rows of other buckets have target 0.
        rest_of_model: weights that are no expert's (S5): ``"mean"`` of the saved experts, ``"last"``, ``"base"``.
        layout: ``"stacked"`` (transformers 5) or ``"classic"`` Mixtral names.

        post_epochs, post_steps, post_learning_rate: of post-training (S6; None: learning_rate). aux_coefficient and
            lb_norm (``"slots"``: 1 is balanced, ``"tokens"``: k is): of the load-balancing loss. renormalize: weights
            of the k experts sum to 1. freeze_router: routers stay as S4 made them.

        lora_rank, lora_alpha, lora_targets: of LoRA experts (S7; the scale is alpha / rank). routing: ``"block"``: a
            router per layer, ``"linear"``: one per linear layer, over all experts (LoRAMoE).

        learning_rate, batch_size (rows per step over all ranks), micro_batch_size (per forward and rank),
            sequence_length, schedule, warmup (share of steps), betas, eps, weight_decay, max_grad_norm,
            mixed_precision: of S1 and S6. checkpoint_every: steps. seed: of everything random.
    """

    variant: str = "ffn"
    num_experts: int = 4
    experts_per_token: int = 2
    epochs: float = 2.0
    steps: int | None = None
    save_every: float = 0.25
    pick: str | tuple[int, ...] = "last"
    saved_experts: int | None = None
    checkpoint_dtype: str = "bfloat16"
    similarity: str = "cosine"
    pair_policy: str = "global"
    alpha: float | None = None
    drop: float = 0.5
    rescale: str = "inv_keep"
    merge_lambda: float = 1.0
    lora_merge: str = "factors"
    expand_seed: int | None = None
    allow_identical: bool = False
    seed_fraction: float = 0.01
    assign: str = "argmin"
    min_bucket: int | None = None
    capacity: int | None = None
    score_batch: int = 16
    router_train: str = "joint"
    router_alpha: float = 0.5
    router_epochs: float = 4.0
    router_steps: int | None = None
    router_equal_steps: bool = True
    router_batch_size: int = 16
    router_learning_rate: float | None = None
    router_init_std: float = 0.02
    normalize: str = "none"
    negatives: bool = False
    rest_of_model: str = "mean"
    layout: str = "stacked"
    post_epochs: float = 2.0
    post_steps: int | None = None
    post_learning_rate: float | None = None
    aux_coefficient: float = 0.01
    lb_norm: str = "slots"
    renormalize: bool = True
    freeze_router: bool = False
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    routing: str = "block"
    learning_rate: float = 2e-5
    batch_size: int = 128
    micro_batch_size: int | None = None
    sequence_length: int = 2048
    schedule: str = "cosine"
    warmup: float = 0.03
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "variant": VARIANTS, "checkpoint_dtype": DTYPES, "similarity": SIMILARITIES,
            "pair_policy": POLICIES, "rescale": RESCALES, "lora_merge": LORA_MERGES, "assign": ASSIGNS,
            "router_train": ROUTER_TRAINS, "normalize": NORMALIZES, "rest_of_model": RESTS,
            "layout": LAYOUTS, "lb_norm": LB_NORMS, "routing": ROUTINGS, "schedule": SCHEDULES,
            "mixed_precision": ("no", "bf16", "fp16"),
        }  # fmt: skip
        for name, allowed in choices.items():
            one_of(name, getattr(self, name), allowed)
        least = {"num_experts": 2, "experts_per_token": 1, "steps": 1, "saved_experts": 1, "expand_seed": 0,
                 "min_bucket": 0, "capacity": 1, "score_batch": 1, "router_steps": 1,
                 "router_batch_size": 1, "post_steps": 0, "lora_rank": 1, "lora_alpha": 1,
                 "batch_size": 1, "micro_batch_size": 1, "sequence_length": 2, "checkpoint_every": 1,
                 "seed": 0}  # fmt: skip
        integers(self, least, ("steps", "saved_experts", "expand_seed", "min_bucket", "capacity",
                               "router_steps", "post_steps", "micro_batch_size"))  # fmt: skip
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be in [1, num_experts], got {self.experts_per_token} of {self.num_experts}"
            )
        if self.saved_experts is not None and self.saved_experts > self.num_experts:
            raise ValueError(
                f"num_experts must be >= saved_experts, got {self.num_experts} and {self.saved_experts}"
            )
        self._check_numbers()
        self._check_pick()

    def _check_numbers(self) -> None:
        for name in ("epochs", "save_every", "seed_fraction", "router_epochs", "learning_rate", "max_grad_norm"):  # fmt: skip
            positive(name, getattr(self, name))
        for name in ("router_learning_rate", "post_learning_rate"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        for name in ("router_init_std", "post_epochs", "aux_coefficient", "eps", "weight_decay", "merge_lambda"):  # fmt: skip
            not_negative(name, getattr(self, name))
        for name in ("router_alpha", "warmup", "seed_fraction", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {self.drop}")
        if self.save_every > self.epochs:
            raise ValueError(f"save_every {self.save_every} epochs saves nothing in {self.epochs}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not self.lora_targets:
            raise ValueError("lora_targets must name at least one linear layer")

    def _check_pick(self) -> None:
        if isinstance(self.pick, str):
            one_of("pick", self.pick, PICKS)
            return
        numbers = list(self.pick)
        good = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in numbers)
        if not numbers or not good or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"pick must be 'last', 'even' or different numbers of checkpoints from 0, got {self.pick!r}"
            )

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> UpITConfig:
        """``"ffn"`` and ``"lora"``: the paper's two variants; ``"small"``: a small model on a CPU."""
        one_of("preset", name, PRESETS)
        return cls(**(_PRESETS[name] | changes))

    def with_changes(self, **changes: Any) -> UpITConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def tuning(self, stage: str) -> TuneSettings:
        """What the training loop needs for ``"collect"``, ``"router"`` or ``"post"``."""
        own: dict[str, Any] = {
            "collect": {"learning_rate": self.learning_rate, "epochs": self.epochs, "steps": self.steps},
            "router": {"learning_rate": self.router_learning_rate or self.learning_rate,
                       "epochs": self.router_epochs, "steps": self.router_steps,
                       "batch_size": self.router_batch_size},
            "post": {"learning_rate": self.post_learning_rate or self.learning_rate,
                     "epochs": self.post_epochs, "steps": self.post_steps},
        }[stage]  # fmt: skip
        common = {n: getattr(self, n) for n in TuneSettings.__dataclass_fields__}
        return TuneSettings(**(common | own))

    @property
    def lora_scale(self) -> float:
        """What LoRA's product is multiplied with."""
        return self.lora_alpha / self.lora_rank

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> UpITConfig:
        """The inverse of :meth:`to_json`."""
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)
