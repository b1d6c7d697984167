# SPDX-License-Identifier: Apache-2.0
"""Tasks for continual learning from what is on the machine: questions and answers, as text.

docstring   the source of a standard-library function -> the first sentence of its documentation
german, french, spanish   an English text -> its translation (catalogues of the wheel ``django``)
licence     the beginning of a paragraph of a licence -> how it goes on
topic       part of a topic of Python's reference -> the topic's name
"""

from __future__ import annotations

import ast
import functools
import hashlib
import random
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.data import long_documents
from tenfold.data.cache import remembered
from tenfold.data.documents import library_files
from tenfold.data.translations import translations
from tenfold.training.batches import Data

Pair = tuple[str, str]
Encode = Callable[[str], list[int]]
LANGUAGES = {"german": "de", "french": "fr", "spanish": "es"}
DEFAULT = ("docstring", "german", "licence", "topic")


@dataclass(frozen=True)
class Task:
    """A task: ``train`` as the data of :func:`tenfold.hft.sft`, ``test`` a dict of rows [R, S]."""

    name: str
    train: Data
    test: dict[str, Tensor]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def _docstrings() -> Iterator[Pair]:
    """Parsing the sources takes seconds."""
    yield from remembered("docstrings", library_files(), lambda: list(_found_docstrings()))


def _found_docstrings() -> Iterator[Pair]:
    for document in long_documents(("source",), min_chars=0):
        for node in _functions(ast.parse(document.text)):
            text = ast.get_docstring(node)
            if not text or len(node.body) < 2:
                continue
            summary = " ".join(text.split("\n\n")[0].split())
            if not 20 <= len(summary) <= 120:
                continue
            bare = ast.FunctionDef(**{**vars(node), "body": node.body[1:], "decorator_list": []})
            code = ast.unparse(bare)
            if len(code) <= 400:
                yield f"Python function:\n{code}\n\nWhat it does: ", summary


def _translated(language: str) -> Iterator[Pair]:
    name = next(n for n, code in LANGUAGES.items() if code == language).capitalize()
    for source, target in translations(language):
        if len(source) <= 160 and "\n" not in source:
            yield f"English: {source}\n{name}: ", target


def _licences() -> Iterator[Pair]:
    seen = set()
    for document in long_documents(("licence",), min_chars=500):
        for paragraph in re.split(r"\n\s*\n", document.text):
            words = " ".join(paragraph.split())
            if len(words) >= 200 and words[:100] not in seen:
                seen.add(words[:100])
                cut = words.rfind(" ", 0, 140) + 1
                yield f"Licence: {words[:cut]}", words[cut : cut + 120]


def _topics() -> Iterator[Pair]:
    for document in long_documents(("reference",), min_chars=600):
        name = document.title.split(": ")[1]
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", document.text)]
        for paragraph in paragraphs:
            if len(paragraph) >= 120:
                text = textwrap.shorten(paragraph, 300, placeholder="")
                yield f"From Python's reference: {text}\nTopic: ", name


_FINDERS: dict[str, Callable[[], Iterator[Pair]]] = {
    "docstring": _docstrings,
    "licence": _licences,
    "topic": _topics,
    **{name: lambda code=code: _translated(code) for name, code in LANGUAGES.items()},  # type: ignore[misc]
}
NAMES = tuple(_FINDERS)


@functools.cache
def _found(name: str) -> tuple[Pair, ...]:
    """The same texts for every seed of a task: read once."""
    found = dict(_FINDERS[name]())
    return tuple(sorted(found.items(), key=lambda p: hashlib.sha256(p[0].encode()).digest()))


def pairs(name: str) -> list[Pair]:
    """All (prompt, answer) pairs of a task, in an order that depends on their text alone."""
    if name not in _FINDERS:
        raise ValueError(f"unknown task {name!r}; there are: {', '.join(NAMES)}")
    return list(_found(name))


def encoder(tokenizer: Any) -> Encode:
    """Token ids of a text, nothing added."""
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def byte_encoder(text: str) -> list[int]:
    """A byte is a token; what is not ASCII is written without its accents, or as ``?``."""
    import unicodedata

    plain = unicodedata.normalize("NFKD", text)
    return list(
        "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace")
    )


def rows_of_pairs(
    given: Sequence[Pair], encode: Encode, length: int, end: int | None, pad: int = 0
) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` (-100 for prompt and padding) and ``attention_mask`` [R, length].

    Pairs that do not fit are cut: the prompt at its beginning, at most to a quarter, then the answer.
    """
    made: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for prompt, answer in given:
        said = encode(answer) + ([] if end is None else [end])
        asked = encode(prompt)
        room = max(length // 4, length - len(said))
        asked = asked[max(0, len(asked) - room) :]
        said = said[: length - len(asked)]
        rest = length - len(asked) - len(said)
        made["input_ids"].append(asked + said + [pad] * rest)
        made["labels"].append([-100] * len(asked) + said + [-100] * rest)
        made["attention_mask"].append([1] * (length - rest) + [0] * rest)
    return {k: torch.tensor(v) for k, v in made.items()}


def make_tasks(
    names: Sequence[str], encode: Encode, length: int, end: int | None, pad: int = 0, *,
    train: int = 256, test: int = 64, seed: int = 0,
) -> list[Task]:  # fmt: skip
    """Tasks with so many training and test rows; which ones, the seed decides (tests are the same)."""
    made = []
    for name in names:
        found = pairs(name)
        if len(found) < test + 8:
            raise ValueError(f"task {name!r} has {len(found)} examples on this machine, too few")
        held, rest = found[:test], found[test:]
        random.Random(f"{seed}:{name}").shuffle(rest)
        rows = [rows_of_pairs(p, encode, length, end, pad) for p in (rest[:train], held)]
        made.append(Task(name, *rows))
    return made


def preference_rows(
    given: Sequence[tuple[str, str, str]],
    encode: Encode,
    length: int,
    end: int | None,
    pad: int = 0,
) -> dict[str, Tensor]:
    """The data of ``dpo`` from (prompt, chosen, rejected) triples."""
    chosen = rows_of_pairs([(p, c) for p, c, _ in given], encode, length, end, pad)
    rejected = rows_of_pairs([(p, r) for p, _, r in given], encode, length, end, pad)
    return chosen | {f"rejected_{k}": v for k, v in rejected.items()}


def swapped(given: Sequence[Pair]) -> list[tuple[str, str, str]]:
    """Preferences without judges: the right answer against that of the next question."""
    return [(p, a, given[(i + 1) % len(given)][1]) for i, (p, a) in enumerate(given)
            if a != given[(i + 1) % len(given)][1]]  # fmt: skip
