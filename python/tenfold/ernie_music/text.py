# SPDX-License-Identifier: Apache-2.0
"""From prompts to what the U-Net reads: last hidden states of any encoder, and which of them are tokens."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.training.checks import integers

BAG, PACKAGED = "bag", "minilm"


class TextStates(ABC):
    """What every encoder does: prompts in a batch, padded, and remembered.

    A subclass has ``name``, ``width`` (d_E) and ``_encode``. An empty prompt is no text: its row of the mask is False.

    Args:
        cache_size: prompts whose states are kept, the last used ones.
    """

    name: str
    width: int

    def __init__(self, cache_size: int = 4096) -> None:
        self.cache_size = cache_size
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[Tensor]:
        """States [N, width] of each text, which is not empty."""

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(states float32 [B, n, d_E], mask bool [B, n]) on the CPU; the first token's state is the text's as a whole.

        Raises TypeError for what is not a text.
        """
        wrong = [t for t in texts if not isinstance(t, str)]
        if wrong or isinstance(texts, str):
            raise TypeError(
                f"prompts must be a list of str, got {type(wrong[0] if wrong else texts).__name__}"
            )
        found = {t: self._known[t] for t in texts if t in self._known}
        new = list(dict.fromkeys(t for t in texts if t.strip() and t not in found))
        if new:
            found |= dict(zip(new, self._encode(new)))
        for text, states in found.items():
            self._known[text] = states
            self._known.move_to_end(text)
        while len(self._known) > self.cache_size:
            self._known.popitem(last=False)
        empty = torch.zeros(0, self.width)
        rows = [found.get(t, empty) for t in texts]
        n = max([2, *(len(r) for r in rows)])
        states, mask = (
            torch.zeros(len(rows), n, self.width),
            torch.zeros(len(rows), n, dtype=torch.bool),
        )
        for i, row in enumerate(rows):
            states[i, : len(row)] = row
            mask[i, : len(row)] = True
        return states, mask


class TransformersText(TextStates):
    """Last hidden states of a transformers encoder, frozen and in eval mode.

    Args:
        model, tokenizer: an ``AutoModel`` whose first token stands for the text (BERT, XLM-R, ERNIE), and its
            tokenizer.
        max_length: tokens; longer prompts are cut with a warning, or refused (ValueError) if ``strict``.
        name: what the encoder is called in a model's configuration. batch_size: prompts at a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        max_length: int = 512,
        strict: bool = False,
        batch_size: int = 32,
        cache_size: int = 4096,
    ) -> None:
        super().__init__(cache_size)
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.max_length, self.strict, self.batch_size = max_length, strict, batch_size
        integers(self, {"max_length": 3, "batch_size": 1})
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.width = model.config.hidden_size

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids = [list(self.tokenizer(t, truncation=False, verbose=False)["input_ids"]) for t in texts]
        long = [i for i, row in enumerate(ids) if len(row) > self.max_length]
        if long and self.strict:
            raise ValueError(
                f"a prompt has {len(ids[long[0]])} tokens, the encoder takes {self.max_length}: {texts[long[0]][:60]!r}"
            )
        if long:
            warnings.warn(
                f"{len(long)} prompts are longer than {self.max_length} tokens and were cut",
                stacklevel=4,
            )
        # The last token ends the text, and stays.
        return [
            row if len(row) <= self.max_length else [*row[: self.max_length - 1], row[-1]]
            for row in ids
        ]

    def _encode(self, texts: list[str]) -> list[Tensor]:
        ids = self._ids(texts)
        made: list[Tensor] = [torch.empty(0)] * len(ids)
        # Prompts of one length at a time: no padding, so a state does not depend on its batch.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        at = 0
        while at < len(order):
            length = len(ids[order[at]])
            rows = [i for i in order[at : at + self.batch_size] if len(ids[i]) == length]
            batch = torch.tensor([ids[i] for i in rows], device=self.model.device)
            states = self.model(
                input_ids=batch, attention_mask=torch.ones_like(batch)
            ).last_hidden_state
            for row, state in zip(rows, states.float().cpu()):
                made[row] = state
            at += len(rows)
        return made


class BagText(TextStates):
    """A random vector per word, and their mean before them: an encoder that needs no model.

    Args:
        width: d_E. seed: of the vectors, which depend on nothing else.
    """

    def __init__(self, width: int = 64, seed: int = 0, cache_size: int = 4096) -> None:
        super().__init__(cache_size)
        self.width, self.seed, self.name = width, seed, f"{BAG}:{width}"
        integers(self, {"width": 1, "seed": 0})

    def _word(self, word: str) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {word}".encode()).digest()
        made = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(self.width, generator=made)

    def _encode(self, texts: list[str]) -> list[Tensor]:
        made = []
        for text in texts:
            words = torch.stack([self._word(w.strip(".,;:!?").lower()) for w in text.split()])
            made.append(torch.cat([words.sum(0, keepdim=True) / len(words) ** 0.5, words]))
        return made


def text_encoder_of(name: str = PACKAGED, device: str = "cpu", **options: Any) -> TextStates:
    """An encoder by name: ``"minilm"`` (packaged, English at heart), ``"bag"`` or ``"bag:WIDTH"`` (no model), a
    folder of ERNIE-M, or a folder or hub id of any ``AutoModel``.

    MissingData says how to get the packaged model where it is not installed.
    """
    if name == BAG or name.startswith(f"{BAG}:"):
        width = name.partition(":")[2]
        if width and not width.isdigit():
            raise ValueError(f"an encoder 'bag:WIDTH' has a number of values, got {name!r}")
        return BagText(**({"width": int(width)} if width else {}), **options)
    if name == PACKAGED:
        from tenfold.data.sentences import minilm

        model, tokenizer = minilm(device)
        return TransformersText(model, tokenizer, name=PACKAGED, **options)
    config = Path(name) / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("model_type") == "ernie_m":
        from tenfold.ernie_music.ernie_m import ErnieMEncoder, ErnieMTokenizer

        return TransformersText(
            ErnieMEncoder.from_pretrained(name).to(device),
            ErnieMTokenizer(name),
            name=name,
            **options,
        )
    from transformers import AutoModel, AutoTokenizer

    from tenfold.data.models import quiet_transformers

    with quiet_transformers():
        model = AutoModel.from_pretrained(name).to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
    return TransformersText(model, tokenizer, name=name, **options)
