# SPDX-License-Identifier: Apache-2.0
"""Pre-training on mixtures of streams: on accelerate, on any number of ranks, resumed exactly."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from tenfold.pixelgpt.baselines import strip_baselines
from tenfold.pixelgpt.record import PretrainRecord, model_summary
from tenfold.pixelgpt.steps import (
    OF_PIXELS,
    OF_TEXT,
    PretrainLoss,
    PretrainTrainer,
    held_out_losses,
)
from tenfold.pixelgpt.streams import MixtureBatches, Streams
from tenfold.pixelgpt.train_config import PretrainConfig
from tenfold.training.loop import Callback, Metrics, kept_random_state
from tenfold.training.record import HELD_OUT
from tenfold.training.session import Session

STAGE = "pretrain"
RECORD = "pretrain.json"


def _frozen(streams: tuple[str, ...]) -> tuple[str, ...]:
    """Modules that no stream of these goes through."""
    if "pair" in streams:
        return ()
    return (() if "text" in streams else OF_TEXT) + (() if "pixel" in streams else OF_PIXELS)


def check_lengths(model: Any, config: PretrainConfig) -> None:
    """Raises ValueError if rows of the settings are longer than the model's positions."""
    most = model.config.max_position_embeddings
    longest = max(config.length, sum(config.pair_lengths) if "pair" in config.streams else 0)
    if longest > most:
        raise ValueError(
            f"rows of {longest} patches and tokens (length {config.length}, pairs of {config.pair_lengths[0]} + "
            f"{config.pair_lengths[1]}) are longer than the model's {most} positions"
        )


def pretrain(
    model: Any,
    streams: Streams,
    config: PretrainConfig | None = None,
    *,
    held_out: Streams | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> PretrainRecord:
    """Trains a model on the streams of its variant, in place.

    Under ``torchrun`` or ``accelerate launch`` all ranks take part; they make the same steps as one process.

    Args:
        model: a :class:`~tenfold.pixelgpt.PixelGPTForCausalLM`.
        streams: of :func:`~tenfold.pixelgpt.streams.make_streams`.
        config: settings, default :class:`~tenfold.pixelgpt.train_config.PretrainConfig`; ``changes`` are fields of it.
        held_out: streams that are measured before, on the way and after; at most 64 rows of each.
        out: where model, processor, tokenizer and record (``pretrain.json``) are saved; a run that was killed goes on
            from ``out/training``, with the same call on the same model, unless ``resume`` is False.
        callback: told after every step. quiet: no progress bar.

    Raises:
        ValueError: settings, a stream without rows, rows longer than the model's positions, a folder of another run.
        TrainingError: a loss that is not a number.
    """
    config = (config or PretrainConfig()).with_changes(**changes)
    check_lengths(model, config)
    batches = MixtureBatches(streams, config)
    session = Session(STAGE, model, config, streams.digest(), out, resume)
    accelerator = session.accelerator
    record = PretrainRecord(config.to_json(), model_summary(model.config), streams=batches.names)
    record.rows = {n: streams.count(n) for n in batches.names}
    record.parameters = sum(p.numel() for p in model.parameters())
    size = config.micro_batch_size or min(config.batch_size, 16)

    def measured(step: int) -> Metrics:
        if held_out is None:
            return {}
        found = held_out_losses(model, held_out, batch_size=size, limit=64, accelerator=accelerator)
        return {"step": float(step)} | found

    start = time.perf_counter()
    with kept_random_state(), session.training(_frozen(config.streams)) as record.trained:
        trainer = PretrainTrainer(accelerator, config, batches, session.folder, callback, quiet)
        trainer.streams, trainer.eos_in_loss = streams, model.config.eos_in_loss
        before = measured(0)
        every = config.eval_every

        def after_step(module: nn.Module, step: int, metrics: Metrics) -> bool:
            metrics["stream"] = float(batches.drawn(step - 1)[0])
            if step == config.steps or (every and step % every == 0):
                with trainer.whole():
                    metrics |= {HELD_OUT + k: v for k, v in measured(step).items()}
            return False

        curve = trainer.run(
            STAGE, PretrainLoss(model), config.steps, config.batch_size, trainer.loss_of, after_step
        )
        record.take_curve(curve)
        if before:
            record.validation.insert(0, before)
    if held_out is not None and held_out.count("pixel"):
        record.baselines = strip_baselines(held_out, model.config, train=streams)
    record.seconds = time.perf_counter() - start
    session.finish(record, RECORD, streams.processor, streams.tokenizer)
    return record
