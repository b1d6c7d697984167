# SPDX-License-Identifier: Apache-2.0
"""A renderer as a file: settings, the hashes of its fonts, and a proof that it draws the same elsewhere.

The proof is the hash of a rendered text in many scripts: it differs where another version of HarfBuzz or
FreeType draws another pixel, and is silent where they agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenfold.pixelgpt.fonts import (
    FOLDERS_VARIABLE,
    FontChain,
    FontFile,
    backend,
    find_font,
    places,
)
from tenfold.pixelgpt.glyphs import GlyphPainter
from tenfold.pixelgpt.settings import RenderSettings
from tenfold.pixelgpt.typeset import Typesetter

FILE = "processor_config.json"  # where transformers' AutoProcessor looks
CLASS = "PixelProcessor"
FORMAT = 1
_PROBE = (
    "The quick brown fox (AVWa Te) 0123456789 fi ffl ÅĘẤ e\u0301 Ωμέγα Жук "
    "שלום السلام 12 ह\u093fन\u094dद\u0940 ไทย 中文 "
    "한글 😀"
)  # fmt: skip


class RendererMismatch(ValueError):
    """A saved renderer cannot be had here as it was; the message says what differs."""


def versions() -> dict[str, str]:
    """Of what decides pixels besides the fonts."""
    hb = backend()[0]
    return {
        "harfbuzz": hb.version_string(),
        "freetype": GlyphPainter(RenderSettings().em).version(),
        "unicode": unicodedata.unidata_version,
    }


def probe(settings: RenderSettings, fonts: Sequence[FontFile]) -> str:
    """SHA-256 of a fixed text in many scripts, drawn with these settings and fonts."""
    quiet = replace(settings, on_missing="box", direction="auto")
    line = Typesetter(quiet, FontChain(fonts, settings.mode == "rgb")).line(_PROBE)
    found = hashlib.sha256(line.columns())
    for x, color in line.colors():
        found.update(str(x).encode() + color.tobytes())
    return found.hexdigest()


def to_json(settings: RenderSettings, fonts: Sequence[FontFile]) -> dict[str, Any]:
    """What the file holds."""
    return {
        "processor_class": CLASS,
        "format": FORMAT,
        "settings": settings.to_json(),
        "fonts": [f.entry() for f in fonts],
        "probe": probe(settings, fonts),
        "versions": versions(),
    }


def write(
    folder: Path, settings: RenderSettings, fonts: Sequence[FontFile], copy_fonts: bool
) -> Path:
    """Writes the file, and the fonts beside it if wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    if copy_fonts:
        for font in fonts:
            (folder / font.path.name).write_bytes(font.data)
    path = folder / FILE
    path.write_text(json.dumps(to_json(settings, fonts), indent=2) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    """The file's content. Raises FileNotFoundError or ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no saved PixelProcessor")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kind, form = saved["processor_class"], saved["format"]
        if not isinstance(saved["settings"], dict) or not isinstance(saved["fonts"], list):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not the configuration of a {CLASS}") from None
    if kind != CLASS or form != FORMAT:
        raise ValueError(
            f"{path} is of a {kind}, format {form}; this is a {CLASS}, format {FORMAT}"
        )
    return saved


def locate(name: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    """The folder with the saved file: the one named, or the hub's in the cache."""
    path = Path(name)
    if path.is_dir():
        return path / hub.get("subfolder", "")
    if path.is_file():
        return path.parent
    from transformers.utils import cached_file

    file = cached_file(os.fspath(name), FILE, **hub)
    if file is None:
        raise FileNotFoundError(f"{os.fspath(name)} has no {FILE}")
    for entry in json.loads(Path(file).read_text(encoding="utf-8")).get("fonts", []):
        # Fonts that were saved with it come along; others are looked for here.
        cached_file(
            os.fspath(name), entry["file"], **hub, _raise_exceptions_for_missing_entries=False
        )
    return Path(file).parent


def fonts_of(
    saved: dict[str, Any], folder: Path, given: Sequence[FontFile] | None
) -> tuple[list[FontFile], list[str]]:
    """The fonts of a saved renderer that are here (or those given), and what differs, a sentence each."""
    if given is not None:
        theirs = [(e["sha256"], e.get("index", 0)) for e in saved["fonts"]]
        ours = [(f.sha256, f.index) for f in given]
        if theirs == ours:
            return list(given), []
        names = ", ".join(e["file"] for e in saved["fonts"])
        return list(given), [f"the fonts given are not those saved, {names}"]
    here = [(entry, find_font(entry, folder)) for entry in saved["fonts"]]
    missing = [entry["file"] for entry, font in here if font is None]
    other = [
        f"{font} (SHA-256 saved: {entry['sha256']})"
        for entry, font in here
        if isinstance(font, Path)
    ]
    wrong = [f"another file than the one saved is {o}" for o in other[:3]]
    if missing:
        listed = ", ".join(missing[:3]) + (
            f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        )
        searched = ", ".join(str(p) for p in (folder, *places()))
        wrong.append(f"missing: {listed}; looked in {searched}; {FOLDERS_VARIABLE} adds folders")
    return [font for _, font in here if isinstance(font, FontFile)], wrong


def differences(
    saved: dict[str, Any], settings: RenderSettings, fonts: Sequence[FontFile]
) -> list[str]:
    """Empty where the saved renderer's probe is drawn here bit by bit."""
    if probe(settings, fonts) == saved.get("probe"):
        return []
    theirs, ours = saved.get("versions", {}), versions()
    changed = [
        f"{k} {theirs.get(k)} there, {v} here" for k, v in ours.items() if theirs.get(k) != v
    ]
    why = "; ".join(changed) or "the same versions of HarfBuzz and FreeType"
    return [f"the fonts are the same but draw other pixels here ({why})"]
