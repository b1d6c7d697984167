# SPDX-License-Identifier: Apache-2.0
"""Numbers that describe sounds: bands over time, statistics of spectra, the distance of two sets of sounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BANDS = 48
STATISTICS = (
    "centroid_hz",
    "bandwidth_hz",
    "rolloff_hz",
    "flatness",
    "flux",
    "rms",
    "crest",
    "zero_crossings_hz",
)


def _mono(audio: Tensor) -> Tensor:
    x = audio.float()
    return x.mean(-2) if x.ndim == 3 else x


def power_spectrogram(audio: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    """(power [B, F, T], frequencies in Hz [F]) of waveforms [B, C, S] or [B, S]; windows of about 64 ms, a quarter
    apart.

    Raises ValueError for waveforms shorter than a window.
    """
    x = _mono(audio)
    size = 2 ** round(math.log2(sample_rate * 0.064))
    if x.shape[-1] < size:
        raise ValueError(f"waveforms must have at least {size} samples (64 ms), got {x.shape[-1]}")
    window = torch.hann_window(size, device=x.device)
    made = torch.stft(x, size, size // 4, window=window, center=False, return_complex=True)
    return made.abs().square(), torch.arange(size // 2 + 1, device=x.device) * (sample_rate / size)


def band_energies(audio: Tensor, sample_rate: int, bands: int = BANDS) -> Tensor:
    """Log energies [B, bands, T] in bands of equal width on a log scale from 50 Hz up, relative to the loudest: at
    most 0.

    Energies below -45 dB are -45 dB (in nepers of power):
    what is under the music, and a synthesiser does not have, is not listened to.
    """
    power, f = power_spectrogram(audio, sample_rate)
    edges = torch.logspace(
        math.log10(50.0), math.log10(sample_rate / 2), bands + 2, device=f.device
    )
    # Triangles at least as wide as two lines of the spectrum, so that no band at the low end is empty.
    width = (edges[2:] - edges[:-2]).clamp_min(4 * float(f[1])) / 2
    weights = (1 - (f[None] - edges[1:-1, None]).abs() / width[:, None]).clamp_min(0)
    energy = torch.einsum("bf,nft->nbt", weights, power)
    peak = energy.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return (energy / peak).clamp_min(10**-4.5).log()


def features(audio: Tensor, sample_rate: int) -> Tensor:
    """What the judges hear: float32 [B, D] of band energies over time, their changes, and the rhythm of onsets."""
    bands = band_energies(audio, sample_rate)
    rise = (bands[:, :, 1:] - bands[:, :, :-1]).clamp_min(0)
    onset = rise.mean(1)
    onset = onset - onset.mean(1, keepdim=True)
    n = onset.shape[1]
    spectrum = torch.fft.rfft(onset, 2 * n).abs().square()
    correlation = torch.fft.irfft(spectrum)[:, :n]
    correlation = correlation / correlation[:, :1].clamp_min(1e-9)
    lags = torch.nn.functional.interpolate(correlation[:, None, 1:], 24, mode="linear")[:, 0]
    ordered = bands.sort(2).values
    last = ordered.shape[2] - 1
    shares = [ordered[:, :, round(q * last)] for q in (0.1, 0.5, 0.9)]
    loud = bands.exp().sum(1).log()
    slope = (loud[:, 1:] - loud[:, :-1]).sort(1).values
    ends = [slope[:, [round(q * (slope.shape[1] - 1)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]]]
    return torch.cat([*shares, rise.mean(2), rise.std(2), lags, *ends], 1)


def statistics(audio: Tensor, sample_rate: int) -> dict[str, Tensor]:
    """``STATISTICS`` of each waveform, float32 [B]; silence has NaN where a spectrum's shape is asked for."""
    x = _mono(audio)
    power, f = power_spectrogram(audio, sample_rate)
    mean = power.mean(2)
    total = mean.sum(1, keepdim=True)
    share = mean / torch.where(total > 0, total, torch.nan)
    centroid = (share * f).sum(1)
    spread = (share * (f[None] - centroid[:, None]).square()).sum(1).sqrt()
    rolloff = f[(share.cumsum(1) < 0.85).sum(1).clamp(max=len(f) - 1)]
    flat = (mean.clamp_min(1e-12).log().mean(1).exp()) / mean.mean(1).clamp_min(1e-12)
    magnitude = power.sqrt()
    unit = magnitude / magnitude.sum(1, keepdim=True).clamp_min(1e-12)
    rms = x.square().mean(1).sqrt()
    crossings = (x[:, 1:].sign() != x[:, :-1].sign()).float().mean(1) * sample_rate / 2
    return {
        "centroid_hz": centroid,
        "bandwidth_hz": spread,
        "rolloff_hz": rolloff,
        "flatness": flat,
        "flux": (unit[:, :, 1:] - unit[:, :, :-1]).abs().sum(1).mean(1),
        "rms": rms,
        "crest": x.abs().amax(1) / rms.clamp_min(1e-12),
        "zero_crossings_hz": crossings,
    }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """``|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))`` of the Gaussians of two sets of vectors [N, D], [M, D].

    Raises ValueError for sets of fewer than two vectors, or of different widths.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"two sets of at least two vectors of one width are compared, got {list(a.shape)} and {list(b.shape)}"
        )
    a, b = a.double(), b.double()
    ca, cb = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross)
