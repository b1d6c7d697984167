# SPDX-License-Identifier: Apache-2.0
"""What tools and traces buy a reward model: accuracy by tool, ablations, unseen sets, calibration, and PPO.

python examples/themis.py [--model bpe] [--kinds calculator calendar ...] [--unseen search none] [--train 600]
                          [--variants plain themis beta0 omega0] [--seeds 0 1 2] [--no-rl]
                          [--out bench/results/themis]
python examples/themis.py --model smollm2 --keep-layers 12 --preset default --set learning_rate=3e-4 batch_size=16 \
                          epochs=1 mixed_precision=bf16

--model bpe: a Llama of a few million parameters over byte pairs, random at first. --model smollm2:
SmolLM2-135M-Instruct (--preset lora: with LoRA); --keep-layers: its first layers alone, which is quicker.
Pairs are synthetic, with true traces; questions of the tests are in no training set. --unseen kinds are tested on only.
PPO: a byte-level policy that has learnt sums from answers of which half are wrong, with the demo's reward models.
Finished runs are kept in --work: a stopped study goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tenfold.ma_rlhf.inputs import named_settings
from tenfold.report import PALETTE, figure, png_bytes
from tenfold.themis import report, study
from tenfold.themis.config import ThemisConfig
from tenfold.themis.inputs import reward_model, split_off
from tenfold.themis.small import small_model
from tenfold.themis.synthetic import KINDS, synthetic_mixture, synthetic_tools
from tenfold.themis.tokens import byte_tokenizer

SMALL = {
    "preset": "small",
    "learning_rate": 2e-3,
    "batch_size": 16,
    "warmup": 0.05,
    "max_length": 512,
}


def told(text: str) -> None:
    print(text, flush=True)


def data_of(chosen: argparse.Namespace, seed: int) -> tuple[Any, dict[str, Any]]:
    """(pairs to train on, test sets)."""
    train = synthetic_mixture(dict.fromkeys(chosen.kinds, chosen.train), seed)
    tests = {
        "seen tools": synthetic_mixture(
            dict.fromkeys(chosen.kinds, chosen.test), seed, split="test"
        )
    }
    if chosen.unseen:
        tests["unseen"] = synthetic_mixture(
            dict.fromkeys(chosen.unseen, chosen.test), seed, split="test"
        )
    return train, tests


def fresh(chosen: argparse.Namespace, train: Any, seed: int) -> tuple[Any, Any]:
    """(untrained reward model, tokenizer)."""
    if chosen.model != "bpe":
        model, tokenizer = reward_model(chosen.model, torch.float32, seed=seed)
        if chosen.keep_layers:
            del model.base_model.layers[chosen.keep_layers :]
            model.config.num_hidden_layers = len(model.base_model.layers)
        return model, tokenizer
    texts = [text for p in train for text in (p.question, p.chosen.answer, p.context or "",
             *(s.observation or "" for s in p.chosen.trace.steps), p.chosen.trace.rationale or "")]  # fmt: skip
    tokenizer = byte_tokenizer(texts, chosen.vocabulary)
    return small_model(tokenizer, seed, layers=chosen.layers, heads=chosen.heads)


def variants(chosen: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The results of a seed's variants."""
    pairs, tests = data_of(chosen, seed)
    train, held = split_off(pairs, 0.05)
    fields = list(ThemisConfig.__dataclass_fields__)
    settings = (SMALL if chosen.preset == "small" else {"preset": chosen.preset}) | {"seed": seed}
    settings |= named_settings(chosen.set, fields)
    made = []
    for variant in chosen.variants:
        folder = chosen.work / f"{chosen.model}-{variant}-{seed}"
        made.append(study.run_variant(
            variant, lambda: fresh(chosen, pairs, seed), train, tests, settings, folder, tools=synthetic_tools,
            validation=held, loop={"max_new_tokens": 160, "max_length": 1024}, step=told,
        ) | {"seed": seed})  # fmt: skip
    return made


def rewards(chosen: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """PPO with both reward models."""
    file = chosen.work / f"ppo-{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    place = chosen.work / f"policy-{seed}-{chosen.policy_steps}"
    if not (place / "config.json").is_file():
        study.noisy_policy(seed, chosen.policy_steps, step=told).save_pretrained(place)
    policy = AutoModelForCausalLM.from_pretrained(place).eval()
    judges = study.arithmetic_judges(seed, chosen.judge_steps, told)
    settings = {"steps": chosen.rl_steps, "batch_size": 64, "minibatches": 2, "ppo_epochs": 1, "learning_rate": 3e-4,
                "critic_learning_rate": 6e-4, "beta": 0.02, "n": 1, "checkpoint_every": None}  # fmt: skip
    made = [study.ppo(v, policy, judges[v], settings, seed, told) | {"seed": seed} for v in judges]
    file.write_text(json.dumps(made) + "\n")
    return made


def seeds_plot(runs: list[dict[str, Any]], name: str) -> Any:
    """Accuracy over all pairs of a test set: a dot per seed, a line for the mean."""
    made, axes = figure(6.0, 3.2)
    kinds = list(dict.fromkeys(r["variant"] for r in runs))
    for i, variant in enumerate(kinds):
        values = [
            100 * r["evaluations"][name]["accuracy"]["all"]["value"]
            for r in runs
            if r["variant"] == variant
        ]
        axes.scatter([i] * len(values), values, s=16, color=PALETTE[i])
        axes.hlines(sum(values) / len(values), i - 0.3, i + 0.3, color=PALETTE[i])
    axes.axhline(50, color="#888", lw=0.8, ls=":")
    axes.set_xticks(range(len(kinds)), [study.TITLES[k] for k in kinds], fontsize=8)
    axes.set_ylabel(f"% right, {name}")
    return made


def ppo_plot(runs: list[dict[str, Any]]) -> Any:
    """Share of right answers before and after PPO, by reward model and seed."""
    made, axes = figure(5.4, 3.2)
    for i, variant in enumerate(dict.fromkeys(r["variant"] for r in runs)):
        for r in (r for r in runs if r["variant"] == variant):
            axes.plot(
                [3 * i, 3 * i + 1],
                [100 * r["before"], 100 * r["after"]],
                "o-",
                ms=4,
                lw=1,
                color=PALETTE[i],
            )
        axes.text(3 * i + 0.5, 4, study.TITLES[variant], ha="center", fontsize=8)
    axes.set_xticks([0, 1, 3, 4], ["before", "after", "before", "after"])
    axes.set_ylim(0, 104)
    axes.set_ylabel("% of sums right")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="bpe", help="bpe, bytes, smollm2, or a folder")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE of ThemisConfig")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["calculator", "calendar", "weather", "multi"]
    )
    parser.add_argument("--unseen", nargs="*", choices=KINDS, default=["search", "none"])
    parser.add_argument("--train", type=int, default=600, help="pairs per kind")
    parser.add_argument("--test", type=int, default=60, help="pairs per kind")
    parser.add_argument(
        "--variants", nargs="+", choices=list(study.VARIANTS), default=list(study.VARIANTS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--vocabulary", type=int, default=1024, help="of --model bpe")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8, help="32 wide each")
    parser.add_argument("--keep-layers", type=int, help="of a trained model; default: all")
    parser.add_argument("--no-rl", action="store_true", help="no PPO")
    parser.add_argument("--policy-steps", type=int, default=1500)
    parser.add_argument("--judge-steps", type=int, default=120)
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("bench/results/themis"))
    parser.add_argument("--work", type=Path, default=Path("tenfold-report/themis-study"))
    chosen = parser.parse_args()
    for folder in (chosen.out, chosen.work):
        folder.mkdir(parents=True, exist_ok=True)
    runs = [r for seed in chosen.seeds for r in variants(chosen, seed)]
    policies = [] if chosen.no_rl else [r for seed in chosen.seeds for r in rewards(chosen, seed)]
    about = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    setting = {k: v for k, v in vars(chosen).items() if k not in ("out", "work")}
    for run in runs:
        for found in run["evaluations"].values():
            found.pop("pairs", None)
    (chosen.out / f"{chosen.model}.json").write_text(
        json.dumps({"about": about, "setting": setting, "runs": runs, "ppo": policies}) + "\n"
    )
    first = [r for r in runs if r["seed"] == chosen.seeds[0]]
    for name in first[0]["evaluations"] if first else ():
        found = {study.TITLES[r["variant"]]: r["evaluations"][name] for r in first}
        slug = f"{chosen.model}-{name.replace(' ', '-')}"
        plots = {"accuracy": report.accuracy_plot(found), "calibration": report.calibration_plot(found),
                 "seeds": seeds_plot(runs, name)}  # fmt: skip
        for plot, made in plots.items():
            (chosen.out / f"{slug}-{plot}.png").write_bytes(png_bytes(made))
        for row in report.accuracy_rows(found):
            told(f"{name}: " + "  ".join(row))
    if policies:
        (chosen.out / "ppo.png").write_bytes(png_bytes(ppo_plot(policies)))


if __name__ == "__main__":
    main()
