# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of one half: one round over prompts and answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tenfold.hft.baselines import merge_lora, prepared
from tenfold.hft.config import HFTConfig
from tenfold.hft.record import TuneRecord
from tenfold.hft.session import Session
from tenfold.hft.training import lm_step
from tenfold.training.batches import Batches, Data, lm_loss
from tenfold.training.loop import Callback, kept_random_state


def sft(
    model: Any,
    data: Data,
    config: HFTConfig | None = None,
    *,
    eval_rows: Tensor | None = None,
    work_dir: str | None = None,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> TuneRecord:
    """Fine-tunes a causal LM, in place: half of its layer matrices, drawn from the seed.

    Args:
        model: a transformers causal LM. data: a token stream [n], rows [R, S], a dict with ``input_ids`` and
            optional ``labels`` (-100: no loss) and ``attention_mask`` [R, S], or a function
            (stage, step, size) -> such rows.
        config: settings, default :class:`HFTConfig`; ``changes`` are fields of it.
        eval_rows: rows whose loss is taken before and after.
        work_dir: for checkpoints; a run that was killed goes on there, with the same call on the same model.
        callback: told after every step. quiet: no progress bar.

    Returns:
        The record of the run.

    Raises:
        ValueError: settings, an architecture without layers, a work folder of another run. TrainingError:
            a loss that is not a number.
    """
    config = (config or HFTConfig()).with_changes(**changes)
    batches = Batches(data, config.sequence_length, config.seed)
    session = Session("sft", model, config, [batches], work_dir, callback, quiet)
    record = session.record
    if eval_rows is not None:
        record.losses["before"] = lm_loss(model, eval_rows)
    with kept_random_state():
        module = prepared(model, config)
        session.round(0, module, lm_step)
    session.finish(module)
    if config.method == "lora":
        merge_lora(module)
    if eval_rows is not None:
        record.losses["after"] = lm_loss(model, eval_rows)
    return record
