# SPDX-License-Identifier: Apache-2.0
"""What goes into a renderer and what comes out: jobs, batches, and a collator for DataLoaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from tenfold.pixelgpt.strips import Strip, StripMaker

if TYPE_CHECKING:
    from tenfold.pixelgpt.processor import PixelProcessor


@dataclass(frozen=True)
class Job:
    """One strip to render: a text, a pair, or words. ``sample``: which text of the batch it is of.

    ``shift``: position of the first character in the text that goes on over several strips.
    """

    sample: int
    first: str = ""
    second: str | None = None
    words: tuple[str, ...] | None = None
    shift: int = 0

    def lay(self, maker: StripMaker) -> Strip:
        """The strip."""
        if self.words is not None:
            return maker.words(self.words)
        return (
            maker.single(self.first) if self.second is None else maker.pair(self.first, self.second)
        )

    def part(self, text: str, shift: int) -> Job:
        """The same with a part of the text that goes on."""
        if self.second is None:
            return replace(self, first=text, shift=shift)
        return replace(self, second=text, shift=shift)


def _job(sample: int, text: Any) -> Job:
    if isinstance(text, str):
        return Job(sample, text)
    if isinstance(text, tuple) and len(text) == 2 and all(isinstance(t, str) for t in text):
        return Job(sample, *text)
    if isinstance(text, list) and all(isinstance(t, str) for t in text):
        return Job(sample, words=tuple(text))
    told = f"a {type(text).__name__}"
    if isinstance(text, tuple | list):
        told += f" of {len(text)}: " + ", ".join(type(t).__name__ for t in text[:4])
    raise TypeError(
        "text must be a str, a pair (str, str), a list of words, or a list of those, got "
        f"{told} as text {sample}"
    )


def jobs_of(text: Any, text_pair: Any = None, is_split_into_words: bool = False) -> list[Job]:
    """Jobs of what a processor is called with; TypeError or ValueError says what is wrong with it."""
    if text_pair is not None:
        if is_split_into_words:
            raise ValueError("word lists cannot be pairs: is_split_into_words with text_pair")
        if isinstance(text, str) and isinstance(text_pair, str):
            return [_job(0, (text, text_pair))]
        if not isinstance(text, list) or not isinstance(text_pair, list):
            raise TypeError(
                "text and text_pair must both be a str or both a list, got "
                f"{type(text).__name__} and {type(text_pair).__name__}"
            )
        if len(text) != len(text_pair):
            raise ValueError(f"text has {len(text)} texts, text_pair {len(text_pair)}")
        return [_job(i, pair) for i, pair in enumerate(zip(text, text_pair))]
    if is_split_into_words:
        if not isinstance(text, list):
            raise TypeError(
                f"with is_split_into_words text must be a list, got a {type(text).__name__}"
            )
        text = text if text and all(isinstance(t, list) for t in text) else [text]
    return [_job(i, t) for i, t in enumerate(text)] if isinstance(text, list) else [_job(0, text)]


class PixelBatch(dict):
    """A dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this batch has no {name!r}; it has {', '.join(self)}") from None

    def tensors(self) -> PixelBatch:
        """Arrays as tensors that share their memory."""
        import torch

        return PixelBatch(
            {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in self.items()}
        )

    def to(self, *args: Any, **kwargs: Any) -> PixelBatch:
        """The same with every tensor moved, as ``Tensor.to`` does it with a device."""
        return PixelBatch(
            {k: v.to(*args, **kwargs) if hasattr(v, "to") else v for k, v in self.items()}
        )


def packed_batches(
    processor: PixelProcessor, lines: Iterable[str], batch_size: int = 64, **options: Any
) -> Iterator[PixelBatch]:
    """Batches of full strips from a stream of lines (``PixelProcessor.pack``), however long it is.

    ``options`` are keywords of the processor's call. The last batch may be smaller.
    """
    packed = iter(processor.pack(lines))
    while texts := list(islice(packed, batch_size)):
        yield processor(texts, **options)


@dataclass
class PixelCollator:
    """``collate_fn`` that renders on the fly, in the main process or in the workers of a DataLoader.

    Args:
        processor: a PixelProcessor; it is pickled as settings and paths, and caches are built anew per worker.
        text, text_pair, label: keys of a row; ``label`` becomes ``labels`` [B], int64 or float32.
        options: keywords of the processor's call.
    """

    processor: PixelProcessor
    text: str = "text"
    text_pair: str | None = None
    label: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, rows: Sequence[dict[str, Any] | str]) -> dict[str, Any]:
        """A batch of the rows (dicts, or plain texts)."""
        import torch

        texts = [row if isinstance(row, str) else row[self.text] for row in rows]
        pairs = None if self.text_pair is None else [row[self.text_pair] for row in rows]  # type: ignore[index]
        batch = dict(self.processor(texts, pairs, **self.options))
        if self.label is not None:
            batch["labels"] = torch.tensor([row[self.label] for row in rows])  # type: ignore[index]
        return batch
