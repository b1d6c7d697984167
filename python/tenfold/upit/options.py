# SPDX-License-Identifier: Apache-2.0
"""Settings of router initialisation (S4), assembly (S5), post-training (S6) and LoRA experts (S7), checked when made.

Where the paper is silent (arXiv 2410.01610) the defaults are those of the method's specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tenfold.training.checks import integers, not_negative, one_of, positive

TRAIN = ("joint", "router")
NORMALIZE = ("none", "unit")
LAYOUTS = ("classic", "stacked")
RESTS = ("mean", "last", "base")
ROUTERS = ("normal", "uniform")
DTYPES = ("float32", "bfloat16", "float16")
TRAINABLE = ("all", "routers", "experts", "routers+experts")
LB_NORMS = ("slots", "tokens")
SCHEDULES = ("cosine", "linear", "constant")
IMPLEMENTATIONS = ("tenfold", "eager", "batched_mm", "grouped_mm")
ROUTINGS = ("block", "linear")


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _betas(value: Any) -> None:
    if len(value) != 2 or not all(0 <= b < 1 for b in value):
        raise ValueError(f"betas must be two numbers in [0, 1), got {value}")


@dataclass(frozen=True)
class RouterConfig:
    """How an expert's routing vectors are seeded.

    Attributes:
        train: ``"joint"`` trains the expert and its vectors on ``alpha L_lm + (1 - alpha) L_aux`` (the paper);
            ``"router"`` keeps the expert and trains the vectors on L_aux of hidden states that are made once.
        alpha: weight of the language model's loss.
        epochs: on a bucket of mean size; :func:`tenfold.upit.router.equal_steps` gives all experts that many steps.
        learning_rate: of the expert (2e-5 for whole experts, 2e-4 for LoRA). router_learning_rate: of the
            vectors, None for the same. weight_decay, betas, max_grad_norm: AdamW; vectors do not decay.
        batch_size: samples per step. micro_batch_size: samples per forward (None: all of them).
        init_std: vectors start from N(0, init_std^2).
        normalize: ``"unit"`` gives every vector the norm 1 at the end.
        negatives: tokens of other experts' buckets have the target 0; as many samples per step as of the own.
        cache_bytes: of hidden states, with ``train="router"``; more of them are made anew in every step.
    """

    train: str = "joint"
    alpha: float = 0.5
    epochs: float = 4.0
    learning_rate: float = 2e-5
    router_learning_rate: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    batch_size: int = 8
    micro_batch_size: int | None = None
    init_std: float = 0.02
    normalize: str = "none"
    negatives: bool = False
    cache_bytes: int = 2_000_000_000

    def __post_init__(self) -> None:
        one_of("train", self.train, TRAIN)
        one_of("normalize", self.normalize, NORMALIZE)
        _probability("alpha", self.alpha)
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            positive(name, getattr(self, name))
        if self.router_learning_rate is not None:
            positive("router_learning_rate", self.router_learning_rate)
        for name in ("weight_decay", "init_std"):
            not_negative(name, getattr(self, name))
        _betas(self.betas)
        least = {"batch_size": 1, "micro_batch_size": 1, "cache_bytes": 0}
        integers(self, least, ("micro_batch_size",))


@dataclass(frozen=True)
class AssemblyConfig:
    """How experts become one stock Mixtral checkpoint.

    Attributes:
        experts_per_token: k. renormalize: whether the weights of the k experts add up to 1; a Mixtral always
            renormalises, so False is written to the configuration as ``norm_topk_prob`` and is followed by
            :func:`tenfold.upit.load` and ``post_train`` alone.
        layout: names of the experts' tensors: ``"classic"`` (w1, w2, w3 of each expert) or ``"stacked"``
            (``gate_up_proj`` and ``down_proj`` of all). transformers 5 loads either; other engines the classic one.
        rest: attention, norms and embeddings: the ``"mean"`` over the saved checkpoints, the ``"last"`` of
            them, or those of the ``"base"``.
        saved: how many of the experts, the first ones, are saved checkpoints and not merged ones (None: all).
        dtype: of what is written (None: that of the experts).
        router_init: without vectors rows are ``"normal"`` (0, router_std^2) or ``"uniform"``
            (-router_std, router_std). seed: of these.
        aux_coef: ``router_aux_loss_coef`` of the configuration.
        allow_identical: experts may all be the same (vanilla upcycling).
        max_shard_bytes: size of an output file, but for a larger tensor.
    """

    experts_per_token: int = 2
    renormalize: bool = True
    layout: str = "classic"
    rest: str = "mean"
    saved: int | None = None
    dtype: str | None = None
    router_init: str = "normal"
    router_std: float = 0.02
    seed: int = 0
    aux_coef: float = 0.01
    allow_identical: bool = False
    max_shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        one_of("layout", self.layout, LAYOUTS)
        one_of("rest", self.rest, RESTS)
        one_of("router_init", self.router_init, ROUTERS)
        if self.dtype is not None:
            one_of("dtype", self.dtype, DTYPES)
        for name in ("router_std", "aux_coef"):
            not_negative(name, getattr(self, name))
        integers(
            self, {"experts_per_token": 1, "saved": 1, "seed": 0, "max_shard_bytes": 1}, ("saved",)
        )


@dataclass(frozen=True)
class PostTrainingConfig:
    """How the assembled mixture is trained on.

    Attributes:
        epochs: over the data, unless ``steps`` says how many steps.
        learning_rate, weight_decay, betas, eps, max_grad_norm: AdamW; norms and biases do not decay.
            state_dtype, stochastic_rounding: of ``MaskedAdamW``.
        schedule: after a linear ``warmup`` (share of the steps). batch_size: rows per step over all ranks;
            micro_batch_size: rows per forward and rank (None: all of them), over which the load is then balanced.
            sequence_length: of token streams.
        aux_coef: c of ``L_lm + c mean over layers of L_load``. lb_norm: ``"slots"`` (1 when balanced) or
            ``"tokens"`` (k when balanced, as in transformers).
        renormalize: of the routers' weights; None: as the model's configuration says.
        trainable: ``"all"``, ``"routers"``, ``"experts"`` or ``"routers+experts"``. LoRA experts have a frozen
            base whatever is chosen.
        experts_implementation: of transformers' experts interface. fused_loss: the loss of the language model
            without its logits in memory, where the head allows it.
        mixed_precision: accelerate's. checkpoint_every: steps. seed: of everything random.
    """

    epochs: float = 2.0
    steps: int | None = None
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    state_dtype: str = "fp32"
    stochastic_rounding: bool = False
    schedule: str = "cosine"
    warmup: float = 0.03
    batch_size: int = 128
    micro_batch_size: int | None = None
    sequence_length: int = 2048
    aux_coef: float = 0.01
    lb_norm: str = "slots"
    renormalize: bool | None = None
    trainable: str = "all"
    experts_implementation: str = "tenfold"
    fused_loss: bool = True
    mixed_precision: str = "no"
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("lb_norm", self.lb_norm, LB_NORMS)
        one_of("trainable", self.trainable, TRAINABLE)
        one_of("experts_implementation", self.experts_implementation, IMPLEMENTATIONS)
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        one_of("state_dtype", self.state_dtype, ("param", "fp32", "bf16", "int8"))
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            positive(name, getattr(self, name))
        for name in ("weight_decay", "eps", "aux_coef"):
            not_negative(name, getattr(self, name))
        _probability("warmup", self.warmup)
        _betas(self.betas)
        least = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "sequence_length": 2,
                 "checkpoint_every": 1, "seed": 0}  # fmt: skip
        integers(self, least, ("steps", "micro_batch_size"))


@dataclass(frozen=True)
class LoraExpertsConfig:
    """Experts that are LoRA pairs on the gate, up and down of a shared frozen FFN.

    Attributes:
        experts: n. experts_per_token: k, of ``routing="block"``.
        rank, alpha: pairs ``(alpha / rank) B A``.
        routing: ``"block"`` has one router per layer, at the input of the FFN; ``"linear"`` one per linear layer,
            a softmax over all experts without top-k (LoRAMoE's layout), so there is no load to be balanced.
        renormalize: of the k weights. router_std: of the routers' start. seed: of that and of A.
    """

    experts: int = 8
    experts_per_token: int = 2
    rank: int = 64
    alpha: float = 64.0
    routing: str = "block"
    renormalize: bool = True
    router_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("routing", self.routing, ROUTINGS)
        positive("alpha", self.alpha)
        not_negative("router_std", self.router_std)
        integers(self, {"experts": 2, "experts_per_token": 1, "rank": 1, "seed": 0})
        check_experts(self.experts, self.experts_per_token)


def check_experts(experts: int, per_token: int) -> None:
    """ValueError unless there are two experts or more, and 1 to all of them per token."""
    if experts < 2:
        raise ValueError(f"a mixture needs at least 2 experts, got {experts}")
    if not 1 <= per_token <= experts:
        raise ValueError(
            f"experts per token must be 1 to {experts} (the number of experts), got {per_token}"
        )
