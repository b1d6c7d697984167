# SPDX-License-Identifier: Apache-2.0
"""Multilingual text that is on the machine: documentation in English, and the catalogues of the wheel ``django``.

A document is a list of lines of one language. Which documents are for training, and which are held out, depends on
their text alone. Catalogue lines also say which application they are of, which is a task.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.data import long_documents
from tenfold.data.translations import catalogue_entries
from tenfold.pixelgpt.tasks import Example, TaskSpec

# Languages with catalogues, by script, as far as DejaVu has glyphs for it.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "Latin": ("de", "fr", "es", "it", "pl", "pt", "nl", "sv", "tr", "cs", "fi", "hu", "id", "ro", "sk", "sl", "hr",
              "da", "nb", "et", "lt", "lv", "ca", "gl", "eu", "ga", "cy", "af", "sq", "az", "is", "vi"),
    "Cyrillic": ("ru", "uk", "bg", "be", "sr", "mk", "kk", "mn", "ky", "tg"),
    "Greek": ("el",),
    "Armenian": ("hy",),
    "Georgian": ("ka",),
    "Hebrew": ("he",),
    "Arabic": ("ar", "fa", "ur", "ckb"),
}  # fmt: skip
SCRIPT_OF = {code: script for script, codes in SCRIPTS.items() for code in codes} | {"en": "Latin"}
DOMAINS = ("core", "admin", "auth", "gis", "postgres", "humanize", "admindocs", "other")
_LINES = 12  # of a document
_SHORTEST = 10  # characters of a line of a catalogue
_MARKS = re.compile(r"%\(\w+\)[sd]|%[sd]|\{\w*\}|<[^>]*>")


@dataclass(frozen=True)
class Document:
    """Lines of one language."""

    language: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The lines, joined by spaces."""
        return " ".join(self.lines)


def plain(text: str) -> str:
    """A catalogue's message as text: without placeholders and markup, whitespace as single spaces."""
    return re.sub(r"\s+", " ", _MARKS.sub(" ", text)).strip()


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _english(limit: int) -> list[Document]:
    """Paragraphs of Python's reference as documents of several lines."""
    found, seen = [], set()
    for document in long_documents(("reference",), min_chars=400):
        lines = []
        for paragraph in re.split(r"\n\s*\n", document.text[:40_000]):
            line = re.sub(r"\s+", " ", re.sub(r"[=~*^`|\-]{3,}|\.\.\s", " ", paragraph)).strip()
            if len(line) >= 40 and line not in seen:
                seen.add(line)
                lines.append(line[:400])
        found += [
            Document("en", tuple(lines[at : at + _LINES])) for at in range(0, len(lines), _LINES)
        ]
    return sorted(found, key=lambda d: _key(d.text))[:limit]


def _catalogue(language: str, limit: int) -> list[Document]:
    found = {plain(e.target) for e in catalogue_entries(language)}
    lines = sorted((line for line in found if len(line) >= _SHORTEST), key=_key)
    made = [
        Document(language, tuple(lines[at : at + _LINES])) for at in range(0, len(lines), _LINES)
    ]
    return made[:limit]


def documents(
    languages: Sequence[str] = ("en", "de", "fr", "es", "ru", "el"), per_language: int = 120
) -> list[Document]:
    """Documents of some languages, at most so many each, in an order that depends on their text alone.

    Raises MissingData without the wheel ``django``, ValueError for a language that it does not have.
    """
    found = [
        d
        for code in languages
        for d in (_english(per_language) if code == "en" else _catalogue(code, per_language))
    ]
    return sorted(found, key=lambda d: _key(d.text))


def split_documents(
    found: Sequence[Document], share: float = 0.1
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents: of every language the last ``share``, at least one."""
    train, held = [], []
    for language in dict.fromkeys(d.language for d in found):
        own = [d for d in found if d.language == language]
        count = max(1, round(share * len(own)))
        train += own[:-count]
        held += own[-count:]
    return sorted(train, key=lambda d: _key(d.text)), held


def _lines_of(language: str, least: int, most: int) -> list[tuple[str, str]]:
    """(line, domain) of a language, no line twice."""
    found: dict[str, str] = {}
    for entry in catalogue_entries("de" if language == "en" else language):
        line = plain(entry.source if language == "en" else entry.target)
        if least <= len(line) <= most and line not in found:
            found[line] = entry.domain if entry.domain in DOMAINS else "other"
    return sorted(found.items(), key=lambda p: _key(p[0]))


def language_task(
    languages: Sequence[str], *, train: int = 120, test: int = 40, least: int = 12, most: int = 120
) -> tuple[TaskSpec, list[Example], list[Example]]:
    """Which language is a line in? (task, training, test examples); so many lines per language.

    Raises ValueError for a language with too few lines.
    """
    spec = TaskSpec("language", labels=tuple(languages))
    return spec, *_dealt(
        {c: [(line, i) for line, _ in _lines_of(c, least, most)] for i, c in enumerate(languages)},
        train, test,
    )  # fmt: skip


def domain_task(
    languages: Sequence[str], *, train: int = 240, test: int = 80, domains: Sequence[str] = ("core", "admin", "auth"),
    least: int = 8, most: int = 120,
) -> tuple[TaskSpec, list[Example], list[Example]]:  # fmt: skip
    """Which application is a catalogue's line of? (task, training, test examples); so many lines per language."""
    spec = TaskSpec("domain", labels=tuple(domains))
    return spec, *_dealt(
        {c: [(line, domains.index(d)) for line, d in _lines_of(c, least, most) if d in domains] for c in languages},
        train, test,
    )  # fmt: skip


def _dealt(
    lines: dict[str, list[tuple[str, int]]], train: int, test: int
) -> tuple[list[Example], list[Example]]:
    parts: tuple[list[Example], list[Example]] = ([], [])
    for language, found in lines.items():
        if len(found) < test + 8:
            raise ValueError(
                f"{language} has {len(found)} lines on this machine, too few for {test} tests"
            )
        made = [Example(line, None, label, language) for line, label in found]
        parts[1].extend(made[:test])
        parts[0].extend(made[test : test + train])
    return parts
