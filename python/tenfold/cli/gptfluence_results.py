# SPDX-License-Identifier: Apache-2.0
"""How results of ``tenfold gptfluence`` are read, shown and kept."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.cli.common import out, split, table, write_json


def recorded(given: Mapping[str, Any]) -> Any:
    """The runs and texts that a verb's options name."""
    from tenfold.gptfluence.inputs import read_recorded

    return read_recorded(
        given["data"], given["metric"], missing="mask" if given["mask"] else "raise", published=given["published"],
        train=given["train_texts"], tests=given["test_texts"],
    )  # fmt: skip


def fitted(simulator: Any, record: Any, kept: Any, folder: Path, json: bool) -> None:
    """What a fit was."""
    from tenfold.gptfluence.evaluation import evaluate

    found = evaluate(simulator.predict(kept).values, kept).to_json() if len(kept) else None
    about = {
        "simulator": str(folder), "metric": simulator.metric, "trained_parameters": simulator.trained_parameters,
        "steps": record.steps, "best": record.best, "seconds": record.seconds, "loss": record.losses[-1], "test": found,
        "runs": list(simulator.fitted),
    }  # fmt: skip
    if json:
        write_json(about)
        return
    out.print(
        f"{len(simulator.fitted)} runs, {simulator.trained_parameters:,} parameters, "
        f"{record.steps} steps in {record.seconds:.0f} s",
        highlight=False,
    )
    if found:
        out.print(
            f"{len(kept)} runs that it never saw: MSE {found['mse']:.4g}, MAE {found['mae']:.4g}",
            highlight=False,
        )
    out.print(f"simulator: {folder}", highlight=False, soft_wrap=True)


def predicted(
    folder: Path,
    run: Path | None,
    curriculum: Path | None,
    first: Path | None,
    without: Sequence[str],
    file: Path | None,
    json: bool,
) -> None:
    """A simulated run."""
    from tenfold.gptfluence import inputs
    from tenfold.gptfluence.simulator import Simulator

    simulator = Simulator.load(folder)
    ids, start, tests = _curriculum(simulator, run, curriculum, first)
    gone = {inputs.id_of(text, simulator.train.ids) for text in without}
    ids = [[i for i in batch if i not in gone] for batch in ids]
    found = simulator.predict(ids, start, tests=tests)
    lines = [
        {"id": test, "trajectory": found.values[0, :, q].tolist()} for q, test in enumerate(tests)
    ]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json_module.dumps(line) + "\n" for line in lines))
    if json:
        about = {"stability": dict(found.stability), "diverged": bool(found.diverged.any())}
        write_json(about | ({"file": str(file)} if file else {"tests": lines}))
        return
    rows = [
        [str(t), f"{v[0]:.4f}", f"{v[-1]:.4f}"]
        for t, v in ((line["id"], line["trajectory"]) for line in lines)
    ]
    out.print(table(f"{simulator.metric} over {len(ids)} steps", ("test", "before", "after"), rows))
    if file is not None:
        out.print(f"trajectories: {file}", highlight=False, soft_wrap=True)


def _curriculum(
    simulator: Any, run: Path | None, curriculum: Path | None, first: Path | None
) -> tuple[list[Any], Any, list[Any]]:
    """(batches of ids, first values, tests) of a recorded run, or of files. ValueError for neither, and for both."""
    from tenfold.gptfluence import inputs
    from tenfold.gptfluence.runs import read_run

    if (run is None) == (curriculum is None):
        raise ValueError("give --run, or --curriculum with --first")
    if run is not None:
        kept = read_run(run)
        kept.scale(simulator.metric)
        start = int(kept.steps[0])
        ids = [
            [kept.train_ids[i] for i in batch if i >= 0]
            for batch in kept.order[start + 1 :].tolist()
        ]
        return ids, kept.values[simulator.metric][0], list(kept.test_ids)
    if first is None:
        raise ValueError("--curriculum needs --first: the values before the first batch")
    tests = list(simulator.test.ids)
    assert curriculum is not None
    return inputs.read_curriculum(curriculum), inputs.read_values(first, tests), tests


def attributed(simulator: Any, given: Mapping[str, Any], json: bool) -> None:
    """Scores of pairs, or of examples on themselves."""
    from tenfold.gptfluence import inputs

    kind = given["kind"]
    tests: list[Any] = ["itself"]
    if given["itself"]:
        kind = "alpha" if kind == "delta" else kind
        scores = simulator.self_influence(kind=kind)[:, None]
    else:
        names = split(given["test"], str, "--test") if given["test"] else []
        tests = [inputs.id_of(n, simulator.test.ids) for n in names] or list(simulator.test.ids)
        options: dict[str, Any] = {"kind": kind}
        if given["level"] is not None:
            options["level"] = given["level"]
        if kind == "counterfactual":
            ids, start, all_tests = _curriculum(simulator, given["run"], None, None)
            at = [all_tests.index(t) for t in tests]
            options |= {"curriculum": ids, "first": start[at]}
        scores = simulator.attribute(test=tests, **options)
    lines = [
        {"id": name, "scores": dict(zip(map(str, tests), row))}
        for name, row in zip(simulator.train.ids, scores.tolist())
    ]
    if given["file"] is not None:
        given["file"].parent.mkdir(parents=True, exist_ok=True)
        given["file"].write_text("".join(json_module.dumps(line) + "\n" for line in lines))
    mean = scores.mean(1)
    order = mean.argsort().tolist()
    top = min(given["top"], len(order) // 2)
    ends = [*order[:top], *order[len(order) - top :]]
    if json:
        shown = [{"id": simulator.train.ids[i], "mean": float(mean[i])} for i in ends]
        write_json(
            {
                "kind": kind,
                "ends": shown,
                **({"file": str(given["file"])} if given["file"] else {"scores": lines}),
            }
        )
        return
    rows = [[str(simulator.train.ids[i]), f"{float(mean[i]):+.5f}"] for i in ends]
    what = "itself" if given["itself"] else f"{len(tests)} tests, mean"
    out.print(table(f"{kind} of examples on {what}: lowest and highest", ("example", kind), rows))


def _named(given: Sequence[str] | None) -> dict[str, Any]:
    from tenfold.gptfluence.simulator import Simulator
    from tenfold.ma_rlhf.inputs import named_paths

    return {
        name: Simulator.load(path)
        for name, path in named_paths(list(given or []), "simulator").items()
    }


def _unseen(simulators: Mapping[str, Any], runs: Any) -> None:
    for name, simulator in simulators.items():
        both = set(simulator.fitted) & set(runs.names)
        if both:
            raise ValueError(
                f"the simulator {name!r} was fitted to run {sorted(both)[0]!r}, which it is to be tested on"
            )


def evaluated(given: Mapping[str, Any], json: bool) -> None:
    """Evaluates simulators and baselines on the last runs."""
    from tenfold.gptfluence import report, study
    from tenfold.gptfluence.encoders import encoder_of
    from tenfold.gptfluence.inputs import EVALUATION
    from tenfold.training.checks import one_of
    from tenfold.training.store import write_text

    names = split(given["methods"], str, "--methods") if given["methods"] else []
    for name in names:
        one_of("--methods", name, ("constant", "mean", "ridge", "table", "similarity"))
    simulators = _named(given["simulators"])
    data = recorded(given)
    train, held, test = data.runs.split(given["validation"], given["test"])
    _unseen(simulators, test)
    features: Any = ()
    if "similarity" in names:
        one = next(iter(simulators.values()), None)
        features = (one.train, one.test) if one else data.features(encoder_of(given["encoder"]))
    made: dict[str, Any] = study.contestants(features, names)
    for one in made.values():
        one.fit(train, held if len(held) else None)
    made = simulators | made
    predicted_ = {name: study.predicted(one, test) for name, one in made.items()}
    found = study.judged(made, test)
    folder: Path = given["folder"]
    record = next((s.record.to_json() for s in simulators.values() if s.record), None)
    page = report.write_report(
        folder / "index.html", test, predicted_, found, record, str(given["data"])
    )
    write_text(folder / EVALUATION, json_module.dumps(found) + "\n")
    if json:
        write_json({"report": str(page), "runs": list(test.names), "methods": found})
        return
    out.print(table(f"{len(test)} runs: {test.metric}", report.COLUMNS, report.rows_of(found)))
    out.print(f"report: {page}", highlight=False, soft_wrap=True)


def plotted(given: Mapping[str, Any], json: bool) -> None:
    """A page of curves."""
    from tenfold.gptfluence import report, study

    simulators = _named(given["simulators"])
    runs = recorded(given).runs
    last = runs.take(range(max(0, len(runs) - given["runs"]), len(runs)))
    found = {name: study.predicted(s, last) for name, s in simulators.items()}
    seen = {name: sorted(set(s.fitted) & set(last.names)) for name, s in simulators.items()}
    page = report.write_report(
        given["folder"] / "index.html",
        last,
        found,
        study.judged(simulators, last),
        None,
        str(given["data"]),
    )
    if json:
        write_json({"report": str(page), "runs": list(last.names), "fitted": seen})
        return
    for name, both in seen.items():
        if both:
            out.print(f"{name} was fitted to {len(both)} of these runs", highlight=False)
    out.print(f"report: {page}", highlight=False, soft_wrap=True)
