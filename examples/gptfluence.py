# SPDX-License-Identifier: Apache-2.0
"""Records fine-tunings of a small model, learns to simulate them, and asks which examples helped.

python examples/gptfluence.py [--runs 16] [--encoder minilm] [--out FOLDER] [--json FILE]

A minute on two cores. An own training loop needs three lines: `recorder.begin(model)`, `recorder.step(model, ids)`
after each step and
`recorder.finish(model)`; transformers' Trainer needs `DynamicsCallback`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
from pathlib import Path

import torch

from tenfold import gptfluence
from tenfold.gptfluence import study
from tenfold.gptfluence.metrics import trimmed
from tenfold.gptfluence.recording import lm_step
from tenfold.training.threads import threads


def own_loop(model, material, curriculum, folder: Path) -> None:
    """Without any trainer of ours: three lines record it."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    metric = gptfluence.LossMetric(material.test_rows)
    with gptfluence.Recorder(folder, range(len(material.tests)), [metric]) as recorder:
        recorder.begin(model)
        for batch in curriculum.order:
            rows = trimmed({k: v[batch] for k, v in material.rows.items()})
            lm_step(model, rows, 0)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(model, batch.tolist())
        recorder.finish(model)
    run = gptfluence.read_run(folder)
    first, last = run.values["loss"][[0, -1]].mean(1).tolist()
    print(
        f"own loop: {len(run.order) - 1} steps, mean loss of {len(run.test_ids)} tests {first:.3f} -> {last:.3f}"
    )


def trainer(model, material, folder: Path) -> None:
    """In transformers' Trainer: one callback."""
    from transformers import Trainer, TrainingArguments

    rows = [{k: v[i] for k, v in material.rows.items()} for i in range(len(material.samples))]
    callback = gptfluence.DynamicsCallback(
        folder / "run",
        range(len(material.tests)),
        [gptfluence.LossMetric(material.test_rows)],
        every=5,
    )
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    made = Trainer(model=copy.deepcopy(model), args=args, train_dataset=rows, callbacks=[callback])
    callback.attach(made)
    made.train()
    print(f"Trainer: measured after steps {gptfluence.read_run(folder / 'run').steps.tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument(
        "--parent-steps", type=int, default=100, help="of the model's first training"
    )
    parser.add_argument(
        "--encoder", default="minilm", help="minilm, bag, or a folder of an AutoModel"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the report is written")
    parser.add_argument("--json", type=Path, help="where the result is written")
    chosen = parser.parse_args()

    material = study.material(16, 6, seed=chosen.seed, length=96)
    config = gptfluence.RecordConfig.from_preset(
        "small", runs=chosen.runs, examples=32, epochs=3.0, batch_size=4, concentration=0.3, learning_rate=2e-3,
        seed=chosen.seed,
    )  # fmt: skip
    with threads(1), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = study.parent_model(2, 2, chosen.parent_steps, chosen.seed)
        own_loop(
            model, material, gptfluence.make_curricula(config, material.groups)[0], folder / "own"
        )
        trainer(model, material, folder / "trainer")
        runs = study.record(material, model, config, folder / "runs")
    train, held, test = runs.split(2, 3)
    features = study.text_features(material, gptfluence.encoder_of(chosen.encoder))
    made = study.contestants(features, ("default", "ridge", "similarity", "mean", "constant"))
    for one in made.values():
        one.fit(train, held)
    found = study.judged(made, test)
    for name, e in found.items():
        print(
            f"{study.NAMES[name]}: all-steps MSE {e['mse']:.4f}, final-step Spearman {e['spearman']:.3f}"
        )

    scores = made["default"].attribute(kind="delta")
    best = int(scores[:, 0].argmin())
    print(f"test: {' '.join(material.tests[0]['text'].split())[:80]}")
    print(
        f"helps it most ({scores[best, 0]:+.4f}): {' '.join(material.samples[best]['text'].split())[:80]}"
    )
    if chosen.out:
        predicted = {name: study.predicted(one, test) for name, one in made.items()}
        print("report:", gptfluence.write_report(chosen.out / "index.html", test, predicted, found))
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "encoder": chosen.encoder,
        }
        chosen.json.write_text(json.dumps(about | {"methods": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
