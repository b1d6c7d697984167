# SPDX-License-Identifier: Apache-2.0
"""Prompts for the evaluation: facts hidden in real documents, and real documents to continue.

The needle is a sentence with a made-up five-digit code. The question comes last, in the model's chat
template, and the assistant's turn is begun for it, so that even a small model answers from the text
when it still has all of it; how often it does with the full cache is always reported.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tenfold.data import Document, long_documents

NAMES = (
    "Amelia", "Boris", "Carmen", "Dmitri", "Elena", "Farid", "Greta", "Hiro", "Ingrid", "Jonas",
    "Kavya", "Leon", "Marta", "Nadia", "Omar", "Paula",
)  # fmt: skip
DEPTHS = tuple((i + 0.5) / 10 for i in range(10))
INSTRUCTION = "Read the text, then answer the question at its end.\n\n"
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Case:
    """One prompt: its tokens, the tokens whose probability is measured, and what it is."""

    task: str
    length: int
    depth: float
    seed: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    answer_text: str
    document: str


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, no special tokens added."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@functools.cache
def _documents() -> tuple[Document, ...]:
    # The same on every machine with this Python: no packaged extras.
    return tuple(long_documents(("docs", "reference"), min_chars=2000))


def haystack(tokenizer: Any, length: int, rng: random.Random) -> tuple[list[int], str]:
    """``length`` tokens of real text from a random document (and those after it), and its title."""
    documents = _documents()
    first = at = rng.randrange(len(documents))
    ids: list[int] = []
    while len(ids) < length:
        ids += tokens_of(tokenizer, documents[at].text[: 10 * length] + "\n\n")
        at = (at + 1) % len(documents)
    return ids[:length], documents[first].title


def chat_frame(tokenizer: Any, question: str, begun: str) -> tuple[list[int], list[int]]:
    """Tokens before the text and after it: template, question, the assistant's begun answer."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": _MARK}]
        framed = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        before, after = framed.split(_MARK)
    else:
        before, after = "", "\nAnswer: "
    head = tokens_of(tokenizer, before + INSTRUCTION)
    tail = tokens_of(tokenizer, f"\n\nQuestion: {question}{after}{begun}")
    return head, tail


def _line_end(tokenizer: Any, ids: list[int], at: int, reach: int = 48) -> int:
    """The first place at or after ``at`` where a line ends, else ``at``: facts are lines."""
    for stop in range(at, min(at + reach, len(ids))):
        if stop > 0 and tokenizer.decode(ids[stop - 1 : stop]).endswith("\n"):
            return stop
    return at


def retrieval_case(tokenizer: Any, length: int, depth: float, seed: int, num_keys: int = 1) -> Case:
    """A prompt of exactly ``length`` tokens with ``num_keys`` facts, the one at ``depth`` asked for.

    Raises ValueError if the prompt is too short for the facts and the question.
    """
    rng = random.Random(f"{length}/{seed}/{depth}/{num_keys}")
    names = rng.sample(NAMES, num_keys)
    numbers = [str(rng.randrange(10000, 100000)) for _ in names]
    head, tail = chat_frame(
        tokenizer,
        f"What is the secret code of {names[0]}?",
        f"The secret code of {names[0]} is",
    )
    facts = [
        tokens_of(tokenizer, f"\nThe secret code of {name} is {number}.\n")
        for name, number in zip(names, numbers)
    ]
    room = length - len(head) - len(tail) - sum(map(len, facts))
    if room < length // 4:
        raise ValueError(f"{length} tokens are too few for {num_keys} facts and a question")
    text, title = haystack(tokenizer, room, rng)
    spots = [depth, *(rng.random() for _ in names[1:])]
    prompt, at = list(head), 0
    for spot, fact in sorted(zip(spots, facts)):
        stop = _line_end(tokenizer, text, max(at, int(spot * room)))
        prompt += text[at:stop] + fact
        at = stop
    prompt += text[at:] + tail
    task = "needle" if num_keys == 1 else f"multikey{num_keys}"
    answer = tokens_of(tokenizer, " " + numbers[0])
    return Case(task, length, depth, seed, tuple(prompt), tuple(answer), numbers[0], title)


def retrieval_cases(
    tokenizer: Any,
    lengths: Iterable[int],
    seeds: Iterable[int],
    depths: Iterable[float] = DEPTHS,
    num_keys: int = 1,
) -> Iterator[Case]:
    """:func:`retrieval_case` for all lengths, seeds and depths; multi-key with ``num_keys`` > 1."""
    seeds, depths = list(seeds), list(depths)
    for length in lengths:
        for seed in seeds:
            for depth in depths:
                yield retrieval_case(tokenizer, length, depth, seed, num_keys)


def perplexity_cases(
    tokenizer: Any, lengths: Iterable[int], seeds: Iterable[int], continuation: int = 256
) -> Iterator[Case]:
    """Real texts cut at ``length`` tokens, their next ``continuation`` tokens to be predicted."""
    seeds = list(seeds)
    for length in lengths:
        for seed in seeds:
            rng = random.Random(f"ppl/{length}/{seed}")
            ids, title = haystack(tokenizer, length + continuation, rng)
            yield Case("perplexity", length, 1.0, seed, tuple(ids[:length]), tuple(ids[length:]),
                       "", title)  # fmt: skip
