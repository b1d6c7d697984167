"""Glyphs as pixels: FreeType without hinting, at quarters of a pixel.

FreeType's rasteriser works in integers, so a glyph has the same bytes on every machine with the same version.
Colour bitmaps (emoji) are scaled down by area, in integers too. FreeType's objects belong to one thread at a
time: each thread has its own, opened on first use.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tenfold.pixelgpt.fonts import FontFile, backend

PHASES = 4  # positions inside a pixel, each way
_NO_HINTING, _NO_BITMAP, _COLOR = 2, 8, 1 << 20
_SCALABLE = 1
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
        self._library()
        numbers = [ctypes.c_int() for _ in range(3)]
        backend()[1].FT_Library_Version(self._local.library, *map(ctypes.byref, numbers))
        return ".".join(str(n.value) for n in numbers)

    def _library(self) -> Any:
        if not hasattr(self._local, "library"):
            raw = backend()[1]
            library = raw.FT_Library()
            _check(raw.FT_Init_FreeType(ctypes.byref(library)), "FT_Init_FreeType", None)
            self._local.library, self._local.faces = library, {}
        return self._local.library

    def _face(self, font: FontFile) -> tuple[Any, Fraction]:
        """FreeType's face, and by how much its bitmaps are scaled (1 for outlines)."""
        library, raw = self._library(), backend()[1]
        found = self._local.faces.get(font)
        if found is None:
            face = raw.FT_Face()
            size = ctypes.c_long(len(font.data))
            _check(
                raw.FT_New_Memory_Face(library, font.data, size, ctypes.c_long(font.index), ctypes.byref(face)),
                "FT_New_Memory_Face", font,
            )  # fmt: skip
            scale = Fraction(1)
            if face.contents.face_flags & _SCALABLE:
                wanted = ctypes.c_long(self._size)
                _check(raw.FT_Set_Char_Size(face, wanted, wanted, 72, 72), "FT_Set_Char_Size", font)
            else:
                scale = self._strike(face, font)
            found = self._local.faces[font] = (face, scale)
        return found

    def _strike(self, face: Any, font: FontFile) -> Fraction:
        """Selects the smallest bitmaps that are at least of the size wanted, or the largest."""
        sizes = [
            face.contents.available_sizes[i].y_ppem for i in range(face.contents.num_fixed_sizes)
        ]
        if not sizes:
            raise ValueError(f"font file {str(font.path)!r} has neither outlines nor bitmaps")
        enough = [s for s in sizes if s >= self._size]
        chosen = min(enough) if enough else max(sizes)
        _check(backend()[1].FT_Select_Size(face, sizes.index(chosen)), "FT_Select_Size", font)
        return Fraction(self._size, chosen)

    def draw(self, font: FontFile, glyph: int, x: int = 0, y: int = 0) -> GlyphImage:
        """A glyph moved right by ``x`` and up by ``y`` quarters of a pixel."""
        raw = backend()[1]
        face, scale = self._face(font)
        slot = face.contents.glyph
        flags = _NO_HINTING | (_COLOR if font.coloured else 0)
        if face.contents.face_flags & _SCALABLE and not font.coloured:
            flags |= _NO_BITMAP
        _check(raw.FT_Load_Glyph(face, glyph, flags), "FT_Load_Glyph", font)
        if slot.contents.format == _OUTLINE:
            step = 64 // PHASES
            raw.FT_Outline_Translate(
                ctypes.byref(slot.contents.outline), ctypes.c_long(x * step), ctypes.c_long(y * step)
            )
            _check(raw.FT_Render_Glyph(slot, 0), "FT_Render_Glyph", font)
        record = slot.contents
        pixels = _pixels(record.bitmap)
        if pixels is None:
            return _EMPTY
        left, top = record.bitmap_left, record.bitmap_top
        if scale != 1:
            pixels, left, top = _shrink(pixels, left, top, scale)
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


def _overlaps(start: int, count: int, scale: Fraction) -> tuple[np.ndarray, int, int]:
    """How much of each new pixel each old one covers: [new, old] integers, their sum for a full one, first new."""
    old, new = scale.denominator, scale.numerator  # a new pixel is old/new old ones wide
    first = (start * new) // old
    last = -((-(start + count) * new) // old)
    edges = np.arange(first, last + 1, dtype=np.int64) * old
    theirs = np.arange(start, start + count + 1, dtype=np.int64) * new
    low = np.maximum(edges[:-1, None], theirs[None, :-1])
    high = np.minimum(edges[1:, None], theirs[None, 1:])
    return np.maximum(high - low, 0), old, first


def _shrink(pixels: np.ndarray, left: int, top: int, scale: Fraction) -> tuple[np.ndarray, int, int]:
    """Pixels scaled by area, with their new place."""
    values = pixels if pixels.ndim == 3 else pixels[..., None]
    down, full, first = _overlaps(-top, values.shape[0], scale)
    across, _, begin = _overlaps(left, values.shape[1], scale)
    summed = np.einsum("yi,ijc,xj->yxc", down, values.astype(np.int64), across)
    made = ((summed + full * full // 2) // (full * full)).astype(np.uint8)
    return (made if pixels.ndim == 3 else made[..., 0]), begin, -first
