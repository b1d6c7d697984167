# SPDX-License-Identifier: Apache-2.0
"""Batches: strips rendered from texts, rows of tokens, and pairs of both, as the models take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tenfold.pixelgpt.tokens import encode_rows

IGNORE = -100
Text: TypeAlias = str | tuple[str, str]
Batch: TypeAlias = dict[str, Tensor]


def with_settings(processor: Any, **changes: Any) -> Any:
    """A processor with the same fonts and some other settings; the same one if none differs."""
    settings = replace(processor.settings, **changes)
    if settings == processor.settings:
        return processor
    return type(processor)(processor.fonts, **vars(settings))


def strips_of(processor: Any, texts: Sequence[Text], *, crop: bool = True) -> Batch:
    """Texts, or pairs of texts, as strips of at most ``processor.settings.max_patches`` patches; longer texts are cut.

    Args:
        crop: leave out patches at the end that are padding in all rows (padding changes nothing before it).

    Returns:
        ``pixel_values`` uint8 [B, C, p, p * L], ``patch_mask`` bool [B, L].
    """
    made = processor(list(texts), padding="longest" if crop else "max_length")
    return {name: made[name] for name in ("pixel_values", "patch_mask")}


def padded_ids(rows: Sequence[Sequence[int]], pad: int) -> Batch:
    """``input_ids`` int64 [B, T] and ``attention_mask`` bool [B, T] of rows, filled up on the right with ``pad``."""
    lengths = torch.tensor([len(r) for r in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(mask.shape, pad)
    ids[mask] = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": mask}


def pad_id(tokenizer: Any) -> int:
    """The padding token, else the end token (as Llama 2's)."""
    found = tokenizer.pad_token_id
    return (tokenizer.eos_token_id or 0) if found is None else found


def pair_batch(processor: Any, tokenizer: Any, texts: Sequence[str], tokens: int) -> Batch:
    """Texts as pairs of a strip and its tokens, with labels for both losses; the strip comes first.

    Strips are not cropped: where tokens begin depends on their length.
    """
    ids = padded_ids(encode_rows(tokenizer, list(texts), None, tokens, end=True), pad_id(tokenizer))
    labels = ids["input_ids"].masked_fill(~ids["attention_mask"], IGNORE)
    return strips_of(processor, texts, crop=False) | ids | {"labels": labels}


def classifier_batch(
    processor: Any, tokenizer: Any, texts: Sequence[Text], modality: str, length: int
) -> Batch:
    """Texts, or pairs of texts, as a classifier reads them: a strip, at most ``length`` tokens, or both."""
    made: Batch = {}
    if modality in ("pixel", "pair"):
        made |= strips_of(processor, texts, crop=modality == "pixel")
    if modality in ("text", "pair"):
        both = [t if isinstance(t, tuple) else (t, None) for t in texts]
        others = [b for _, b in both if b is not None]
        if others and len(others) < len(both):
            raise ValueError("texts are either all pairs or all single")
        rows = encode_rows(tokenizer, [a for a, _ in both], others or None, length)
        made |= padded_ids(rows, pad_id(tokenizer))
    return made
