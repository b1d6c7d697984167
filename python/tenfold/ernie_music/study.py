# SPDX-License-Identifier: Apache-2.0
"""One run from scores to judged sounds: what the demo and the example have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.data.sentences import sentence_model_path
from tenfold.ernie_music import report
from tenfold.ernie_music.config import ErnieMusicConfig
from tenfold.ernie_music.dataset import AudioTexts, rows_of
from tenfold.ernie_music.evaluation import Evaluation, Judges, evaluate, generate, train_judges
from tenfold.ernie_music.model import ErnieMusicUNet1D
from tenfold.ernie_music.pipeline import ErnieMusicPipeline
from tenfold.ernie_music.recipe import RecipeConfig, make_rows
from tenfold.ernie_music.scheduler import VDiffusionScheduler
from tenfold.ernie_music.text import PACKAGED, TextStates, text_encoder_of
from tenfold.ernie_music.train_config import MusicTrainConfig
from tenfold.ernie_music.training import MusicRecord, train
from tenfold.report import Page
from tenfold.training.loop import Progress

Step = Callable[[str], None]


@dataclass
class Run:
    """A trained model with what it was judged by.

    Attributes:
        evaluations: by guidance. audio: sounds [N, C, S] of ``best`` guidance. real: held-out real ones.
    """

    record: MusicRecord
    pipeline: ErnieMusicPipeline
    judges: Judges
    test: AudioTexts
    evaluations: dict[float, Evaluation] = field(default_factory=dict)
    audio: dict[float, Tensor] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """The guidance whose sounds follow their prompts best: the mean accuracy over attributes."""
        return max(self.evaluations, key=lambda g: sum(self.evaluations[g].accuracy.values()))


def offline_encoder() -> TextStates:
    """The packaged sentence encoder; where its wheel is not installed, vectors of words."""
    return text_encoder_of(PACKAGED if sentence_model_path() else "bag:384")


def material(config: RecipeConfig) -> tuple[AudioTexts, AudioTexts]:
    """(training, held-out) pieces in memory, rendered at the model's rate."""
    made = make_rows(config)
    train, test = (
        AudioTexts(rows_of(made[n], config.sample_rate), config.sample_rate, 1)
        for n in ("train", "test")
    )
    return train, test


def held_out_prompts(test: AudioTexts, count: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts of held-out pieces in phrasings that training never had, and what they ask for."""
    prompts, about = [], []
    for i in range(count):
        row = test.rows[i % len(test)]
        choices = row.prompts("texts")
        prompts.append(choices[(i + i // len(test)) % len(choices)])  # the languages in turn
        about.append(row.about)
    return prompts, about


def run(
    recipe: RecipeConfig,
    model: ErnieMusicConfig,
    settings: MusicTrainConfig,
    *,
    prompts: int = 48,
    guidance: tuple[float, ...] = (1.0, 3.0),
    inference_steps: int = 20,
    judge_steps: int = 400,
    out: Path | None = None,
    demo_prompts: tuple[str, ...] = (),
    step: Step = lambda text: None,
    tell: int = 50,
    quiet: bool = True,
) -> Run:
    """Renders, trains judges and model, generates for held-out prompts and judges them."""
    data, test = material(recipe)
    step("scores are rendered")
    encoder = offline_encoder()
    judges = train_judges(
        data, test, model.sample_size, encoder, steps=judge_steps, seed=settings.seed
    )
    step("judges are trained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        unet = ErnieMusicUNet1D(model)

    def told(p: Progress) -> None:
        if p.step % tell == 0:
            step(f"training, step {p.step}: loss {p.metrics['loss']:.3f}")

    record, averaged = train(
        unet,
        data,
        encoder,
        settings,
        held_out=test,
        out=out,
        callback=told,
        demo_prompts=demo_prompts,
        quiet=quiet,
    )
    pipeline = ErnieMusicPipeline(
        averaged, VDiffusionScheduler(solver="dpm++", time_warp=settings.time_warp), encoder
    )
    pipeline.set_progress_bar_config(disable=True)
    made = Run(record, pipeline, judges, test)
    texts, about = held_out_prompts(test, prompts)
    for g in guidance:
        audio = generate(
            pipeline,
            texts,
            num_inference_steps=inference_steps,
            guidance_scale=g,
            seed=settings.seed,
        )
        made.audio[g] = audio
        made.evaluations[g] = evaluate(audio, texts, about, judges)
        step(f"sounds with guidance {g:g} are judged")
    return made


def setting_of(made: Run, recipe: RecipeConfig) -> str:
    """What was run, in a sentence."""
    c, m = made.record.config, made.pipeline.unet.config
    return (
        f"{made.record.rows} clips of scores at {m.sample_rate / 1000:g} kHz ({', '.join(recipe.instruments)}; "
        f"{', '.join(recipe.registers)} register); a U-Net of {made.record.parameters / 1e3:.0f}k parameters over "
        f"{m.sample_size} samples ({m.sample_size / m.sample_rate:.2f} s), {c['steps']} steps of {c['batch_size']} "
        f"crops; texts are encoded by {m.text_encoder}. "
        f"{torch.get_num_threads()} threads, one seed."
    )


def by_language(made: Run, recipe: RecipeConfig) -> dict[str, dict[str, float]]:
    """Accuracies of the best guidance, by the language of the prompts."""
    found, rows = made.evaluations[made.best], made.test.rows
    right: dict[str, dict[str, list[bool]]] = {
        lang: {n: [] for n in found.accuracy} for lang in recipe.languages
    }
    for i, (prompt, about) in enumerate(zip(found.prompts, found.about)):
        lang = recipe.languages[rows[i % len(rows)].prompts("texts").index(prompt)]
        for name, predicted in found.predicted.items():
            right[lang][name].append(predicted[i] == str(about[name]))
    return {
        lang: {n: sum(v) / max(1, len(v)) for n, v in one.items()} for lang, one in right.items()
    }


GUIDANCE_COLUMNS = (
    "guidance",
    "instrument",
    "register",
    "tempo",
    "text found first",
    "Fréchet distance",
)


def guidance_rows(made: Run) -> list[list[str]]:
    """Rows for ``GUIDANCE_COLUMNS``: what follows, by guidance; then chance and real audio."""
    any_one = next(iter(made.evaluations.values()))

    def line(name: str, values: dict[str, float], found: str, frechet: str) -> list[str]:
        return [name, *(f"{100 * values[n]:.0f} %" for n in values), found, frechet]

    rows = [
        line(f"{g:g}", e.accuracy, f"{100 * e.retrieval['top1']:.0f} %", f"{e.frechet:.0f}")
        for g, e in made.evaluations.items()
    ]
    rows.append(
        line(
            "other prompts",
            made.evaluations[made.best].shuffled,
            f"{100 * any_one.retrieval['chance1']:.0f} %",
            "–",
        )
    )
    rows.append(
        line(
            "real audio",
            any_one.ceiling,
            f"{100 * any_one.real_retrieval['top1']:.0f} %",
            f"{any_one.frechet_real:.0f}",
        )
    )
    return rows


def add_section(page: Page, made: Run, recipe: RecipeConfig, sounds: int = 6) -> None:
    """A run's part of a page."""
    page.text(setting_of(made, recipe), soft=True)
    page.table(GUIDANCE_COLUMNS, guidance_rows(made))
    g = made.best
    report.add_evaluation(page, made.evaluations[g])
    report.add_training(page, made.record)
    rate = made.pipeline.unet.config.sample_rate
    prompts = made.evaluations[g].prompts
    page.heading("Sounds of held-out prompts")
    report.add_sounds(
        page, made.audio[g][:sounds], prompts[:sounds], rate, f"Generated, guidance {g:g}."
    )
    page.heading("Real sounds")
    texts = [row.text for row in made.test.rows]
    report.add_sounds(page, made.judges.real[:3], texts[:3], rate, "Held-out scores, rendered.")
