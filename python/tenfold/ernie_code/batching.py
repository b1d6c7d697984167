# SPDX-License-Identifier: Apache-2.0
"""What both collators share: random streams by (seed, step, row), lengths, and the last step of making a batch."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold import ops
from tenfold.ernie_code.tokenizer import sentinels
from tenfold.ops.corruption import corrupted_sizes, longest_chunk, span_counts
from tenfold.training.checks import integers, one_of

IGNORE = -100
PADDINGS = ("longest", "max_length")
_STEP_BITS, _ROW_BITS = 30, 31
_TURNED = 1 << _ROW_BITS  # in the stream of a pair's second row

Batch = dict[str, Tensor]


class TruncationWarning(UserWarning):
    """A source or a target did not fit and lost tokens at its end."""


def stream_of(step: int, row: int) -> int:
    """The random stream of the row at place ``row`` of step ``step``; rows of a step have consecutive ones.

    Raises ValueError for a step outside [0, 2^30) or a row outside [0, 2^31).
    """
    if not (0 <= step < 1 << _STEP_BITS and 0 <= row < 1 << _ROW_BITS):
        raise ValueError(f"step must be in [0, 2^30) and row in [0, 2^31), got {step} and {row}")
    return (step << _ROW_BITS + 1) + row


def turned_stream(stream: int) -> int:
    """That of a pair's second row, in the other direction; rows of a step have consecutive ones of these, too."""
    return stream ^ _TURNED


class Collator:
    """What both share: ids, lengths, random streams, and the last step of making a batch."""

    def __init__(
        self, tokenizer: Any, *, max_inputs: int = 512, max_targets: int | None = None, density: float = 0.15,
        mean_span: float = 3.0, seed: int = 0, roll: bool = False, aligned: bool = True, final_sentinel: bool = False,
        allow_sentinels: bool = False, first_sentinel: int | None = None, num_sentinels: int | None = None,
        padding: str = "longest", pad_to_multiple_of: int | None = None, decoder_input_ids: bool = False,
    ) -> None:  # fmt: skip
        if (first_sentinel is None) != (num_sentinels is None):
            raise ValueError("first_sentinel and num_sentinels are given both or neither")
        if first_sentinel is None or num_sentinels is None:
            first_sentinel, num_sentinels = sentinels(tokenizer)
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer)
        self.first_sentinel, self.num_sentinels = first_sentinel, num_sentinels
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        if self.eos_id is None or self.pad_id is None:
            raise ValueError("the tokenizer must have an EOS and a padding token")
        self.max_inputs, self.seed, self.epoch = max_inputs, seed, 0
        self.density, self.mean_span, self.final_sentinel = density, mean_span, final_sentinel
        self.roll, self.aligned, self.allow_sentinels = roll, aligned, allow_sentinels
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_targets = (
            1 if max_targets is None else max_targets
        )  # till the longest row is known
        integers(
            self, {"max_inputs": 2, "max_targets": 1, "seed": 0, "pad_to_multiple_of": 1}, ("pad_to_multiple_of",)
        )  # fmt: skip
        self.length = self._longest(max_inputs)
        self.length = self.most_tokens()
        if max_targets is None:
            self.max_targets = self._sizes(self.length)[1]
        one_of("padding", padding, PADDINGS)
        self.padding, self.decoder_input_ids = padding, decoder_input_ids

    def _streams(self, examples: Sequence[Any], contents: Iterable[bytes]) -> list[int]:
        made = []
        for example, content in zip(examples, contents):
            if isinstance(example, Mapping) and "step" in example and "row" in example:
                made.append(stream_of(int(example["step"]), int(example["row"])))
            else:
                key = f"{self.epoch} ".encode() + content
                digest = hashlib.blake2b(key, digest_size=8).digest()
                # Bit 62 is in no stream of a step.
                made.append(1 << 62 | int.from_bytes(digest, "little") >> 2)
        return made

    def _sizes(self, length: int) -> tuple[int, int]:
        """Tokens of inputs and targets that a row may need."""
        return corrupted_sizes(length, self.density, self.mean_span, self.final_sentinel, roll=self.roll,
                               aligned=self.aligned)  # fmt: skip

    def _longest(self, max_inputs: int) -> int:
        """The longest row whose inputs fit."""
        return longest_chunk(max_inputs, self.density, self.mean_span, roll=self.roll)[0]

    def _padded(self, side: Tensor, lengths: Tensor, fill: int) -> Tensor:
        """A side with the columns that ``padding`` asks for; off the CPU, lengths count as the longest possible."""
        if self.padding == "max_length":
            return side
        width = side.shape[1]
        if side.device.type == "cpu":
            width = int(lengths.max()) if len(lengths) else 0
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        if width > side.shape[1]:
            return torch.nn.functional.pad(side, (0, width - side.shape[1]), value=fill)
        return side[:, :width].contiguous()

    def _finish(self, inputs: Tensor, in_len: Tensor, labels: Tensor, tgt_len: Tensor) -> Batch:
        inputs = self._padded(inputs, in_len, self.pad_id)
        labels = self._padded(labels, tgt_len, IGNORE)
        at = torch.arange(inputs.shape[1], device=inputs.device)
        batch = {
            "input_ids": inputs,
            "attention_mask": (at < in_len[:, None]).to(torch.int64),
            "labels": labels,
        }
        if self.decoder_input_ids:
            batch["decoder_input_ids"] = ops.shift_right(labels, self.pad_id, self.pad_id, IGNORE)
        return batch

    def _corrupt(
        self, tokens: Tensor, lengths: Tensor, stream: int, max_inputs: int, max_targets: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.span_corruption(
            tokens, lengths, self.density, self.mean_span, self.seed, stream, self.first_sentinel, self.num_sentinels,
            self.eos_id, self.pad_id, max_inputs, max_targets, self.roll, self.aligned, self.final_sentinel,
            allow_sentinels=self.allow_sentinels, target_pad_id=IGNORE,
        )  # fmt: skip

    def _corrupt_rows(
        self, tokens: Tensor, lengths: Tensor, streams: Sequence[int], max_inputs: int, max_targets: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """As ``_corrupt``, each row with a stream of its own: one call for each run of consecutive ones."""
        order = sorted(range(len(streams)), key=streams.__getitem__)
        ranked = [streams[i] for i in order]
        tokens, lengths = tokens[order], lengths[order]
        starts = [i for i, s in enumerate(ranked) if i == 0 or s != ranked[i - 1] + 1]
        parts = [
            self._corrupt(tokens[a:b], lengths[a:b], ranked[a], max_inputs, max_targets)
            for a, b in zip(starts, [*starts[1:], len(ranked)])
        ]
        back = torch.tensor(order).argsort()
        inputs, in_len, labels, tgt_len = (torch.cat(part)[back] for part in zip(*parts))
        return inputs, in_len, labels, tgt_len

    def _check_ids(self, rows: Sequence[np.ndarray]) -> None:
        for i, row in enumerate(rows):
            if len(row) and not (row.min() >= 0 and row.max() < self.vocab_size):
                wrong = row[(row < 0) | (row >= self.vocab_size)][0]
                raise IndexError(
                    f"token ids must be in [0, {self.vocab_size}), the tokenizer's, got {wrong} in row {i}"
                )

    def _sentinels(self, length: int) -> int:
        """Sentinels that a row may need: for its spans, or for its runs of kept tokens where those are marked."""
        spans = span_counts(length, self.density, self.mean_span)[1] if length > 1 else 0
        marks = spans + int(self.roll) if spans else int(length > 0 and not self.aligned)
        return marks + int(self.final_sentinel)

    def most_tokens(self) -> int:
        """The longest row whose spans do not outnumber the sentinels (2009 at 0.15 and 3 with 100 of them)."""
        return bisect.bisect_right(
            range(1, self.length + 1), self.num_sentinels, key=self._sentinels
        )


def padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Rows of ids as int64 [B, longest], filled up with 0, and their lengths [B]."""
    lengths = np.array([len(r) for r in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(tokens), torch.from_numpy(lengths)
