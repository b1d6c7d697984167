# SPDX-License-Identifier: Apache-2.0
"""Pictures and pages: spectrograms, losses, the attribute table, sounds that play in the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.ernie_music.evaluation import COLUMNS, Evaluation, attribute_rows
from tenfold.ernie_music.spectral import power_spectrogram
from tenfold.ernie_music.training import MusicRecord
from tenfold.report import PALETTE, Page, figure, png_bytes

STATISTIC_COLUMNS = ("statistic", "generated", "real audio")
RETRIEVAL_COLUMNS = ("text found by its sound", "generated", "real audio", "by chance")


def spectrogram_picture(
    audio: Tensor, titles: Sequence[str], sample_rate: int, columns: int = 3
) -> bytes:
    """Waveforms [N, C, S] as a PNG of spectrograms: dB below each one's loudest point, frequencies on a line."""
    power, f = power_spectrogram(torch.as_tensor(audio), sample_rate)
    count = len(power)
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    made, first = figure(3.4 * columns, 2.1 * lines)
    first.remove()
    seconds = torch.as_tensor(audio).shape[-1] / sample_rate
    for i in range(count):
        axes = made.add_subplot(lines, columns, i + 1)
        level = 10 * (power[i] / power[i].max().clamp_min(1e-12)).clamp_min(1e-8).log10()
        axes.imshow(
            level.numpy(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=-70,
            vmax=0,
            extent=(0, seconds, 0, float(f[-1]) / 1000),
            interpolation="nearest",
        )
        title = (
            titles[i].encode("latin-1", "ignore").decode("latin-1") or "(prompt in another script)"
        )
        axes.set_title(title if len(title) < 46 else title[:43] + "...", fontsize=7)
        axes.tick_params(labelsize=6)
        if i % columns == 0:
            axes.set_ylabel("kHz", fontsize=7)
    return png_bytes(made, 110)


def loss_plot(record: MusicRecord) -> Any:
    """Loss over steps (a moving mean), and on held-out pieces."""
    made, axes = figure()
    losses = torch.tensor([m["loss"] for m in record.curve])
    width = max(1, len(losses) // 40)
    smooth = torch.nn.functional.avg_pool1d(losses[None], width, 1)[0]
    axes.plot(range(width, len(losses) + 1), smooth.tolist(), color=PALETTE[0], label="training")
    if record.validation:
        axes.plot(
            [v["step"] for v in record.validation],
            [v["loss"] for v in record.validation],
            "o-",
            color=PALETTE[1],
            label="held-out, averaged weights",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared error of velocities")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return made


def time_plot(record: MusicRecord) -> Any:
    """Loss by time at the beginning, in the middle and at the end of training."""
    made, axes = figure()
    entries = record.by_time()
    bins = record.config["time_bins"]
    for color, i in zip(PALETTE, sorted({0, len(entries) // 2, len(entries) - 1})):
        entry = entries[i]
        at = [(b, entry[str(b)]) for b in range(bins) if str(b) in entry]
        axes.plot(
            [(b + 0.5) / bins for b, _ in at],
            [v for _, v in at],
            "o-",
            color=color,
            label=f"step {entry['step']:.0f}",
        )
    axes.set_xlabel("time (0: data, 1: noise)")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return made


def statistic_rows(found: Evaluation) -> list[list[str]]:
    """Rows for ``STATISTIC_COLUMNS``."""
    return [
        [n.replace("_", " "), f"{a:.3g}", f"{b:.3g}"] for n, (a, b) in found.statistics.items()
    ] + [
        [
            "Fréchet distance to real features (of its halves)",
            f"{found.frechet:.3g}",
            f"{found.frechet_real:.3g}",
        ]
    ]


def retrieval_rows(found: Evaluation) -> list[list[str]]:
    """Rows for ``RETRIEVAL_COLUMNS``; none without a judge of texts."""
    if not found.retrieval:
        return []
    return [
        [
            f"first {k}",
            *(f"{100 * r[f'top{k}']:.0f} %" for r in (found.retrieval, found.real_retrieval)),
            f"{100 * found.retrieval[f'chance{k}']:.0f} %",
        ]
        for k in (1, 5)
    ]


def add_training(page: Page, record: MusicRecord) -> None:
    """Curves of a run."""
    page.image(png_bytes(loss_plot(record)), "Loss over training.", 520)
    if record.by_time():
        page.image(png_bytes(time_plot(record)), "Loss by time.", 520)


def add_evaluation(page: Page, found: Evaluation) -> None:
    """Tables of an evaluation."""
    page.text(
        f"{found.count} sounds of held-out prompts, judged by a classifier that was trained on real audio. A model "
        "that ignores its prompt scores what the third column says."
    )
    page.table(COLUMNS, attribute_rows(found))
    if found.retrieval:
        page.table(RETRIEVAL_COLUMNS, retrieval_rows(found))
    page.table(STATISTIC_COLUMNS, statistic_rows(found))
    if found.metrics:
        page.table(("metric", "value"), [[n, f"{v:.4g}"] for n, v in found.metrics.items()])


def add_sounds(
    page: Page, audio: Tensor, prompts: Sequence[str], sample_rate: int, caption: str
) -> None:
    """Sounds that play in the page, with their spectrograms."""
    page.image(spectrogram_picture(audio, prompts, sample_rate), caption)
    for prompt, wave in zip(prompts, audio):
        page.audio(wave_bytes(wave, sample_rate), prompt)


def wave_bytes(audio: Tensor, sample_rate: int) -> bytes:
    """A waveform [C, S] as the bytes of a WAV file."""
    import tempfile
    from pathlib import Path

    from tenfold.ernie_music.audio import write_audio

    with tempfile.TemporaryDirectory() as folder:
        return write_audio(Path(folder) / "sound.wav", audio, sample_rate).read_bytes()
