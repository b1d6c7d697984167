# SPDX-License-Identifier: Apache-2.0
"""What upcycling buys: UpIT with 4 and 8 experts against dense continued tuning and vanilla upcycling, at equal data.

python examples/upit.py [--model bytes] [--experts 4 8] [--seeds 0 1 2] [--methods dense vanilla btx upit]
                        [--out bench/results/upit]
python examples/upit.py --model smollm2 --layers 10 --train 128 --experts 4

--model bytes: a byte-level Llama (4 layers) that is trained here on Python's documentation. --model smollm2:
SmolLM2-135M-Instruct, or with --layers a copy with that many of its 30 layers, healed on documentation first. Families:
docstrings, German, licences, topics. All methods go on from the same dense run, for the same steps on the same rows.
Finished runs are kept in --work: a stopped study goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tenfold.report import PALETTE, figure, png_bytes
from tenfold.training.batches import token_rows
from tenfold.upit import demo, report, summary
from tenfold.upit.families import Families
from tenfold.upit.study import METHODS, TUNED, compare


def cut(model: Any, layers: int) -> Any:
    """A copy with so many layers, evenly spaced; the first and the last stay."""
    made = copy.deepcopy(model)
    held = made.model.layers
    kept = sorted({round(i * (len(held) - 1) / (layers - 1)) for i in range(layers)})
    made.model.layers = torch.nn.ModuleList(held[i] for i in kept)
    for i, layer in enumerate(made.model.layers):
        layer.self_attn.layer_idx = i
    made.config.num_hidden_layers = len(kept)
    if getattr(made.config, "layer_types", None):
        made.config.layer_types = made.config.layer_types[: len(kept)]
    return made


def heal(model: Any, tokenizer: Any, steps: int, length: int) -> Any:
    """A cut model learns to speak again: so many steps of 8 rows of documentation."""
    from tenfold.data import long_documents
    from tenfold.upit.options import PostTrainingConfig
    from tenfold.upit.post_train import post_train

    rows = token_rows(
        tokenizer, [d.text[:30_000] for d in long_documents(("docs",), limit=60)], length
    )
    config = PostTrainingConfig(steps=steps, learning_rate=1e-3, batch_size=8, warmup=0.05)
    return post_train(model, rows, config=config, quiet=False).model


def prepared(chosen: argparse.Namespace, seed: int) -> tuple[Any, Any, Families]:
    """(model, tokenizer or None, data) of a seed."""
    if chosen.model == "bytes":
        path = chosen.work / f"bytes-{seed}-{chosen.parent_steps}.pt"
        if path.exists():
            from tenfold.training import tiny

            model = tiny.make_model(seed, demo.LAYERS, chosen.heads)
            model.load_state_dict(torch.load(path))
        else:
            model = demo.parent(chosen.parent_steps, heads=chosen.heads, seed=seed)
            torch.save(model.state_dict(), path)
        return model.eval(), None, demo.data_of(train=chosen.train, test=chosen.test, seed=seed)
    from tenfold.data import smollm2
    from tenfold.training.tasks import encoder
    from tenfold.upit.families import load_families
    from tenfold.upit.recipe import DataSpec

    model, tokenizer = smollm2()
    if chosen.layers:
        path = chosen.work / f"smollm2-{chosen.layers}-{chosen.heal}.pt"
        model = cut(model, chosen.layers)
        if path.exists():
            model.load_state_dict(torch.load(path))
        else:
            heal(model, tokenizer, chosen.heal, 128)
            torch.save(model.state_dict(), path)
    end = tokenizer.eos_token_id
    spec = DataSpec(demo.NAMES, (), chosen.train, chosen.test)
    return (
        model.eval(),
        tokenizer,
        load_families(spec, encoder(tokenizer), chosen.length, end, end, seed),
    )


def recipe_of(chosen: argparse.Namespace, experts: int, seed: int) -> dict[str, Any]:
    """UpIT's settings: checkpoints every quarter of an epoch, real ones as far as there are."""
    rate = chosen.learning_rate or (2e-3 if chosen.model == "bytes" else 2e-4)
    collect = {"epochs": 2.0, "save_every": 0.25, "learning_rate": rate, "dtype": "float32",
               "batch_size": chosen.batch, "sequence_length": chosen.length}  # fmt: skip
    if chosen.keep:
        collect["keep"] = min(chosen.keep, experts)
    return {
        "base_model": chosen.model, "preset": "small", "num_experts": experts, "experts_per_token": 2, "seed": seed,
        "collect": collect, "seeds": {"fraction": 0.1, "assign": chosen.assign},
        "router": {"normalize": chosen.normalize, "train": chosen.router, "learning_rate": rate / 20},
        "post": {"epochs": chosen.post_epochs, "learning_rate": rate / 2, "batch_size": chosen.batch,
                 "sequence_length": chosen.length},
    }  # fmt: skip


def every_twentieth(label: str) -> Callable[[str], None]:
    """Prints one in twenty of the steps that it is told."""
    numbers = itertools.count(1)

    def step(text: str) -> None:
        number = next(numbers)
        if number % 20 == 0:
            print(f"{label}, step {number}: {text}", flush=True)

    return step


def means_plot(runs: list[dict[str, Any]]) -> Any:
    """Mean loss after the same steps, less that of the dense model before: a dot per seed."""
    names = [(r["experts"], t) for r in runs for t in r["losses"] if t in METHODS.values()]
    names = sorted(dict.fromkeys(names), key=lambda n: (n[0], list(METHODS.values()).index(n[1])))
    made, axes = figure(7.2, 3.4)
    for i, (experts, title) in enumerate(names):
        values = [r["losses"][title]["mean"] - r["losses"][TUNED]["mean"] for r in runs
                  if r["experts"] == experts and title in r["losses"]]  # fmt: skip
        color = PALETTE[list(METHODS.values()).index(title) % len(PALETTE)]
        axes.scatter([i] * len(values), values, s=14, color=color)
        axes.hlines(sum(values) / len(values), i - 0.3, i + 0.3, color=color)
    axes.axhline(0, color="#888", lw=0.8)
    axes.set_xticks(
        range(len(names)), [f"{t}, {n}" for n, t in names], rotation=30, ha="right", fontsize=8
    )
    axes.set_ylabel("change of loss (nats per token)")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=("bytes", "smollm2"), default="bytes")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--layers", type=int, help="of a cut-down SmolLM2")
    parser.add_argument(
        "--heal", type=int, default=200, help="steps of documentation after cutting"
    )
    parser.add_argument(
        "--heads", type=int, default=8, help="of the byte-level model, 32 wide each"
    )
    parser.add_argument("--parent-steps", type=int, default=400)
    parser.add_argument("--train", type=int, default=512, help="rows per family")
    parser.add_argument("--test", type=int, default=96)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--keep",
        type=int,
        help="saved experts; the others are merged (default: all that there are)",
    )
    parser.add_argument("--post-epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--assign", default="relative", help="argmin, relative or random")
    parser.add_argument("--normalize", default="unit", help="none or unit")
    parser.add_argument("--router", default="joint", help="joint or router")
    parser.add_argument("--out", type=Path, default=Path("bench/results/upit"))
    parser.add_argument("--work", type=Path, default=Path("tenfold-report/upit-study"))
    chosen = parser.parse_args()
    for folder in (chosen.out, chosen.work):
        folder.mkdir(parents=True, exist_ok=True)
    setting = {
        k: v for k, v in vars(chosen).items() if k not in ("out", "work", "seeds", "experts")
    }
    runs = []
    for seed in chosen.seeds:
        ready = None
        for experts in chosen.experts:
            file = chosen.work / f"{chosen.model}-{experts}-{seed}.json"
            if file.exists() and (kept := json.loads(file.read_text()))["setting"] == setting:
                runs.append(kept)
                continue
            ready = ready or prepared(chosen, seed)
            model, tokenizer, data = ready
            found = compare(recipe_of(chosen, experts, seed), chosen.work / f"run-{chosen.model}-{experts}-{seed}",
                            methods=chosen.methods, model=model, tokenizer=tokenizer, data=data,
                            step=every_twentieth(f"{experts} experts, seed {seed}"))  # fmt: skip
            run = {"experts": experts, "seed": seed, "setting": setting, **found.to_json()}
            file.write_text(json.dumps(run) + "\n")
            for name, losses in found.losses.items():
                print(
                    f"{experts} experts, seed {seed}, {name}: loss {losses['mean']:.4f}", flush=True
                )
            runs.append(run)
    about = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    (chosen.out / f"{chosen.model}.json").write_text(
        json.dumps({"about": about, "runs": runs}) + "\n"
    )
    (chosen.out / f"{chosen.model}-means.png").write_bytes(png_bytes(means_plot(runs)))
    for run in runs:
        if run["seed"] != chosen.seeds[0]:
            continue
        name = f"{chosen.model}-{run['experts']}"
        shares = {t: torch.tensor(a, dtype=torch.float64) for t, a in run["affinity"].items()}
        plots = {"losses": summary.losses_plot(run["losses"], run["families"])}
        if shares:
            plots["specialisation"] = report.specialisation_plot(shares)
        if METHODS["upit"] in shares:
            plots["affinity"] = report.affinity_plot(shares[METHODS["upit"]], run["families"])
            plots["seeds"] = summary.buckets_plot(
                run["stages"]["seeds"]["families"], run["families"]
            )
        for plot, made in plots.items():
            (chosen.out / f"{name}-{plot}.png").write_bytes(png_bytes(made))


if __name__ == "__main__":
    main()
