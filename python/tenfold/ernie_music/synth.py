# SPDX-License-Identifier: Apache-2.0
"""A small synthesiser: notes to sound by adding partials, for data that needs no samples and no programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tenfold.data.scores import Note
from tenfold.training.checks import one_of


@dataclass(frozen=True)
class Instrument:
    """How an instrument sounds.

    Attributes:
        partials: (ratio to the fundamental, amplitude, seconds in which it falls to 1/e; 0: it is held).
        attack, release: seconds. vibrato: (depth in semitones, Hz). breath: noise, as a share of the tone.
        stretch: inharmonicity of strings, B in ``f_n = n f sqrt(1 + B n^2)``.
    """

    partials: tuple[tuple[float, float, float], ...]
    attack: float = 0.01
    release: float = 0.05
    vibrato: tuple[float, float] = (0.0, 0.0)
    breath: float = 0.0
    stretch: float = 0.0


def _series(
    count: int, fall: float, decay: float = 0.0, odd: bool = False
) -> tuple[tuple[float, float, float], ...]:
    numbers = range(1, count + 1, 2 if odd else 1)
    return tuple((float(n), n**-fall, decay / n**0.5) for n in numbers)


INSTRUMENTS: dict[str, Instrument] = {
    "piano": Instrument(_series(10, 1.3, 0.9), attack=0.004, release=0.12, stretch=4e-4),
    "guitar": Instrument(_series(9, 1.0, 0.45), attack=0.003, release=0.08),
    "marimba": Instrument(
        ((1.0, 1.0, 0.25), (3.93, 0.35, 0.08), (9.6, 0.12, 0.04)), attack=0.002, release=0.05
    ),
    "organ": Instrument(
        (
            (0.5, 0.45, 0.0),
            (1.0, 1.0, 0.0),
            (2.0, 0.7, 0.0),
            (3.0, 0.3, 0.0),
            (4.0, 0.4, 0.0),
            (8.0, 0.15, 0.0),
        ),
        attack=0.02,
        release=0.06,
    ),
    "flute": Instrument(
        ((1.0, 1.0, 0.0), (2.0, 0.22, 0.0), (3.0, 0.06, 0.0)),
        attack=0.06,
        release=0.08,
        vibrato=(0.25, 5.2),
        breath=0.06,
    ),
    "clarinet": Instrument(_series(11, 0.9, odd=True), attack=0.03, release=0.06),
    "violin": Instrument(_series(12, 0.8), attack=0.09, release=0.1, vibrato=(0.35, 6.0)),
    "trumpet": Instrument(
        tuple((float(n), (0.6 if n == 1 else 1.0) * n**-0.55, 0.0) for n in range(1, 11)),
        attack=0.035,
        release=0.05,
        breath=0.01,
    ),
}


def tone(
    instrument: str, pitch: int, seconds: float, sample_rate: int, rng: np.random.Generator
) -> np.ndarray:
    """One note float32 [S], with its release after ``seconds``; partials above 45 % of the rate are left out."""
    kind = INSTRUMENTS[instrument]
    total = max(2, int((seconds + kind.release) * sample_rate))
    t = np.arange(total) / sample_rate
    base = 440.0 * 2 ** ((pitch - 69) / 12)
    phase = 2 * np.pi * base * t
    depth, hz = kind.vibrato
    if depth:
        # Vibrato comes in after the attack, with a phase of its own.
        grow = np.clip((t - 0.1) / 0.2, 0, 1)
        swing = np.sin(2 * np.pi * hz * t + rng.uniform(0, 2 * np.pi)) * grow * depth
        phase = 2 * np.pi * base * np.cumsum(2 ** (swing / 12)) / sample_rate
    made = np.zeros(total)
    for ratio, amplitude, decay in kind.partials:
        stretched = ratio * (1 + kind.stretch * ratio * ratio) ** 0.5
        if stretched * base > 0.45 * sample_rate:
            continue
        wave = np.sin(stretched * phase + rng.uniform(0, 2 * np.pi)) * amplitude
        # High notes of strings and bars die sooner.
        made += wave * np.exp(-t / (decay * (261.6 / base) ** 0.5)) if decay else wave
    if kind.breath:
        made += kind.breath * rng.standard_normal(total) * np.abs(made).max(initial=0.0)
    envelope = np.minimum(t / kind.attack, 1.0)
    envelope *= np.clip((seconds + kind.release - t) / kind.release, 0, 1)
    return (made * envelope).astype(np.float32)


def render(
    notes: Sequence[Note],
    instrument: str,
    seconds_per_quarter: float,
    length: float,
    sample_rate: int,
    seed: Sequence[int] = (0,),
    gain: float = 0.7,
) -> np.ndarray:
    """Notes as a waveform float32 [S] of ``length`` seconds, its peak at ``gain``.

    Args:
        notes: starts and lengths in quarters; what begins after the end is left out. instrument: of ``INSTRUMENTS``.
        seed: of loudness, phases and breath.

    Raises ValueError for an unknown instrument, or nothing that sounds.
    """
    one_of("instrument", instrument, tuple(INSTRUMENTS))
    rng = np.random.default_rng(list(seed))
    made = np.zeros(round(length * sample_rate), np.float32)
    for note in notes:
        at = int(note.start * seconds_per_quarter * sample_rate)
        if at >= len(made):
            continue
        sound = tone(instrument, note.pitch, note.length * seconds_per_quarter, sample_rate, rng)
        sound = sound[: len(made) - at]
        made[at : at + len(sound)] += sound * rng.uniform(0.75, 1.0)
    peak = float(np.abs(made).max(initial=0.0))
    if peak == 0:
        raise ValueError("none of the notes sounds")
    return made * np.float32(gain / peak)
