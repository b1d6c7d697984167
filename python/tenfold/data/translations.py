"""Short texts in English and another language, from the catalogues inside the wheel ``django``."""

from __future__ import annotations

import gettext
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tenfold.data.models import MissingData

CATALOGUES = "django==5.2.19"


@dataclass(frozen=True)
class Entry:
    """A message of a catalogue: English ``source``, its translation ``target``, and the application it is of."""

    source: str
    target: str
    domain: str


def _root() -> Path:
    spec = importlib.util.find_spec("django")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return Path(folder)
    raise MissingData(
        f"translations come from the wheel {CATALOGUES}, which is not installed. Run "
        f"`pip install --no-deps {CATALOGUES}`"
    )


def languages() -> list[str]:
    """Codes of the languages that have catalogues (``de``, ``fr``, ...)."""
    return sorted(
        {p.parent.parent.name for p in _root().glob("**/locale/*/LC_MESSAGES/*.mo")} - {"en"}
    )


def _messages(language: str) -> Iterator[Entry]:
    """All translated messages, catalogue by catalogue, as they are in the files."""
    root = _root()
    for path in sorted(root.glob(f"**/locale/{language}/LC_MESSAGES/*.mo")):
        parts = path.relative_to(root).parts
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for source, target in catalogue.items():
            if isinstance(source, str) and target:
                yield Entry(source, target, parts[1] if parts[0] == "contrib" else "core")


def _none(language: str) -> ValueError:
    return ValueError(f"no catalogues for {language!r}; there are: {', '.join(languages())}")


def translations(language: str, min_chars: int = 8) -> list[tuple[str, str]]:
    """(English, translation) pairs, sorted by the English text.

    Raises MissingData without the wheel, ValueError for a language without catalogues.
    """
    found = {
        e.source: e.target
        for e in _messages(language)
        if len(e.source) >= min_chars and e.source != e.target
    }
    if not found:
        raise _none(language)
    return sorted(found.items())


def catalogue_entries(language: str, min_chars: int = 2) -> list[Entry]:
    """All messages of a language with their application, sorted by application and English text.

    Applications are ``core`` and the names of django's ``contrib`` packages. Raises MissingData without the wheel,
    ValueError for a language without catalogues.
    """
    found: dict[tuple[str, str], Entry] = {}
    for entry in _messages(language):
        source = entry.source.split("\x04")[-1]  # a message with a context has it before this
        if len(source) >= min_chars:
            found[entry.domain, source] = Entry(source, entry.target, entry.domain)
    if not found:
        raise _none(language)
    return [found[key] for key in sorted(found)]
