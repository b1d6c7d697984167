# SPDX-License-Identifier: Apache-2.0
"""What continual fine-tuning forgets: full, half and other methods on a model trained here.

python examples/hft_study.py [--seeds 0 1 2] [--only full half LoRA] [--out bench/results/hft]

A byte-level Llama (4 layers, width 256, 2.8M parameters) learns standard-library text, then tasks one
after the other. Judged: OP and BWT over the tasks, and the loss of held-out text before and after.
Finished cells are kept in the cache: a stopped study goes on, and processes may share the work.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from tenfold import hft
from tenfold.hft.report import methods_plot
from tenfold.report import PALETTE, figure, png_bytes
from tenfold.training import tiny
from tenfold.training.batches import lm_loss
from tenfold.training.tasks import byte_encoder, make_tasks

LENGTH, END = 192, 0
TASKS = ("docstring", "german", "licence", "topic")
# name -> settings that differ from half fine-tuning's
VARIANTS = {
    "full": {"method": "full"},
    "half": {},
    "half, layer-level": {"strategy": "layer"},
    "half, model-level": {"strategy": "model"},
    "half, never redrawn": {"reselect": "never"},
    "quarter": {"ratio": 0.25},
    "LISA-like": {"method": "lisa", "lisa_layers": 1, "lisa_every": 10},
    "LoRA": {"method": "lora", "lora_rank": 8, "lora_lr": 3e-3},
}


def parent_of(seed: int, steps: int, stream, folder: Path):
    """The trained parent, from the cache if it is there."""
    path = folder / f"parent-{seed}-{steps}.pt"
    model = tiny.make_model(seed)
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model.eval()

    def data(stage: str, step: int, size: int):
        made = torch.Generator().manual_seed(hash((seed, step)) % (1 << 62))
        return tiny.text_rows(stream, size, made, LENGTH)

    def told(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"parent, seed {seed}: step {step} of {steps}, loss {loss:.3f}", flush=True)

    tiny.train(model, data, steps, batch_size=16, callback=told)
    torch.save(model.state_dict(), path)
    return model


def cell(parent, name: str, seed: int, chosen: argparse.Namespace, held) -> dict:
    """One variant on a copy of the parent."""
    import copy

    model = copy.deepcopy(parent)
    tasks = make_tasks(
        TASKS, byte_encoder, LENGTH, END, END, train=512, test=chosen.test, seed=seed
    )
    config = hft.HFTConfig.from_preset(
        "small",
        steps=chosen.steps,
        batch_size=8,
        learning_rate=1e-3,
        warmup=0.05,
        seed=seed,
        **VARIANTS[name],
    )
    before = lm_loss(model, held)
    record = hft.continual(model, tasks, config)
    return record.to_json() | {
        "variant": name,
        "text_loss": {"before": before, "after": lm_loss(model, held)},
    }


def records_of(cells: list[dict]) -> list[hft.TuneRecord]:
    kept = [
        {k: v for k, v in c.items() if k not in ("variant", "text_loss", "summary")} for c in cells
    ]
    return [hft.TuneRecord(**k) for k in kept]


def text_plot(cells: list[dict], path: Path) -> None:
    """Increase of the loss of ordinary text, per variant: a dot per seed."""
    made, axes = figure(7.2, 3.2)
    for i, name in enumerate(VARIANTS):
        values = [
            c["text_loss"]["after"] - c["text_loss"]["before"]
            for c in cells
            if c["variant"] == name
        ]
        if values:
            axes.scatter([i] * len(values), values, s=14, color=PALETTE[i % len(PALETTE)])
            axes.hlines(
                sum(values) / len(values), i - 0.3, i + 0.3, color=PALETTE[i % len(PALETTE)]
            )
    axes.set_xticks(range(len(VARIANTS)), VARIANTS, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("increase of text loss (nats)")
    path.write_bytes(png_bytes(made))


def gather(folder: Path, setting: dict) -> list[dict]:
    """All finished cells of this setting, in the order of variants and seeds."""
    cells = [json.loads(p.read_text()) for p in sorted(folder.glob("cell-*.json"))]
    cells = [c for c in cells if c.pop("setting") == setting]
    order = list(VARIANTS)
    return sorted(cells, key=lambda c: (order.index(c["variant"]), c["config"]["seed"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--parent-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=60, help="per task")
    parser.add_argument("--test", type=int, default=96, help="questions per task")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/hft"))
    parser.add_argument("--cache", type=Path, default=Path("tenfold-report/hft-study"))
    chosen = parser.parse_args()
    for folder in (chosen.out, chosen.cache):
        folder.mkdir(parents=True, exist_ok=True)
    stream, held_stream = tiny.split(tiny.byte_stream())
    setting = {"tasks": list(TASKS), "steps": chosen.steps, "parent_steps": chosen.parent_steps,
               "test": chosen.test}  # fmt: skip
    for seed in chosen.seeds:
        held = tiny.text_rows(held_stream, 64, torch.Generator().manual_seed(seed + 1000), LENGTH)
        parent = None
        for name in chosen.only:
            path = chosen.cache / f"cell-{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
            if path.exists() and json.loads(path.read_text())["setting"] == setting:
                continue
            parent = parent or parent_of(seed, chosen.parent_steps, stream, chosen.cache)
            found = cell(parent, name, seed, chosen, held)
            # Losses of single steps would be most of the file.
            found["curves"] = {
                k: [{"loss": round(m["loss"], 4)} for m in c] for k, c in found["curves"].items()
            }
            path.write_text(json.dumps(found | {"setting": setting}) + "\n")
            s = found["summary"]["log_prob"]
            print(
                f"seed {seed} {name}: OP {s['op']:.3f}, BWT {s['bwt']:+.3f}, text {found['text_loss']}",
                flush=True,
            )
    cells = gather(chosen.cache, setting)
    about = {"torch": torch.__version__, "machine": platform.machine()}
    result = {"setting": setting | about, "cells": cells}
    (chosen.out / "study.json").write_text(json.dumps(result) + "\n")
    (chosen.out / "methods.png").write_bytes(png_bytes(methods_plot(records_of(cells))))
    text_plot(cells, chosen.out / "text.png")


if __name__ == "__main__":
    main()
