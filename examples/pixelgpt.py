# SPDX-License-Identifier: Apache-2.0
"""Do pixels carry over to scripts that pre-training never saw? Pixels, tokens, both, and pairs, at equal rows.

python examples/pixelgpt.py [--steps 800] [--seeds 0 1] [--variants pixelgpt textgpt monogpt dualgpt]
                            [--tasks language domain] [--out bench/results/pixelgpt]

Small models are pre-trained on packaged text in six languages (Python's reference, django's catalogues), rendered or as
tokens. Then classifiers are fine-tuned on what language a line is in, and which application it is of, in scripts of the
pre-training and in others. Finished runs are kept in --work: a stopped study goes on where it was.
An hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from tenfold.pixelgpt import report, small, study
from tenfold.pixelgpt.config import TITLES, VARIANTS
from tenfold.pixelgpt.loading import load
from tenfold.pixelgpt.train_config import PretrainConfig
from tenfold.report import png_bytes


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=800, help="of pre-training, per stream")
    parser.add_argument("--tune-steps", type=int, default=300, help="of classifiers on tokens")
    parser.add_argument(
        "--pixel-tune-steps", type=int, default=1500, help="of classifiers on pixels and pairs"
    )
    parser.add_argument("--pixel-tune-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--tasks", nargs="+", choices=list(study.GROUPS), default=list(study.GROUPS))  # fmt: skip
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--length", type=int, default=48, help="patches, or tokens")
    parser.add_argument("--tune-length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--per-language", type=int, default=400, help="documents")
    parser.add_argument("--train", type=int, default=120, help="lines per language of a task")
    parser.add_argument("--test", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("bench/results/pixelgpt"))
    parser.add_argument("--work", type=Path, default=Path("tenfold-report/pixelgpt-study"))
    chosen = parser.parse_args()
    for folder in (chosen.out, chosen.work):
        folder.mkdir(parents=True, exist_ok=True)
    width = chosen.width
    sizes = {"size": "tiny", "hidden_size": width, "intermediate_size": 11 * width // 4,
             "num_hidden_layers": chosen.layers,
             "num_attention_heads": width // 32, "num_key_value_heads": width // 64}  # fmt: skip
    settings = {"steps": chosen.steps, "length": chosen.length, "batch_size": chosen.batch,
                "learning_rate": chosen.learning_rate}  # fmt: skip

    def tuning(modality: str) -> dict[str, Any]:
        """Pixels learn slowly, and not at all at the rate of tokens: each kind has its own steps and rate."""
        steps = chosen.tune_steps if modality == "text" else chosen.pixel_tune_steps
        made = {"steps": steps, "length": chosen.tune_length, "eval_every": max(1, steps // 5)}
        return made if modality == "text" else made | {"learning_rate": chosen.pixel_tune_rate}

    corpus = small.packaged_corpus(per_language=chosen.per_language)
    runs, tuned, first = [], [], {}
    for seed in chosen.seeds:
        for variant in chosen.variants:
            record = study.run_pretraining(
                variant, corpus, settings, sizes, seed, chosen.work / f"{variant}-{seed}", say
            )
            runs.append(study.pretraining_row(record, seed))
            if seed == chosen.seeds[0]:
                first[TITLES[variant]] = record
            say(f"{TITLES[variant]}, seed {seed}: {record.validation[-1]}")
        for name in chosen.tasks:
            for variant, modality in study.CELLS:
                if variant not in (*chosen.variants, study.NONE):
                    continue
                found = study.run_task(
                    name, variant, modality, corpus, tuning(modality), sizes, seed, chosen.work / f"{variant}-{seed}",
                    chosen.work / f"{name}-{variant}-{modality}-{seed}.json", train=chosen.train, test=chosen.test,
                )  # fmt: skip
                tuned.append(found)
                scores = ", ".join(f"{g} {100 * s['accuracy']:.1f} %" for g, s in found["scores"].items())  # fmt: skip
                say(f"{name}, {study.cell_title(variant, modality)}, seed {seed}: {scores}")
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}  # fmt: skip
    setting = {k: v for k, v in vars(chosen).items() if k not in ("out", "work")}
    setting["documents"] = {"train": len(corpus.train), "held out": len(corpus.held_out)}
    setting["groups"] = study.GROUPS
    (chosen.out / "study.json").write_text(
        json.dumps({"about": about, "setting": setting, "pretraining": runs, "tasks": tuned}, indent=1) + "\n"
    )  # fmt: skip
    plots = {f"loss-{kind}": report.loss_plot(some, kind) for kind, some in (
        ("npp", {n: r for n, r in first.items() if "pixel/npp" in r.validation[-1]}),
        ("ntp", {n: r for n, r in first.items() if "text/ntp" in r.validation[-1]}),
    ) if some}  # fmt: skip
    plots |= {f"task-{name}": study.tasks_plot(tuned, name) for name in chosen.tasks}
    for name, made in plots.items():
        (chosen.out / f"{name}.png").write_bytes(png_bytes(made))
    if "pixelgpt" in chosen.variants:
        model, _, _ = load(chosen.work / f"pixelgpt-{chosen.seeds[0]}")
        config = PretrainConfig.from_preset("small", variant="pixelgpt", length=chosen.length)
        _, held = corpus.streams(config)
        for png in small.pictures(model, held, patches=chosen.length).values():
            (chosen.out / "reconstructions.png").write_bytes(png)


if __name__ == "__main__":
    main()
