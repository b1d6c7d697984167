# SPDX-License-Identifier: Apache-2.0
"""The packaged data set: excerpts of real scores, rendered by the synthesiser, with texts about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from tenfold.data.scores import COMPOSERS, Note, Score, packaged_scores
from tenfold.ernie_music.audio import write_audio
from tenfold.ernie_music.captions import LANGUAGES, REGISTERS, TEMPI, tags, texts_of
from tenfold.ernie_music.synth import INSTRUMENTS, render
from tenfold.training.checks import integers, one_of, positive
from tenfold.training.store import write_text

# Median pitch (MIDI) that excerpts are moved to by whole octaves; they end within half an octave of it.
_CENTRES = {"low": 43, "middle": 60, "high": 79}
# Notes per second of the median note.
_PACE = {"slow": 1.4, "moderate": 2.8, "fast": 5.5}


@dataclass(frozen=True)
class RecipeConfig:
    """What is rendered.

    Attributes:
        clips, test_clips: how many; test clips are of other scores, and in phrasings that training does not have.
        seconds: of a clip. sample_rate: Hz. instruments: of ``tenfold.ernie_music.synth.INSTRUMENTS``.
        languages: of the texts. composers: of ``tenfold.data.scores.COMPOSERS``. scores: of each composer, at most.
        ensemble: share of clips in which all parts are played, the others are melodies. seed.
    """

    clips: int = 600
    test_clips: int = 60
    seconds: float = 6.0
    sample_rate: int = 16_000
    instruments: tuple[str, ...] = tuple(INSTRUMENTS)
    registers: tuple[str, ...] = REGISTERS
    tempi: tuple[str, ...] = TEMPI
    languages: tuple[str, ...] = LANGUAGES
    composers: tuple[str, ...] = (
        "bach",
        "mozart",
        "haydn",
        "beethoven",
        "schumann_clara",
        "schumann_robert",
    )
    scores: int = 24
    ensemble: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        integers(self, {"clips": 1, "test_clips": 0, "sample_rate": 1000, "scores": 1, "seed": 0})
        positive("seconds", self.seconds)
        for name, allowed in (
            ("instruments", tuple(INSTRUMENTS)),
            ("registers", REGISTERS),
            ("tempi", TEMPI),
            ("languages", LANGUAGES),
            ("composers", tuple(COMPOSERS)),
        ):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values:
                raise ValueError(f"{name} must not be empty")
            for value in values:
                one_of(name, value, allowed)
        if not 0 <= self.ensemble <= 1:
            raise ValueError(f"ensemble must be in [0, 1], got {self.ensemble}")

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return json.loads(json.dumps(asdict(self)))


def register_of(pitches: Iterable[float]) -> str:
    """The register that pitches (MIDI numbers) are in, by their median."""
    middle = median(pitches)
    return "low" if middle < 51.5 else "middle" if middle < 69.5 else "high"


def _excerpt(notes: Sequence[Note], at: float, quarters: float) -> list[Note]:
    return [
        Note(n.start - at, n.length, n.pitch, n.part)
        for n in notes
        if at <= n.start < at + quarters and n.length > 0
    ]


def make_clip(
    score: Score, config: RecipeConfig, seed: Sequence[int]
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """(waveform float32 [S], what is known about it) of a random place of a score; None where little sounds."""
    rng = np.random.default_rng(list(seed))

    def pick(values: Sequence[str]) -> str:
        return str(values[int(rng.integers(len(values)))])

    about: dict[str, Any] = {
        "instrument": pick(config.instruments),
        "register": pick(config.registers),
        "tempo": pick(config.tempi),
    }
    ensemble = bool(rng.random() < config.ensemble) and len({n.part for n in score.notes}) > 1
    line = score.melody()
    end = line[-1].start
    start = line[int(rng.integers(len(line)))].start if end > 16 else line[0].start
    sample = [n.length for n in _excerpt(line, start, 16) if n.length]
    if len(sample) < 3:
        return None
    per_quarter = 1 / (_PACE[about["tempo"]] * median(sample))
    quarters = config.seconds / per_quarter
    notes = _excerpt(score.notes if ensemble else line, start, quarters)
    if len(notes) < 3 or sum(n.length for n in notes) < 0.5 * quarters:
        return None
    shift = 12 * round((_CENTRES[about["register"]] - median(n.pitch for n in notes)) / 12)
    notes = [Note(n.start, n.length, min(max(n.pitch + shift, 24), 108), n.part) for n in notes]
    if register_of(n.pitch for n in notes) != about["register"]:
        return None
    try:
        wave = render(
            notes, about["instrument"], per_quarter, config.seconds, config.sample_rate, (*seed, 1)
        )
    except ValueError:  # all of it is above half the rate
        return None
    onsets = sorted({n.start for n in notes})
    gaps = [b - a for a, b in pairwise(onsets)]
    about |= {
        "texture": "ensemble" if ensemble else "solo",
        "composer": score.composer,
        "key": score.key,
        "mode": score.mode,
        "score": score.name,
        "bpm": round(60 / per_quarter, 1),
        "median_pitch": median(n.pitch for n in notes),
        "notes_per_second": round(1 / (median(gaps) * per_quarter), 2) if gaps else 0.0,
    }
    return wave, about


def split_scores(scores: Sequence[Score], share: float = 0.15) -> tuple[list[Score], list[Score]]:
    """(training, test) scores: every so manyth is for tests."""
    every = max(2, round(1 / share))
    return (
        [s for i, s in enumerate(scores) if i % every != every - 1],
        [s for i, s in enumerate(scores) if i % every == every - 1],
    )


def make_rows(
    config: RecipeConfig, step: Callable[[str], None] = lambda text: None
) -> dict[str, list[tuple[np.ndarray, dict[str, Any]]]]:
    """``{"train": [(waveform, row), ...], "test": ...}``: a row has text, texts, tags and attributes.

    MissingData says how to get the scores.
    """
    scores = list(packaged_scores(config.composers, config.scores))
    np.random.default_rng([config.seed, 9]).shuffle(scores)  # type: ignore[arg-type]
    parts = dict(zip(("train", "test"), split_scores(scores)))
    made: dict[str, list[Any]] = {}
    for number, (name, count) in enumerate((("train", config.clips), ("test", config.test_clips))):
        made[name] = []
        if count and not parts[name]:
            raise ValueError(
                f"of {len(scores)} scores none is left to {name} with; allow more scores, or name more composers"
            )
        for attempt in range(20 * count):
            if len(made[name]) == count:
                break
            score = parts[name][attempt % len(parts[name])]
            found = make_clip(score, config, (config.seed, number, attempt))
            if found is None:
                continue
            wave, about = found
            rng = np.random.default_rng([config.seed, number, attempt, 2])
            texts = texts_of(about, config.languages, rng, held_out=name == "test")
            made[name].append(
                (wave, about | {"text": texts[0], "texts": texts, "tags": tags(about)})
            )
            step(f"{name}: {about['instrument']}")
        if len(made[name]) < count:
            raise ValueError(
                f"the scores gave only {len(made[name])} of {count} clips; allow more scores"
            )
    return made


def prepare(
    folder: str | Path,
    config: RecipeConfig | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> dict[str, Path]:
    """Writes the data set: 16-bit WAV files, and ``train.jsonl`` and ``test.jsonl`` with a row per file.

    A folder that has the same data already stays as it is. Raises ValueError for one with other data.
    """
    config, folder = config or RecipeConfig(), Path(folder)
    files = {name: folder / f"{name}.jsonl" for name in ("train", "test")}
    stamp = folder / "recipe.json"
    if stamp.is_file():
        if json.loads(stamp.read_text()) != config.to_json():
            raise ValueError(
                f"{folder} has data of another recipe; give another folder, or remove this one"
            )
        return files
    for name, rows in make_rows(config, step).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = []
        for i, (wave, row) in enumerate(rows):
            path = write_audio(
                folder / name / f"{i:05d}.wav", torch.from_numpy(wave), config.sample_rate
            )
            lines.append(
                json.dumps({"audio": str(path.relative_to(folder))} | row, ensure_ascii=False)
            )
        write_text(files[name], "".join(line + "\n" for line in lines))
    write_text(stamp, json.dumps(config.to_json(), indent=1))
    return files
