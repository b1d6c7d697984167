# SPDX-License-Identifier: Apache-2.0
"""Strips as pictures for people: folded into rows, enlarged, written as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BEYOND = (225, 228, 235)  # what is not strip


def as_rows(strip: Any) -> np.ndarray:
    """A strip [C, p, W], [p, W, C] or [p, W], tensor or array, uint8 or float in [0, 1], as [p, W, 3] uint8.

    Raises ValueError for other shapes and for numbers outside [0, 1].
    """
    pixels = np.asarray(strip.detach().float().cpu() if hasattr(strip, "detach") and strip.is_floating_point()
                        else strip.cpu() if hasattr(strip, "cpu") else strip)  # fmt: skip
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(
            f"a strip is [C, p, W], [p, W, C] or [p, W] with C 1 or 3, got {pixels.shape}"
        )
    if pixels.dtype != np.uint8:
        if not np.issubdtype(pixels.dtype, np.floating) or pixels.min() < 0 or pixels.max() > 1:
            raise ValueError("a strip is uint8 or float in [0, 1]; clamp predictions first")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels


def strip_picture(
    strip: Any,
    *,
    wrap: int = 48,
    num_patches: int | None = None,
    scale: int = 1,
    grid: bool = False,
    gap: int = 4,
) -> np.ndarray:
    """A strip folded into rows of patches: [H, W, 3] uint8.

    Args:
        strip: see ``as_rows``.
        wrap: patches per row.
        num_patches: stops after the patch of this index (the end of the sequence); default: the whole strip.
        scale: pixels per pixel.
        grid: a line between patches.
        gap: pixels between rows, before scaling.
    """
    if wrap < 1 or scale < 1:
        raise ValueError(f"wrap and scale must be >= 1, got {wrap} and {scale}")
    pixels = as_rows(strip)
    patch = pixels.shape[0]
    count = pixels.shape[1] // patch if num_patches is None else num_patches + 1
    pixels = pixels[:, : count * patch]
    across = min(wrap, max(count, 1)) * patch
    rows = max(-(-pixels.shape[1] // across), 1)
    made = np.empty((rows * (patch + gap) - gap, across, 3), np.uint8)
    made[...] = BEYOND
    for row in range(rows):
        part = pixels[:, row * across : (row + 1) * across]
        made[row * (patch + gap) : row * (patch + gap) + patch, : part.shape[1]] = part
    made = made.repeat(scale, 0).repeat(scale, 1)
    if grid:
        made[:, :: patch * scale] = made[:, :: patch * scale] // 2 + np.array([120, 0, 0], np.uint8)
    return made


def stack(pictures: Sequence[np.ndarray], gap: int = 6) -> np.ndarray:
    """Pictures one under the other."""
    if not pictures:
        raise ValueError("stack needs at least one picture")
    width = max(p.shape[1] for p in pictures)
    made = np.empty((sum(p.shape[0] + gap for p in pictures) - gap, width, 3), np.uint8)
    made[...] = BEYOND
    y = 0
    for picture in pictures:
        made[y : y + picture.shape[0], : picture.shape[1]] = picture
        y += picture.shape[0] + gap
    return made


def write_png(picture: np.ndarray, path: str | Path) -> Path:
    """Writes [H, W, 3] uint8 as PNG; ImportError names the extra that has Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("PNG files need Pillow: pip install 'tenfold[pixel]'") from None
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, optimize=True)
    return path
