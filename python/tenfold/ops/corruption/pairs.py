# SPDX-License-Identifier: Apache-2.0
"""Pairs of a source and a target as rows of an encoder and a decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold

for _name in ("pair_pack", "shift_right"):
    inference_only(_name)


@torch.library.register_fake("tenfold::pair_pack")
def _(source, source_offsets, target, target_offsets, prefix, prefix_offsets, eos_id, pad_id, max_inputs, max_targets,
      *, target_pad_id=None):  # fmt: skip
    rows = source_offsets.shape[0] - 1
    sizes = [source.new_empty((rows,), dtype=torch.int32) for _ in range(2)]
    return (source.new_empty((rows, max_inputs)), sizes[0], source.new_empty((rows, max_targets)), sizes[1],
            source.new_empty((rows, 2), dtype=torch.int32))  # fmt: skip


@torch.library.register_fake("tenfold::shift_right")
def _(labels, start_id=0, pad_id=0, ignore_index=-100):
    return labels.new_empty(labels.shape)


def pair_pack(
    source: Tensor, source_offsets: Tensor, target: Tensor, target_offsets: Tensor,
    prefix: Tensor | None, prefix_offsets: Tensor | None, eos_id: int, pad_id: int, max_inputs: int,
    max_targets: int, *, target_pad_id: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows of an encoder and a decoder from ragged pairs: ``prefix + source + EOS`` and ``target + EOS``, padded.

    A source that is too long loses tokens at its end, never the prefix and never EOS; a target likewise. ``cut`` counts
    what was lost, so that a caller can warn.

    Args:
        source, target: int32 or int64 [N], [M], of one dtype: the tokens of all rows, one row after the other.
        source_offsets, target_offsets: int32 or int64 [B + 1]: row i is ``source[offsets[i] : offsets[i + 1]]``. They
            need not begin at 0. Rows may be empty.
        prefix, prefix_offsets: likewise what comes before each source (a prompt), or None for both.
        eos_id, pad_id: ends both sides, and fills what is left of them.
        max_inputs, max_targets: columns of the results, at least 1.
        target_pad_id: what fills the targets instead of pad_id: -100 makes labels of them.

    Returns:
        (inputs [B, max_inputs], in_len [B], targets [B, max_targets], tgt_len [B], cut [B, 2]); tokens have the dtype
        of ``source``; lengths, with EOS counted, and cut (tokens of the source and of the target) are int32.

    Raises:
        ValueError: shapes, devices, ids that do not fit; on the CPU also a prefix that leaves no room for EOS.
        IndexError: offsets that fall, or leave the tokens; a token below 0 among those that are kept (what is cut off
        is not read). TypeError: dtypes. Elsewhere values are not checked: offsets count as the nearest possible ones,
        tokens are copied as they are, and both lengths of a row whose prefix does not fit are -1, with nothing but
        padding in it.

    Source:
        ERNIE-Code (arXiv 2212.06742), sections 3.4 and 8 of the method's specification.
    """
    return call_inference(
        _ops.pair_pack.default, source, source_offsets, target, target_offsets, prefix, prefix_offsets, eos_id, pad_id,
        max_inputs, max_targets, target_pad_id=target_pad_id,
    )  # fmt: skip


def shift_right(
    labels: Tensor, start_id: int = 0, pad_id: int = 0, ignore_index: int = -100
) -> Tensor:
    """What a decoder reads so as to predict ``labels``: them one position later, behind ``start_id``.

    Args:
        labels: int32 or int64 [B, T]: targets, or labels with ``ignore_index`` as padding.
        start_id: the decoder's first token; T5's is its padding, 0.
        pad_id: what the decoder reads at positions that the loss ignores.
        ignore_index: marks those.

    Returns:
        The shape and dtype of ``labels``, contiguous.

    Raises:
        ValueError: shape, ids that do not fit. TypeError: dtype.

    Source:
        ERNIE-Code (arXiv 2212.06742), section 2 of the method's specification; T5's decoder.
    """
    return call_inference(_ops.shift_right.default, labels, start_id, pad_id, ignore_index)
