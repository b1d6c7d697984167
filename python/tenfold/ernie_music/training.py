# SPDX-License-Identifier: Apache-2.0
"""Training on accelerate: velocities, averaged weights, loss by time, demo sounds, exact resumption."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data.models import quiet_transformers
from tenfold.ernie_music.dataset import AudioTexts, MusicBatches
from tenfold.ernie_music.diffusion import row_noise, vdiff_operations
from tenfold.ernie_music.ema import EMA
from tenfold.ernie_music.model import ErnieMusicUNet1D
from tenfold.ernie_music.pipeline import ErnieMusicPipeline
from tenfold.ernie_music.scheduler import VDiffusionScheduler
from tenfold.ernie_music.train_config import MusicTrainConfig
from tenfold.training.loop import Callback, Metrics, kept_random_state
from tenfold.training.recipe import AdamWTrainer
from tenfold.training.record import HELD_OUT, Record
from tenfold.training.session import Session

STAGE = "train"
RECORD = "train.json"
BY_TIME = "time/"


@dataclass
class MusicRecord(Record):
    """Of training: the curve has ``loss``, and every ``log_every`` steps ``time/0``, ... by time.

    Attributes:
        rows: of the data. demos: files of sounds made on the way, relative to the folder.
    """

    rows: int = 0
    demos: list[str] = field(default_factory=list)

    def by_time(self) -> list[dict[str, float]]:
        """The entries of loss by time: ``step``, and the mean loss of each bin that had rows, by its number."""
        made = []
        for i, metrics in enumerate(self.curve):
            found = {
                k.removeprefix(BY_TIME): v for k, v in metrics.items() if k.startswith(BY_TIME)
            }
            if found:
                made.append({"step": float(i + 1)} | found)
        return made


class _State:
    """What a checkpoint keeps beside accelerate's: averaged weights, the unfinished entry of loss by time."""

    def __init__(self, ema: EMA, bins: int) -> None:
        self.ema = ema
        self.sums, self.counts = torch.zeros(bins), torch.zeros(bins)

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self.ema.state_dict(), "sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state["ema"])
        self.sums, self.counts = state["sums"], state["counts"]


class VelocityLoss(nn.Module):
    """A U-Net with the loss of its velocities as its forward: float32 [B] of a batch of ``MusicBatches.load``."""

    def __init__(self, unet: ErnieMusicUNet1D, seed: int) -> None:
        super().__init__()
        self.unet, self.seed = unet, seed

    @property
    def kernels(self) -> str:
        """Where noising and loss come from: as the U-Net's operations."""
        return self.unet.body.kernels

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean squared error of each row's velocity (equation "SNR + 1" of section 3.1)."""
        ops = vdiff_operations(self.kernels)
        x0, t = batch["audio"], batch["t"]
        noise = row_noise(x0, batch["place"], self.seed, int(batch["step"][0]), self.kernels)
        z, _ = ops.vdiff_noise(x0, t, noise)
        v = self.unet(z, t, batch.get("states"), batch.get("mask")).sample
        return ops.vdiff_loss(v.float(), x0, noise, t)


class MusicTrainer(AdamWTrainer):
    """The loop's part that is diffusion's."""

    config: MusicTrainConfig
    batches: MusicBatches  # type: ignore[assignment]

    def rank_rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows, loaded: other ranks' are not read."""
        mine = {k: v.cpu() for k, v in super().rank_rows(batch).items()}
        return {k: v.to(self.accelerator.device) for k, v in self.batches.load(mine).items()}

    def clip(self, optimizer: Any) -> None:
        """Clips the gradients' norm where the settings say so."""
        if self.config.max_grad_norm is not None:
            super().clip(optimizer)

    def loss_of(
        self, model: Any, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over rows, and sums and counts of rows by time."""
        each = model(batch)
        bins = self.config.time_bins
        at = (batch["t"] * bins).long().clamp(max=bins - 1)
        hot = torch.nn.functional.one_hot(at, bins).to(each.dtype)
        parts = {f"sum/{i}": s for i, s in enumerate((hot * each.detach()[:, None]).mean(0))}
        parts |= {f"count/{i}": n for i, n in enumerate(hot.mean(0))}
        return each.mean(), parts


@torch.no_grad()
def held_out_loss(
    unet: ErnieMusicUNet1D,
    data: AudioTexts,
    encoder: Any,
    *,
    text: str = "text",
    rows: int = 64,
    bins: int = 10,
    batch_size: int = 16,
    seed: int = 7,
) -> dict[str, float]:
    """Loss of velocities on held-out pieces, the same crops, times and noise each time: ``loss``, and ``time/0``, ...

    Times are the middles of ``bins`` parts of [0, 1] in turn; crops are from the pieces' beginnings on.
    """
    config = MusicTrainConfig.from_preset(
        "small", text=text, condition_dropout=0.0, polarity_flip=0.0, seed=seed
    )
    batches = MusicBatches(data, encoder, config, unet.config.sample_size)
    model, was = VelocityLoss(unet, seed), unet.training
    unet.eval()
    sums, counts = torch.zeros(bins), torch.zeros(bins)
    for at in range(0, rows, batch_size):
        place = torch.arange(at, min(rows, at + batch_size))
        t = ((place % bins) + 0.5) / bins
        batch = batches.load(
            {"number": place % len(data), "place": place, "step": torch.zeros_like(place), "t": t}
        )
        each = model({k: v.to(unet.device) for k, v in batch.items()}).cpu()
        sums.index_add_(0, place % bins, each)
        counts.index_add_(0, place % bins, torch.ones_like(each))
    unet.train(was)
    found = {f"{BY_TIME}{i}": float(sums[i] / counts[i]) for i in range(bins) if counts[i]}
    return {"loss": float(sums.sum() / counts.sum())} | found


class _Demos:
    """Sounds and their pictures on the way."""

    def __init__(
        self, folder: Path | None, prompts: Sequence[str], config: MusicTrainConfig
    ) -> None:
        self.folder, self.prompts, self.config = folder, list(prompts), config

    def write(self, unet: ErnieMusicUNet1D, encoder: Any, step: int) -> None:
        from tenfold.ernie_music.report import spectrogram_picture

        if self.folder is None:
            return
        c = self.config
        scheduler = VDiffusionScheduler(unet.body.kernels, time_warp=c.time_warp)
        pipe = ErnieMusicPipeline(unet, scheduler, encoder)
        pipe.set_progress_bar_config(disable=True)
        place = self.folder / "demos" / f"step-{step:07d}"
        for g in c.demo_guidance:
            if g != 1 and c.condition_dropout == 0:
                continue
            generators = [
                torch.Generator().manual_seed(c.seed + i) for i in range(len(self.prompts))
            ]
            made = pipe(
                self.prompts,
                num_inference_steps=c.demo_steps,
                guidance_scale=g,
                generator=generators,
                output_type="pt",
            )
            made.save(place / f"guidance-{g:g}.wav")  # type: ignore[union-attr]
            picture = spectrogram_picture(made.audios, self.prompts, unet.config.sample_rate)  # type: ignore[union-attr]
            (place / f"guidance-{g:g}.png").write_bytes(picture)

    def files(self) -> list[str]:
        if self.folder is None:
            return []
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.glob("demos/*/*"))


def train(
    model: ErnieMusicUNet1D,
    data: AudioTexts,
    encoder: Any = None,
    config: MusicTrainConfig | None = None,
    *,
    held_out: AudioTexts | None = None,
    demo_prompts: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = True,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> tuple[MusicRecord, ErnieMusicUNet1D]:
    """Trains a U-Net in place; returns the record, and the U-Net of averaged weights, which is the one to sample from.

    Under ``torchrun`` or ``accelerate launch`` all ranks take part, and make the same steps as one process.

    Args:
        model: the U-Net. data: the pieces. encoder: texts -> (states, mask); None: a model without text.
        config: settings; ``changes`` are fields of it. held_out: pieces whose loss is measured.
        demo_prompts: what demo sounds are made of (``demo_every``).
        out: where the pipeline of averaged weights (``unet/``, ``scheduler/``), the last weights (``last/``), the
            record
            (``train.json``) and the demos go; a run that was killed goes on from ``out/training``, with the same call
            on the same model, unless ``resume`` is False.
        callback: told after every step. quiet: no progress bar.

    Raises:
        ValueError: settings, a folder of another run, rates or channels that are not the model's.
        TrainingError: a loss that is not a number.
    """
    config = (config or MusicTrainConfig()).with_changes(**changes)
    for name in ("sample_rate", "channels"):
        if getattr(data, name) != getattr(model.config, name):
            raise ValueError(
                f"the data has {name} {getattr(data, name)}, the model {getattr(model.config, name)}"
            )
    model.config.check_length(model.config.sample_size)
    if (
        encoder is not None
        and getattr(encoder, "width", model.config.text_dim) != model.config.text_dim
    ):
        raise ValueError(
            f"the text encoder's states are {encoder.width} wide, the model takes {model.config.text_dim}"
        )
    model.config.condition_dropout, model.config.time_warp = (
        config.condition_dropout,
        config.time_warp,
    )
    model.config.text_encoder = getattr(encoder, "name", model.config.text_encoder)
    batches = MusicBatches(data, encoder, config, model.config.sample_size)
    session = Session(STAGE, model, config, data.digest(), out, resume)
    accelerator = session.accelerator
    record = MusicRecord(config.to_json(), model.config.to_dict(), rows=len(data))
    record.parameters = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    with kept_random_state(), session.training() as record.trained:
        ema = EMA(model, config.ema_decay, config.ema_early_decay, config.ema_early_epochs)
        state = _State(ema, config.time_bins)
        accelerator.register_for_checkpointing(state)
        trainer = MusicTrainer(accelerator, config, batches, session.folder, callback, quiet)  # type: ignore[arg-type]
        demos = _Demos(session.target, demo_prompts, config)
        curve = trainer.run(
            STAGE,
            VelocityLoss(model, config.seed),
            config.steps,
            config.batch_size,
            trainer.loss_of,
            _after_step(state, batches, config, held_out, encoder, demos, accelerator),
        )
        record.take_curve(curve)
    record.seconds = time.perf_counter() - start
    record.demos = demos.files()
    pipeline = None
    if session.target is not None:
        scheduler = VDiffusionScheduler(model.body.kernels, time_warp=config.time_warp)
        pipeline = ErnieMusicPipeline(ema.model, scheduler, encoder)
        if accelerator.is_main_process:
            with quiet_transformers():
                model.save_pretrained(session.target / "last")
    session.finish(record, RECORD, model=pipeline)
    return record, ema.model


def _after_step(
    state: _State,
    batches: MusicBatches,
    config: MusicTrainConfig,
    held_out: AudioTexts | None,
    encoder: Any,
    demos: _Demos,
    accelerator: Any,
) -> Any:
    """What follows a step: averaged weights, loss by time, evaluation, demos."""
    bins = range(config.time_bins)

    def after_step(module: nn.Module, step: int, metrics: Metrics) -> bool:
        state.ema.update(module.unet, batches.epoch(step - 1))  # type: ignore[arg-type]
        state.sums += torch.tensor([metrics.pop(f"sum/{i}") for i in bins])
        state.counts += torch.tensor([metrics.pop(f"count/{i}") for i in bins])
        if step % config.log_every == 0 or step == config.steps:
            metrics |= {
                f"{BY_TIME}{i}": float(state.sums[i] / state.counts[i])
                for i in bins
                if state.counts[i]
            }
            state.sums.zero_()
            state.counts.zero_()
        last, ema = step == config.steps, state.ema.model
        if held_out is not None and (last or (config.eval_every and step % config.eval_every == 0)):
            found = held_out_loss(ema, held_out, encoder, text=config.text, bins=config.time_bins)
            metrics |= {HELD_OUT + k: v for k, v in ({"step": float(step)} | found).items()}
        if (
            demos.prompts
            and accelerator.is_main_process
            and config.demo_every
            and (last or step % config.demo_every == 0)
        ):
            demos.write(ema, encoder, step)
        return False

    return after_step
