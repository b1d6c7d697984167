# SPDX-License-Identifier: Apache-2.0
"""Batches of pairs: rows of preferred traces, then rows of rejected ones.

Rows are tokenised once (:func:`encode_pairs`, in one call of the tokenizer) and kept with the classes of their tokens;
a batch joins what was kept, all rows at a time, which costs nanoseconds per token.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold import ops
from tenfold.themis.data import Pair
from tenfold.themis.traces import EOS, FAILURE, IGNORE, Encoded, Query, Trace, TraceFormat
from tenfold.training.checks import one_of

INPUTS = ("trace", "plain")


class Row(NamedTuple):
    """A row of n tokens: ``ids`` int32 [n], ``classes`` int8 [n], and ``at`` int32 [3]: n, and the columns where its
    answer and its trace begin (n in a plain row)."""

    ids: NDArray[np.int32]
    classes: NDArray[np.int8]
    at: NDArray[np.int32]


@dataclass
class EncodedPair:
    """A pair with its two rows in tokens. ``made``: rows with observations that were replaced, by side and which."""

    pair: Pair
    rows: tuple[Row, Row]
    made: dict[tuple[int, tuple[int, ...]], Row] = field(default_factory=dict, repr=False)


AnyPair: TypeAlias = Pair | EncodedPair


def _rows(made: Sequence[Encoded]) -> list[Row]:
    if not made:
        return []
    at = np.array([(len(e.ids), e.answer[0], e.assistant) for e in made], np.int32)
    ends = at[:, 0].cumsum(dtype=np.int64)
    ids = np.fromiter(chain.from_iterable(e.ids for e in made), np.int32, ends[-1])
    classes = np.fromiter(chain.from_iterable(e.classes for e in made), np.int8, ends[-1])
    return list(map(Row, np.split(ids, ends[:-1]), np.split(classes, ends[:-1]), at))


def _parts(pair: Pair, drop_rationale: bool) -> list[tuple[Query, Trace]]:
    return [(q, replace(t, rationale=None) if drop_rationale else t) for q, t in pair.rows()]


def encode_pairs(
    pairs: Sequence[Pair],
    format: TraceFormat,
    *,
    inputs: str = "trace",
    drop_rationale: bool = False,
    on_bad: str = "raise",
) -> list[EncodedPair]:
    """Pairs in tokens, to be kept and given to :func:`collate` again and again.

    Args:
        inputs: ``"trace"``, or ``"plain"`` for question and answer alone. drop_rationale: leave the rationale out.
        on_bad: ``"raise"``, or ``"skip"``: leave pairs out that cannot be encoded, with a warning that counts them.

    Raises:
        ValueError: settings; see :meth:`tenfold.themis.traces.TraceFormat.assemble`; a pair whose two rows are the
            same. The pair's id is named.
    """
    one_of("inputs", inputs, INPUTS)
    one_of("on_bad", on_bad, ("raise", "skip"))
    try:
        return _encoded(pairs, format, inputs, drop_rationale)
    except ValueError:
        pass  # one by one, to find out which
    made, bad = [], []
    for pair in pairs:
        try:
            made += _encoded([pair], format, inputs, drop_rationale)
        except ValueError as error:
            bad.append(f"pair {pair.id!r}: {error}")
            if on_bad == "raise":
                raise ValueError(bad[0]) from None
    if bad:
        warnings.warn(
            f"{len(bad)} of {len(pairs)} pairs are left out, the first because of {bad[0]}",
            UserWarning, stacklevel=2,
        )  # fmt: skip
    return made


def _encoded(
    pairs: Sequence[Pair], format: TraceFormat, inputs: str, drop_rationale: bool
) -> list[EncodedPair]:
    texts = [part for pair in pairs for part in _parts(pair, drop_rationale)]
    if inputs == "plain":
        found = [Encoded(r, [IGNORE] * len(r), (len(r), len(r)), len(r))
                 for r in (format.plain(q) for q, _ in texts)]  # fmt: skip
    else:
        found = format.assemble_all(texts)
    for chosen, rejected in zip(found[::2], found[1::2]):
        if chosen.ids == rejected.ids:
            raise ValueError(
                f"the rows of its two answers are the same {len(chosen.ids)} tokens, so that nothing could "
                "tell them apart"
            )
    rows = _rows(found)
    return [EncodedPair(*made) for made in zip(pairs, zip(rows[::2], rows[1::2]))]


def dropped(pair: Pair, side: int, share: float, seed: int, step: int) -> tuple[int, ...]:
    """Which observations of a candidate (side 0: preferred) are replaced, of those that there are.

    Each with probability ``share``, drawn from (seed, step, id, side, its number) and nothing else: the same for any
    order and size of batches.
    """
    trace = (pair.chosen, pair.rejected)[side].trace
    if share == 0 or not trace.steps:
        return ()
    found = []
    for i, step_ in enumerate(trace.steps):
        name = f"{seed} {step} {side} {i} {pair.id}".encode("utf-8", "surrogatepass")
        draw = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
        if step_.observation is not None and draw < share * 2**64:
            found.append(i)
    return tuple(found)


def _chosen_row(
    item: EncodedPair, side: int, format: TraceFormat, which: tuple[int, ...], drop_rationale: bool
) -> Row:
    if not which:
        return item.rows[side]
    row = item.made.get((side, which))
    if row is None:
        query, trace = _parts(item.pair, drop_rationale)[side]
        steps = tuple(
            replace(s, observation=FAILURE) if i in which else s for i, s in enumerate(trace.steps)
        )
        (row,) = _rows([format.assemble(query, replace(trace, steps=steps))])
        item.made[side, which] = row
    return row


def collate(
    pairs: Sequence[AnyPair],
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
        pairs: of :mod:`tenfold.themis.data`, or what :func:`encode_pairs` made of them with the same ``format``,
            ``inputs`` and ``drop_rationale``. format: made with the tokenizer of the model.
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
    one_of("padding_side", padding_side, ("right", "left"))
    one_of("inputs", inputs, INPUTS)
    if not 0 <= obs_dropout <= 1:
        raise ValueError(f"obs_dropout must be in [0, 1], got {obs_dropout}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be >= 1, got {multiple_of}")
    for name, value in (("beta", beta), ("omega", omega)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not pairs:
        raise ValueError("pairs is empty; a batch needs at least one")
    new = [p for p in pairs if isinstance(p, Pair)]
    items: Sequence[Any] = pairs
    if new:
        encoded = iter(encode_pairs(new, format, inputs=inputs, drop_rationale=drop_rationale))
        items = [next(encoded) if isinstance(p, Pair) else p for p in pairs]
    if obs_dropout == 0 or inputs == "plain":
        rows = [item.rows[side] for side in (0, 1) for item in items]
    else:
        rows = [
            _chosen_row(item, side, format, dropped(item.pair, side, obs_dropout, seed, step), drop_rationale)
            for side in (0, 1)
            for item in items
        ]  # fmt: skip
    weights = _class_weights(beta, omega, lm_on_positive)
    if packed:
        return _packed(rows, weights)
    return _padded(rows, weights, format.ids.pad, padding_side, multiple_of)


@functools.lru_cache(maxsize=64)
def _class_weights(beta: float, omega: float, lm_on_positive: bool) -> NDArray[np.float32]:
    """Of each class, in a preferred row and then in a rejected one."""
    classes = torch.arange(EOS + 1, dtype=torch.int8, device="cpu").expand(2, -1)
    sides = torch.tensor([True, False], device="cpu")
    return ops.lm_weight(classes, sides, beta, omega, lm_on_positive).flatten().numpy()


def _joined(
    rows: list[Row], weights: NDArray[np.float32]
) -> tuple[NDArray[np.int32], dict[str, NDArray[Any]]]:
    """([length, answer, trace] of the rows, and what their tokens have, one row after the other)."""
    at = np.concatenate([r.at for r in rows]).reshape(-1, 3).T
    classes = np.concatenate([r.classes for r in rows])
    kinds = classes.astype(np.int64)
    kinds[at[0, : len(rows) // 2].sum() :] += EOS + 1
    ids = np.concatenate([r.ids for r in rows])
    return at, {"ids": ids, "cls": classes, "weights": weights.take(kinds)}


def _preferred(rows: list[Row]) -> NDArray[np.bool_]:
    return np.arange(len(rows)) < len(rows) // 2


def _packed(rows: list[Row], weights: NDArray[np.float32]) -> dict[str, Tensor]:
    (lengths, *_), tokens = _joined(rows, weights)
    offsets = np.zeros(len(rows) + 1, np.int64)
    lengths.cumsum(out=offsets[1:])
    whole = {
        "ids": tokens["ids"].astype(np.int64),
        "mask": np.ones(offsets[-1], np.bool_),
        "cls": tokens["cls"],
        "weights": tokens["weights"],
        "position_ids": np.arange(offsets[-1]) - offsets[:-1].repeat(lengths),
    }
    batch = {name: torch.from_numpy(values)[None] for name, values in whole.items()}
    alone = {"is_pos": _preferred(rows), "offsets": offsets}
    return batch | {name: torch.from_numpy(values) for name, values in alone.items()}


def _padded(
    rows: list[Row], weights: NDArray[np.float32], pad: int, side: str, multiple_of: int
) -> dict[str, Tensor]:
    (lengths, answer, assistant), tokens = _joined(rows, weights)
    width = -(-int(lengths.max()) // multiple_of) * multiple_of
    shape = len(rows), width
    columns = np.arange(width, dtype=np.int32)
    if side == "right":
        first = np.zeros_like(lengths)
        mask = columns < lengths[:, None]
        positions = np.empty(shape, np.int64)
        positions[:] = columns
    else:
        first = width - lengths
        mask = columns >= first[:, None]
        positions = (columns - first[:, None]).clip(min=0).astype(np.int64)

    def filled(name: str, dtype: Any, outside: int) -> NDArray[Any]:
        made = np.full(shape, outside, dtype)
        made[mask] = tokens[name]
        return made

    whole = {
        "ids": filled("ids", np.int64, pad),
        "mask": mask,
        "cls": filled("cls", np.int8, IGNORE),
        "weights": filled("weights", np.float32, 0),
        "position_ids": positions,
        "is_pos": _preferred(rows),
        "answer_start": (first + answer).astype(np.int64),
        "asst_start": (first + assistant).astype(np.int64),
    }
    return {name: torch.from_numpy(values) for name, values in whole.items()}
