"""Batches of pairs: rows of preferred traces, then rows of rejected ones.

Rows are tokenised once (:func:`encode_pairs`, in one call of the tokenizer) and kept; a batch then joins kept ids and
reads the classes of its tokens off them, which costs nanoseconds per token.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from tenfold import ops
from tenfold.themis.data import Pair
from tenfold.themis.traces import FAILURE, Query, Trace, TraceFormat
from tenfold.training.checks import one_of

INPUTS = ("trace", "plain")


@dataclass(frozen=True)
class Row:
    """A row as tensors: ``ids`` int32 [n]; the columns where its answer and its trace begin (n without a trace)."""

    ids: Tensor
    answer: int
    assistant: int


@dataclass
class EncodedPair:
    """A pair with its two rows in tokens. ``made``: rows with observations that were replaced, by side and which."""

    pair: Pair
    rows: tuple[Row, Row]
    made: dict[tuple[int, tuple[int, ...]], Row] = field(default_factory=dict, repr=False)


AnyPair: TypeAlias = Pair | EncodedPair


def _rows(ids: list[list[int]], starts: list[tuple[int, int]]) -> list[Row]:
    flat = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int32)
    return [Row(part, *at) for part, at in zip(flat.split([len(r) for r in ids]), starts)]


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
        plain = [format.plain(q) for q, _ in texts]
        rows = _rows(plain, [(len(r), len(r)) for r in plain])
    else:
        found = format.assemble_all(texts)
        rows = _rows([e.ids for e in found], [(e.answer[0], e.assistant) for e in found])
    made = [EncodedPair(p, (rows[2 * i], rows[2 * i + 1])) for i, p in enumerate(pairs)]
    for item in made:
        if torch.equal(item.rows[0].ids, item.rows[1].ids):
            raise ValueError(
                f"the rows of its two answers are the same {len(item.rows[0].ids)} tokens, so that nothing could "
                "tell them apart"
            )
    return made


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
        made = format.assemble(query, replace(trace, steps=steps))
        (row,) = _rows([made.ids], [(made.answer[0], made.assistant)])
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
    encoded = iter(encode_pairs(new, format, inputs=inputs, drop_rationale=drop_rationale))
    items = [next(encoded) if isinstance(p, Pair) else p for p in pairs]
    share = obs_dropout if inputs == "trace" else 0.0
    rows = [
        _chosen_row(item, side, format, dropped(item.pair, side, share, seed, step), drop_rationale)
        for side in (0, 1)
        for item in items
    ]
    return _batch(rows, format, beta, omega, lm_on_positive, "right" if packed else padding_side,
                  multiple_of, packed)  # fmt: skip


def _batch(
    rows: list[Row], format: TraceFormat, beta: float, omega: float, lm_on_positive: bool,
    padding_side: str, multiple_of: int, packed: bool,
) -> dict[str, Tensor]:  # fmt: skip
    lengths = torch.tensor([len(r.ids) for r in rows])
    width = -(-int(lengths.max()) // multiple_of) * multiple_of
    first = torch.zeros_like(lengths) if padding_side == "right" else width - lengths
    # Of every column, how far it is into its row.
    columns = torch.arange(width) - first[:, None]
    mask = (columns >= 0) & (columns < lengths[:, None])
    flat = torch.cat([r.ids for r in rows]).long()
    ids = torch.full(mask.shape, format.ids.pad).masked_scatter_(mask, flat)
    answer = first + torch.tensor([r.answer for r in rows])
    assistant = first + torch.tensor([r.assistant for r in rows])
    is_pos = torch.arange(len(rows)) < len(rows) // 2
    special = format.ids
    cls = ops.trace_token_class(ids, mask, assistant, answer, special.tool, special.observation,
                                special.work, special.eos)  # fmt: skip
    batch = {
        "ids": ids, "mask": mask, "cls": cls,
        "weights": ops.lm_weight(cls, is_pos, beta, omega, lm_on_positive),
        "position_ids": columns.clamp(min=0),
    }  # fmt: skip
    if packed:
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return {k: v[mask][None] for k, v in batch.items()} | {"is_pos": is_pos, "offsets": offsets}
    return batch | {"is_pos": is_pos, "answer_start": answer, "asst_start": assistant}
