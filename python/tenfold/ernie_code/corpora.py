# SPDX-License-Identifier: Apache-2.0
"""Real data that is on the machine: code, documentation and messages in many languages, for both objectives.

Code is the standard library of Python (functions with their docstrings), JavaScript and C++ headers of installed
wheels. Pairs of human languages are the catalogues of the wheel ``django``, English their pivot. What is held out
depends on names alone: a file's for code, the English message's for catalogues. So the translations of one message are
all on the same side, and pairs of two other languages can be made for tests that no training pair gives away.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tenfold.data import long_documents
from tenfold.data.code import Function, SourceFile, functions, held_out, source_files
from tenfold.data.duplicates import near_duplicates
from tenfold.data.translations import Message, aligned_messages, message_sites
from tenfold.ernie_code.languages import name_of
from tenfold.ernie_code.pairs import Pair

# Of the best-covered catalogues, one of each branch and script first.
DEFAULT_LANGUAGES = (
    "de", "fr", "es", "ru", "ja", "zh_Hans", "ar", "el", "hi", "ko", "pt", "it", "nl", "pl", "cs", "sv", "da", "fi",
    "hu", "tr", "uk", "bg", "id", "he",
)  # fmt: skip
CODE_NAMES = {"python": "Python", "javascript": "JavaScript", "c++": "C++"}
HELD_SHARE = 0.1
_CHUNK = 40  # messages of a document of a catalogue


@dataclass
class Corpora:
    """Training and held-out data by name.

    Attributes:
        text, held_text: documents of one language, by its name.
        pairs, held_pairs: by ``source-target`` names. ``held_pairs`` also has pairs of two languages of which no
            training pair exists.
    """

    text: dict[str, list[str]] = field(default_factory=dict)
    held_text: dict[str, list[str]] = field(default_factory=dict)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    held_pairs: dict[str, list[Pair]] = field(default_factory=dict)


def _tuple(packages: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if packages is None else tuple(packages)


@functools.cache
def _python(packages: tuple[str, ...] | None) -> tuple[SourceFile, ...]:
    return tuple(source_files("python", packages))


@functools.cache
def _functions(packages: tuple[str, ...] | None) -> tuple[Function, ...]:
    """All functions of some packages; parsing the standard library takes seconds: once in a process."""
    return tuple(f for file in _python(packages) for f in functions(file))


def _natural(function: Function, most: int) -> bool:
    """CodeSearchNet's filters: documented in at least three words, three lines or more, no test, no ``__method__``."""
    name = function.name.rsplit(".", 1)[-1]
    return (
        len(function.summary.split()) >= 3
        and function.code.count("\n") >= 3
        and len(function.code) <= most
        and "test" not in function.name.lower()
        and not (name.startswith("__") and name.endswith("__"))
        and function.summary.isascii()
    )


def code_pairs(
    *, packages: Sequence[str] | None = None, share: float = HELD_SHARE, max_chars: int = 2000,
    whole_docstring: bool = False, limit: int | None = None,
) -> tuple[list[Pair], list[Pair]]:  # fmt: skip
    """(training, held-out) pairs English -> Python: a function's documentation and its code without it.

    Args:
        packages: as of ``tenfold.data.code.source_files``. share: of the files that are held out. max_chars: of the
            code. whole_docstring: not the first paragraph only. limit: at most so many pairs of each.

    No function is nearly the same as another one (Jaccard similarity of 5-token shingles below 0.8), in either part.
    """
    found = [f for f in _functions(_tuple(packages)) if _natural(f, max_chars)]
    # Held-out ones first: of two alike the training one goes.
    found.sort(key=lambda f: not held_out(f.file, share))
    repeats = near_duplicates([f.code for f in found])
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for function, repeated in zip(found, repeats):
        if repeated is None:
            text = function.docstring if whole_docstring else function.summary
            pair = Pair(text, function.code, "English", "Python", f"{function.file}:{function.name}")  # fmt: skip
            parts[held_out(function.file, share)].append(pair)
    return parts[0][:limit], parts[1][:limit]


def code_text(
    language: str = "python", *, packages: Sequence[str] | None = None, share: float = HELD_SHARE,
    limit: int | None = None,
) -> tuple[list[str], list[str]]:  # fmt: skip
    """(training, held-out) files of a language of ``tenfold.data.code.LANGUAGES``, split as ``code_pairs`` are."""
    if language == "python":
        files: Sequence[SourceFile] = _python(_tuple(packages))
    else:
        files = source_files(language, packages)
    parts: tuple[list[str], list[str]] = ([], [])
    for file in files:
        parts[held_out(file.name, share)].append(file.text)
    return parts[0][:limit], parts[1][:limit]


def _key(text: str) -> str:
    """What decides on which side a message is: its words, so that variants in case or punctuation stay together."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


@functools.cache
def _messages(languages: tuple[str, ...]) -> tuple[Message, ...]:
    return tuple(aligned_messages(languages))


def split_messages(
    languages: Sequence[str] = DEFAULT_LANGUAGES, share: float = HELD_SHARE
) -> tuple[list[Message], list[Message]]:
    """(training, held-out) messages of catalogues, by a hash of the English words.

    A held-out translation that is also one of a training message in its language is left out.

    Raises MissingData without the wheel ``django``, ValueError for a language without catalogues.
    """
    parts: tuple[list[Message], list[Message]] = ([], [])
    for message in _messages(tuple(languages)):
        parts[held_out(_key(message.source), share)].append(message)
    seen = {(code, _key(text)) for m in parts[0] for code, text in m.targets.items()}
    held = [
        Message(m.source, {c: t for c, t in m.targets.items() if (c, _key(t)) not in seen})
        for m in parts[1]
    ]
    return parts[0], [m for m in held if m.targets]


def message_pairs(messages: Iterable[Message], source: str, target: str) -> list[Pair]:
    """Pairs of two languages (codes of catalogues, ``en`` included) of the messages that both have."""

    def text(message: Message, code: str) -> str | None:
        return message.source if code == "en" else message.targets.get(code)

    made = []
    for message in messages:
        a, b = text(message, source), text(message, target)
        if a and b:
            made.append(
                Pair(a.strip(), b.strip(), name_of(source), name_of(target), message.source)
            )
    return made


def site_pairs(messages: Iterable[Message], language: str) -> list[Pair]:
    """Pairs of a language and Python: a message, and django's statement that says it (in English).

    For languages other than English no training pair with Python exists: zero-shot tests of the pivot.
    """
    sites = _sites()
    own = [m for m in messages if m.source in sites]
    turned = message_pairs(own, language, "en")
    return [Pair(p.source, sites[p.origin], p.source_language, "Python", p.origin) for p in turned]


@functools.cache
def _sites() -> dict[str, str]:
    return dict(message_sites())


def text_of(messages: Sequence[Message], language: str) -> list[str]:
    """Documents of a language: its messages, some dozens in each, a line apiece."""
    lines = [p.source for p in message_pairs(messages, language, "en")]
    return ["\n".join(lines[at : at + _CHUNK]) + "\n" for at in range(0, len(lines), _CHUNK)]


def english_text(share: float = HELD_SHARE, limit: int | None = None) -> tuple[list[str], list[str]]:  # fmt: skip
    """(training, held-out) pages of Python's reference, which quote no docstring of ``code_pairs``."""
    parts: tuple[list[str], list[str]] = ([], [])
    for page in long_documents(("reference",), min_chars=400):
        parts[held_out(page.title, share)].append(page.text)
    return parts[0][:limit], parts[1][:limit]


def packaged(
    languages: Sequence[str] = DEFAULT_LANGUAGES, *, code: Sequence[str] = ("python", "javascript", "c++"),
    packages: Sequence[str] | None = None, share: float = HELD_SHARE, limit: int | None = None,
    zero_shot: Sequence[tuple[str, str]] | None = None,
) -> Corpora:  # fmt: skip
    """All packaged data of some languages.

    Args:
        languages: codes of catalogues. code: programming languages, of which Python gives pairs with English.
        packages: of Python files, default the standard library. share: of each that is held out.
        limit: at most so many documents, and pairs, of each corpus.
        zero_shot: pairs of codes in ``held_pairs`` besides English's; default: each language with the next one.
            ``("de", "python")`` gives messages and the statements that say them, of which English's are trained on.

    Raises MissingData without the wheel ``django``, ValueError for a language without data.
    """
    made = Corpora()
    made.text["English"], made.held_text["English"] = english_text(share, limit)
    for name in code:
        label = CODE_NAMES.get(name, name)
        made.text[label], made.held_text[label] = code_text(
            name, packages=packages if name == "python" else None, share=share, limit=limit
        )
    if "python" in code:
        made.pairs["English-Python"], made.held_pairs["English-Python"] = code_pairs(
            packages=packages, share=share, limit=limit
        )
    train, held = split_messages(languages, share)
    for language in languages:
        label = name_of(language)
        for messages, text, pairs in (
            (train, made.text, made.pairs),
            (held, made.held_text, made.held_pairs),
        ):
            text[label] = text_of(messages, language)[:limit]
            pairs[f"{label}-English"] = message_pairs(messages, language, "en")[:limit]
    asked = list(itertools.pairwise(languages) if zero_shot is None else zero_shot)
    if any(b == "python" for _, b in asked):
        own, sites = made.pairs.get("English-Python", []), site_pairs(train, "en")
        if limit is not None:  # some of both
            sites = sites[: max(limit // 2, limit - len(own))]
            own = own[: limit - len(sites)]
        made.pairs["English-Python"] = [*own, *sites]
    for a, b in asked:
        found = site_pairs(held, a) if b == "python" else message_pairs(held, a, b)
        made.held_pairs[f"{name_of(a)}-{CODE_NAMES.get(b, name_of(b))}"] = found[:limit]
    return made
