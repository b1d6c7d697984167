# SPDX-License-Identifier: Apache-2.0
"""Real music as notes: scores in MusicXML, from the wheel ``music21`` or from files.

Only the wheel's corpus is read; its Python code is not imported, and none of its dependencies is needed.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

from tenfold.data.models import MissingData

SCORES = "music21==10.5.1"
# Folder of the corpus -> composer. All died before 1900.
COMPOSERS = {
    "bach": "Johann Sebastian Bach",
    "beethoven": "Ludwig van Beethoven",
    "corelli": "Arcangelo Corelli",
    "cpebach": "Carl Philipp Emanuel Bach",
    "handel": "George Frideric Handel",
    "haydn": "Joseph Haydn",
    "monteverdi": "Claudio Monteverdi",
    "mozart": "Wolfgang Amadeus Mozart",
    "schumann_clara": "Clara Schumann",
    "schumann_robert": "Robert Schumann",
    "schubert": "Franz Schubert",
    "verdi": "Giuseppe Verdi",
    "weber": "Carl Maria von Weber",
}
_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_MAJOR = ("Cb", "Gb", "Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "C#")
_MINOR = ("Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "C#", "G#", "D#", "A#")


@dataclass(frozen=True)
class Note:
    """A note: start and length in quarter notes, pitch as a MIDI number (60: middle C), and number of its part."""

    start: float
    length: float
    pitch: int
    part: int


@dataclass(frozen=True)
class Score:
    """A piece.

    Attributes:
        name: of its file. composer, title: as far as known. key: tonic, ``"Bb"``; mode: ``"major"`` or ``"minor"``;
            both ``""`` where unknown. tempo: quarters per minute, None where the score says nothing.
        parts: their names. notes: by start.
    """

    name: str
    composer: str
    title: str
    key: str
    mode: str
    tempo: float | None
    parts: tuple[str, ...]
    notes: tuple[Note, ...]

    def part(self, number: int) -> list[Note]:
        """The notes of one part."""
        return [n for n in self.notes if n.part == number]

    def melody(self) -> list[Note]:
        """The highest part, one note at a time: of chords the top note."""
        numbers = {n.part for n in self.notes}
        highest = max(numbers, key=lambda p: median(n.pitch for n in self.part(p)))
        top: dict[float, Note] = {}
        for note in self.part(highest):
            if note.start not in top or note.pitch > top[note.start].pitch:
                top[note.start] = note
        line = [top[s] for s in sorted(top)]
        ends = [n.start for n in line[1:]] + [line[-1].start + line[-1].length]
        return [
            Note(n.start, min(n.length, max(e - n.start, 0.0)), n.pitch, n.part)
            for n, e in zip(line, ends)
        ]


def corpus_folder() -> Path:
    """The corpus inside the installed wheel. Raises MissingData, with the command, without it."""
    spec = importlib.util.find_spec("music21")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "corpus").is_dir():
            return Path(folder) / "corpus"
    raise MissingData(
        f"the scores come from the wheel {SCORES}, which is not installed. Run "
        f"`pip install --no-deps {SCORES}`"
    )


def _number(element: Any, path: str, default: float = 0.0) -> float:
    text = element.findtext(path)
    try:
        return float(text) if text else default
    except ValueError:
        return default


def _pitch(note: Any) -> int | None:
    pitch = note.find("pitch")
    if pitch is None:
        return None
    step = (pitch.findtext("step") or "").strip()
    if step not in _STEPS:
        return None
    octave, alter = int(_number(pitch, "octave", 4)), round(_number(pitch, "alter"))
    return 12 * (octave + 1) + _STEPS[step] + alter


class _Part:
    """Reads one part: the clock in quarters, ties that hold notes."""

    def __init__(self, number: int) -> None:
        self.number, self.divisions, self.clock = number, 1.0, 0.0
        self.notes: list[Note] = []
        self._held: dict[int, float] = {}

    def measure(self, measure: Any) -> None:
        begin, previous = self.clock, self.clock
        farthest = self.clock
        for item in measure:
            if item.tag == "attributes":
                self.divisions = _number(item, "divisions", self.divisions) or self.divisions
            elif item.tag in ("backup", "forward"):
                sign = -1 if item.tag == "backup" else 1
                self.clock = max(
                    begin, self.clock + sign * _number(item, "duration") / self.divisions
                )
            elif item.tag == "note" and item.find("grace") is None:
                length = _number(item, "duration") / self.divisions
                start = previous if item.find("chord") is not None else self.clock
                self._add(item, start, length)
                if item.find("chord") is None:
                    previous, self.clock = self.clock, self.clock + length
            farthest = max(farthest, self.clock)
        self.clock = farthest

    def _add(self, item: Any, start: float, length: float) -> None:
        pitch = _pitch(item)
        if pitch is None or not 0 <= pitch <= 127 or length <= 0:
            return
        ties = {t.get("type") for t in item.findall("tie")}
        start = self._held.pop(pitch, start) if "stop" in ties else start
        end = start + length if "stop" not in ties else max(start, self.clock) + length
        if "start" in ties:
            self._held[pitch] = start
        else:
            self.notes.append(Note(start, end - start, pitch, self.number))


def _root(path: Path) -> Any:
    if path.suffix == ".mxl":
        with zipfile.ZipFile(path) as archive:
            names = [
                n
                for n in archive.namelist()
                if n.endswith((".xml", ".musicxml")) and not n.startswith("META-INF")
            ]
            return ElementTree.fromstring(archive.read(names[0]))
    return ElementTree.parse(path).getroot()


def read_score(path: str | Path, composer: str = "") -> Score:
    """A MusicXML file (``.xml``, ``.musicxml`` or ``.mxl``), repeats not unfolded.

    Raises ValueError for a file that is no MusicXML by parts, or has no notes.
    """
    path = Path(path)
    try:
        root = _root(path)
    except (ElementTree.ParseError, zipfile.BadZipFile, IndexError, UnicodeError) as error:
        raise ValueError(f"{path} is no MusicXML: {error}") from None
    if root.tag != "score-partwise":
        raise ValueError(f"{path} must be MusicXML by parts (score-partwise), got {root.tag}")
    notes: list[Note] = []
    parts = root.findall("part")
    for number, element in enumerate(parts):
        part = _Part(number)
        for measure in element.findall("measure"):
            part.measure(measure)
        notes += part.notes
    if not notes:
        raise ValueError(f"{path} has no notes")
    creators = {c.get("type"): (c.text or "").strip() for c in root.iter("creator")}
    title = root.findtext("movement-title") or root.findtext("work/work-title") or ""
    tempo = next((float(s.get("tempo", "0")) for s in root.iter("sound") if s.get("tempo")), None)
    key, mode = "", ""
    found = root.find(".//key")
    if found is not None:
        at = int(_number(found, "fifths")) + 7
        mode = (found.findtext("mode") or "major").strip().lower()
        if mode in ("major", "minor") and 0 <= at < 15:
            key = (_MINOR if mode == "minor" else _MAJOR)[at]
        else:
            mode = ""
    names = tuple(
        " ".join((p.findtext("part-name") or "").split())
        for p in root.findall("part-list/score-part")
    )
    return Score(
        path.name,
        composer or creators.get("composer", ""),
        " ".join(title.split()),
        key,
        mode,
        tempo if tempo and tempo > 0 else None,
        names,
        tuple(sorted(notes, key=lambda n: (n.start, n.part, n.pitch))),
    )


def packaged_scores(
    composers: Sequence[str] | None = None, limit: int | None = None
) -> Iterator[Score]:
    """Scores of the corpus, composer by composer; files that hold no notes by parts are passed over.

    Args:
        composers: names of ``COMPOSERS``; default: all. limit: scores of each, the first in the order of their names.

    Raises:
        MissingData: without the wheel. ValueError: an unknown composer.
    """
    chosen = tuple(COMPOSERS) if composers is None else tuple(composers)
    unknown = [c for c in chosen if c not in COMPOSERS]
    if unknown:
        raise ValueError(
            f"there are no scores of {', '.join(unknown)}; there are: {', '.join(COMPOSERS)}"
        )
    root = corpus_folder()
    for name in chosen:
        count = 0
        files = sorted(
            p for p in (root / name).rglob("*") if p.suffix in (".mxl", ".xml", ".musicxml")
        )
        for path in files:
            if limit is not None and count >= limit:
                break
            try:
                score = read_score(path, COMPOSERS[name])
            except ValueError:
                continue
            count += 1
            yield score
