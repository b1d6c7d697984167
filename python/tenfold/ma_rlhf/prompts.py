# SPDX-License-Identifier: Apache-2.0
"""Prompts: texts, chats or token ids with columns of their own, in an order that is a function of the step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.training.batches import Batches


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of a step, over all ranks, each as often as its group is large.

    Attributes:
        prompts: as the data set has them (text, or chat messages). texts: what the policy reads.
        ids, mask: left-padded, int64 and bool [B, P]. columns: of the data set, lists of B.
        group: int64 [B], which rows answer the same prompt. cut: prompts that were too long.
    """

    prompts: list[Any]
    texts: list[str]
    ids: Tensor
    mask: Tensor
    columns: dict[str, list[Any]]
    group: Tensor
    cut: int


class Prompts:
    """A data set of prompts.

    Args:
        data: a list of texts, of chats (lists of messages) or of dicts with ``prompt`` and other columns; a
            dict of columns; or a ``datasets.Dataset`` with a column ``prompt``.
        tokenizer: a transformers tokenizer, or what has its call, ``decode``, ``pad_token_id`` and
            ``eos_token_id``. limit: tokens of the longest prompt; longer ones lose their beginning.
        seed: of the order.

    Raises:
        TypeError, ValueError: no prompts, rows of different columns, an empty prompt, a chat without a
            chat template.
    """

    def __init__(self, data: Any, tokenizer: Any, limit: int, seed: int) -> None:
        self.rows = _rows(data)
        self.tokenizer, self.limit = tokenizer, limit
        self._order = Batches({"input_ids": torch.arange(len(self.rows))[:, None]}, 1, seed)
        self._encoded: dict[int, tuple[str, list[int]]] = {}

    def digest(self) -> str:
        """Identifies the data in a work folder."""
        text = json.dumps(self.rows, sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:16]

    def encoded(self, index: int) -> tuple[str, list[int]]:
        """(text, token ids) of a prompt, whole."""
        if index not in self._encoded:
            prompt = self.rows[index]["prompt"]
            if isinstance(prompt, str):
                text, special = prompt, True
            else:
                text, special = _chat(self.tokenizer, prompt), False
            ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
            if not ids:
                raise ValueError(
                    f"prompt {index} has no tokens; a response needs something to follow"
                )
            self._encoded[index] = text, ids
        return self._encoded[index]

    def take(self, stage: str, step: int, size: int, group: int = 1) -> PromptBatch:
        """The ``size`` rows of a step: ``size // group`` prompts, ``group`` times each."""
        found = self._order.take(stage, step, size // group)["input_ids"][:, 0]
        at = found.repeat_interleave(group).tolist()
        texts, ids = zip(*(self.encoded(i) for i in at))
        width = min(self.limit, max(map(len, ids)))
        padded = torch.full((size, width), self.tokenizer.pad_token_id or 0, dtype=torch.int64)
        mask = torch.zeros(size, width, dtype=torch.bool)
        for row, tokens in enumerate(ids):
            tokens = tokens[-width:]
            padded[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = True
        names = [k for k in self.rows[0] if k != "prompt"]
        columns = {name: [self.rows[i][name] for i in at] for name in names}
        return PromptBatch(
            [self.rows[i]["prompt"] for i in at], list(texts), padded, mask, columns,
            torch.arange(size) // group, sum(len(t) > width for t in ids),
        )  # fmt: skip


def _chat(tokenizer: Any, messages: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "prompts are chats, but the tokenizer has no chat template; give texts, or set "
            "tokenizer.chat_template"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _rows(data: Any) -> list[dict[str, Any]]:
    if isinstance(data, Mapping):
        lengths = {name: len(values) for name, values in data.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"prompts: columns must be equally long, got {lengths}")
        data = [dict(zip(data, row)) for row in zip(*data.values())]
    if isinstance(data, str) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            "prompts must be a list of texts, chats or dicts with 'prompt', a dict of columns, or a "
            f"datasets.Dataset; got {type(data).__name__}"
        )
    rows: list[dict[str, Any]] = []
    for i in range(len(data)):
        row = data[i]
        row = dict(row) if isinstance(row, Mapping) else {"prompt": row}
        prompt = row.get("prompt")
        chat = isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
        if not isinstance(prompt, str) and not chat:
            raise TypeError(
                f"prompts: row {i} needs 'prompt', a text or a list of messages; got "
                f"{type(prompt).__name__} (columns {', '.join(map(str, row)) or 'none'})"
            )
        if rows and set(row) != set(rows[0]):
            raise ValueError(
                f"prompts: row {i} has columns {sorted(row)}, row 0 has {sorted(rows[0])}"
            )
        rows.append(row)
    if not rows:
        raise ValueError("prompts is empty")
    return rows
