# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers of which one is preferred: read from files, made from packaged texts, as tokens.

Pairs without a network (:func:`packaged_preferences`): a prompt is the first words of a paragraph of the
standard library's documentation, the chosen answer is how it goes on, and the rejected one is the same number
of words of another kind:

    other      how a paragraph of another document goes on
    shuffled   the chosen answer's words in another order
    repeated   the chosen answer's first words again and again

So "good" means: on topic, in order, not looping. Documents, not paragraphs, are held out.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.data import Document, long_documents
from tenfold.training.checks import one_of

CORRUPTIONS = ("other", "shuffled", "repeated")


@dataclass(frozen=True)
class Preference:
    """``chosen`` is preferred to ``rejected`` as an answer to ``prompt``; ``kind`` says where it is from."""

    prompt: str
    chosen: str
    rejected: str
    kind: str = ""


def load_preferences(path: str | Path) -> list[Preference]:
    """Reads JSON lines with ``prompt``, ``chosen``, ``rejected`` and optionally ``kind``, all text.

    Raises:
        ValueError: a line that is not JSON, lacks a field, or whose answers are equal; with its number. An
            empty file.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} must be an object, got {type(row).__name__}")
        wrong = [k for k in ("prompt", "chosen", "rejected") if not isinstance(row.get(k), str)]
        if wrong:
            raise ValueError(
                f"{path}: line {number} needs text in {', '.join(wrong)}; it has {sorted(row)}"
            )
        if row["chosen"] == row["rejected"]:
            raise ValueError(f"{path}: line {number}: chosen and rejected are equal")
        found.append(
            Preference(row["prompt"], row["chosen"], row["rejected"], str(row.get("kind", "")))
        )
    if not found:
        raise ValueError(f"{path} holds no pairs")
    return found


def save_preferences(path: str | Path, pairs: Iterable[Preference]) -> None:
    """Writes what :func:`load_preferences` reads."""
    lines = (json.dumps(vars(p), ensure_ascii=False) + "\n" for p in pairs)
    Path(path).write_text("".join(lines), encoding="utf-8")


def _draws(seed: int, name: str) -> random.Random:
    return random.Random(
        int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
    )


def _paragraphs(document: Document, least: int) -> list[list[str]]:
    """Words of the paragraphs of prose that have at least so many."""
    words = [part.split() for part in document.text.split("\n\n")]
    return [w for w in words if len(w) >= least and not w[0].startswith((">>>", "..."))]


def _rejected(kind: str, chosen: list[str], other: list[str], draw: random.Random) -> list[str]:
    if kind == "other":
        return other
    if kind == "repeated":
        return [chosen[i % 3] for i in range(len(chosen))]
    mixed = list(chosen)
    draw.shuffle(mixed)
    return mixed


def packaged_preferences(
    *,
    prompt_words: int = 8,
    answer_words: int = 16,
    corruptions: Sequence[str] = CORRUPTIONS,
    held_out: float = 0.2,
    limit: int | None = None,
    seed: int = 0,
    documents: Sequence[Document] | None = None,
) -> tuple[list[Preference], list[Preference]]:
    """(training, held-out) pairs from texts that are on the machine; see the module's text.

    Args:
        prompt_words, answer_words: lengths. corruptions: of ``CORRUPTIONS``, in equal parts.
        held_out: share of the documents whose pairs are for evaluation. limit: at most so many pairs of each
            part. seed: of everything drawn. documents: default the standard library's documentation.

    Raises:
        ValueError: settings; too few texts.
    """
    for name in corruptions:
        one_of("corruptions", name, CORRUPTIONS)
    if not corruptions or prompt_words < 1 or answer_words < 4 or not 0 < held_out < 1:
        raise ValueError(
            "packaged_preferences needs corruptions, prompt_words >= 1, answer_words >= 4 and held_out in (0, 1); "
            f"got {list(corruptions)}, {prompt_words}, {answer_words}, {held_out}"
        )
    if documents is None:
        documents = long_documents(("docs",), min_chars=2000)
    rank = {d.title: _draws(seed, d.title).random() for d in documents}
    order = sorted(documents, key=lambda d: rank[d.title])
    cut = max(1, round(held_out * len(order)))
    parts = []
    for part in (order[cut:], order[:cut]):
        found = _pairs(part, prompt_words, answer_words, corruptions, seed)
        if not found:
            raise ValueError(
                f"{len(documents)} documents do not give pairs of {prompt_words} + {answer_words} words for both "
                "parts; give more, or ask for shorter ones"
            )
        parts.append(found if limit is None else found[:limit])
    return parts[0], parts[1]


def _pairs(
    documents: Sequence[Document], prompt: int, answer: int, corruptions: Sequence[str], seed: int
) -> list[Preference]:
    rows = [(d.title, w) for d in documents for w in _paragraphs(d, prompt + answer)]
    made = []
    for i, (title, words) in enumerate(rows):
        draw = _draws(seed, f"{title} {i}")
        others = draw.sample(range(len(rows)), min(8, len(rows)))
        other = next(
            (rows[j][1][prompt : prompt + answer] for j in others if rows[j][0] != title), None
        )
        kind = corruptions[i % len(corruptions)]
        chosen = words[prompt : prompt + answer]
        if other is None:
            continue
        rejected = _rejected(kind, chosen, other, draw)
        if rejected != chosen:
            begin, good, bad = (" ".join(w) for w in (words[:prompt], chosen, rejected))
            made.append(Preference(begin, " " + good, " " + bad, kind))
    _draws(seed, "order").shuffle(made)
    return made


def encode_texts(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], length: int, end: bool = True
) -> tuple[Tensor, Tensor]:
    """Prompts and answers as rows (ids int64, mask int64 [B, S]), right-padded, S as needed, at most ``length``.

    A row is the prompt's tokens, the answer's, and the end token; what is beyond ``length`` is cut off. The two
    are tokenised apart, as a policy's prompt and answer are. Raises ValueError for a row without tokens.
    """
    if len(prompts) != len(answers):
        raise ValueError(
            f"prompts and answers must be equally many, got {len(prompts)} and {len(answers)}"
        )
    rows = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids = [
            *tokenizer(prompt)["input_ids"],
            *tokenizer(answer, add_special_tokens=False)["input_ids"],
        ]
        if end and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if not ids:
            raise ValueError(f"row {i} has no tokens")
        rows.append(ids[:length])
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def encode_preferences(
    tokenizer: Any, pairs: Sequence[Preference], length: int = 1024
) -> dict[str, Tensor]:
    """Pairs as tensors [N, S]: ``input_ids``, ``attention_mask``, ``rejected_input_ids``, ``rejected_attention_mask``.

    Pairs that are equal once cut to ``length`` tokens are left out with a warning; ValueError if none is left.
    """
    if not pairs:
        raise ValueError("pairs is empty")
    texts = [p.prompt for p in pairs]
    both = [*(p.chosen for p in pairs), *(p.rejected for p in pairs)]
    ids, mask = (
        x.view(2, len(pairs), -1) for x in encode_texts(tokenizer, texts * 2, both, length)
    )
    keep = ((ids[0] != ids[1]) | (mask[0] != mask[1])).any(1)
    if not bool(keep.any()):
        raise ValueError(
            f"all {len(pairs)} pairs are equal in their first {length} tokens; raise the length"
        )
    if not bool(keep.all()):
        warnings.warn(
            f"{int((~keep).sum())} of {len(pairs)} pairs are equal in their first {length} tokens and left out",
            UserWarning, stacklevel=2,
        )  # fmt: skip
    ids, mask = ids[:, keep], mask[:, keep]
    return {"input_ids": ids[0], "attention_mask": mask[0], "rejected_input_ids": ids[1],
            "rejected_attention_mask": mask[1]}  # fmt: skip
