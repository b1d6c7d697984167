# SPDX-License-Identifier: Apache-2.0
"""ERNIE-Music: text-to-waveform diffusion (arXiv 2302.04456)."""

from __future__ import annotations

import importlib
from typing import Any

# Module -> names. Loaded on first use: audio files and data need no transformers.
_HOMES = {
    "audio": ("audio_length", "read_audio", "resample", "write_audio"),
    "config": ("ErnieMusicConfig",),
    "ema": ("EMA",),
    "model": ("ErnieMusicUNet1D", "UNet1DOutput"),
    "pipeline": ("AudioPipelineOutput", "ErnieMusicPipeline"),
    "scheduler": ("KDenoiser", "VDiffusionScheduler"),
    "text": ("BagText", "TextStates", "TransformersText", "text_encoder_of"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.ernie_music' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.ernie_music.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
