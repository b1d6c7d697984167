# SPDX-License-Identifier: Apache-2.0
"""Batches of both objectives: span corruption of one language, and translation by way of English (spec 3.3, 3.4).

Both collators take examples as a DataLoader, transformers' Trainer or accelerate hand them over, and give
``input_ids``, ``attention_mask`` and ``labels``. What is random in a row depends on (seed, step, row) alone, which
``MixtureDataset`` puts into each example: not on the batch's split over ranks, micro-batches or workers, nor on what
was read before. (Trainer must be told ``remove_unused_columns=False``, or it drops them.) Without those fields the
row's own content takes their place, with ``epoch``.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold import ops
from tenfold.ernie_code.batching import (
    IGNORE,
    Batch,
    Collator,
    TruncationWarning,
    padded,
    stream_of,
    turned_stream,
)
from tenfold.ernie_code.formatting import encode_texts, unformat_code, warn_unformatted
from tenfold.ernie_code.languages import is_code, prompt
from tenfold.training.checks import one_of

PTLM_MODES = ("full", "span")
DIRECTIONS = ("forward", "backward", "random", "both")

__all__ = ["PivotTranslationCollator", "SpanCorruptionCollator", "TruncationWarning"]


def _array(example: Any) -> np.ndarray:
    row = np.asarray(example["input_ids"] if isinstance(example, Mapping) else example)
    if row.ndim != 1 or (len(row) and row.dtype.kind not in "iu"):
        raise ValueError(f"a row must be token ids [n], got {row.dtype} of shape {list(row.shape)}")
    return row.astype(np.int64)


class SpanCorruptionCollator(Collator):
    """Raw token rows -> inputs with sentinels, and the removed spans as labels (SCLM).

    Called with examples: dicts with ``input_ids`` (and ``step``, ``row``), or arrays, lists or tensors of ids [n]
    without EOS, of any lengths up to ``length``. Gives int64 ``input_ids`` and ``attention_mask`` [B, S], ``labels``
    [B, T] with -100 as padding, and ``decoder_input_ids`` [B, T] on demand. ``packing.pack`` makes rows of ``length``.

    Args:
        tokenizer: whose sentinels, EOS, padding and length are used.
        max_inputs: tokens of the inputs at most, EOS included. max_targets: of the labels; default: what the longest
            row needs.
        density, mean_span: share of tokens that are masked, in [0, 1), and mean length of a span.
        seed: of all draws. epoch (an attribute): for rows without ``step`` and ``row``, set it before each epoch.
        roll: rotate each mask by a random number. aligned: see ``ops.span_corrupt``; False is t5's rule.
        final_sentinel: one more sentinel before the labels' EOS.
        allow_sentinels: accept rows that hold sentinels already.
        first_sentinel, num_sentinels: of a vocabulary whose sentinels have other names.
        padding: ``longest`` of the batch, or ``max_length``; pad_to_multiple_of applies to the former.
        decoder_input_ids: give them, too (models make them of the labels themselves).

    Attributes:
        length: tokens of the longest row, whose inputs fit and whose spans find a sentinel each.

    Raises:
        TypeError, ValueError: settings out of range; when called: no rows, a row longer than ``length``, one that
            holds sentinels. IndexError: ids outside the vocabulary.
    """

    def __call__(self, examples: Sequence[Any]) -> Batch:
        """A batch; see the class."""
        if not len(examples):
            raise ValueError("there are no rows to collate")
        rows = [_array(e) for e in examples]
        for i, row in enumerate(rows):
            self._check_length(i, len(row))
        self._check_ids(rows)
        streams = self._streams(examples, (r.tobytes() for r in rows))
        tokens, lengths = padded(rows)
        return self._finish(
            *self._corrupt_rows(tokens, lengths, streams, self.max_inputs, self.max_targets)
        )

    def corrupt(self, tokens: Tensor, lengths: Tensor, *, step: int, row: int = 0) -> Batch:
        """A batch of rows that are on a device already, the same as of the call; there without a synchronisation.

        Args:
            tokens: int32 or int64 [B, L <= length]. lengths: int [B]. step, row: of the first row; the others follow
                it.

        Off the CPU, rows are padded to the longest possible and ids are not checked.
        """
        if tokens.dtype == torch.int32:
            tokens = tokens.to(torch.int64)  # batches are int64
        if tokens.shape[-1] > self.length:
            self._check_length(0, tokens.shape[-1])
        checked = tokens.dtype == torch.int64 and lengths.dtype in (torch.int32, torch.int64)
        if checked and tokens.device.type == "cpu" and lengths.shape == tokens.shape[:1]:
            self._check_ids([r[:n].numpy() for r, n in zip(tokens, lengths.tolist())])
        stream = stream_of(step, row)
        return self._finish(
            *self._corrupt(tokens, lengths, stream, self.max_inputs, self.max_targets)
        )

    def _check_length(self, number: int, length: int) -> None:
        if length <= self.length:
            return
        needed = self._sentinels(length)
        if self._sentinels(self.length + 1) > self.num_sentinels:
            raise ValueError(
                f"row {number} has {length} tokens and needs {needed} sentinels, there are {self.num_sentinels}: "
                f"rows may have at most {self.length}"
            )
        raise ValueError(
            f"row {number} has {length} tokens; corrupted inputs of at most max_inputs = {self.max_inputs} tokens "
            f"come from rows of at most {self.length} (tenfold.ernie_code.packing cuts them)"
        )


class PivotTranslationCollator(Collator):
    r"""Pairs of texts -> ``translate {source} to {target}: \n`` + source, and the whole target as labels (PTLM).

    Called with dicts with ``source`` and ``target`` (texts, or token ids without EOS), ``source_language`` and
    ``target_language`` (names, or codes of django's catalogues). Text of a programming language is formatted by
    ``format_code`` first. What does not fit is cut off at its end, with a warning; the prompt and EOS never are.

    Args:
        tokenizer, max_inputs, max_targets, options: as of ``SpanCorruptionCollator``; those of masks apply to mode
            ``span`` only. Without max_targets, whole targets may have max_inputs tokens.
        ptlm_mode: ``full``: the target is predicted as a whole, as in translation. ``span``: source and target in a row
            are corrupted, as span corruption does it, behind the prompt.
        directions: ``forward`` as given, ``backward`` from target to source, ``random`` one of them by (seed, step,
            row), ``both`` as two rows.
        strict: raise ValueError for an empty source or target instead of leaving the pair out.
        formatted: code is formatted already; a warning says so where it is not.

    Attributes:
        skipped, truncated: pairs left out, rows cut, since the collator was made (in this process).

    Raises:
        ValueError: settings out of range; when called: no pair that is not empty; a prompt that does not fit.
        IndexError: ids outside the vocabulary.
    """

    def __init__(
        self, tokenizer: Any, *, max_inputs: int = 512, max_targets: int | None = None, ptlm_mode: str = "full",
        directions: str = "random", strict: bool = False, formatted: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        one_of("ptlm_mode", ptlm_mode, PTLM_MODES)
        one_of("directions", directions, DIRECTIONS)
        if max_targets is None and ptlm_mode == "full":
            max_targets = max_inputs
        super().__init__(tokenizer, max_inputs=max_inputs, max_targets=max_targets, **options)
        self.ptlm_mode, self.directions = ptlm_mode, directions
        self.strict, self.formatted = strict, formatted
        self.skipped = self.truncated = 0
        self._prompts: dict[tuple[str, str], np.ndarray] = {}
        self._rooms: dict[int, int] = {}

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch; see the class."""
        rows = self._pairs(examples)
        prompts = [self._prompt(a, b) for a, b, _, _, _ in rows]
        sources = self._encode([(a, x) for a, _, x, _, _ in rows])
        targets = self._encode([(b, y) for _, b, _, y, _ in rows])
        self._check_ids(sources)
        self._check_ids(targets)
        if self.ptlm_mode == "span":
            streams = [stream for *_, stream in rows]
            return self._spans(prompts, sources, targets, streams)
        return self._packed(prompts, sources, targets)

    def _pairs(self, examples: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Any, Any, int]]:
        """(source language, target language, source, target, stream) of each row."""
        made = []
        for number, e in enumerate(examples):
            _check_pair(number, e)
        contents = (repr((e["source"], e["target"])).encode("utf-8", "surrogatepass") for e in examples)  # fmt: skip
        for number, (e, stream) in enumerate(zip(examples, self._streams(examples, contents))):
            lost = [side for side in ("source", "target") if _empty(e[side])]
            if lost:
                if self.strict:
                    raise ValueError(f"pair {number} has an empty {lost[0]}")
                self.skipped += 1
                continue
            forward = (e["source_language"], e["target_language"], e["source"], e["target"], stream)
            backward = (e["target_language"], e["source_language"], e["target"], e["source"], stream)  # fmt: skip
            turned = self.directions == "backward" or (
                self.directions == "random" and _coin(self.seed, stream)
            )
            if self.directions == "both":
                made += [forward, (*backward[:4], turned_stream(stream))]
            else:
                made.append(backward if turned else forward)
        if not made:
            raise ValueError(f"none of the {len(examples)} pairs has both a source and a target")
        return made

    def _prompt(self, source: str, target: str) -> np.ndarray:
        key = (source, target)
        if key not in self._prompts:
            text = prompt(source, target)
            ids = np.array(encode_texts(self.tokenizer, [text])[0], dtype=np.int64)
            if len(ids) + 2 > self.max_inputs:
                raise ValueError(
                    f"the prompt {text!r} has {len(ids)} tokens; with a token of the source and EOS it does not fit "
                    f"into max_inputs = {self.max_inputs}"
                )
            self._prompts[key] = ids
        return self._prompts[key]

    def _encode(self, texts: Sequence[tuple[str, Any]]) -> list[np.ndarray]:
        made: list[np.ndarray] = [np.empty(0, np.int64)] * len(texts)
        for code in (False, True):
            own = [i for i, (name, t) in enumerate(texts) if isinstance(t, str) and is_code(name) == code]  # fmt: skip
            given = [texts[i][1] for i in own]
            if code and self.formatted:
                for text in given:
                    warn_unformatted(text, "formatted=True, but code", stacklevel=4)
                given = [unformat_code(text) for text in given]
            for i, ids in zip(own, encode_texts(self.tokenizer, given, code=code)):
                made[i] = np.array(ids, dtype=np.int64)
        for i, (_, text) in enumerate(texts):
            if not isinstance(text, str):
                made[i] = _array(text)
        return made

    def _packed(
        self, prompts: list[np.ndarray], sources: list[np.ndarray], targets: list[np.ndarray]
    ) -> Batch:  # fmt: skip
        *made, cut = ops.pair_pack(
            *_ragged(sources), *_ragged(targets), *_ragged(prompts), self.eos_id, self.pad_id, self.max_inputs,
            self.max_targets, target_pad_id=IGNORE,
        )  # fmt: skip
        self._warn(cut.tolist())
        return self._finish(*made)

    def _spans(
        self, prompts: list[np.ndarray], sources: list[np.ndarray], targets: list[np.ndarray], streams: list[int]
    ) -> Batch:  # fmt: skip
        rows, cut = [], []
        for before, x, y in zip(prompts, sources, targets):
            room = self._room(len(before))
            kept = min(max(room - len(y), 0), len(x))
            rows.append(np.concatenate([x[:kept], y[: room - kept]]))
            cut.append([len(x) - kept, max(len(y) - room + kept, 0)])
        self._warn(cut)
        inputs, in_len, labels, tgt_len = self._corrupt_rows(
            *padded(rows), streams, self.max_inputs, self.max_targets
        )
        bodies = [row[: n - 1].numpy() for row, n in zip(inputs, in_len.tolist())]
        answers = [row[: n - 1].numpy() for row, n in zip(labels, tgt_len.tolist())]
        *made, _ = ops.pair_pack(
            *_ragged(bodies), *_ragged(answers), *_ragged(prompts), self.eos_id, self.pad_id, self.max_inputs,
            self.max_targets, target_pad_id=IGNORE,
        )  # fmt: skip
        return self._finish(*made)

    def _room(self, before: int) -> int:
        """Tokens of source and target that fit behind a prompt of so many, corrupted."""
        if before not in self._rooms:
            room = min(self._longest(self.max_inputs - before), self.length)
            while room > 0 and self._sizes(room)[1] > self.max_targets:
                room -= 1
            if room == 0:
                raise ValueError(
                    f"no token of source and target fits: its labels have {self._sizes(1)[1]} tokens; max_targets = "
                    f"{self.max_targets}"
                )
            self._rooms[before] = room
        return self._rooms[before]

    def _warn(self, cut: Sequence[Sequence[int]]) -> None:
        sources, targets = (sum(row[side] > 0 for row in cut) for side in (0, 1))
        self.truncated += sum(any(row) for row in cut)
        if sources or targets:
            warnings.warn(
                f"cut to fit: {sources} sources (max_inputs = {self.max_inputs}) and {targets} targets (max_targets = "
                f"{self.max_targets}) of {len(cut)} rows",
                TruncationWarning,
                stacklevel=4,
            )


def _empty(text: Any) -> bool:
    return not text.strip() if isinstance(text, str) else len(text) == 0


def _check_pair(number: int, example: Mapping[str, Any]) -> None:
    for name in ("source", "target", "source_language", "target_language"):
        if name not in example:
            raise ValueError(f"pair {number} has no {name}; it has {', '.join(map(str, example))}")
        value = example[name]
        text = name in ("source", "target")
        if not isinstance(value, str) and not (text and hasattr(value, "__len__")):
            wanted = "a text or token ids" if text else "a name"
            raise TypeError(f"{name} of pair {number} must be {wanted}, got {value!r}")


def _coin(seed: int, stream: int) -> bool:
    return bool(hashlib.blake2b(f"{seed} {stream}".encode(), digest_size=1).digest()[0] & 1)


def _ragged(rows: Iterable[np.ndarray]) -> tuple[Tensor, Tensor]:
    """All rows one after the other, and where each begins [B + 1]."""
    found = list(rows)
    offsets = np.cumsum([0, *(len(r) for r in found)])
    return torch.from_numpy(np.concatenate(found)), torch.from_numpy(offsets)
