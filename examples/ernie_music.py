# SPDX-License-Identifier: Apache-2.0
"""Does a small waveform model do what its prompt says? Trained on rendered scores, asked in phrasings it never saw.

python examples/ernie_music.py [--steps 5000] [--prompts 96] [--out bench/results/ernie_music]

Melodies of real scores (Bach's chorales and more, from the wheel music21) are rendered for four instruments in three
registers and at three speeds; sentences in four languages say so. A U-Net over raw samples learns from them. Then it
makes sounds of held-out sentences, and a classifier that was trained on the real sounds says which instrument, register
and tempo they have. A stopped training goes on where it was. About half an hour of one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from tenfold.ernie_music import ErnieMusicConfig, report, speed, study, write_audio
from tenfold.ernie_music.evaluation import attribute_rows
from tenfold.ernie_music.recipe import RecipeConfig
from tenfold.ernie_music.train_config import MusicTrainConfig
from tenfold.report import Page, png_bytes
from tenfold.training.threads import threads


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=5000, help="of training")
    parser.add_argument("--batch", type=int, default=16, help="crops per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--clips", type=int, default=800)
    parser.add_argument("--sample-rate", type=int, default=4000)
    parser.add_argument("--length", type=int, default=4096, help="samples of a crop")
    parser.add_argument("--instruments", nargs="+", default=["organ", "flute", "marimba", "violin"])
    parser.add_argument("--composers", nargs="+", default=["bach", "mozart", "schumann_clara"])
    # The packaged encoder reads English; of Chinese it knows little more than the characters.
    parser.add_argument("--languages", nargs="+", default=["en", "de", "fr", "es"])
    parser.add_argument("--prompts", type=int, default=96, help="held-out prompts")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--inference-steps", type=int, default=25)
    parser.add_argument("--sounds", type=int, default=8, help="that are written as files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/ernie_music"))
    parser.add_argument("--work", type=Path, default=Path("tenfold-report/ernie_music-study"))
    chosen = parser.parse_args()
    recipe = RecipeConfig(
        clips=chosen.clips,
        test_clips=min(96, chosen.prompts),
        seconds=2.5 * chosen.length / 4096,
        sample_rate=chosen.sample_rate,
        instruments=tuple(chosen.instruments),
        composers=tuple(chosen.composers),
        languages=tuple(chosen.languages),
        scores=60,
        ensemble=0.0,
        seed=chosen.seed,
    )
    model = ErnieMusicConfig.from_preset(
        "tiny", sample_rate=chosen.sample_rate, sample_size=chosen.length
    )
    settings = MusicTrainConfig.from_preset(
        "small",
        steps=chosen.steps,
        batch_size=chosen.batch,
        learning_rate=chosen.learning_rate,
        ema_early_epochs=5,
        mixed_precision=chosen.precision,
        log_every=max(1, chosen.steps // 20),
        checkpoint_every=250,
        eval_every=max(1, chosen.steps // 6),
        seed=chosen.seed,
    )
    start = time.process_time()
    with threads(chosen.threads):
        made = study.run(
            recipe,
            model,
            settings,
            prompts=chosen.prompts,
            guidance=tuple(chosen.guidance),
            inference_steps=chosen.inference_steps,
            out=chosen.work,
            step=say,
            tell=max(1, chosen.steps // 60),
        )
        cpu = time.process_time() - start
        fast = speed.compare(model, chosen.batch)
    found = made.evaluations[made.best]
    for row in attribute_rows(found):
        say("  ".join(row))
    out: Path = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    rate = model.sample_rate
    for kind, audio, texts in (
        ("generated", made.audio[made.best], found.prompts),
        ("real", made.judges.real, [r.text for r in made.test.rows]),
    ):
        for i in range(min(chosen.sounds, len(audio))):
            write_audio(out / f"{kind}-{i}.wav", audio[i], rate)
        (out / f"{kind}.png").write_bytes(
            report.spectrogram_picture(audio[: chosen.sounds], texts[: chosen.sounds], rate)
        )
    (out / "loss.png").write_bytes(png_bytes(report.loss_plot(made.record)))
    (out / "loss-by-time.png").write_bytes(png_bytes(report.time_plot(made.record)))
    about = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": chosen.threads,
        "cpu_seconds": round(cpu),
        "training_seconds": round(made.record.seconds),
    }
    result = {
        "about": about,
        "setting": study.setting_of(made, recipe),
        "recipe": recipe.to_json(),
        "model": {
            "parameters": made.record.parameters,
            "widths": list(model.widths),
            "layers_per_level": model.layers_per_level,
        },
        "training": settings.to_json(),
        "validation": made.record.validation,
        "loss_by_time": made.record.by_time(),
        "speed": fast,
        "best_guidance": made.best,
        "by_language": study.by_language(made, recipe),
        "evaluations": {f"{g:g}": e.to_json() for g, e in made.evaluations.items()},
        "sounds": {
            f"generated-{i}.wav": found.prompts[i] for i in range(min(chosen.sounds, found.count))
        },
    }
    (out / "study.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    page = Page("ERNIE-Music: a study")
    study.add_section(page, made, recipe, sounds=chosen.sounds)
    page.table(speed.COLUMNS, speed.table_rows(fast))
    say(
        f"report: {page.write(chosen.work / 'index.html')}   result: {out / 'study.json'}   {cpu / 60:.1f} min of CPU"
    )


if __name__ == "__main__":
    main()
