# SPDX-License-Identifier: Apache-2.0
"""Parsers of English sentences, for macro actions that are constituents.

No parser with its weights is on PyPI by its authors: benepar and stanza fetch theirs when they are first used, and
spaCy (extra ``parse``) when it is told to: ``python -m spacy download en_core_web_sm``. What does without weights
are sentences and Python statements. :func:`dependency_tree` makes constituents of spaCy's dependencies.
:func:`benepar_parser`, the published code's choice, is there for who has benepar and its model.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable
from typing import Any

from tenfold.ma_rlhf.parsing import Mismatch, Parser, installed

MODEL = "en_core_web_sm"
_SUBJECTS = ("nsubj", "nsubjpass", "csubj", "csubjpass", "expl")


def dependency_tree(words: Iterable[Any]) -> list[Any]:
    """Nested lists of words: a head with all that depends on it is a constituent.

    What follows a head's subject, but for closing punctuation, is a constituent of its own (the verb phrase).

    Args:
        words: spaCy's tokens, or anything with ``text``, ``i``, ``head`` (of a root: itself) and ``dep_``.
            A word that depends on something out of reach (crossing arcs) depends on that head's head instead.
    """
    tokens = list(words)
    place = {w.i: k for k, w in enumerate(tokens)}
    head = [place.get(w.head.i, k) for k, w in enumerate(tokens)]
    _uncross(head)
    kids: list[list[int]] = [[] for _ in tokens]
    for k, h in enumerate(head):
        if h != k:
            kids[h].append(k)

    def constituent(k: int) -> list[Any]:
        parts = sorted([*kids[k], k])
        made = [tokens[i].text if i == k else constituent(i) for i in parts]
        subjects = [n for n, i in enumerate(parts) if i < k and tokens[i].dep_ in _SUBJECTS]
        if not subjects:
            return made
        first, last = subjects[-1] + 1, len(parts)
        while tokens[parts[last - 1]].dep_ == "punct" and parts[last - 1] > k:
            last -= 1
        return [*made[:first], made[first:last], *made[last:]]

    return [constituent(k) for k, h in enumerate(head) if h == k]


def _uncross(head: list[int]) -> None:
    """Lifts arcs until every word between a head and its dependent descends from that head."""

    def descends(k: int, h: int) -> bool:
        while k != h:
            if head[k] == k:
                return False
            k = head[k]
        return True

    changed = True
    while changed:
        changed = False
        for k, h in enumerate(head):
            between = range(min(k, h) + 1, max(k, h))
            if h != k and not all(descends(x, h) for x in between):
                # a root above the arc's head: the dependent becomes a root of its own
                head[k] = head[h] if head[h] != h else k
                changed = True


def spacy_parser(model: str = MODEL) -> Parser:
    """spaCy's dependency parser, as :func:`dependency_tree`.

    Args:
        model: an installed package with a pipeline.

    Raises:
        ImportError: spaCy or the model is missing; the message says how to install it.
    """
    need = "termination='parsing' without parser="
    installed("spacy", need)
    try:
        package = importlib.import_module(model)
    except ModuleNotFoundError:
        raise ImportError(
            f"{need} needs spaCy's model {model}: python -m spacy download {model} (beside the extra parse)"
        ) from None
    pipeline = package.load(exclude=["ner", "lemmatizer", "attribute_ruler"])
    return lambda sentence: dependency_tree(w for w in pipeline(sentence) if not w.is_space)


@functools.cache
def default_parser() -> Parser:
    """What parses where nothing else is given: :func:`spacy_parser`."""
    return spacy_parser()


def benepar_parser(model: str = "benepar_en3") -> Parser:
    """benepar's constituency parser; package and model must have been installed by hand.

    Raises:
        ImportError: benepar is missing. LookupError (of benepar): its model is.
    """
    try:
        benepar = importlib.import_module("benepar")
    except ImportError as error:
        raise ImportError(
            "benepar_parser needs benepar and its model, which pip cannot install: "
            "pip install benepar, then benepar.download(...) where there is a network"
        ) from error
    parser = benepar.Parser(model)

    def parse(sentence: str) -> Any:
        words = re.findall(r"\w+|[^\w\s]", sentence)
        try:
            return parser.parse(benepar.InputSentence(words=words))
        except ValueError as error:  # too long for its encoder
            raise Mismatch(f"benepar cannot parse {sentence[:20]!r}: {error}") from error

    return parse
