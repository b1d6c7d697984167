# SPDX-License-Identifier: Apache-2.0
"""Texts about rendered pieces: several phrasings in several languages, and lists of tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tenfold.training.checks import one_of

REGISTERS = ("low", "middle", "high")
TEMPI = ("slow", "moderate", "fast")
TEXTURES = ("solo", "ensemble")
ATTRIBUTES = ("instrument", "register", "tempo")

# Words for the attributes, in the form that the phrasings need.
_WORDS: dict[str, dict[str, str]] = {
    "en": {
        "piano": "piano",
        "guitar": "guitar",
        "marimba": "marimba",
        "organ": "organ",
        "flute": "flute",
        "clarinet": "clarinet",
        "violin": "violin",
        "trumpet": "trumpet",
        "low": "low",
        "middle": "middle",
        "high": "high",
        "slow": "slow",
        "moderate": "moderate",
        "fast": "fast",
        "solo": "melody",
        "ensemble": "piece in several voices",
        "major": "major",
        "minor": "minor",
    },
    "de": {
        "piano": "Klavier",
        "guitar": "Gitarre",
        "marimba": "Marimba",
        "organ": "Orgel",
        "flute": "Flöte",
        "clarinet": "Klarinette",
        "violin": "Violine",
        "trumpet": "Trompete",
        "low": "tiefer",
        "middle": "mittlerer",
        "high": "hoher",
        "slow": "langsam",
        "moderate": "mäßig schnell",
        "fast": "schnell",
        "solo": "Melodie",
        "ensemble": "mehrstimmige Komposition",
        "major": "Dur",
        "minor": "Moll",
    },
    "fr": {
        "piano": "piano",
        "guitar": "guitare",
        "marimba": "marimba",
        "organ": "orgue",
        "flute": "flûte",
        "clarinet": "clarinette",
        "violin": "violon",
        "trumpet": "trompette",
        "low": "grave",
        "middle": "médium",
        "high": "aigu",
        "slow": "lent",
        "moderate": "modéré",
        "fast": "rapide",
        "solo": "mélodie",
        "ensemble": "pièce à plusieurs voix",
        "major": "majeur",
        "minor": "mineur",
    },
    "es": {
        "piano": "piano",
        "guitar": "guitarra",
        "marimba": "marimba",
        "organ": "órgano",
        "flute": "flauta",
        "clarinet": "clarinete",
        "violin": "violín",
        "trumpet": "trompeta",
        "low": "grave",
        "middle": "medio",
        "high": "agudo",
        "slow": "lento",
        "moderate": "moderado",
        "fast": "rápido",
        "solo": "melodía",
        "ensemble": "pieza a varias voces",
        "major": "mayor",
        "minor": "menor",
    },
    "zh": {
        "piano": "钢琴",
        "guitar": "吉他",
        "marimba": "马林巴",
        "organ": "管风琴",
        "flute": "长笛",
        "clarinet": "单簧管",
        "violin": "小提琴",
        "trumpet": "小号",
        "low": "低",
        "middle": "中",
        "high": "高",
        "slow": "慢",
        "moderate": "中等",
        "fast": "快",
        "solo": "旋律",
        "ensemble": "多声部乐曲",
        "major": "大调",
        "minor": "小调",
    },
}
# The last phrasing of a language is kept for prompts that training never saw.
_PHRASES: dict[str, tuple[str, ...]] = {
    "en": (
        "A {tempo} {solo} for {instrument} in the {register} register, by {composer}.",
        "{instrument}, {register} register, {tempo} tempo: a {solo} in {key} {mode} by {composer}.",
        "{composer} wrote this; a {instrument} plays it, {tempo} and in the {register} register.",
        "Give me {tempo} music: the {instrument} should play in its {register} register.",
    ),
    "de": (
        "{instrument} in {register} Lage, {tempo}: {solo} von {composer}.",
        "Eine {solo} von {composer}, {tempo} gespielt, {instrument} in {register} Lage.",
        "Ich hätte gern Musik: {tempo}, {instrument}, in {register} Lage.",
    ),
    "fr": (
        "{instrument}, registre {register}, tempo {tempo} : {solo} de {composer}.",
        "Une {solo} de {composer} pour {instrument} dans le registre {register}, tempo {tempo}.",
        "Je voudrais de la musique pour {instrument}, registre {register}, tempo {tempo}.",
    ),
    "es": (
        "{instrument}, registro {register}, tempo {tempo}: {solo} de {composer}.",
        "Una {solo} de {composer} para {instrument} en el registro {register}, tempo {tempo}.",
        "Quiero música para {instrument}, registro {register}, tempo {tempo}.",
    ),
    "zh": (
        "{composer}的{solo}，{instrument}，{register}音区，速度{tempo}。",
        "{instrument}演奏的{solo}，{register}音区，{tempo}速。",
        "请播放{tempo}速的{instrument}音乐，{register}音区。",
    ),
}
LANGUAGES = tuple(_PHRASES)


def caption(
    about: dict[str, Any], language: str = "en", phrasing: int = 0, composer: str | None = None
) -> str:
    """A sentence about a piece.

    Args:
        about: ``instrument``, ``register``, ``tempo``, and as far as known ``texture``, ``key``, ``mode``,
            ``composer``.
        language: of ``LANGUAGES``. phrasing: its number in the language; -1: the one that is kept for held-out prompts.
    """
    one_of("language", language, LANGUAGES)
    words = _WORDS[language]
    mode = about.get("mode") or "major"
    values = {
        "instrument": words[about["instrument"]],
        "register": words[about["register"]],
        "tempo": words[about["tempo"]],
        "solo": words[about.get("texture", "solo")],
        "composer": composer or about.get("composer") or "Anonymous",
        "key": about.get("key") or "C",
        "mode": words[mode],
    }
    text = _PHRASES[language][phrasing].format(**values)
    return text[:1].upper() + text[1:]


def phrasings(language: str) -> int:
    """How many phrasings of a language training may use; one more is held out."""
    return len(_PHRASES[language]) - 1


def tags(about: dict[str, Any]) -> str:
    """The same as comma-joined tags, in English."""
    kept = (
        about["instrument"],
        f"{about['register']} register",
        about["tempo"],
        about.get("texture", "solo"),
    )
    key = f"{about['key']} {about['mode']}" if about.get("key") else ""
    return ", ".join(t for t in (*kept, key, about.get("composer", "")) if t)


def texts_of(
    about: dict[str, Any],
    languages: Sequence[str],
    rng: np.random.Generator,
    held_out: bool = False,
) -> list[str]:
    """One text per language: a random phrasing of those for training, or the held-out one."""
    return [
        caption(about, lang, -1 if held_out else int(rng.integers(phrasings(lang))))
        for lang in languages
    ]
