# SPDX-License-Identifier: Apache-2.0
"""Font files of a renderer: where they are, their hashes, and which of them draws a character.

A chain of files is the whole answer to "which font": the first file that has every character of a
cluster draws it. Nothing is asked of the system's font configuration, so the same chain gives the same
choice everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

INSTALL = "pip install 'tenfold[pixel]'"
PACKAGED = "DejaVuSans.ttf"
FOLDERS = ("/usr/share/fonts/truetype/noto", "/usr/share/fonts/opentype/noto")
FOLDERS_VARIABLE = "TENFOLD_FONTS"
# In the order of the chain. Debian: fonts-noto-core, fonts-noto-cjk, fonts-noto-color-emoji.
_NOTO = (
    ("NotoSans-Regular.ttf", 0),
    ("NotoSans*-Regular.ttf", 0),
    ("NotoSerif*-Regular.ttf", 0),  # Tibetan, Tangut and others have no Sans
    ("NotoSansCJK-Regular.ttc", 2),  # simplified Chinese, with kana and hangul
    ("NotoColorEmoji.ttf", 0),
    ("NotoEmoji-Regular.ttf", 0),
)
_SFNT = (b"\0\1\0\0", b"OTTO", b"true")
_OUTLINES = frozenset({"glyf", "CFF ", "CFF2"})
_BITMAPS = frozenset({"CBDT", "sbix"})
_LEFT_OUT = re.compile("Mono|Display|UI-")
# Format characters that are drawn all the same: signs under Arabic, Syriac and Kaithi numbers.
_VISIBLE_FORMAT = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd]")
_SELECTOR = re.compile(
    "[\u034f\u115f\u1160\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# What is drawn in colour by default, or after the selector U+FE0F.
_EMOJI = re.compile(
    "\ufe0f|[\u231a\u231b\u23e9-\u23ec\u23f0\u23f3\u25fd\u25fe\u2614\u2615\u2648-\u2653\u267f\u2693\u26a1"
    "\u26aa\u26ab\u26bd\u26be\u26c4\u26c5\u26ce\u26d4\u26ea\u26f2\u26f3\u26f5\u26fa\u26fd\u2705\u270a\u270b"
    "\u2728\u274c\u274e\u2753-\u2755\u2757\u2795-\u2797\u27b0\u27bf\u2b1b\u2b1c\u2b50\u2b55"
    "\U0001f004\U0001f0cf\U0001f18e\U0001f191-\U0001f19a\U0001f1e6-\U0001f1ff\U0001f201\U0001f21a\U0001f22f"
    "\U0001f232-\U0001f236\U0001f238-\U0001f23a\U0001f250\U0001f251\U0001f300-\U0001faff]"
)  # fmt: skip


@functools.cache
def backend() -> tuple[Any, Any]:
    """``(uharfbuzz, freetype.raw)``; ImportError names the extra that has both."""
    try:
        import freetype.raw
        import uharfbuzz
    except (ImportError, RuntimeError) as error:  # freetype-py without a library: RuntimeError
        raise ImportError(
            f"rendering text needs uharfbuzz and freetype-py: {INSTALL} ({error})"
        ) from error
    return uharfbuzz, freetype.raw


def ignorable(char: str) -> bool:
    """Does the character only steer others (joiners, selectors, directions), without ink of its own?"""
    if unicodedata.category(char) == "Cf":
        return not _VISIBLE_FORMAT.match(char)
    return bool(_SELECTOR.match(char))


def code_points(chars: Iterable[str]) -> str:
    """``U+0E01 (THAI CHARACTER KO KAI), ...`` for messages; ten at most."""
    listed = list(chars)
    told = [f"U+{ord(c):04X} ({unicodedata.name(c, 'unnamed')})" for c in listed[:10]]
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return ", ".join(told) + more


class FontFile:
    """One face of one font file. Its head is read to look at it, all of it to draw and to hash.

    Args:
        path: a TrueType or OpenType file, or a collection.
        index: the face inside a collection.

    Raises FileNotFoundError where the file is missing, ValueError (on first use) where it is no such font.
    """

    def __init__(self, path: str | os.PathLike[str], index: int = 0) -> None:
        self.path, self.index = Path(path), int(index)
        if not self.path.is_file():
            raise FileNotFoundError(f"font file {str(self.path)!r} does not exist")

    @classmethod
    def of(cls, font: str | os.PathLike[str] | FontFile) -> FontFile:
        """A font from a path; ``file.ttc#2`` is the third face of a collection."""
        if isinstance(font, FontFile):
            return font
        path, mark, index = os.fspath(font).rpartition("#")
        if mark and index.isdigit():
            return cls(path, int(index))
        return cls(font)

    @functools.cached_property
    def data(self) -> bytes:
        """The file's bytes."""
        return self.path.read_bytes()

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def tables(self) -> frozenset[str]:
        """Tags of the face's tables, from the head of the file; ``COLR`` only if it has layers (version 0)."""
        with self.path.open("rb") as file:
            head = file.read(12)
            if head[:4] == b"ttcf":
                faces = int.from_bytes(head[8:12], "big")
                if self.index >= faces:
                    raise ValueError(
                        f"font file {str(self.path)!r} has no face {self.index}, only {faces}"
                    )
                file.seek(12 + 4 * self.index)
                file.seek(int.from_bytes(file.read(4), "big"))
                head = file.read(12)
            elif self.index:
                raise ValueError(f"font file {str(self.path)!r} has no face {self.index}, only one")
            if head[:4] not in _SFNT:
                raise ValueError(f"font file {str(self.path)!r} is not a TrueType or OpenType font")
            rows = file.read(16 * int.from_bytes(head[4:6], "big"))
            starts = {
                rows[i : i + 4].decode("latin-1"): int.from_bytes(rows[i + 8 : i + 12], "big")
                for i in range(0, len(rows), 16)
            }
            if "COLR" in starts:
                file.seek(starts["COLR"] + 2)
                if (
                    file.read(2) == b"\0\0"
                ):  # no glyph of layers: paint graphs alone, which FreeType does not draw
                    del starts["COLR"]
        found = frozenset(starts)
        if not found & (_OUTLINES | _BITMAPS):
            raise ValueError(
                f"font file {str(self.path)!r} has neither outlines nor bitmaps in colour"
            )
        return found

    @functools.cached_property
    def face(self) -> Any:
        """HarfBuzz's face."""
        face = backend()[0].Face(self.data, self.index)
        if not self.tables or not face.glyph_count:
            raise ValueError(f"font file {str(self.path)!r} has no glyphs: is it damaged?")
        return face

    @functools.cached_property
    def font(self) -> Any:
        """HarfBuzz's font; its positions are in units of the em, so integers are exact."""
        return backend()[0].Font(self.face)

    @property
    def outlined(self) -> bool:
        """Has the font outlines?"""
        return bool(self.tables & _OUTLINES)

    @property
    def bitmapped(self) -> bool:
        """Has the font bitmaps in colour?"""
        return bool(self.tables & _BITMAPS)

    @property
    def coloured(self) -> bool:
        """Has the font glyphs in colour: bitmaps, or layers of outlines?"""
        return self.bitmapped or "COLR" in self.tables

    def has(self, char: str) -> bool:
        """Is there a glyph for the character, or can HarfBuzz do without one?"""
        code = ord(char)
        if unicodedata.category(char) == "Zs":
            code = 0x20  # other spaces are made of the space and their width
        return bool(self.font.get_nominal_glyph(code))

    def entry(self) -> dict[str, Any]:
        """What a saved configuration says about the font; its path too, where it is in none of the usual places."""
        told = {"file": self.path.name, "index": self.index, "sha256": self.sha256}
        usual = any(place.resolve() == self.path.parent.resolve() for place in places())
        return told if usual else told | {"path": str(self.path.absolute())}

    def __repr__(self) -> str:
        return f"FontFile({str(self.path)!r}{f', {self.index}' if self.index else ''})"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "index": self.index}


def packaged_font() -> Path:
    """DejaVu Sans inside the wheel of matplotlib, which is not imported for it."""
    found = importlib.util.find_spec("matplotlib")
    if found is not None and found.origin:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / PACKAGED
        if path.is_file():
            return path
    raise ImportError(
        f"the default font, {PACKAGED}, is read from matplotlib, which is not installed: {INSTALL}, "
        "or name font files with fonts=[...]"
    )


def folders() -> list[Path]:
    """Where fonts are looked for: the folders of the variable TENFOLD_FONTS, then Debian's of Noto."""
    named = [f for f in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if f]
    return [Path(f) for f in (*named, *FOLDERS)]


def default_fonts() -> list[FontFile]:
    """DejaVu Sans of matplotlib's wheel, then every Noto font found in ``folders()``."""
    fonts, seen = [FontFile(packaged_font())], {PACKAGED}
    for pattern, index in _NOTO:
        for folder in folders():
            for path in sorted(folder.glob(pattern)):
                if path.name not in seen and not _LEFT_OUT.search(path.name):
                    seen.add(path.name)
                    fonts.append(FontFile(path, index))
    return fonts


def places() -> list[Path]:
    """Folders in which fonts are found by their name: matplotlib's, and ``folders()``."""
    with contextlib.suppress(ImportError):
        return [packaged_font().parent, *folders()]
    return folders()


def find_font(entry: dict[str, Any], near: Path) -> FontFile | Path | None:
    """The font of a saved entry: in the folder ``near``, in ``places()``, or where it was.

    Without one of its hash, a file of its name that has another; None without any.
    """
    name, index = Path(entry["file"]).name, int(entry.get("index", 0))
    candidates = [folder / name for folder in (near, *places())]
    if "path" in entry:
        candidates.append(Path(entry["path"]))
    files = [path for path in candidates if path.is_file()]
    for path in files:
        font = FontFile(path, index)
        if font.sha256 == entry["sha256"]:
            return font
    return files[0] if files else None


class FontChain:
    """Fonts in order of preference."""

    def __init__(self, fonts: Sequence[FontFile], colour: bool) -> None:
        if not fonts:
            raise ValueError("fonts must name at least one font file")
        self.fonts = tuple(fonts)
        plain = range(len(fonts))
        self.coloured = [i for i in plain if fonts[i].coloured] if colour else []
        # Where colour is not wanted, a font in colour still beats no font.
        self._plain = sorted(plain, key=lambda i: fonts[i].coloured)
        self._emoji = [*self.coloured, *(i for i in plain if i not in self.coloured)]
        self._chosen: dict[str, int | None] = {}

    def choose(self, cluster: str) -> int | None:
        """Position of the font for a base character with what belongs to it; None: no font has the base.

        The first font that has all of it, as it is, composed or decomposed; else the first with its base.
        """
        if cluster not in self._chosen:
            if len(self._chosen) > 1 << 16:
                self._chosen.clear()
            self._chosen[cluster] = self._choose(cluster)
        return self._chosen[cluster]

    def _choose(self, cluster: str) -> int | None:
        emoji = self.coloured and _EMOJI.search(cluster) and "\ufe0e" not in cluster
        order = self._emoji if emoji else self._plain
        forms = {
            f: None for f in (cluster, *(unicodedata.normalize(n, cluster) for n in ("NFC", "NFD")))
        }
        needed = [[c for c in form if not ignorable(c)] for form in forms]
        if not needed[0]:
            return 0
        for i in order:
            if any(all(map(self.fonts[i].has, form)) for form in needed):
                return i
        for i in order:
            if any(self.fonts[i].has(form[0]) for form in needed):
                return i
        return None
