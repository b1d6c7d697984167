# SPDX-License-Identifier: Apache-2.0
"""Post-training (S6): the assembled mixture, or a dense model, on instruction data with a balanced load."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.optim import MaskedAdamW
from tenfold.training.batches import Batches, Data, model_digest
from tenfold.training.loop import (
    Callback,
    Metrics,
    Pieces,
    Trainer,
    kept_random_state,
    make_accelerator,
)
from tenfold.training.recipe import decay_groups, scheduled, steps_of
from tenfold.training.store import WorkFolder
from tenfold.upit.layout import copy_small_files
from tenfold.upit.loading import load, set_implementation
from tenfold.upit.lora_model import lora_layers, save_lora_experts
from tenfold.upit.measure import expert_load, mean_loss
from tenfold.upit.mixture import MixtureLayer, fuse_routers, mixture_layers, restore_routers
from tenfold.upit.objective import MixtureLoss
from tenfold.upit.options import PostTrainingConfig

_STAGE = "post_training"


@dataclass
class PostTrained:
    """What post-training made.

    Attributes:
        model: the trained model, None if a finished run was found in ``out``. path: its folder, if one was given.
        curve: of every step loss, lm_loss, balance (the mean over layers of L_load) and the share of slots of each
            expert, ``load/e``. load: shares after training [L][n], on ``eval_rows`` or the last step's rows.
        losses: ``before`` and ``after``, with ``eval_rows``. seconds: of training.
    """

    model: Any = None
    path: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    curve: list[Metrics] = field(default_factory=list)
    load: list[list[float]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All fields but the model."""
        return {k: v for k, v in vars(self).items() if k != "model"}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PostTrained:
        """The inverse, without the model."""
        return cls(**values)


class _Trainer(Trainer):
    """AdamW with a schedule; the losses of ranks and pieces are weighted by their tokens."""

    config: PostTrainingConfig
    share: float = 1.0

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Over what trains."""
        c = self.config
        trained = [p for p in module.parameters() if p.requires_grad]
        return MaskedAdamW(
            decay_groups(trained, c.learning_rate, c.weight_decay), betas=c.betas, eps=c.eps,
            max_grad_norm=c.max_grad_norm, masks={}, state_dtype=c.state_dtype, seed=c.seed,
            stochastic_rounding=c.stochastic_rounding,
        )  # fmt: skip

    def rate(self, step: int, steps: int) -> float:
        """The schedule."""
        return scheduled(step, steps, self.config.schedule, self.config.warmup)

    def apart(self, module: nn.Module) -> list[nn.Module]:
        """The balance reads the routers' logits."""
        return [layer.router for layer in module.layers]  # type: ignore[union-attr]

    def rank_rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows; ``share`` makes the mean over ranks that over all tokens."""
        mine = super().rank_rows(batch)
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in (mine, batch)]
        self.share = self.accelerator.num_processes * counts[0] / max(1, counts[1])
        return mine

    def loss_of(
        self, model: Any, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a :class:`MixtureLoss`, wrapped or not."""
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=True).share = self.share
        return model(batch)

    def pieces(self, batch: dict[str, Tensor], rows: int | None) -> Pieces:
        """All ranks have the same number of them, since they add up their counts piece by piece."""
        size = len(batch["input_ids"])
        each = min(rows or size, size)
        parts = [{k: v[at : at + each] for k, v in batch.items()} for at in range(0, size, each)]
        tokens = [int((p["labels"][:, 1:] != -100).sum()) for p in parts]
        return [(p, n / max(1, sum(tokens))) for p, n in zip(parts, tokens)]


def _choose(model: nn.Module, layers: list[MixtureLayer], trainable: str) -> None:
    """Sets what trains."""
    if trainable == "all":
        return
    if not layers:
        raise ValueError(
            f"trainable={trainable!r} needs a mixture; the model has no routers and experts"
        )
    wanted: set[int] = set()
    for layer in layers:
        for what, module in (("routers", layer.router), ("experts", layer.experts)):
            if what in trainable:
                wanted |= {id(p) for p in module.parameters()}
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and id(p) in wanted)


@contextlib.contextmanager
def _prepared(model: Any, layers: list[MixtureLayer], config: PostTrainingConfig) -> Iterator[None]:
    """Our experts and gates inside, and gradients for what trains; afterwards all is as it was.

    But for ``config.renormalize``: a model that was trained with it is used with it.
    """
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    interface = getattr(model.config, "_experts_implementation", None)
    already = [layer.router for layer in layers if "forward" in vars(layer.router)]
    fused: list[nn.Module] = []
    try:
        _choose(model, layers, config.trainable)
        set_implementation(model, config.experts_implementation)
        fused = fuse_routers(layers, config.renormalize)
        if layers and config.renormalize is not None:
            model.config.norm_topk_prob = config.renormalize
        yield
    finally:
        if config.renormalize is None:
            restore_routers([r for r in fused if r not in already])
        if interface is not None and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation(interface)
        for name, p in model.named_parameters():
            p.requires_grad_(trained[name])


def _save(model: Any, source: Path | None, out: Path) -> None:
    if lora_layers(model):
        save_lora_experts(model, out)
        return
    model.save_pretrained(str(out))
    if source is not None:
        copy_small_files(source, out)


def post_train(
    folder: Any,
    data: Data,
    *,
    config: PostTrainingConfig | None = None,
    out: str | Path | None = None,
    eval_rows: Any = None,
    callback: Callback | None = None,
    quiet: bool = True,
) -> PostTrained:
    """Trains a mixture on ``L_lm + c mean over layers of L_load``, with our experts inside; or a dense model on L_lm.

    Under ``torchrun`` or ``accelerate launch`` all ranks take part (DDP); they make the same steps as one process.

    Args:
        folder: a model's folder, or a causal LM, which is trained in place (its experts implementation is its own
            again afterwards; ``config.renormalize``, if given, stays).
        data: rows [R, S], a stream [n], a dict with ``input_ids`` and optional ``labels`` (-100: no loss) and
            ``attention_mask`` (0: a token that no balance counts), or a function (stage, step, size) -> such rows.
        out: where the trained model is saved as transformers does it (LoRA experts: ``lora_experts.safetensors``);
            ``out/training`` holds what a run that was killed goes on from, and the record of a finished one.
        eval_rows: rows [R, S], or such a dict, whose loss is taken before and after.

    Raises:
        ValueError: settings, data, a folder of another run. KeyError: a mixture without one of its experts.
            TrainingError: a loss that is not a number.

    Source:
        UpIT (arXiv 2410.01610), post-training.
    """
    config = config or PostTrainingConfig()
    source = Path(folder) if isinstance(folder, str | Path) else None
    model = load(source) if source is not None else folder
    batches = Batches(data, config.sequence_length, config.seed)
    accelerator = make_accelerator(config, next(model.parameters()).device)
    target = None if out is None else Path(out).expanduser()
    work = None
    if target is not None:
        work = WorkFolder(target / "training", accelerator.is_main_process)
        accelerator.wait_for_everyone()
        work.claim(
            {"config": asdict(config), "model": model_digest(model), "data": batches.digest()}
        )
        accelerator.wait_for_everyone()  # all ranks have read it
        done = work.load("result")
        if done is not None:
            return PostTrained.from_json(done)
    layers = mixture_layers(model)
    made = PostTrained(model, None if target is None else str(target), asdict(config))
    with _prepared(model, layers, config):
        if eval_rows is not None:
            made.losses["before"] = mean_loss(model, eval_rows)
        steps = steps_of(config, batches.rows())
        trainer = _Trainer(accelerator, config, batches, work, callback, quiet)
        loss = MixtureLoss(model, layers, config, accelerator)
        start = time.perf_counter()
        with kept_random_state():
            made.curve = trainer.run(_STAGE, loss, steps, config.batch_size, trainer.loss_of)
        made.seconds = time.perf_counter() - start
        model.eval()
        if eval_rows is not None:
            made.losses["after"] = mean_loss(model, eval_rows)
        if layers:
            last = batches.take(_STAGE, steps - 1, config.batch_size)
            made.load = expert_load(model, last if eval_rows is None else eval_rows).tolist()
    if target is not None and work is not None:
        if accelerator.is_main_process:
            _save(model, source, target)
        work.save("result", made.to_json())
        accelerator.wait_for_everyone()
        work.drop_checkpoints(_STAGE)
    return made
