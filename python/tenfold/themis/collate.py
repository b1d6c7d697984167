"""Batches of pairs: rows of preferred traces, then rows of rejected ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tenfold.themis.traces import TraceFormat


def collate(
    pairs: Sequence[Any],
    format: TraceFormat,
    *,
    beta: float = 1.0,
    omega: float = 1.0,
    lm_on_positive: bool = True,
    obs_dropout: float = 0.0,
    drop_rationale: bool = False,
    inputs: str = "trace",
    seed: int = 0,
    step: int = 0,
    padding_side: str = "right",
    multiple_of: int = 8,
    packed: bool = False,
) -> dict[str, Tensor]:
    """Pairs as tensors; rows 0 .. B-1 are the preferred ones, B .. 2B-1 the rejected ones, in the same order.

    Args:
        pairs: of :mod:`tenfold.themis.data`. format: made with the tokenizer of the model.
        beta, omega, lm_on_positive: of the weights. obs_dropout: share of observations that are replaced by the
            failure sentence, drawn from (seed, step, pair id, side, number of the call).
        drop_rationale: leave the rationale out. inputs: ``"trace"``, or ``"plain"`` for question and answer alone.
        padding_side: ``"right"`` or ``"left"``; rows are padded with the pad token to a ``multiple_of`` columns.
        packed: one row [1, N] without padding instead.

    Returns:
        ``ids`` [2B, S] int64; ``mask`` [2B, S] bool; ``cls`` [2B, S] int8, classes of targets; ``weights`` [2B, S]
        fp32; ``position_ids`` [2B, S] int64; ``is_pos`` [2B] bool; ``answer_start``, ``asst_start`` [2B] int64,
        columns. Packed: the same with one row [1, N], ``offsets`` [2B+1] int64 instead of the starts, and a mask of
        ones; position ids begin at 0 in every row.

    Raises:
        ValueError: no pairs; settings; special tokens in texts; rows too long; a pair whose rows are the same.
    """
    raise NotImplementedError
