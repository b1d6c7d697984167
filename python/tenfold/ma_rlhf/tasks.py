# SPDX-License-Identifier: Apache-2.0
"""Real prompts without a network, and a reward for them that a program computes.

Prompts are places in the standard library's documentation that the policy has not been trained on; the
reward is how much of the continuation is spelt right, without saying the same word twice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.training import tiny

_WORD = re.compile(r"[A-Za-z]+")


def text_prompts(stream: Tensor, count: int, length: int, seed: int) -> list[str]:
    """``count`` pieces of ``length`` bytes from random places of a byte stream (``tiny.byte_stream``)."""
    made = torch.Generator().manual_seed(seed)
    rows = tiny.text_rows(stream, count, made, length)
    return [bytes(row.tolist()).decode("ascii", "replace") for row in rows]


def vocabulary(text: str, least: int = 3) -> set[str]:
    """Words of at least three letters that a text has at least ``least`` times, in lower case."""
    counts = Counter(word.lower() for word in _WORD.findall(text))
    return {word for word, n in counts.items() if n >= least and len(word) >= 3}


class Spelling:
    """Share of a response's characters in words that are known and new in it, in [0, 1].

    A word that the end of the response may have cut is not counted, one that continues the prompt is.

    Args:
        words: what counts as a word, in lower case, letters only.

    Raises:
        ValueError: no words.
    """

    __name__ = "spelling"

    def __init__(self, words: Iterable[str]) -> None:
        self.words = frozenset(words)
        if not self.words:
            raise ValueError("words must not be empty")

    def score(self, prompt: str, completion: str) -> float:
        """The reward of one response; 0 of an empty one."""
        begun = re.search(r"[A-Za-z]*$", prompt)
        head = begun[0] if begun else ""
        seen: set[str] = set()
        good = 0
        for found in _WORD.finditer(completion):
            if found.end() == len(completion):
                break
            word = found[0].lower()
            if found.start() == 0:
                word = head.lower() + word
            if word in self.words and word not in seen:
                good += found.end() - found.start()
            seen.add(word)
        return good / len(completion) if completion else 0.0

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        """Rewards in TRL's style."""
        return [self.score(p, c) for p, c in zip(prompts, completions)]
