# SPDX-License-Identifier: Apache-2.0
"""``wiki_search``: the best passage of a corpus on this machine, by BM25.

    score(q, d) = sum over words t of q:  idf(t) * f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
    idf(t) = ln(1 + (N - n_t + 1/2) / (n_t + 1/2))

f: how often t is in d; n_t: passages with t. (Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009; the
idf that cannot be negative is Lucene's.)
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.themis.tools.base import BadArguments, Tool
from tenfold.training.checks import not_negative

PASSAGE_WORDS = 100
_KINDS = ("reference", "docs", "licence")


def words_of(text: str) -> list[str]:
    """Letters and digits between everything else, without case."""
    return re.findall(r"\w+", text.casefold())


class Bm25:
    """An inverted index over texts. k1 >= 0: how little repetitions wear off; b in [0, 1]: how much length counts."""

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        not_negative("k1", k1)
        if not 0 <= b <= 1:
            raise ValueError(f"b must be in [0, 1], got {b}")
        if not texts:
            raise ValueError("texts: there are none to search")
        where: dict[str, list[int]] = {}
        often: dict[str, list[int]] = {}
        lengths = np.zeros(len(texts))
        for i, text in enumerate(texts):
            words = words_of(text)
            lengths[i] = len(words)
            for word, count in Counter(words).items():
                where.setdefault(word, []).append(i)
                often.setdefault(word, []).append(count)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))
        self.size = len(texts)
        self._postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, found in where.items():
            at = np.array(found, dtype=np.int32)
            f = np.array(often[word], dtype=np.float64)
            idf = np.log1p((self.size - len(found) + 0.5) / (len(found) + 0.5))
            self._postings[word] = (at, (idf * f * (k1 + 1) / (f + norm[at])).astype(np.float32))

    def scores(self, query: str) -> np.ndarray:
        """[texts] float64; 0 where no word of the query is."""
        made = np.zeros(self.size)
        for word, count in Counter(words_of(query)).items():
            if word in self._postings:
                at, weight = self._postings[word]
                made[at] += count * weight
        return made

    def top(self, query: str, k: int = 1) -> list[int]:
        """The best ``k`` with a score above 0, best first; of equals, the first in the corpus."""
        made = self.scores(query)
        best = np.argsort(-made, kind="stable")[:k]
        return [int(i) for i in best if made[i] > 0]


def split_passages(text: str, words: int = PASSAGE_WORDS) -> Iterator[str]:
    """Paragraphs put together until they have so many words, long ones cut; white space is made single."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        kept += paragraph.split()
        if len(kept) >= words:
            for start in range(0, len(kept), 2 * words):
                yield " ".join(kept[start : start + 2 * words])
            kept = []
    if kept:
        yield " ".join(kept)


def packaged_passages(kinds: Sequence[str] = _KINDS) -> list[tuple[str, str]]:
    """(title, text) of the Python documentation and of licences that are on this machine."""
    from tenfold.data import long_documents

    return [
        (document.title, passage)
        for document in long_documents(kinds, min_chars=200)
        for passage in split_passages(document.text)
    ]


def read_passages(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """JSON lines with ``title`` and ``text``. ValueError names a line that is none."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append((str(row["title"]), str(row["text"])))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: needs a title and a text") from None
    return found


class WikiSearch(Tool):
    """The best passage, as ``title | text``.

    Args:
        passages: (title, text) pairs, or JSON lines with both; default :func:`packaged_passages`, indexed at the first
            call (some seconds). max_words: of a passage.
    """

    names = ("wiki_search",)
    timeout = 30.0

    def __init__(
        self,
        passages: Sequence[tuple[str, str]] | str | os.PathLike[str] | None = None,
        *,
        max_words: int = 2 * PASSAGE_WORDS,
    ) -> None:
        if isinstance(passages, str | os.PathLike):
            passages = read_passages(passages)
        if passages is not None and not passages:
            raise ValueError("passages: there are none to search")
        self._passages = passages
        self._index: Bm25 | None = None
        self._lock = threading.Lock()
        self.max_words = max_words

    def _built(self) -> tuple[Sequence[tuple[str, str]], Bm25]:
        with self._lock:
            if self._passages is None:
                self._passages = packaged_passages()
            if self._index is None:
                self._index = Bm25([f"{title} {text}" for title, text in self._passages])
            return self._passages, self._index

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """The best passage; LookupError where no passage has any word of the query."""
        if not words_of(arguments):
            raise BadArguments("wiki_search takes a query, got no word")
        passages, index = self._built()
        found = index.top(arguments)
        if not found:
            raise LookupError("no passage has a word of the query")
        title, text = passages[found[0]]
        return f"{title} | {' '.join(text.split()[: self.max_words])}"

    def key(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """The query's words."""
        return " ".join(words_of(arguments))
