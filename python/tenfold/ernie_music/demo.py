# SPDX-License-Identifier: Apache-2.0
"""ERNIE-Music on rendered scores: a small U-Net learns from Bach's melodies, in a minute, what a prompt asks for.

A demo: docs/methods/ernie_music.md has a study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenfold.ernie_music import speed, study
from tenfold.ernie_music.config import ErnieMusicConfig
from tenfold.ernie_music.recipe import RecipeConfig
from tenfold.ernie_music.train_config import MusicTrainConfig
from tenfold.report import Page
from tenfold.training.threads import threads

TRAIN_STEPS, TELL = 240, 20
STEPS = 5 + TRAIN_STEPS // TELL
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


@dataclass
class Demo:
    """What the demo found."""

    run: study.Run
    speed: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {
            "setting": study.setting_of(self.run, RECIPE),
            "speed": self.speed,
            "evaluations": {f"{g:g}": e.to_json() for g, e in self.run.evaluations.items()},
        }


def run_demo(step: Callable[[str], None] = lambda text: None) -> Demo:
    """Runs it, on one thread; ``step`` is told after each piece."""
    model = ErnieMusicConfig.from_preset("tiny", **MODEL)
    settings = MusicTrainConfig.from_preset("small", **TRAIN)
    with threads(1):
        made = study.run(
            RECIPE,
            model,
            settings,
            prompts=32,
            guidance=(1.0, 3.0),
            inference_steps=12,
            judge_steps=200,
            step=step,
            tell=TELL,
        )
        found = speed.compare(model, 8, 5)
        step("the net is timed")
    return Demo(made, found)


def table_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    return study.guidance_rows(demo.run)


def speed_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SPEED_COLUMNS``."""
    return speed.table_rows(demo.speed)


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
