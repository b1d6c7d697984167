# SPDX-License-Identifier: Apache-2.0
"""S1: instruction tuning of a dense model that leaves checkpoints on the way, every quarter of an epoch.

A transformers Trainer does the same with ``save_strategy="steps", save_steps=0.125, save_only_model=True`` (a share of
two epochs); the pipeline takes its ``checkpoint-N`` folders as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.training.batches import Batches, Data, model_digest
from tenfold.training.loop import Callback, Metrics, Trainer, kept_random_state, make_accelerator
from tenfold.training.lora import with_lora
from tenfold.training.recipe import decay_groups, scheduled, steps_of
from tenfold.training.store import WorkFolder
from tenfold.upit.adapters import load_adapter, save_adapter
from tenfold.upit.checkpoints import checkpoints_in, full_state, save_dense
from tenfold.upit.config import CollectConfig
from tenfold.upit.options import LoraExpertsConfig

INITIAL = "initial"  # the adapter before training


class DenseTrainer(Trainer):
    """AdamW on what trains."""

    config: CollectConfig
    share: float = 1.0

    def rank_rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows; ``share`` makes the mean over ranks that over all tokens."""
        mine = super().rank_rows(batch)
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in (mine, batch)]
        self.share = self.accelerator.num_processes * counts[0] / max(1, counts[1])
        return mine

    def loss_of(
        self, model: Any, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a causal LM on the labels."""
        return self.share * model(**batch, use_cache=False).loss, {}

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Matrices decay, vectors do not."""
        config, device = self.config, self.accelerator.device.type
        trained = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            decay_groups(trained, config.learning_rate, config.weight_decay), betas=config.betas,
            eps=config.eps, fused=device in ("cpu", "cuda"),
        )  # fmt: skip

    def rate(self, step: int, steps: int) -> float:
        """The schedule."""
        return scheduled(step, steps, self.config.schedule, self.config.warmup)

    def clip(self, optimizer: Any) -> None:
        """By the norm of all gradients."""
        trained = [p for g in optimizer.param_groups for p in g["params"]]
        self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm)


def save_points(steps: int, config: CollectConfig) -> list[int]:
    """After which steps a checkpoint is saved. ValueError if there are fewer steps than checkpoints."""
    count = int(config.epochs / config.save_every + 1e-9)
    points = [round(steps * config.save_every * (i + 1) / config.epochs) for i in range(count)]
    if len(set(points)) < count or points[0] < 1:
        raise ValueError(
            f"{steps} steps are too few for {count} checkpoints (every {config.save_every} of {config.epochs} epochs)"
        )
    return points


def collect(
    model: Any,
    data: Data,
    out: str | Path,
    config: CollectConfig | None = None,
    *,
    lora: LoraExpertsConfig | None = None,
    tokenizer: Any = None,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> list[Path]:
    """Tunes a causal LM and saves checkpoints into ``out``; a run that was killed goes on with the same call.

    Args:
        model: a transformers causal LM, trained in place (with ``lora`` it stays as it was). data: a token stream
            [n], rows [R, S], a dict with ``input_ids`` and optional ``labels`` (-100: no loss) and
            ``attention_mask`` [R, S], or a function (stage, step, size) -> such rows.
        config: settings; ``changes`` are fields of it. lora: rank and scale, if experts are LoRA adapters.
        tokenizer: saved with every checkpoint.

    Returns:
        The folders ``checkpoint-STEP``, oldest first: models, or PEFT adapters (and ``initial``, the adapter before
        training).

    Raises:
        ValueError: too few steps for the checkpoints; a folder of another run. TrainingError: a loss that is not a
            number.
    """
    config = replace(config or CollectConfig(), **changes)
    folder = Path(out)
    accelerator = make_accelerator(config, next(model.parameters()).device)
    work = WorkFolder(folder, accelerator.is_main_process)
    batches = Batches(data, config.sequence_length, config.seed)
    steps = steps_of(config, batches.rows())
    points = save_points(steps, config)
    accelerator.wait_for_everyone()
    identity = {k: v for k, v in asdict(config).items() if k not in ("keep", "pick")}
    work.claim({"config": identity, "lora": None if lora is None else asdict(lora),
                "model": model_digest(model), "data": batches.digest()})  # fmt: skip
    accelerator.wait_for_everyone()
    if work.load("collect") is None:
        with kept_random_state():
            trainer = DenseTrainer(accelerator, config, batches, work, callback, quiet)
            curve = _train(trainer, model, steps, points, lora, tokenizer)
        work.save("collect", {"steps": steps, "curve": curve})
        accelerator.wait_for_everyone()
        work.drop_checkpoints("tuning")
        accelerator.wait_for_everyone()
    return checkpoints_in(folder)


def _train(
    trainer: DenseTrainer, model: Any, steps: int, points: list[int], lora: LoraExpertsConfig | None,
    tokenizer: Any,
) -> list[Metrics]:  # fmt: skip
    work, config = trainer.folder, trainer.config
    assert work is not None
    dtype = getattr(torch, config.dtype)
    module, save = model, _saver(work, dtype, tokenizer)
    if lora is not None:
        torch.manual_seed(config.seed)
        module = with_lora(model, lora.rank, lora.alpha, config.targets)  # type: ignore[arg-type]
        save = _adapter_saver(work, dtype)
        save(module, work.path / INITIAL)
    kind = next(model.parameters()).dtype
    module.float()

    def after_step(trained: nn.Module, step: int, metrics: Metrics) -> bool:
        if step in points:
            with trainer.whole():
                save(trained, work.path / f"checkpoint-{step}")
            trainer.accelerator.wait_for_everyone()
        return False

    curve = trainer.run("tuning", module, steps, config.batch_size, trainer.loss_of, after_step)
    if lora is not None:
        module.unload()
        model.requires_grad_(True)
    model.to(kind).eval()
    return curve


def _saver(work: WorkFolder, dtype: torch.dtype, tokenizer: Any) -> Callable[[Any, Path], None]:
    def save(module: Any, folder: Path) -> None:
        state = full_state(module, dtype)
        if work.main and not folder.exists():
            save_dense(module, state, folder, tokenizer)

    return save


def _adapter_saver(work: WorkFolder, dtype: torch.dtype) -> Callable[[Any, Path], None]:
    def save(module: Any, folder: Path) -> None:
        if not work.main or folder.exists():
            return
        temporary = folder.with_name(f".{folder.name}.peft")
        shutil.rmtree(temporary, ignore_errors=True)
        module.save_pretrained(temporary)
        state, settings = load_adapter(temporary)
        save_adapter(folder, {n: t.to(dtype) for n, t in state.items()}, settings)
        shutil.rmtree(temporary)

    return save
