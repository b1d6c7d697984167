# SPDX-License-Identifier: Apache-2.0
"""DHA against mean-pooled GQA on a model trained here: the study of docs/methods/dha.md.

python examples/dha_study.py [--seeds 1] [--parent-steps 900] [--out bench/results/dha]

A byte-level MHA Llama (4 layers, 8 heads of 32) learns standard-library text and key-value recall. It is
converted at 50 % and 25 % of its heads; every conversion is judged on held-out text and recall right
after conversion and while it is trained further. Finished cells are kept in OUT: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from tenfold.dha import convert
from tenfold.report import PALETTE, figure, png_bytes
from tenfold.training import tiny
from tenfold.training.batches import lm_loss

LENGTH, PAIRS = 128, 8
# name -> settings that differ from DHA's; "same steps" trains GQA for as long as all DHA's stages.
VARIANTS = {
    "DHA": {},
    "GQA, mean-pooled": {"method": "gqa_mean"},
    "GQA, mean-pooled, same steps": {"method": "gqa_mean", "longer": True},
    "GQA, groups by CKA": {"method": "cka_mean"},
    "DHA groups, mean-pooled": {"method": "dha_mean"},
    "DHA, uniform budgets": {"allocation": "uniform"},
    "DHA, aligned first": {"init": "aligned"},
}
ONLY_AT_25 = (
    "GQA, groups by CKA",
    "DHA groups, mean-pooled",
    "DHA, uniform budgets",
    "DHA, aligned first",
)


def parent_of(seed: int, steps: int, data, folder: Path):
    """The trained parent, from OUT's cache if it is there."""
    path = folder / f"parent-{seed}-{steps}.pt"
    model = tiny.make_model(seed)
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model.eval()

    def told(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"parent, seed {seed}: step {step} of {steps}, loss {loss:.3f}", flush=True)

    tiny.train(model, data, steps, batch_size=8, callback=told)
    torch.save(model.state_dict(), path)
    return model


def judged(model, seed: int, text, recall) -> dict:
    return {"text_loss": lm_loss(model, text), "recall_loss": lm_loss(model, recall)} | {
        f"recall_{k}": v for k, v in tiny.recall_score(model, seed, 4 * len(recall), PAIRS).items()
    }


def cell(parent, name: str, budget: float, seed: int, data, held, steps: dict) -> dict:
    """One conversion: judged before and after recovery, with the LM loss of every recovery step."""
    changes = dict(VARIANTS[name])
    recovery = steps["recovery"]
    if changes.pop("longer", False):
        recovery += steps["search"] + steps["fusion"]
    start = time.monotonic()
    settings = {
        "search_steps": steps["search"], "fusion_steps": steps["fusion"], "sequence_length": LENGTH,
        "omega_lr": 0.04, "force": True, "seed": seed,
    } | changes  # fmt: skip
    first = convert(parent, budget, data, "small", recovery_steps=0, **settings)
    before = judged(first, seed, *held)
    curve = tiny_recovery(first, data, recovery, seed)
    after = judged(first, seed, *held)
    record = first.conversion
    return {
        "variant": name, "budget": budget, "seed": seed, "before": before, "after": after,
        "recovery_steps": recovery, "curve": curve, "heads": sum(record.key_heads + record.value_heads),
        "key_heads": record.key_heads, "value_heads": record.value_heads,
        "mse_by_layer": record.mse_by_layer, "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def tiny_recovery(model, data, steps: int, seed: int) -> list[float]:
    from tenfold.dha import recover
    from tenfold.dha.config import DhaConfig

    config = DhaConfig.from_preset("small", recovery_steps=steps, sequence_length=LENGTH, seed=seed)
    kept = model.config._attn_implementation
    model.set_attn_implementation(config.attention)
    curve = recover(model, data, config)
    model.set_attn_implementation(kept)
    return [round(m["lm"], 4) for m in curve]


def smooth(curve: list[float], width: int = 20) -> list[float]:
    return [
        sum(curve[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(curve))
    ]


def plot(cells: list[dict], parents: list[dict], path: Path) -> None:
    """Loss by recovery step, a panel's worth of lines per budget."""
    made, axes = figure(7.2, 4.0)
    names = list(VARIANTS)
    for c in cells:
        if c["seed"] == cells[0]["seed"]:
            axes.plot(
                smooth(c["curve"]), color=PALETTE[names.index(c["variant"]) % len(PALETTE)], lw=1.2,
                ls="-" if c["budget"] == 0.25 else "--", label=f"{c['variant']}, {100 * c['budget']:g} %",
            )  # fmt: skip
    mean = sum(p["text_loss"] + p["recall_loss"] for p in parents) / (2 * len(parents))
    axes.axhline(mean, color="black", lw=1, ls=":", label="parent")
    axes.set_xlabel("recovery step")
    axes.set_ylabel("training loss (nats, mean of 20 steps)")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.write_bytes(png_bytes(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--parent-steps", type=int, default=900)
    parser.add_argument("--search-steps", type=int, default=40)
    parser.add_argument("--fusion-steps", type=int, default=160)
    parser.add_argument("--recovery-steps", type=int, default=100)
    parser.add_argument("--held", type=int, default=64, help="held-out rows of text, and of recall")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/dha"))
    parser.add_argument("--cache", type=Path, default=Path("tenfold-report/dha-study"))
    chosen = parser.parse_args()
    steps = {"search": chosen.search_steps, "fusion": chosen.fusion_steps,
             "recovery": chosen.recovery_steps}  # fmt: skip
    for folder in (chosen.out, chosen.cache):
        folder.mkdir(parents=True, exist_ok=True)
    train, held_stream = tiny.split(tiny.byte_stream())
    file = chosen.out / "study.json"
    done = json.loads(file.read_text()) if file.exists() else {"cells": [], "parents": []}
    for seed in range(chosen.seeds):
        data = tiny.mixture(train, seed, LENGTH, PAIRS)
        generator = torch.Generator().manual_seed(seed + 1000)
        held = (tiny.text_rows(held_stream, chosen.held, generator, LENGTH),
                tiny.recall_rows(chosen.held, generator, PAIRS, LENGTH // (2 * PAIRS)))  # fmt: skip
        parent = parent_of(seed, chosen.parent_steps, data, chosen.cache)
        if all(p["seed"] != seed for p in done["parents"]):
            done["parents"].append({"seed": seed} | judged(parent, seed, *held))
        print(done["parents"][-1], flush=True)
        for budget in (0.25, 0.5):
            for name in chosen.only:
                key = (name, budget, seed)
                had = {(c["variant"], c["budget"], c["seed"]) for c in done["cells"]}
                if key in had or (budget != 0.25 and name in ONLY_AT_25):
                    continue
                found = cell(parent, name, budget, seed, data, held, steps)
                done["cells"].append(found)
                done["setting"] = {"torch": torch.__version__, "machine": platform.machine(),
                                   "threads": torch.get_num_threads(), "steps": steps,
                                   "parent_steps": chosen.parent_steps}  # fmt: skip
                file.write_text(json.dumps(done, indent=1) + "\n")
                print(f"{budget:g} {name}: {found['before']} -> {found['after']}, "
                      f"{found['seconds']} s", flush=True)  # fmt: skip
    plot(done["cells"], done["parents"], chosen.out / "recovery.png")


if __name__ == "__main__":
    main()
