# SPDX-License-Identifier: Apache-2.0
"""Short texts in English and another language, from the catalogues inside the wheel ``django``."""

from __future__ import annotations

import ast
import gettext
import importlib.util
import textwrap
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class Message:
    """An English message with its translations, by language."""

    source: str
    targets: dict[str, str]


def aligned_messages(languages: Sequence[str], min_chars: int = 8) -> list[Message]:
    """Messages that at least one of the languages translates, sorted by the English text, each of them once.

    What is the same in both languages is left out. Raises MissingData without the wheel, ValueError for a language
    without catalogues.
    """
    found: dict[str, dict[str, str]] = {}
    for language in languages:
        for entry in catalogue_entries(language, min_chars):
            if entry.source.strip() != entry.target.strip():
                # The same English in several applications: the first one's translation.
                found.setdefault(entry.source, {}).setdefault(language, entry.target)
    return [Message(source, found[source]) for source in sorted(found)]


_GETTEXT = frozenset({"_", "gettext", "gettext_lazy", "gettext_noop", "pgettext", "pgettext_lazy"})


def message_sites(max_chars: int = 300) -> list[tuple[str, str]]:
    """(English message, Python statement of django's sources that says it), sorted by the message.

    The statement is the innermost one without a body, not indented, of at most ``max_chars`` characters and with one
    message in it. Raises MissingData without the wheel.
    """
    root = _root()
    found: dict[str, str] = {}
    for path in sorted(root.glob("**/*.py")):
        text = path.read_text(encoding="utf-8")
        if "gettext" in text:
            for message, code in _sites(ast.parse(text), text):
                if len(code) <= max_chars:
                    found.setdefault(message, code)
    return sorted(found.items())


def _sites(tree: ast.AST, text: str) -> Iterator[tuple[str, str]]:
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr | ast.Return | ast.Raise):
            continue
        said = [m for call in ast.walk(node) if isinstance(call, ast.Call) for m in _said(call)]
        if len(said) == 1 and not lines[node.lineno - 1][: node.col_offset].strip():
            yield said[0], textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))


def _said(call: ast.Call) -> list[str]:
    name = getattr(call.func, "id", getattr(call.func, "attr", None))
    values = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]  # fmt: skip
    return values[-1:] if name in _GETTEXT else []
