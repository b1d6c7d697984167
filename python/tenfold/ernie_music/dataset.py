# SPDX-License-Identifier: Apache-2.0
"""Audio with texts: rows of CSV and JSON lines, crops at the model's rate, the batches of a run."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.ernie_music.audio import (
    audio_length,
    check_waveform,
    fit_length,
    read_audio,
    resample,
    with_channels,
)
from tenfold.ernie_music.diffusion import draw_times, row_seed
from tenfold.ernie_music.train_config import TEXTS, MusicTrainConfig
from tenfold.training.batches import Batches
from tenfold.training.checks import one_of

_AROUND = 64  # samples of the file on either side of a crop, for the resampling filter


@dataclass(frozen=True)
class Row:
    """A piece: its file, what is said about it, all else that the file of rows has.

    Attributes:
        audio: a path, or the waveform float32 [C, S] itself (then ``sample_rate`` is its rate).
        text: a sentence. texts: several. tags: comma-joined.
    """

    audio: Path | Tensor
    text: str = ""
    texts: tuple[str, ...] = ()
    tags: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    sample_rate: int | None = None

    def prompts(self, kind: str) -> tuple[str, ...]:
        """What training may read: the text, all texts, or the tags."""
        one_of("text", kind, TEXTS)
        if kind == "tags":
            return (self.tags,)
        return self.texts if kind == "texts" and self.texts else (self.text,)


def _row(values: dict[str, Any], folder: Path, where: str) -> Row:
    audio = values.get("audio") or values.get("path") or values.get("file")
    if not audio:
        raise ValueError(f"{where}: a row needs the column 'audio' (a path), got {sorted(values)}")
    path = folder / str(audio)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no file {path}")
    tags = values.get("tags") or ""
    texts = values.get("texts") or ()
    if not isinstance(tags, str):
        tags = ", ".join(map(str, tags))
    if isinstance(texts, str):
        texts = (texts,)
    text = str(values.get("text") or (texts[0] if texts else ""))
    if not (text or tags):
        raise ValueError(f"{where}: a row needs 'text', 'texts' or 'tags'")
    known = ("audio", "path", "file", "text", "texts", "tags")
    about = {k: v for k, v in values.items() if k not in known}
    return Row(path, text or tags, tuple(map(str, texts)), tags or text, about)


def read_rows(file: str | Path) -> list[Row]:
    """Rows of a ``.csv`` (with a header) or ``.jsonl`` file; paths are relative to its folder.

    Columns: ``audio`` (path), ``text``, ``texts`` (a list, JSON lines only), ``tags``; all others are kept as
    ``about``.

    Raises FileNotFoundError, ValueError with the line.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    made = []
    with file.open(encoding="utf-8", newline="") as lines:
        if file.suffix.lower() == ".csv":
            for i, values in enumerate(csv.DictReader(lines), 2):
                made.append(_row(values, file.parent, f"{file.name}, line {i}"))
        else:
            for i, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file.name}, line {i} is no JSON: {error.msg}") from None
                made.append(_row(values, file.parent, f"{file.name}, line {i}"))
    if not made:
        raise ValueError(f"{file} has no rows")
    return made


def rows_of(made: Iterable[tuple[np.ndarray, dict[str, Any]]], sample_rate: int) -> list[Row]:
    """Rows of waveforms in memory: what the packaged recipe makes."""
    rows = []
    for wave, values in made:
        about = {k: v for k, v in values.items() if k not in ("text", "texts", "tags")}
        rows.append(
            Row(
                torch.from_numpy(wave)[None] if wave.ndim == 1 else torch.from_numpy(wave),
                values["text"],
                tuple(values.get("texts", ())),
                values.get("tags", ""),
                about,
                sample_rate,
            )
        )
    return rows


class AudioTexts:
    """Rows as waveforms at a model's rate and channels.

    Args:
        rows: of :func:`read_rows`. sample_rate, channels: of the model.
        memory: bytes of waveforms that are kept once read; what is beyond is read again, crop by crop.
    """

    def __init__(
        self, rows: Sequence[Row], sample_rate: int, channels: int, memory: int = 2**31
    ) -> None:
        if not rows:
            raise ValueError("there are no rows")
        self.rows, self.sample_rate, self.channels = list(rows), sample_rate, channels
        self._kept: dict[int, Tensor] = {}
        self._free = memory

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """Identifies the data in a work folder: texts, and names and sizes of files."""
        made = hashlib.sha256(f"{self.sample_rate} {self.channels}".encode())
        for row in self.rows:
            audio = row.audio
            what = (
                f"{audio.name} {audio.stat().st_size}"
                if isinstance(audio, Path)
                else f"{list(audio.shape)} {float(audio.abs().sum())}"
            )
            made.update(f"{what} {row.prompts('texts')} {row.tags}\n".encode())
        return made.hexdigest()[:16]

    def waveform(self, number: int) -> Tensor:
        """A whole piece float32 [channels, S] in [-1, 1]. ValueError for NaN or an unknown rate."""
        if number in self._kept:
            return self._kept[number]
        row = self.rows[number]
        x, rate = (
            read_audio(row.audio) if isinstance(row.audio, Path) else (row.audio, row.sample_rate)
        )
        made = self._ready(x, rate, row)
        if made.numel() * 4 <= self._free:
            self._free -= made.numel() * 4
            self._kept[number] = made
        return made

    def _ready(self, x: Tensor, rate: int | None, row: Row) -> Tensor:
        name = row.audio.name if isinstance(row.audio, Path) else "audio"
        made = resample(
            with_channels(check_waveform(x, name), self.channels), rate, self.sample_rate
        )
        return made.clamp(-1, 1).contiguous()  # the filter's ringing may pass 1

    def crop(self, number: int, length: int, rng: np.random.Generator) -> Tensor:
        """``length`` samples [channels, length] from a random place; what is shorter is followed by silence."""
        row = self.rows[number]
        if number not in self._kept and isinstance(row.audio, Path):
            frames, rate = audio_length(row.audio)
            size = frames * self.sample_rate // rate
            if size * self.channels * 4 > self._free:
                return self._read_crop(row, frames, rate, size, length, rng)
        x = self.waveform(number)
        start = int(rng.integers(max(0, x.shape[1] - length) + 1))
        return fit_length(x[:, start:], length)

    def _read_crop(
        self, row: Row, frames: int, rate: int, size: int, length: int, rng: np.random.Generator
    ) -> Tensor:
        start = int(rng.integers(max(0, size - length) + 1))
        ratio = rate / self.sample_rate
        first = max(0, int(start * ratio) - _AROUND)
        last = min(frames, int((start + length) * ratio) + _AROUND + 1)
        x, _ = read_audio(row.audio, first, last - first)  # type: ignore[arg-type]
        made = self._ready(x, rate, row)
        return fit_length(made[:, round(start - first / ratio) :], length)


class MusicBatches:
    """Which rows a step has, and their crops, texts and times: functions of seed, step and place in the batch.

    Args:
        data: the pieces. encoder: texts -> (states, mask); None: a model without text. length: samples of a crop.
    """

    def __init__(
        self, data: AudioTexts, encoder: Any, config: MusicTrainConfig, length: int
    ) -> None:
        self.data, self.encoder, self.config, self.length = data, encoder, config, length
        self._order = Batches({"input_ids": torch.arange(len(data))[:, None]}, 1, config.seed)

    def take(self, stage: str, step: int, size: int) -> dict[str, Tensor]:
        """Numbers of rows, places in the batch, step and times of a step, over all ranks."""
        numbers = self._order.take(stage, step, size)["input_ids"][:, 0]
        c = self.config
        t = draw_times(c.seed, step, size, c.time_sampler, c.time_warp)
        return {
            "number": numbers,
            "place": torch.arange(size),
            "step": torch.full((size,), step),
            "t": t,
        }

    def epoch(self, step: int) -> int:
        """The epoch that a step is in, from 0."""
        return step * self.config.batch_size // len(self.data)

    def load(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A part of ``take``'s rows with ``audio`` [B, C, L], ``states`` [B, n, d_E] and ``mask`` [B, n]."""
        crops, prompts = [], []
        for number, place, step in zip(*(batch[k].tolist() for k in ("number", "place", "step"))):
            rng = row_seed(self.config.seed, 1, step, place)
            crop = self.data.crop(number, self.length, rng)
            crops.append(-crop if rng.random() < self.config.polarity_flip else crop)
            choices = self.data.rows[number].prompts(self.config.text)
            prompt = choices[int(rng.integers(len(choices)))]
            prompts.append("" if rng.random() < self.config.condition_dropout else prompt)
        made = {k: batch[k] for k in ("place", "step", "t")} | {"audio": torch.stack(crops)}
        if self.encoder is not None:
            made["states"], made["mask"] = self.encoder(prompts)
        return made
