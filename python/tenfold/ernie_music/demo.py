# SPDX-License-Identifier: Apache-2.0
"""ERNIE-Music on rendered scores: a small U-Net learns from Bach's melodies, in a minute, what a prompt asks for.

A demo: docs/methods/ernie_music.md has a study.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tenfold import ops
from tenfold.ernie_music import speed, study
from tenfold.ernie_music.config import ErnieMusicConfig
from tenfold.ernie_music.recipe import RecipeConfig
from tenfold.ernie_music.train_config import MusicTrainConfig
from tenfold.report import Headline, Page, Speedup, TextTable
from tenfold.training.threads import threads

TRAIN_STEPS, TELL = 240, 20
PROMPTS, SAMPLING, JUDGE_STEPS = 32, 12, 200
STEPS = 6 + TRAIN_STEPS // TELL
RECIPE = RecipeConfig(
    clips=160,
    test_clips=32,
    seconds=1.5,
    sample_rate=2000,
    instruments=("organ", "marimba"),
    registers=("low", "middle"),
    tempi=("moderate", "fast"),
    composers=("bach",),
    scores=30,
    ensemble=0.0,
)
MODEL: dict[str, Any] = {
    "sample_rate": 2000,
    "sample_size": 1024,
    "widths": (32, 32, 48, 64, 64),
    "attn_levels": (5,),
    "head_dim": 16,
}
TRAIN: dict[str, Any] = {
    "steps": TRAIN_STEPS,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "ema_early_epochs": 100,
    "log_every": 40,
}
COLUMNS = study.GUIDANCE_COLUMNS
SPEED_COLUMNS = speed.COLUMNS
KERNEL_COLUMNS = ("op", "against", "times as fast", "largest difference")


@dataclass
class Demo:
    """What the demo found; ``fused``: the net's fused operations on this run's sounds, ``apart``: from PyTorch's."""

    run: study.Run
    speed: dict[str, Any]
    fused: Speedup
    apart: float

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {
            "setting": study.setting_of(self.run, RECIPE),
            "speed": self.speed,
            "evaluations": {f"{g:g}": e.to_json() for g, e in self.run.evaluations.items()},
        }


def run_demo(step: Callable[[str], None] = lambda text: None, seed: int = 0) -> Demo:
    """Runs it, on one thread; ``step`` is told after each piece. ``seed``: of clips, weights, crops and noise."""
    model = ErnieMusicConfig.from_preset("tiny", **MODEL)
    settings = MusicTrainConfig.from_preset("small", **TRAIN, seed=seed)
    with threads(1):
        made = study.run(
            dataclasses.replace(RECIPE, seed=seed),
            model,
            settings,
            prompts=PROMPTS,
            guidance=(1.0, 3.0),
            inference_steps=SAMPLING,
            judge_steps=JUDGE_STEPS,
            step=step,
            tell=TELL,
        )
        found = speed.compare(model, 8, 5)
        step("the net is timed")
        fused, apart = speed.fused(made.pipeline.unet, *noised(made, settings.batch_size, seed))
        step(str(fused))
    return Demo(made, found, fused, apart)


def noised(made: study.Run, count: int, seed: int) -> tuple[Any, ...]:
    """What the net is called with for held-out sounds: (z, times, text states, mask), ``count`` rows."""
    x0, encode = made.judges.real[:count], made.pipeline.text_encoder
    assert encode is not None  # the run has one
    draws = torch.Generator().manual_seed(seed)
    t = torch.rand(len(x0), generator=draws)
    z, _ = ops.vdiff_noise(x0, t, torch.randn(x0.shape, generator=draws))
    return z, t, *encode([r.text for r in made.test.rows[: len(x0)]])


def table_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    return study.guidance_rows(demo.run)


def speed_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SPEED_COLUMNS``."""
    return speed.table_rows(demo.speed)


def kernel_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``KERNEL_COLUMNS``."""
    return [[demo.fused.op, demo.fused.against, f"{demo.fused.ratio:.2f}", f"{demo.apart:.1e}"]]


def headline(found: Demo) -> Headline:
    """Its line of the table of all methods."""
    run, best = found.run, found.run.evaluations[found.run.best]
    right = ", ".join(f"{n} {100 * v:.0f} %" for n, v in best.accuracy.items())
    chance = 100 * sum(best.shuffled.values()) / len(best.shuffled)
    return Headline(
        f"{run.record.parameters / 1e3:.0f}k U-Net, {run.record.rows} clips of Bach's melodies",
        f"{right} as asked for (chance {chance:.0f} %)",
        found.fused,
    )


def tables(found: Demo) -> list[TextTable]:
    """What the terminal shows."""
    return [
        TextTable("Sounds of held-out prompts: is it what was asked for?", COLUMNS, table_rows(found)),
        TextTable("One call of the U-Net", SPEED_COLUMNS, speed_rows(found)),
        TextTable("Its fused operations alone", KERNEL_COLUMNS, kernel_rows(found)),
    ]  # fmt: skip


def add_demo_section(demo: Demo, page: Page) -> None:
    """ERNIE-Music's part of the report page."""
    page.section("ERNIE-Music: waveforms from text")
    page.text(
        "A U-Net over raw samples learns the velocity of a diffusion, with the states of a text encoder as further "
        "keys of its attention. Scores are rendered by a small synthesiser; a classifier that was trained on them "
        "says whether generated sounds have the instrument, register and tempo of their prompts."
    )
    study.add_section(page, demo.run, RECIPE)
    page.heading("The net on these kernels, and in plain PyTorch")
    page.table(SPEED_COLUMNS, speed_rows(demo))
    page.text(
        "Its fused operations alone, all calls of a forward pass over held-out sounds:", soft=True
    )
    page.table(KERNEL_COLUMNS, kernel_rows(demo))
