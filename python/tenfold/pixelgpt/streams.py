# SPDX-License-Identifier: Apache-2.0
"""What a model is pre-trained on: streams of text rows, strips and pairs; and which step is of which.

Everything is a function of (seed, stage, step): a run that is resumed reads exactly what it would have.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.pixelgpt.collate import Batch, pair_batch, strips_of, with_settings
from tenfold.pixelgpt.config import MODALITIES
from tenfold.pixelgpt.texts import Document
from tenfold.pixelgpt.tokens import encode_rows
from tenfold.pixelgpt.train_config import PretrainConfig
from tenfold.training.batches import Batches, sample_digest, token_rows
from tenfold.training.checks import one_of


@dataclass
class Streams:
    """Rows of every stream: ``text`` int64 [R, T], ``pixel`` and ``pair`` texts of a strip each.

    Attributes:
        processor, pair_processor: of strips, and of those in pairs, each of its own length. tokenizer.
        pair_tokens: of a pair, at most.
    """

    processor: Any
    pair_processor: Any
    tokenizer: Any
    pair_tokens: int
    text: Tensor | None = None
    pixel: Sequence[str] = ()
    pair: Sequence[str] = ()

    def count(self, name: str) -> int:
        """Rows of a stream."""
        one_of("stream", name, MODALITIES)
        rows = getattr(self, name)
        return 0 if rows is None else len(rows)

    def batch(self, name: str, numbers: Sequence[int]) -> Batch:
        """Rows by their numbers, as the model takes them, targets included."""
        if name == "text":
            assert self.text is not None
            rows = self.text[torch.as_tensor(numbers)]
            return {"input_ids": rows, "labels": rows}
        texts = [getattr(self, name)[i] for i in numbers]
        if name == "pixel":
            return strips_of(self.processor, texts)
        return pair_batch(self.pair_processor, self.tokenizer, texts, self.pair_tokens)

    def digest(self) -> str:
        """Identifies the data in a work folder."""
        made = hashlib.sha256(f"{self.processor} {self.pair_processor} {self.pair_tokens}".encode())
        if self.text is not None:
            sample_digest(self.text, made)
        for name in ("pixel", "pair"):
            for text in getattr(self, name):
                made.update(f"\0{name}\0{text}".encode("utf-8", "surrogatepass"))
        return made.hexdigest()[:16]


def make_streams(
    documents: Sequence[Document], config: PretrainConfig, processor: Any = None, tokenizer: Any = None
) -> Streams:  # fmt: skip
    """The streams of a variant from documents.

    Text rows are all documents' tokens, an end token between. Strips pack whole lines of a document. Pairs are packed
    likewise, as far as their tokens fit, too. MonoGPT's strips and texts are of different documents, every other one.

    Raises:
        ValueError: no documents, or too few tokens for a row; no processor or tokenizer where the variant needs one.
    """
    wanted = config.streams
    if not documents:
        raise ValueError("there are no documents to train on")
    for name, thing, of in (
        ("processor", processor, ("pixel", "pair")),
        ("tokenizer", tokenizer, ("text", "pair")),
    ):
        if thing is None and any(s in wanted for s in of):
            raise ValueError(f"{config.variant} needs a {name}")
    patches, tokens = config.pair_lengths
    strips, pairs = (
        None if processor is None else with_settings(processor, max_patches=n)
        for n in (config.length, patches)
    )
    made = Streams(strips, pairs, tokenizer, tokens)
    shared = config.variant != "monogpt"
    if "text" in wanted:
        own = documents if shared else documents[::2]
        made.text = token_rows(tokenizer, [d.text for d in own], config.length)
    if "pixel" in wanted:
        own = documents if shared else documents[1::2] or documents
        made.pixel = _packed(own, strips)
    if "pair" in wanted:
        made.pair = [
            text
            for text in _packed(documents, pairs)
            if len(encode_rows(tokenizer, [text], None, 10**9, end=True)[0]) <= tokens
        ]
        if not made.pair:
            raise ValueError(
                f"no strip of {patches} patches has a text of at most {tokens} tokens; make pair_tokens larger"
            )
    return made


def _packed(documents: Sequence[Document], processor: Any) -> list[str]:
    """Texts of full strips: whole lines of one document each."""
    return [text for d in documents for text in processor.pack(d.lines)]


class MixtureBatches(Batches):
    """Numbers of rows, and the stream that a step is of, drawn by the streams' weights."""

    def __init__(self, streams: Streams, config: PretrainConfig) -> None:
        super().__init__(lambda stage, step, size: self.take(stage, step, size), 1, config.seed)
        self.names = [n for n in config.streams if config.weights.get(n, 1.0) > 0]
        empty = [n for n in self.names if not streams.count(n)]
        if empty:
            raise ValueError(f"the stream {empty[0]!r} of {config.variant} has no rows")
        self.weights = [config.weights.get(n, 1.0) for n in self.names]
        self.seed = config.seed
        self.parts = {
            n: Batches({"input_ids": torch.arange(streams.count(n))[:, None]}, 1, config.seed)
            for n in self.names
        }
        self._drawn: list[tuple[int, int]] = []
        self._counts = [0] * len(self.names)

    def drawn(self, step: int) -> tuple[int, int]:
        """(number of the stream of a step, how many steps before it were of that stream)."""
        while len(self._drawn) <= step:
            draw = random.Random(f"{self.seed} mixture {len(self._drawn)}")
            at = draw.choices(range(len(self.names)), self.weights)[0]
            self._drawn.append((at, self._counts[at]))
            self._counts[at] += 1
        return self._drawn[step]

    def take(self, stage: str, step: int, size: int) -> dict[str, Tensor]:
        """The numbers of a step's rows [size, 1], and that of their stream."""
        at, before = self.drawn(step)
        name = self.names[at]
        ids = self.parts[name].take(f"{stage}-{name}", before, size)["input_ids"]
        return {"input_ids": ids, "stream": torch.full_like(ids, at)}
