# SPDX-License-Identifier: Apache-2.0
"""Does English carry meaning between languages that were never seen together? Messages in 20 languages, and Python.

python examples/ernie_code.py [--steps 6000] [--out bench/results/ernie_code]

Two models of 7 million parameters: one learns from text of each language alone, the other also from pairs with English.
Both are asked which of 16 sentences translates a message, in pairs of languages that neither was shown. A stopped
training goes on where it was. About an hour of one core; half of it on two, where each has one of them (--only).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from tenfold.ernie_code import report, study
from tenfold.ernie_code.train_config import CodeTrainConfig
from tenfold.report import png_bytes
from tenfold.training.threads import threads

LANGUAGES = [
    "de", "fr", "es", "it", "pt", "nl", "sv", "da", "nb", "fi", "pl", "cs", "sk", "ro", "ru", "uk", "bg", "tr", "id",
    "ca",
]  # fmt: skip


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=6000, help="of each training")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--languages", nargs="+", default=LANGUAGES, help="codes of catalogues")
    parser.add_argument("--vocab-size", type=int, default=6144)
    parser.add_argument("--ranked", type=int, default=800, help="held-out rows of each kind")
    parser.add_argument("--generated", type=int, default=100, help="of them, that are translated")
    parser.add_argument("--width", type=int, default=256, help="d_model")
    parser.add_argument("--layers", type=int, default=2, help="of encoder and decoder")
    parser.add_argument("--max-chars", type=int, default=100, help="of a message")
    parser.add_argument("--code-chars", type=int, default=200, help="of a function")
    parser.add_argument("--only", choices=tuple(study.VARIANTS), help="one of the models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/ernie_code"))
    parser.add_argument("--work", type=Path, default=Path("tenfold-report/ernie_code-study"))
    chosen = parser.parse_args()
    config = study.StudyConfig(
        languages=tuple(chosen.languages), vocab_size=chosen.vocab_size,
        max_chars=chosen.max_chars, code_chars=chosen.code_chars,
        model={
            "d_model": chosen.width, "d_ff": 5 * chosen.width // 2, "num_layers": chosen.layers, "num_heads": 4,
            "d_kv": chosen.width // 4,
        }, ranked=chosen.ranked,
        generated=chosen.generated, seed=chosen.seed,
    )  # fmt: skip
    settings = CodeTrainConfig.from_preset(
        "small", steps=chosen.steps, batch_size=chosen.batch, rows_per_draw=max(1, chosen.batch // 2),
        max_inputs=160, max_targets=160, learning_rate=chosen.learning_rate,
        mixed_precision=chosen.precision, eval_every=max(1, chosen.steps // 2),
        warmup_steps=max(1, chosen.steps // 10), seed=chosen.seed,
        checkpoint_every=100,
    )  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)

    def write(made: study.Study) -> None:
        about = {
            "torch": torch.__version__, "machine": platform.machine(), "threads": chosen.threads,
            "cpu_seconds": round(time.process_time()),
        }  # fmt: skip
        result = {"about": about} | json.loads(json.dumps(made.to_json()))
        path = chosen.out / "study.json"
        if chosen.only and path.is_file():  # the other model's part, where it is of the same study
            before = json.loads(path.read_text())
            if all(before[k] == result[k] for k in ("config", "training")):
                both = before["variants"] | result["variants"]
                result["variants"] = {n: both[n] for n in study.VARIANTS if n in both}
                result["sizes"] = before["sizes"] | result["sizes"]
                result["about"]["cpu_seconds"] += before["about"]["cpu_seconds"]
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        curves = {name: v["curve"] for name, v in result["variants"].items()}
        (chosen.out / "loss.png").write_bytes(png_bytes(report.loss_plot(curves)))
        (chosen.out / "ranking.png").write_bytes(png_bytes(report.ranking_plot(result)))

    with threads(chosen.threads):
        study.run(
            config, settings, out=chosen.work, step=say, tell=max(1, chosen.steps // 40), done=write,
            variants=(chosen.only,) if chosen.only else tuple(reversed(study.VARIANTS)),
        )  # fmt: skip
    say(f"result: {chosen.out / 'study.json'}")


if __name__ == "__main__":
    main()
