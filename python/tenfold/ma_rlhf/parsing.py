# SPDX-License-Identifier: Apache-2.0
"""Where macro actions begin in a text: constituents and sentences.

All of it speaks of ``pieces``: the text of every token, whose concatenation is the response. A piece counts to
the word in which its first character that is no space lies; pieces of space, or of nothing (the end token), to
the word before them. So every token counts to exactly one word, separators between sentences included.

Trees come from any callable that takes a sentence: see :func:`as_tree`. ``parsers.py`` has some.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Parser = Callable[[str], Any]
Cut = Callable[[Sequence[str]], Sequence[int]]
Span = tuple[int, int]
# How the Penn Treebank writes what brackets and quotes would confuse.
_ESCAPED = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}",
            "``": '"', "''": '"'}  # fmt: skip


class Mismatch(ValueError):
    """A text cannot be parsed, or its parse does not fit the tokens."""


@dataclass(frozen=True)
class Tree:
    """A constituent: its children, or a word; ``words`` are its leaves [first, last) in the sentence."""

    word: str
    children: tuple[Tree, ...]
    words: Span

    def leaves(self) -> list[str]:
        """The words, in order."""
        return [self.word] if not self.children else [w for c in self.children for w in c.leaves()]


def as_tree(made: Any) -> Tree:
    """What a parser gave, as a :class:`Tree`.

    Args:
        made: a bracketed string (``"(S (NP The cat) (VP sat))"``; the first word after a bracket is a label), an
            ``nltk.Tree`` or anything that iterates over children and has a ``label``, or nested lists
            of words without labels.

    Raises:
        Mismatch: none of these, brackets that do not match, no word.
    """
    if isinstance(made, str):
        made = _bracketed(made)
    tree = _built(made, 0)
    if tree is None:
        raise Mismatch("the parser gave a tree without words")
    return tree


def _built(made: Any, first: int) -> Tree | None:
    if isinstance(made, str):
        return Tree(made, (), (first, first + 1))
    if not (isinstance(made, list | tuple) or hasattr(made, "label")):
        raise Mismatch(f"a tree is a bracketed string, an nltk.Tree or nested lists, not {made!r}")
    children, at = [], first
    for part in made:
        child = _built(part, at)
        if child is not None:
            children.append(child)
            at = child.words[1]
    return Tree("", tuple(children), (first, at)) if children else None


def _bracketed(text: str) -> list[Any]:
    tokens = re.findall(r"[()]|[^\s()]+", text)
    stack: list[list[Any]] = [[]]
    for i, token in enumerate(tokens):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise Mismatch(f"brackets do not match in {text!r}")
            done = stack.pop()
            stack[-1].append(done)
        elif i == 0 or tokens[i - 1] != "(":  # else a label
            stack[-1].append(token)
    if len(stack) > 1:
        raise Mismatch(f"brackets do not match in {text!r}")
    return stack[0]


def tree_boundaries(tree: Tree, counts: Sequence[int], cutoff: int) -> list[int]:
    """Ends of macro actions in a sentence, from 0 to its number of tokens.

    Left to right: a constituent of one word moves the last boundary to its end (it joins what is on its
    left); one of fewer than ``cutoff`` tokens gets a boundary at its end; others are entered. If words at
    the beginning moved the boundary 0, it is restored.

    Args:
        counts: tokens of every word.

    Source:
        MA-RLHF (arXiv 2410.02743), parsing-based termination.
    """
    if cutoff < 1:
        raise ValueError(f"cutoff must be at least 1, got {cutoff}")
    before = [0]
    for count in counts:
        before.append(before[-1] + count)
    made = [0]
    stack = [tree]
    while stack:
        node = stack.pop()
        first, last = node.words
        if last - first == 1:
            made[-1] = before[last]
        elif before[last] - before[first] < cutoff:
            made.append(before[last])
        else:
            stack.extend(reversed(node.children))
    return sorted({0, *made})


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that every token adds, by ``tokenizer.decode`` of it and the tokens before it.

    Special tokens add nothing. Nor does a token that ends inside a character; the token that completes
    it adds all of it.
    """
    ids = list(ids)
    read, start, made = 0, 0, []
    for end in range(1, len(ids) + 1):
        old, new = _decode(tokenizer, ids[start:read]), _decode(tokenizer, ids[start:end])
        if new.endswith("�") and end < len(ids):
            made.append("")
            continue
        made.append(new[len(old) :] if new.startswith(old) else _decode(tokenizer, ids[read:end]))
        start, read = read, end
    return made


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def split_sentences(text: str, splitter: str = "rule") -> list[Span]:
    """Character spans of the sentences, without the space around them.

    ``"rule"``: they end after ``.``, ``!`` or ``?`` before a space, and at newlines; ``"pysbd"`` (extra
    ``parse``) knows abbreviations and lists.
    """
    if splitter == "pysbd":
        found = [(s.start, s.end) for s in _segmenter().segment(text)]
        if any(later[0] < sooner[1] for sooner, later in itertools.pairwise(found)):
            raise Mismatch("pysbd's sentences overlap")
    else:
        ends = [m.end() for m in re.finditer(r"[.!?]+(?=\s)|\n+", text)]
        found = list(zip([0, *ends], [*ends, len(text)]))
    made = []
    for start, end in found:
        part = text[start:end]
        if part.strip():
            left = len(part) - len(part.lstrip())
            made.append((start + left, start + len(part.rstrip())))
    return made


@functools.cache
def _segmenter() -> Any:
    return installed("pysbd", "splitter='pysbd'").Segmenter(
        language="en", clean=False, char_span=True
    )


def installed(module: str, need: str) -> Any:
    """The module, or an ImportError that says what needs it, and the extra ``parse``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{need} needs {module} ({error}): pip install 'tenfold[parse]' (extra parse)"
        ) from error


def owners(pieces: Sequence[str], starts: Sequence[int]) -> list[int]:
    """Index of the unit (beginning at these characters, ascending) that every piece counts to."""
    made, at, last = [], 0, 0
    for piece in pieces:
        body = piece.lstrip()
        if body:
            place = at + len(piece) - len(body)
            last = max(bisect.bisect_right(starts, place) - 1, last)
        made.append(last)
        at += len(piece)
    return made


def first_of_each(owners: Sequence[int]) -> list[int]:
    """The pieces that begin a unit."""
    return [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]


def sentences(splitter: str = "rule") -> Cut:
    """A cut at every sentence."""

    def cut(pieces: Sequence[str]) -> list[int]:
        spans = split_sentences("".join(pieces), splitter)
        return first_of_each(owners(pieces, [s for s, _ in spans]))

    return cut


def constituents(parse: Parser, cutoff: int, splitter: str = "rule") -> Cut:
    """A cut by the constituency tree of every sentence, see :func:`tree_boundaries`."""

    def cut(pieces: Sequence[str]) -> list[int]:
        text = "".join(pieces)
        trees: list[tuple[Tree, int]] = []  # with the number of words before it
        starts: list[int] = []
        for first, last in split_sentences(text, splitter):
            try:
                tree = as_tree(parse(text[first:last]))
                words = tree.leaves()
            except RecursionError as error:
                raise Mismatch(f"the parse of {text[first:last][:20]!r} is too deep") from error
            trees.append((tree, len(starts)))
            starts += _word_starts(words, text, first, last)
        if not starts:
            raise Mismatch("there is no sentence")
        counts = [0] * len(starts)
        for owner in owners(pieces, starts):
            counts[owner] += 1
        made: set[int] = set()
        at = 0
        for tree, before in trees:
            mine = counts[before : before + tree.words[1]]
            made.update(at + end for end in tree_boundaries(tree, mine, cutoff))
            at += sum(mine)
        return sorted(made - {len(pieces)})

    return cut


def _word_starts(words: Sequence[str], text: str, first: int, last: int) -> list[int]:
    """Where the words of a tree are in the text; they must be all of it but spaces."""
    made, at = [], first
    for word in words:
        while at < last and text[at].isspace():
            at += 1
        if not text.startswith(word, at):
            word = _ESCAPED.get(word, word)
        if not text.startswith(word, at) or at + len(word) > last:
            raise Mismatch(
                f"the parser's word {word!r} is not in the response at {text[at : at + 20]!r}"
            )
        made.append(at)
        at += len(word)
    rest = text[at:last].strip()
    if rest:
        raise Mismatch(f"the parser left out {rest[:20]!r}")
    return made
