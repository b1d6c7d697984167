# SPDX-License-Identifier: Apache-2.0
"""Glyphs as pixels: FreeType without hinting, at quarters of a pixel.

FreeType's rasteriser works in integers, so a glyph has the same bytes on every machine with the same version.
Colour bitmaps (emoji) are scaled down by area, in integers too. FreeType's objects belong to one thread at a
time: each thread has its own, opened on first use.
"""

from __future__ import annotations

import ctypes
import io
import math
import threading
import weakref
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tenfold.pixelgpt.fonts import INSTALL, FontFile, backend

PHASES = 4  # positions inside a pixel, each way
_NO_HINTING, _NO_BITMAP, _COLOR = 2, 8, 1 << 20
_MONO, _GRAY, _BGRA = 1, 2, 7
_OUTLINE = int.from_bytes(b"outl", "big")


@dataclass(frozen=True)
class GlyphImage:
    """Pixels of a glyph; ``left`` and ``top`` place them: pixels right of the pen, pixels above the baseline.

    ``ink`` [w, h] uint16 is coverage of 0 to 255, first column first; ``color`` [w, h, 4] int32, if any, is
    premultiplied red, green, blue, alpha.
    """

    left: int
    top: int
    ink: np.ndarray
    color: np.ndarray | None = None


_EMPTY = GlyphImage(0, 0, np.zeros((0, 0), np.uint16))


class _Library:
    """FreeType's library with the faces that one thread has opened; closed with its thread."""

    def __init__(self) -> None:
        raw = backend()[1]
        self.handle = raw.FT_Library()
        _check(raw.FT_Init_FreeType(ctypes.byref(self.handle)), "FT_Init_FreeType", None)
        self.faces: dict[FontFile, Any] = {}
        weakref.finalize(self, raw.FT_Done_FreeType, self.handle)


class GlyphPainter:
    """Draws glyphs of fonts at one size."""

    def __init__(self, em: Fraction) -> None:
        self.em = em
        self._size = int(em * 64 + Fraction(1, 2))  # 26.6 fixed point
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"em": self.em}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["em"])  # type: ignore[misc]

    def version(self) -> str:
        """FreeType's."""
        numbers = [ctypes.c_int() for _ in range(3)]
        backend()[1].FT_Library_Version(self._opened().handle, *map(ctypes.byref, numbers))
        return ".".join(str(n.value) for n in numbers)

    def _opened(self) -> _Library:
        if not hasattr(self._local, "opened"):
            self._local.opened = _Library()
        return self._local.opened

    def _face(self, font: FontFile) -> Any:
        """FreeType's face, at the painter's size."""
        opened, raw = self._opened(), backend()[1]
        found = opened.faces.get(font)
        if found is None:
            face = raw.FT_Face()
            size = ctypes.c_long(len(font.data))
            _check(
                raw.FT_New_Memory_Face(opened.handle, font.data, size, ctypes.c_long(font.index), ctypes.byref(face)),
                "FT_New_Memory_Face", font,
            )  # fmt: skip
            wanted = ctypes.c_long(self._size)
            _check(raw.FT_Set_Char_Size(face, wanted, wanted, 72, 72), "FT_Set_Char_Size", font)
            found = opened.faces[font] = face
        return found

    def draw(self, font: FontFile, glyph: int, x: int = 0, y: int = 0) -> GlyphImage:
        """A glyph moved right by ``x`` and up by ``y`` quarters of a pixel."""
        if font.bitmapped:
            data = font.font.get_glyph_color_png(glyph).data
            if data or not font.outlined:
                return self._bitmap(font, glyph, data) if data else _EMPTY
        raw, face = backend()[1], self._face(font)
        slot = face.contents.glyph
        flags = _NO_HINTING | (_COLOR if font.coloured else _NO_BITMAP)
        _check(raw.FT_Load_Glyph(face, glyph, flags), "FT_Load_Glyph", font)
        if slot.contents.format == _OUTLINE:
            step = 64 // PHASES
            raw.FT_Outline_Translate(
                ctypes.byref(slot.contents.outline),
                ctypes.c_long(x * step),
                ctypes.c_long(y * step),
            )
            _check(raw.FT_Render_Glyph(slot, 0), "FT_Render_Glyph", font)
        record = slot.contents
        pixels = _pixels(record.bitmap)
        if pixels is None:
            return _EMPTY
        return _image(pixels, record.bitmap_left, record.bitmap_top)

    def _bitmap(self, font: FontFile, glyph: int, data: bytes) -> GlyphImage:
        """A PNG of the font, scaled to the place that HarfBuzz says it has."""
        pixels = _decode(data)
        box, scale = font.font.get_glyph_extents(glyph), self.em / font.face.upem
        if not box.width or not box.height:
            return _EMPTY
        made, left, top = scaled(pixels, (box.x_bearing * scale, box.width * scale),
                                 (-box.y_bearing * scale, -box.height * scale))  # fmt: skip
        return _image(made, left, -top)


def _image(pixels: np.ndarray, left: int, top: int) -> GlyphImage:
    columns = pixels.swapaxes(0, 1)
    if pixels.ndim == 2:
        return GlyphImage(left, top, columns.astype(np.uint16))
    return GlyphImage(left, top, columns[..., 3].astype(np.uint16), columns.astype(np.int32))


def _check(code: int, call: str, font: FontFile | None) -> None:
    if code:
        of = f" of font file {str(font.path)!r}" if font is not None else ""
        raise ValueError(f"FreeType's {call}{of} failed with error {code:#x}")


def _pixels(bitmap: Any) -> np.ndarray | None:
    """[h, w] coverage or [h, w, 4] premultiplied RGBA; None where there is no pixel."""
    rows, width, pitch = bitmap.rows, bitmap.width, bitmap.pitch
    if not rows or not width:
        return None
    data = ctypes.string_at(bitmap.buffer, rows * pitch)
    lines = np.frombuffer(data, np.uint8).reshape(rows, pitch)
    if bitmap.pixel_mode == _BGRA:
        return lines[:, : 4 * width].reshape(rows, width, 4)[..., [2, 1, 0, 3]]
    if bitmap.pixel_mode == _MONO:
        return np.unpackbits(lines, axis=1)[:, :width] * np.uint8(255)
    if bitmap.pixel_mode != _GRAY:
        raise ValueError(f"FreeType made a bitmap of the unknown pixel mode {bitmap.pixel_mode}")
    return lines[:, :width].copy()


def _decode(data: bytes) -> np.ndarray:
    """[h, w, 4] premultiplied RGBA of a PNG."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(f"emoji in colour need Pillow: {INSTALL}") from None
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image.convert("RGBA"), np.int64)
    pixels[..., :3] = (pixels[..., :3] * pixels[..., 3:] + 127) // 255
    return pixels


def _overlaps(start: Fraction, size: Fraction, count: int) -> tuple[np.ndarray, int, int]:
    """How much of each new pixel is covered by each of ``count`` old ones that lie on [start, start + size).

    [new, old] integers, what a full pixel's add up to, and the first new pixel.
    """
    step = Fraction(size) / count
    unit = math.lcm(Fraction(start).denominator, step.denominator)
    begin, width = int(start * unit), int(step * unit)
    first, last = begin // unit, -(-(begin + count * width) // unit)
    edges = np.arange(first, last + 1, dtype=np.int64) * unit
    theirs = begin + np.arange(count + 1, dtype=np.int64) * width
    low = np.maximum(edges[:-1, None], theirs[None, :-1])
    high = np.minimum(edges[1:, None], theirs[None, 1:])
    return np.maximum(high - low, 0), unit, first


def scaled(
    pixels: np.ndarray, across: tuple[Fraction, Fraction], down: tuple[Fraction, Fraction]
) -> tuple[np.ndarray, int, int]:
    """Pixels [h, w, c] laid on a rectangle, (start, size) each way, by area: new pixels, first column, first row."""
    x, of_x, left = _overlaps(*across, pixels.shape[1])
    y, of_y, top = _overlaps(*down, pixels.shape[0])
    summed = np.einsum("yi,ijc,xj->yxc", y, pixels.astype(np.int64), x, optimize=True)
    full = of_x * of_y
    return ((summed + full // 2) // full).astype(np.uint8), left, top
