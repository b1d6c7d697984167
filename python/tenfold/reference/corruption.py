# SPDX-License-Identifier: Apache-2.0
"""Span corruption as T5 does it, and pairs of a source and a target (ERNIE-Code, sections 3.3, 3.4 and 6).

A row of tokens has some spans taken out: ``inputs`` hold one sentinel for each of them, ``targets`` the sentinels with
what they stand for. Sentinel j = 1, 2, ... is the token ``first_sentinel + 1 - j``. Everything is in integers but for
the number of masked tokens, which is rounded in float32, half to even.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tenfold.reference.random import philox4x32_10

NOISE, KEPT, ROLL = 0, 1, 2  # what a draw is for


def span_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many tokens of a row are masked, and in how many spans.

    Lengths below 2 count as 2. A density so high that the kept tokens could not part the spans has fewer of them.
    """
    if density == 0.0:
        return 0, 0
    n = max(length, 2)
    noise = int(np.round(np.float32(n) * np.float32(density)))
    noise = min(max(noise, 1), n - 1)
    spans = int(np.round(np.float32(noise) / np.float32(mean_span)))
    return noise, min(max(spans, 1), n - noise)


def draw_below(bounds: Sequence[int], part: int, seed: int, stream: int) -> list[int]:
    """Number i is uniform among 0, ..., bounds[i] - 1, exactly.

    It is the high half of ``word * bound``, where the word is number ``i % 4`` of Philox4x32-10 at the counter
    ``(i // 4, part + 4 * attempt, stream)`` with the key ``seed``; the attempt is the first one, from 0 on, whose low
    half is at least ``2**32 % bound``.
    """
    index = torch.arange(len(bounds))
    bound = torch.tensor(bounds, dtype=torch.int64)
    out = torch.zeros(len(bounds), dtype=torch.int64)
    left, attempt = index, 0
    while left.numel() > 0:
        counter = (left // 4, torch.tensor(part + 4 * attempt), torch.tensor(stream & 0xFFFFFFFF),
                   torch.tensor((stream >> 32) & 0xFFFFFFFF))  # fmt: skip
        words = torch.stack(philox4x32_10(counter, seed))
        product = words.gather(0, (left % 4)[None])[0] * bound[left]
        good = (product & 0xFFFFFFFF) >= 2**32 % bound[left]
        out[left[good]] = product[good] >> 32
        left, attempt = left[~good], attempt + 1
    return [int(x) for x in out]


def draw_subset(size: int, count: int, part: int, seed: int, stream: int) -> list[int]:
    """``count`` of 0, ..., size - 1, ascending: any subset is equally likely (R. W. Floyd, CACM 30, 1987)."""
    first = size - count
    chosen: set[int] = set()
    draws = draw_below([first + i + 1 for i in range(count)], part, seed, stream)
    for i, drawn in enumerate(draws):
        chosen.add(first + i if drawn in chosen else drawn)
    return sorted(chosen)


def _parts(total: int, count: int, part: int, seed: int, stream: int) -> list[int]:
    """Lengths, at least 1, of ``count`` parts of ``total``: cut at ``count - 1`` of the ``total - 1`` gaps."""
    gaps = draw_subset(total - 1, count - 1, part, seed, stream)
    cuts = [0, *(g + 1 for g in gaps), total]
    return [b - a for a, b in pairwise(cuts)]


def row_mask(
    length: int, density: float, mean_span: float, seed: int, stream: int, roll: bool = False
) -> list[bool]:
    """The mask of one row; see :func:`span_mask`."""
    noise, spans = span_counts(length, density, mean_span)
    if length == 0 or noise == 0:
        return [False] * length
    masked = _parts(noise, spans, NOISE, seed, stream)
    kept = _parts(max(length, 2) - noise, spans, KEPT, seed, stream)
    mask: list[bool] = []
    for a, b in zip(kept, masked):
        mask += [False] * a + [True] * b
    mask = mask[:length]
    shift = draw_below([length], ROLL, seed, stream)[0] if roll else 0
    return mask[length - shift :] + mask[: length - shift]


def span_mask(
    lengths: Tensor, max_len: int, density: float, mean_span: float, seed: int, offset: int,
    roll: bool = False,
) -> Tensor:  # fmt: skip
    """Which tokens are taken out: bool [B, max_len], False beyond a row's length.

    The masked tokens are cut into spans at random, and so are the others; the two kinds take turns, beginning with one
    that is kept. ``roll`` rotates the row by a random number of tokens. Row i draws from the stream ``offset + i``.
    """
    out = torch.zeros(len(lengths), max_len, dtype=torch.bool)
    for i, n in enumerate(lengths.tolist()):
        out[i, :n] = torch.tensor(
            row_mask(n, density, mean_span, seed, offset + i, roll), dtype=torch.bool
        )
    return out.to(lengths.device)


def _marked(tokens: list[int], out: list[bool], first_sentinel: int) -> list[int]:
    """``tokens`` with each run of those that are out replaced by the next sentinel."""
    made: list[int] = []
    number, before = 0, False
    for token, gone in zip(tokens, out):
        if not gone:
            made.append(token)
        elif not before:
            made.append(first_sentinel - number)
            number += 1
        before = gone
    return made


def _spans(tokens: list[int], mask: list[bool], first_sentinel: int) -> list[int]:
    """Each masked span behind its sentinel."""
    made: list[int] = []
    number, before = 0, False
    for token, masked in zip(tokens, mask):
        if masked and not before:
            made.append(first_sentinel - number)
            number += 1
        if masked:
            made.append(token)
        before = masked
    return made


def _padded(rows: list[list[int]], width: int, pad: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(values [B, width], lengths [B] int32)."""
    out = like.new_full((len(rows), width), pad)
    for i, row in enumerate(rows):
        out[i, : len(row)] = like.new_tensor(row)
    sizes = [len(row) for row in rows]
    return out, torch.tensor(sizes, dtype=torch.int32, device=like.device)


def span_corrupt(
    tokens: Tensor, lengths: Tensor, mask: Tensor, first_sentinel: int, num_sentinels: int,
    eos_id: int, pad_id: int, max_inputs: int, max_targets: int, aligned: bool = True,
    final_sentinel: bool = False, *, allow_sentinels: bool = False, target_pad_id: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(inputs, in_len, targets, tgt_len) of rows whose masked tokens are taken out.

    ``aligned``: targets hold sentinel j and the tokens of masked span j. Else they are the row with its *kept* runs
    replaced by sentinels, which is the same for masks that begin with a kept token and end with a masked one.
    """
    rows_in: list[list[int]] = []
    rows_out: list[list[int]] = []
    lowest = first_sentinel - num_sentinels + 1
    for i, n in enumerate(lengths.tolist()):
        row = tokens[i, :n].tolist()
        gone = (mask[i, :n] != 0).tolist()
        if not allow_sentinels and any(lowest <= t <= first_sentinel for t in row):
            raise ValueError(f"row {i} holds sentinels")
        source = _marked(row, gone, first_sentinel)
        if aligned:
            target = _spans(row, gone, first_sentinel)
            spans = sum(b and not a for a, b in zip([False, *gone], gone))
        else:
            kept = [not g for g in gone]
            target = _marked(row, kept, first_sentinel)
            spans = sum(b and not a for a, b in zip([False, *kept], kept))
        if final_sentinel:
            target.append(first_sentinel - spans)
        rows_in.append([*source, eos_id])
        rows_out.append([*target, eos_id])
    inputs = _padded(rows_in, max_inputs, pad_id, tokens)
    targets = _padded(
        rows_out, max_targets, pad_id if target_pad_id is None else target_pad_id, tokens
    )
    return *inputs, *targets


def span_corruption(
    tokens: Tensor, lengths: Tensor, density: float, mean_span: float, seed: int, offset: int,
    first_sentinel: int, num_sentinels: int, eos_id: int, pad_id: int, max_inputs: int,
    max_targets: int, roll: bool = False, aligned: bool = True, final_sentinel: bool = False, *,
    allow_sentinels: bool = False, target_pad_id: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`span_corrupt` of the mask that :func:`span_mask` draws."""
    mask = span_mask(lengths, tokens.shape[1], density, mean_span, seed, offset, roll)
    return span_corrupt(tokens, lengths, mask, first_sentinel, num_sentinels, eos_id, pad_id, max_inputs,
                        max_targets, aligned, final_sentinel, allow_sentinels=allow_sentinels,
                        target_pad_id=target_pad_id)  # fmt: skip


def _body(row: list[int], eos_id: int) -> list[int]:
    return row[:-1] if row and row[-1] == eos_id else row


def span_restore(
    inputs: Tensor, in_len: Tensor, targets: Tensor, tgt_len: Tensor, first_sentinel: int,
    num_sentinels: int, eos_id: int, *, pad_id: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(tokens, lengths): inputs with each sentinel replaced by what follows it in targets, up to the next sentinel.

    Of a sentinel that is there more than once the first one counts, on both sides; one without a partner stands for
    nothing. One EOS at the end of either side is dropped, should it be there.
    """
    sentinels = range(first_sentinel - num_sentinels + 1, first_sentinel + 1)
    rows: list[list[int]] = []
    for i in range(len(inputs)):
        source = _body(inputs[i, : int(in_len[i])].tolist(), eos_id)
        spans: dict[int, list[int]] = {}
        current: list[int] = []
        for token in _body(targets[i, : int(tgt_len[i])].tolist(), eos_id):
            if token in sentinels:
                current = []
                spans.setdefault(token, current)
            else:
                current.append(token)
        row: list[int] = []
        for token in source:
            row += spans.pop(token, []) if token in sentinels else [token]
        rows.append(row)
    return _padded(rows, inputs.shape[1] + max(targets.shape[1] - 2, 0), pad_id, inputs)


def pair_pack(
    source: Tensor, source_offsets: Tensor, target: Tensor, target_offsets: Tensor,
    prefix: Tensor | None, prefix_offsets: Tensor | None, eos_id: int, pad_id: int, max_inputs: int,
    max_targets: int, *, target_pad_id: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(inputs, in_len, targets, tgt_len, cut): ``prefix + source + EOS`` and ``target + EOS`` of every row.

    A source, or a target, that is too long loses tokens at its end; ``cut`` [B, 2] counts them.
    """
    rows_in: list[list[int]] = []
    rows_out: list[list[int]] = []
    cut: list[tuple[int, int]] = []

    def row(values: Tensor, offsets: Tensor, i: int) -> list[int]:
        return values[int(offsets[i]) : int(offsets[i + 1])].tolist()

    for i in range(len(source_offsets) - 1):
        before = [] if prefix is None or prefix_offsets is None else row(prefix, prefix_offsets, i)
        room = max_inputs - 1 - len(before)
        if room < 0:
            raise ValueError(f"prefix {i} and EOS do not fit into {max_inputs} tokens")
        x, y = row(source, source_offsets, i), row(target, target_offsets, i)
        rows_in.append([*before, *x[:room], eos_id])
        rows_out.append([*y[: max_targets - 1], eos_id])
        cut.append((max(len(x) - room, 0), max(len(y) - (max_targets - 1), 0)))
    inputs = _padded(rows_in, max_inputs, pad_id, source)
    targets = _padded(
        rows_out, max_targets, pad_id if target_pad_id is None else target_pad_id, source
    )
    counts = torch.tensor(cut, dtype=torch.int32, device=source.device).view(-1, 2)
    return *inputs, *targets, counts


def shift_right(
    labels: Tensor, start_id: int = 0, pad_id: int = 0, ignore_index: int = -100
) -> Tensor:
    """What a decoder reads so as to predict ``labels``: them one position later, behind ``start_id``.

    Positions that the loss ignores are ``pad_id``.
    """
    out = torch.full_like(labels, start_id)
    out[:, 1:] = labels[:, :-1]
    later = out[:, 1:]
    later[later == ignore_index] = pad_id
    return out
