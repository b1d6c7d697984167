# SPDX-License-Identifier: Apache-2.0
"""Span corruption: masks, inputs and targets, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.ops._masks import as_bytes
from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold

for _name in ("span_mask", "span_corrupt", "span_corruption", "span_restore"):
    inference_only(_name)


@torch.library.register_fake("tenfold::span_mask")
def _(lengths, max_len, density, mean_span, seed, offset, roll=False):
    return lengths.new_empty((lengths.shape[0], max_len), dtype=torch.bool)


def _corrupted(tokens: Tensor, max_inputs: int, max_targets: int) -> tuple[Tensor, ...]:
    rows = tokens.shape[0]
    sizes = [tokens.new_empty((rows,), dtype=torch.int32) for _ in range(2)]
    return (tokens.new_empty((rows, max_inputs)), sizes[0],
            tokens.new_empty((rows, max_targets)), sizes[1])  # fmt: skip


@torch.library.register_fake("tenfold::span_corrupt")
def _(tokens, lengths, mask, first_sentinel, num_sentinels, eos_id, pad_id, max_inputs, max_targets, aligned=True,
      final_sentinel=False, *, allow_sentinels=False, target_pad_id=None):  # fmt: skip
    return _corrupted(tokens, max_inputs, max_targets)


@torch.library.register_fake("tenfold::span_corruption")
def _(tokens, lengths, density, mean_span, seed, offset, first_sentinel, num_sentinels, eos_id, pad_id, max_inputs,
      max_targets, roll=False, aligned=True, final_sentinel=False, *, allow_sentinels=False,
      target_pad_id=None):  # fmt: skip
    return _corrupted(tokens, max_inputs, max_targets)


@torch.library.register_fake("tenfold::span_restore")
def _(inputs, in_len, targets, tgt_len, first_sentinel, num_sentinels, eos_id, *, pad_id=0):
    width = inputs.shape[1] + torch.sym_max(targets.shape[1] - 2, 0)
    return inputs.new_empty((inputs.shape[0], width)), inputs.new_empty(
        (inputs.shape[0],), dtype=torch.int32
    )


def span_mask(
    lengths: Tensor, max_len: int, density: float, mean_span: float, seed: int, offset: int = 0,
    roll: bool = False,
) -> Tensor:  # fmt: skip
    """Which tokens span corruption takes out: the random spans of T5.

    A row of n tokens has ``noise = round(density max(n, 2))`` masked ones, at least 1 and at most n - 1, in
    ``spans = round(noise / mean_span)`` spans, at least 1; both in float32, half to even. The masked tokens are cut
    into so many parts, all at least 1 long and all cuts equally likely, and so are the others; kept and masked parts
    take turns, so that a mask begins with a kept token and ends with a masked one. All such masks are equally likely,
    exactly. (Where ``n - noise`` is below ``spans``, which the published code does not provide for, there are so many
    spans only.)

    Args:
        lengths: int32 or int64 [B], tokens of each row, at most ``max_len``. One token alone is never masked.
        max_len: columns of the mask, below 2^31.
        density: share of tokens that are masked, in [0, 1); 0 masks none.
        mean_span: mean length of a masked span, at least 1.
        seed, offset: any int64 each. Row i draws from the stream ``offset + i`` of ``seed``, so that its mask is the
            same in any batch, on any device and for any number of threads: count examples with ``offset``.
        roll: rotates the mask of a row, by 0 to n - 1 tokens to the right. It may then begin with a masked token, and
            have a span cut in two.

    Returns:
        bool [B, max_len]: True is masked; False beyond the length of a row.

    Raises:
        ValueError: shapes, max_len, density, mean_span. TypeError: dtype of lengths. IndexError: a length outside
        [0, max_len] (checked on the CPU; elsewhere the nearest one counts).

    Source:
        ERNIE-Code (arXiv 2212.06742), section 3.3 of the method's specification; T5 (arXiv 1910.10683).
    """
    return call_inference(_ops.span_mask.default, lengths, max_len, density, mean_span, seed, offset, roll)  # fmt: skip


def span_corrupt(
    tokens: Tensor, lengths: Tensor, mask: Tensor, first_sentinel: int, num_sentinels: int,
    eos_id: int, pad_id: int, max_inputs: int, max_targets: int, aligned: bool = True,
    final_sentinel: bool = False, *, allow_sentinels: bool = False, target_pad_id: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Inputs and targets of rows whose masked spans are to be predicted.

    Inputs are the kept tokens with sentinel j in place of masked span j = 1, 2, ...; targets are sentinel 1, the tokens
    of span 1, sentinel 2, ...; both end with EOS. Sentinel j is the token ``first_sentinel + 1 - j``: they descend.

    Args:
        tokens: int32 or int64 [B, L]; what lies beyond a row's length is not read.
        lengths: int32 or int64 [B].
        mask: [B, L], bool, int8 or uint8 (other dtypes: nonzero is masked); any mask.
        first_sentinel: the first sentinel, 250099 for mT5 and ERNIE-Code. Never derived from a vocabulary's size.
        num_sentinels: how many there are, first_sentinel and the ids below it.
        eos_id, pad_id: ends both sides, and fills what is left of them.
        max_inputs, max_targets: columns of the results; a row that needs more is an error, nothing is cut off.
        aligned: as above. False gives T5's own rule, which replaces runs of *kept* tokens in the targets: the same for
            masks that begin with a kept token and end with a masked one, else its sentinels stand for other spans than
            those of the inputs, and such rows cannot be restored.
        final_sentinel: one more sentinel before EOS in the targets.
        allow_sentinels: raw tokens may be sentinels (such rows cannot be restored).
        target_pad_id: what fills the targets instead of pad_id: -100 makes labels of them.

    Returns:
        (inputs [B, max_inputs], in_len [B], targets [B, max_targets], tgt_len [B]); tokens have the dtype of
        ``tokens``, lengths are int32 with EOS counted.

    Raises:
        ValueError: shapes, devices, ids that do not fit or collide; on the CPU also rows that do not fit, that need
        more sentinels than there are, or that hold sentinels. IndexError: a length outside [0, L], a token below 0.
        TypeError: dtypes. Elsewhere values are not checked: lengths count as the nearest possible one, tokens are
        copied as they are, and both lengths of a row that does not fit, or needs too many sentinels, are -1, with
        nothing but padding in it.

    Source:
        ERNIE-Code (arXiv 2212.06742), section 3.3 of the method's specification, steps 3 and 4.
    """
    return call_inference(
        _ops.span_corrupt.default, tokens, lengths, as_bytes(mask), first_sentinel, num_sentinels, eos_id, pad_id,
        max_inputs, max_targets, aligned, final_sentinel, allow_sentinels=allow_sentinels,
        target_pad_id=target_pad_id,
    )  # fmt: skip


def span_corruption(
    tokens: Tensor, lengths: Tensor, density: float, mean_span: float, seed: int, offset: int,
    first_sentinel: int, num_sentinels: int, eos_id: int, pad_id: int, max_inputs: int,
    max_targets: int, roll: bool = False, aligned: bool = True, final_sentinel: bool = False, *,
    allow_sentinels: bool = False, target_pad_id: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`span_corrupt` of the mask that :func:`span_mask` draws, in one pass: the mask is never in memory.

    The results are equal to those of the two ops. What both need may be computed before:
    :func:`tenfold.ops.corruption.longest_chunk` gives the longest row that fits, and the length of its targets.

    Args:
        tokens, lengths: as of :func:`span_corrupt`.
        density, mean_span, seed, offset, roll: as of :func:`span_mask`.
        first_sentinel, num_sentinels, eos_id, pad_id, max_inputs, max_targets, aligned, final_sentinel,
            allow_sentinels, target_pad_id: as of :func:`span_corrupt`.

    Returns:
        (inputs, in_len, targets, tgt_len), as of :func:`span_corrupt`.

    Raises:
        As both. How long a corrupted row is follows from its length, so where values cannot be seen (not on the CPU) a
        row of L tokens, all columns of ``tokens``, must fit and find enough sentinels: ValueError.

    Source:
        ERNIE-Code (arXiv 2212.06742), section 3.3 of the method's specification.
    """
    return call_inference(
        _ops.span_corruption.default, tokens, lengths, density, mean_span, seed, offset, first_sentinel,
        num_sentinels, eos_id, pad_id, max_inputs, max_targets, roll, aligned, final_sentinel,
        allow_sentinels=allow_sentinels, target_pad_id=target_pad_id,
    )  # fmt: skip


def span_restore(
    inputs: Tensor, in_len: Tensor, targets: Tensor, tgt_len: Tensor, first_sentinel: int,
    num_sentinels: int, eos_id: int, *, pad_id: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The text of inputs and targets: each sentinel of the inputs replaced by what follows it in the targets.

    It undoes :func:`span_corrupt` (``aligned``, for every mask), and fills in what a model has generated as targets.

    Args:
        inputs: int32 or int64 [B, S].
        in_len: int32 or int64 [B]; what lies beyond is not read.
        targets: [B, T], the dtype of ``inputs``.
        tgt_len: int32 or int64 [B].
        first_sentinel, num_sentinels, eos_id: as of :func:`span_corrupt`.
        pad_id: fills what is left of the rows.

    Returns:
        (tokens [B, S + max(T - 2, 0)], lengths int32 [B]). A sentinel's text ends at the next sentinel or at the end;
        one EOS at the end of either side is dropped, should it be there. Of a sentinel that is there more than once the
        first one counts, on both sides; one without a partner stands for nothing.

    Raises:
        ValueError: shapes, devices, ids that do not fit or collide. IndexError: a length outside the row (checked on
        the CPU; elsewhere the nearest one counts). TypeError: dtypes.

    Source:
        ERNIE-Code (arXiv 2212.06742), sections 6 and 9 of the method's specification.
    """
    return call_inference(_ops.span_restore.default, inputs, in_len, targets, tgt_len, first_sentinel, num_sentinels,
                          eos_id, pad_id=pad_id)  # fmt: skip
