# SPDX-License-Identifier: Apache-2.0
"""Documents of one language, one after the other, cut into rows of equal length for span corruption (spec 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.ernie_code.formatting import (
    UnformattedCodeWarning,
    encode_texts,
    is_indented_python,
)
from tenfold.ops.corruption import longest_chunk

_BATCH = 256  # texts tokenised at a time


# The name in the method's own terms: 512 gives (568, 114), 1024 gives (1137, 229).
raw_length = longest_chunk


def pack(
    documents: Iterable[Sequence[int]], length: int, *, separator: int | None = None, keep_last: bool = True
) -> Iterator[np.ndarray]:  # fmt: skip
    """Rows of ``length`` token ids (int32) of documents of one language, read as a stream.

    Args:
        documents: token ids without EOS. separator: an id to put after each document (t5 puts none).
        keep_last: also give what is left over at the end, which is shorter.

    Raises ValueError for a length below 1.
    """
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    left: list[np.ndarray] = []
    count = 0
    for document in documents:
        part = np.asarray(document, dtype=np.int32)
        if separator is not None:
            part = np.append(part, np.int32(separator))
        left.append(part)
        count += len(part)
        if count < length:
            continue
        stream = np.concatenate(left)
        full = count // length * length
        yield from stream[:full].reshape(-1, length)
        left, count = [stream[full:]], count - full
    if keep_last and count:
        yield np.concatenate(left)


class PackedRows(Sequence):
    """Rows of token ids in one flat array, as a map-style dataset of ``{"input_ids": int32 [n]}``.

    Args:
        rows: arrays of at most ``length`` ids; all but the last one must have that many.

    Raises ValueError for rows of other lengths.
    """

    def __init__(self, rows: Iterable[np.ndarray], length: int) -> None:
        found = [np.asarray(r, dtype=np.int32) for r in rows]
        wrong = [len(r) for r in found[:-1] if len(r) != length] + [
            len(r) for r in found[-1:] if not 1 <= len(r) <= length
        ]
        if wrong:
            raise ValueError(
                f"rows must have {length} tokens (the last one may have fewer), got {wrong[0]}"
            )
        self.length = length
        self.tokens = np.concatenate(found) if found else np.empty(0, np.int32)

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.length)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        at = int(number) + (len(self) if number < 0 else 0)
        if not 0 <= at < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return {"input_ids": self.tokens[at * self.length : (at + 1) * self.length]}

    def save(self, path: str | Path) -> None:
        """Writes a file in NumPy's format, of exactly this name, that ``load`` maps into memory."""
        with Path(path).open("wb") as file:  # a name would get the ending .npy
            np.save(file, np.concatenate([np.array([self.length], np.int32), self.tokens]))

    @classmethod
    def load(cls, path: str | Path) -> PackedRows:
        """Rows of a file of ``save``, read as they are asked for."""
        made = cls.__new__(cls)
        whole = np.load(path, mmap_mode="r")
        made.length, made.tokens = int(whole[0]), whole[1:]
        return made


def encoded(tokenizer: Any, texts: Iterable[str], *, code: bool = False) -> Iterator[list[int]]:
    """Token ids of texts, some hundred tokenised at a time."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield from encode_texts(tokenizer, batch, code=code)
            batch = []
    yield from encode_texts(tokenizer, batch, code=code)


def _watched(texts: Iterable[str]) -> Iterator[str]:
    warned = False
    for number, text in enumerate(texts):
        if not warned and is_indented_python(text):
            warned = True
            warnings.warn(
                f"pack_texts: text {number} is indented Python, whose spaces the tokenizer of a released checkpoint "
                "drops; pass code=True",
                UnformattedCodeWarning,
                stacklevel=2,
            )
        yield text


def pack_texts(
    tokenizer: Any, texts: Iterable[str], length: int, *, code: bool = False, separator: int | None = None,
    keep_last: bool = True,
) -> PackedRows:  # fmt: skip
    """Texts of one language as packed rows; with ``code``, formatted by ``format_code``.

    Without it, Python that is indented gets an ``UnformattedCodeWarning``, once.
    """
    ids = encoded(tokenizer, texts if code else _watched(texts), code=code)
    return PackedRows(pack(ids, length, separator=separator, keep_last=keep_last), length)
