# SPDX-License-Identifier: Apache-2.0
"""Waveforms and files: reading, writing WAV and FLAC, other rates, channels, crops.

WAV needs nothing; other formats go through ``soundfile`` where it is installed, resampling through scipy.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUBTYPES = {"int16": "PCM_16", "int24": "PCM_24", "float": "FLOAT"}


def _soundfile(path: Path) -> Any:
    if importlib.util.find_spec("soundfile") is None:
        raise ModuleNotFoundError(
            f"{path.name}: files other than 16-bit WAV need soundfile; install it with `pip install soundfile`"
        )
    import soundfile

    return soundfile


def check_waveform(x: Tensor, name: str = "audio") -> Tensor:
    """Float waveforms in [-1, 1]: louder ones are clamped with a warning; ValueError for NaN and infinities."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{name} must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite")
    peak = float(x.abs().max()) if x.numel() else 0.0
    if peak > 1:
        warnings.warn(f"{name} reaches {peak:.3g} and was clamped to [-1, 1]", stacklevel=3)
        return x.clamp(-1, 1)
    return x


def write_audio(path: str | Path, audio: Tensor, sample_rate: int, subtype: str = "int16") -> Path:
    """Writes a waveform [C, S] (or [S]) in [-1, 1]; the ending of ``path`` says the format.

    Args:
        path: ``.wav``, or ``.flac`` and all else that soundfile writes. subtype: ``"int16"``, ``"int24"`` or
            ``"float"``.

    Raises:
        TypeError, ValueError: no floating tensor, NaN, a sample rate that is not positive.
        ModuleNotFoundError: a format that needs soundfile, which is not installed.
    """
    path = Path(path)
    if subtype not in SUBTYPES:
        raise ValueError(f"subtype must be one of {', '.join(SUBTYPES)}, got {subtype!r}")
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int) or sample_rate < 1:
        raise ValueError(f"sample_rate must be a positive integer, got {sample_rate!r}")
    x = check_waveform(audio.detach().to("cpu"), path.name)
    x = x[None] if x.ndim == 1 else x
    if x.ndim != 2:
        raise ValueError(f"audio must be [C, S] or [S], got {list(x.shape)}")
    values = x.float().T.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    if path.suffix.lower() == ".wav" and subtype == "int16":
        data = np.clip(np.round(values * 32768), -32768, 32767).astype("<i2")
        with wave.open(str(temporary), "wb") as file:
            file.setnchannels(x.shape[0])
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(data.tobytes())
    else:
        kind = path.suffix.lstrip(".").upper()
        _soundfile(path).write(
            temporary, values, sample_rate, subtype=SUBTYPES[subtype], format=kind
        )
    os.replace(temporary, path)
    return path


def _read_wave(path: Path, start: int, frames: int) -> tuple[np.ndarray, int] | None:
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != 2:
                return None
            file.setpos(min(start, file.getnframes()))
            data = np.frombuffer(
                file.readframes(frames if frames >= 0 else file.getnframes()), "<i2"
            )
            return data.reshape(-1, file.getnchannels()).T / np.float32(32768), file.getframerate()
    except wave.Error:
        return None


def audio_length(path: str | Path) -> tuple[int, int]:
    """(samples, sample rate) of a file, from its head."""
    path = Path(path)
    if path.suffix.lower() == ".wav":
        try:
            with wave.open(str(path), "rb") as file:
                return file.getnframes(), file.getframerate()
        except wave.Error:
            pass
    info = _soundfile(path).info(str(path))
    return info.frames, info.samplerate


def read_audio(path: str | Path, start: int = 0, frames: int = -1) -> tuple[Tensor, int]:
    """(waveform float32 [C, S], sample rate) of a file, or of ``frames`` samples from ``start`` on.

    Raises FileNotFoundError, ValueError for what is no audio, ModuleNotFoundError where soundfile is needed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    found = _read_wave(path, start, frames) if path.suffix.lower() == ".wav" else None
    if found is None:
        soundfile = _soundfile(path)
        try:
            data, rate = soundfile.read(str(path), frames, start, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path} cannot be read as audio: {error}") from None
        found = data.T, rate
    return torch.from_numpy(np.ascontiguousarray(found[0], np.float32)), found[1]


def resample(x: Tensor, rate: int | None, target: int) -> Tensor:
    """Waveforms [..., S] of ``rate`` Hz at ``target`` Hz, by a polyphase filter.

    Raises ValueError where the rate is not known, ModuleNotFoundError without scipy.
    """
    if rate is None or rate <= 0:
        raise ValueError(f"the sample rate of the audio must be known, got {rate}")
    if rate == target:
        return x
    if importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError(
            "resampling needs scipy; install it with `pip install 'tenfold[audio]'`"
        )
    from scipy.signal import resample_poly

    shared = math.gcd(rate, target)
    made = resample_poly(x.numpy(), target // shared, rate // shared, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(made, np.float32))


def with_channels(x: Tensor, channels: int) -> Tensor:
    """[C, S] with so many channels: one is repeated, of too many the first stay, stereo is mixed to mono."""
    if x.shape[0] == channels:
        return x
    if channels == 1:
        return x[:2].mean(0, keepdim=True)
    if x.shape[0] == 1:
        return x.expand(channels, -1)
    if x.shape[0] > channels:
        return x[:channels]
    raise ValueError(f"audio of {x.shape[0]} channels cannot fill {channels}")


def fit_length(x: Tensor, length: int) -> Tensor:
    """[..., S] cut to ``length`` samples, or filled up with silence."""
    if x.shape[-1] >= length:
        return x[..., :length]
    return torch.nn.functional.pad(x, (0, length - x.shape[-1]))
