# SPDX-License-Identifier: Apache-2.0
"""Does a simulator know what training examples do? Many fine-tunings on real texts, against all baselines.

python examples/gptfluence_study.py [--seeds 0 1] [--out bench/results/gptfluence]

A byte-level Llama (trained here on documentation) is fine-tuned again and again on four tasks: answers to prompts
of standard-library functions,
German messages, licences, topics. Each run has other examples in another order. Asked, per seed:

  held-out runs     all methods, gradients included, on runs that nobody has learnt from
  unseen examples   the same on runs whose examples no run to learn from has
  unseen tests      the simulator on tests that it was not fitted to
  intervals         fits to every 4th and 8th measurement
  without           sets of examples left out: simulated, and really trained again
  mislabelled       examples with another's answer, ranked by several scores

Everything that was trained is kept in --work: a stopped study goes on. About half an hour per seed on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from tenfold.gptfluence import (
    BagEncoder,
    RecordConfig,
    Simulator,
    encoder_of,
    evaluate,
    make_curricula,
    mislabel_curve,
    report,
    study,
)
from tenfold.gptfluence.gradients import gradient_scores
from tenfold.report import png_bytes

METHODS = ("default", "reference", "ridge", "table", "similarity", "mean", "constant")


def told(text: str) -> None:
    print(text, flush=True)


def sparse(runs, every: int):
    """The runs as if only every so manieth step had been measured, and the last."""
    last = runs.y.shape[1] - 1
    at = torch.tensor(sorted({*range(0, last, every), last}))
    return replace(runs, steps=runs.steps[at], y=runs.y[:, at])


def fitted(made, train, held) -> dict:
    for name, one in made.items():
        one.fit(train, held)
        told(f"  {study.NAMES[name]} is fitted")
    return made


def encoders(chosen) -> dict:
    return {
        name: BagEncoder() if name == "bag" else encoder_of(*name.split(":"))
        for name in chosen.encoders
    }


def fit_settings(chosen, seed: int) -> dict:
    """What all simulators share."""
    return {"seed": seed} | ({} if chosen.fit_epochs is None else {"epochs": chosen.fit_epochs})


def one_seed(chosen, seed: int) -> dict:
    """All questions of one seed."""
    work = chosen.work / f"{chosen.layers}x{chosen.heads * 32}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    material = study.material(chosen.per_task, chosen.tests_per_task, noise=chosen.noise, seed=seed)
    model = study.parent_model(
        chosen.layers, chosen.heads, chosen.parent_steps, seed, file=work / "parent.pt"
    )
    config = RecordConfig.from_preset(
        "small",
        runs=chosen.runs,
        examples=chosen.examples,
        epochs=chosen.epochs,
        batch_size=4,
        learning_rate=chosen.learning_rate,
        concentration=0.3,
        checkpoint_every=100_000,
        seed=seed,
    )
    tested = range(chosen.runs - chosen.test_runs, chosen.runs)
    runs = study.record(
        material,
        model,
        config,
        work / "runs",
        gradients=[*range(chosen.gradient_runs), *tested],
        every=chosen.every,
        last=chosen.every,
        step=told,
    )
    train, held, test = runs.split(2, chosen.test_runs)
    result: dict = {"seed": seed, "steps": runs.order.shape[1] - 1, "methods": {}, "encoders": {}}

    features, settings = {}, fit_settings(chosen, seed)
    for name, encoder in encoders(chosen).items():
        features[name] = study.text_features(material, encoder)
        made = study.contestants(
            features[name],
            chosen.methods if name == chosen.encoders[0] else ("default", "similarity"),
            **settings,
        )
        fitted(made, train, held)
        result["encoders"][name] = study.judged(made, test)
        if name == chosen.encoders[0]:
            contestants = made
    simulator = contestants["default"]
    found = study.judged(contestants, test)
    found |= study.judged_gradients(
        test, train.take(range(chosen.gradient_runs)), work / "runs", config
    )
    result["methods"] = found
    for row in report.rows_of(found, study.NAMES):
        told("  " + "  ".join(row))
    draw(
        chosen.out / f"seed-{seed}",
        test,
        {
            study.NAMES[n]: study.predicted(contestants[n], test)
            for n in ("default", "ridge", "mean")
            if n in contestants
        },
    )

    result["intervals"] = {}
    for every in (4, 8):
        for rule in ("block", "pairs"):
            one = Simulator(*features[chosen.encoders[0]], sparse=rule, **settings)
            few, last = sparse(train, every), sparse(test, every)
            one.fit(few, sparse(held, every))
            result["intervals"][f"{every}, {rule}"] = evaluate(
                one.predict(last).values, last
            ).to_json()
    result["unseen"] = unseen(chosen, seed, material, model, config, (train, held, test), work)
    result["counterfactual"] = without(chosen, seed, simulator, material, model, config, work)
    result["mislabelled"] = mislabelled(chosen, seed, simulator, material, model, contestants)
    return result


def unseen(chosen, seed, material, model, config, parts, work) -> dict:
    """Runs over other examples; and tests that were left out of the fit."""
    train, held, test = parts
    other = study.material(chosen.per_task, chosen.tests_per_task, skip=chosen.per_task, seed=seed)
    settings = config.with_changes(runs=chosen.test_runs, seed=seed + 1000)
    runs = study.record(other, model, settings, work / "unseen", step=told)
    encoder = encoders(chosen)[chosen.encoders[0]]
    ours, theirs = study.text_features(material, encoder), study.text_features(other, encoder)
    made = fitted(
        study.contestants(ours, ("default", "mean", "constant"), **fit_settings(chosen, seed)),
        train,
        held,
    )
    made["default"] = made["default"].with_features(train=theirs[0])
    found = {"examples": study.judged(made, runs)}
    half = range(0, len(material.tests), 2)
    rest = [i for i in range(len(material.tests)) if i not in half]
    some = Simulator(ours[0], ours[1].take(half), **fit_settings(chosen, seed))
    some.fit(train.tests(half), held.tests(half))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved = some.with_features(test=ours[1].take(rest))
    asked = test.tests(rest)
    found["tests"] = {"default": evaluate(moved.predict(asked).values, asked).to_json(),
                      "constant": evaluate(asked.y[:, :1].expand_as(asked.y), asked).to_json()}  # fmt: skip
    return found


def without(chosen, seed, simulator, material, model, config, work) -> dict:
    """Examples left out."""
    curriculum = make_curricula(config, material.groups)[-1]
    sets = study.removals(curriculum, material.groups, chosen.sets, 12, seed)
    found = study.counterfactuals(
        simulator, material, model, config, curriculum, sets, work / "without", told
    )
    folder = chosen.out / f"seed-{seed}"
    (folder / "without.png").write_bytes(png_bytes(report.counterfactual_plot(found)))
    real = torch.tensor(found["real"]).abs()
    number, test = divmod(int(real.argmax()), real.shape[1])
    (folder / "without-curve.png").write_bytes(png_bytes(report.removed_plot(found, number, test)))
    return {"agreement": found["agreement"], "sets": [len(c["removed"]) for c in found["curves"]]}


def mislabelled(chosen, seed, simulator, material, model, contestants) -> dict:
    """Examples ranked by what they do to themselves and to the tests."""
    wrong = torch.zeros(len(material.samples), dtype=torch.bool)
    wrong[material.mislabelled] = True
    rows = {k: material.rows[k] for k in ("input_ids", "labels", "attention_mask")}
    own = gradient_scores(model, rows, rows).diagonal()
    scores = {
        "alpha on itself": simulator.self_influence(), "beta on itself": simulator.self_influence(kind="beta"),
        "delta on tests, mean": simulator.attribute(kind="delta").mean(1),
        "gradient norm": own, "Simfluence beta on tests, mean": contestants["ridge"].factors[1].mean(1),
    }  # fmt: skip
    found = {name: mislabel_curve(values, wrong) for name, values in scores.items()}
    (chosen.out / f"seed-{seed}" / "mislabelled.png").write_bytes(
        png_bytes(report.mislabel_plot(found))
    )
    return {name: {"area": one["area"], "ideal": one["ideal"]} for name, one in found.items()}


def draw(folder: Path, test, predicted: dict) -> None:
    """Plots of one seed's test runs."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        "curves": report.curves_plot(test, predicted),
        "errors": report.steps_plot(test, predicted),
        "final": report.final_plot(test, predicted),
    }
    for name, made in plots.items():
        (folder / f"{name}.png").write_bytes(png_bytes(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="that are fitted; reference (300 epochs of small batches) takes most of the time",
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4, help="32 wide each")
    parser.add_argument("--parent-steps", type=int, default=400)
    parser.add_argument("--per-task", type=int, default=40)
    parser.add_argument("--tests-per-task", type=int, default=12)
    parser.add_argument(
        "--noise", type=float, default=0.1, help="share of examples with another's answer"
    )
    parser.add_argument("--runs", type=int, default=37)
    parser.add_argument("--test-runs", type=int, default=5)
    parser.add_argument(
        "--gradient-runs", type=int, default=3, help="runs to learn a scale of gradients from"
    )
    parser.add_argument(
        "--every", type=int, default=10, help="steps between stored gradient scores"
    )
    parser.add_argument("--examples", type=int, default=80, help="of a run")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--fit-epochs", type=int, help="of a simulator (default: its preset's)")
    parser.add_argument("--sets", type=int, default=12, help="sets of examples that are left out")
    parser.add_argument(
        "--encoders",
        nargs="+",
        default=["minilm", "minilm:mean", "bag"],
        help="NAME or NAME:POOLING; the first is for everything",
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/gptfluence"))
    parser.add_argument("--work", type=Path, default=Path("tenfold-report/gptfluence-study"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    setting = {k: v for k, v in vars(chosen).items() if k not in ("seeds", "out", "work")}
    seeds = []
    for seed in chosen.seeds:
        file = chosen.work / f"result-{seed}.json"
        kept = json.loads(file.read_text()) if file.exists() else None
        if kept is None or kept["setting"] != setting:
            kept = {"setting": setting, "result": one_seed(chosen, seed)}
            file.write_text(json.dumps(kept) + "\n")
        seeds.append(kept["result"])
    about = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    (chosen.out / "study.json").write_text(
        json.dumps({"about": about, "setting": setting, "seeds": seeds}) + "\n"
    )


if __name__ == "__main__":
    main()
