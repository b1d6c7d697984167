"""Batches: strips rendered from texts, rows of tokens, and pairs of both, as the models take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tenfold.pixelgpt.strips import patch_mask
from tenfold.pixelgpt.tokens import encode_rows

IGNORE = -100
Text: TypeAlias = str | tuple[str, str]
Batch: TypeAlias = dict[str, Tensor]


def strips_of(processor: Any, texts: Sequence[Text], length: int, *, crop: bool = True) -> Batch:
    """Texts, or pairs of texts, as strips.

    Args:
        processor: a :class:`~tenfold.pixelgpt.PixelProcessor`. length: patches of a strip, at most; longer texts are cut.
        crop: leave out patches at the end that are padding in all rows (padding changes nothing before it).

    Returns:
        ``pixel_values`` uint8 [B, p, p * L, C], ``pixel_attention_mask`` bool [B, L].
    """
    made = processor(list(texts), max_patches=length)
    images, counts = made["pixel_values"], made["num_patches"]
    mask = patch_mask(counts, length)
    if crop:
        used = int(mask.sum(1).max())
        patch = images.shape[1]
        images, mask = images[:, :, : used * patch], mask[:, :used]
    return {"pixel_values": images, "pixel_attention_mask": mask}


def padded_ids(rows: Sequence[Sequence[int]], width: int | None, pad: int) -> Batch:
    """``input_ids`` int64 [B, T] and ``attention_mask`` bool [B, T] of rows, filled up on the right.

    Args:
        width: T; None: that of the longest row. pad: the id that fills.
    """
    lengths = torch.tensor([len(r) for r in rows])
    width = int(lengths.max()) if width is None else width
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.full(mask.shape, pad)
    ids[mask] = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": mask}


def pad_id(tokenizer: Any) -> int:
    """The padding token, else the end token (as Llama 2's)."""
    found = tokenizer.pad_token_id
    return (tokenizer.eos_token_id or 0) if found is None else found


def text_batch(rows: Tensor) -> Batch:
    """Full rows of tokens [B, T] as inputs and labels."""
    return {"input_ids": rows, "labels": rows}


def pair_batch(
    processor: Any, tokenizer: Any, texts: Sequence[str], patches: int, tokens: int
) -> Batch:
    """Texts as pairs of a strip and its tokens, with labels for both losses; the strip comes first.

    Strips are not cropped: where tokens begin depends on their length.
    """
    rows = encode_rows(tokenizer, list(texts), None, tokens, end=True)
    ids = padded_ids(rows, None, pad_id(tokenizer))
    labels = ids["input_ids"].masked_fill(~ids["attention_mask"], IGNORE)
    return strips_of(processor, texts, patches, crop=False) | ids | {"labels": labels}


def classifier_batch(
    processor: Any, tokenizer: Any, texts: Sequence[Text], modality: str, length: int
) -> Batch:
    """Texts, or pairs of texts, as a classifier reads them: a strip, tokens, or both (each of ``length``)."""
    made: Batch = {}
    if modality in ("pixel", "pair"):
        made |= strips_of(processor, texts, length, crop=modality == "pixel")
    if modality in ("text", "pair"):
        both = [t if isinstance(t, tuple) else (t, None) for t in texts]
        others = [b for _, b in both if b is not None]
        if others and len(others) < len(both):
            raise ValueError("texts are either all pairs or all single")
        rows = encode_rows(tokenizer, [a for a, _ in both], others or None, length)
        made |= padded_ids(rows, None, pad_id(tokenizer))
    return made
