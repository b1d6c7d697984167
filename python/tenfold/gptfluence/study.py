# SPDX-License-Identifier: Apache-2.0
"""Runs on real texts by a model that is trained here: the material of demo and study, and what is asked of it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.gptfluence import baselines
from tenfold.gptfluence.config import RecordConfig, SimulatorConfig
from tenfold.gptfluence.curricula import Curriculum, make_curricula
from tenfold.gptfluence.evaluation import agreement, evaluate, evaluate_gradients
from tenfold.gptfluence.features import Features
from tenfold.gptfluence.gradients import (
    GradientTracker,
    gradient_curve,
    gradient_scores,
    last_layer_scores,
)
from tenfold.gptfluence.metrics import LossMetric, trimmed
from tenfold.gptfluence.recorder import Recorder
from tenfold.gptfluence.recording import learning_rates, record_run, record_runs
from tenfold.gptfluence.runs import RunSet, read_run
from tenfold.gptfluence.simulator import Simulator
from tenfold.training import tiny

TASKS = ("docstring", "german", "licence", "topic")
LENGTH, END = 128, 0
NAMES = {"constant": "first value", "mean": "mean training run", "similarity": "similarity of texts, one number fitted",
         "ridge": "Simfluence, ridge", "table": "Simfluence, N(0, 1) start", "default": "GPTfluence",
         "reference": "GPTfluence as published"}  # fmt: skip


@dataclass
class Material:
    """Examples and tests of several tasks, as text and as rows of bytes.

    Attributes:
        samples, tests: ``prompt``, ``answer``, ``text``, ``group`` of each. mislabelled: numbers of examples whose
            answer is another's.
    """

    samples: list[dict[str, str]]
    tests: list[dict[str, str]]
    mislabelled: list[int]
    rows: dict[str, Tensor] = field(default_factory=dict)
    test_rows: dict[str, Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """The task of each example."""
        return [s["group"] for s in self.samples]


def material(
    per_task: int,
    tests_per_task: int,
    *,
    noise: float = 0.0,
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
    skip: int = 0,
    length: int = LENGTH,
) -> Material:
    """So many examples and tests of each task; ``noise``: share of the examples that get another example's answer.

    ``skip``: examples that are passed over, so that two materials have none in common; the tests are the same.
    """
    from tenfold.training.tasks import byte_encoder, pairs, rows_of_pairs

    samples: list[Any] = []
    tests: list[Any] = []
    for task in tasks:
        found = pairs(task)
        if len(found) < tests_per_task + skip + per_task:
            raise ValueError(f"task {task!r} has {len(found)} examples on this machine, too few")
        held, rest = (
            found[:tests_per_task],
            found[tests_per_task + skip : tests_per_task + skip + per_task],
        )
        for into, pairs_ in ((tests, held), (samples, rest)):
            into += [{"prompt": p, "answer": a, "text": p + a, "group": task} for p, a in pairs_]
    draw = random.Random(seed)
    wrong = sorted(draw.sample(range(len(samples)), round(noise * len(samples))))
    answers = [samples[i]["answer"] for i in wrong]
    for place, i in enumerate(wrong):
        samples[i] = samples[i] | {"answer": answers[(place + 1) % len(wrong)]}
        samples[i]["text"] = samples[i]["prompt"] + samples[i]["answer"]
    made = Material(samples, tests, wrong)
    for name, parts in (("rows", samples), ("test_rows", tests)):
        rows = rows_of_pairs(
            [(s["prompt"], s["answer"]) for s in parts], byte_encoder, length, END, END
        )
        setattr(made, name, trimmed(rows))
    return made


def parent_model(
    layers: int, heads: int, steps: int, seed: int = 0, head_dim: int = 32, file: Path | None = None
) -> Any:
    """A byte-level Llama that has read documentation for some steps; kept in ``file`` where one is given."""
    model = tiny.make_model(seed, layers, heads, head_dim)
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file))
        return model.eval()
    train_parent(model, steps, seed)
    if file is not None:
        torch.save(model.state_dict(), file)
    return model


def train_parent(model: Any, steps: int, seed: int = 0) -> float:
    """Trains a byte-level model on documentation, in place; the last step's loss."""
    stream, losses = tiny.byte_stream(), [0.0]

    def rows(stage: str, step: int, size: int) -> Tensor:
        return tiny.text_rows(
            stream, size, torch.Generator().manual_seed(seed * 1_000_003 + step), LENGTH
        )

    tiny.train(model, rows, steps, callback=lambda step, loss: losses.append(loss))
    return losses[-1]


class StoredScores:
    """Scores of one run's states, kept beside it: by all parameters every few steps, by the head at more of them."""

    def __init__(self, folder: Path, made: Material, every: int, last: int) -> None:
        self.file = folder / "scores.pt"
        batch, tests = _inputs(made.rows), _inputs(made.test_rows)
        self.trackers = {
            "all": GradientTracker(lambda m: gradient_scores(m, batch, tests), every),
            "head": GradientTracker(lambda m: last_layer_scores(m, batch, tests), last),
        }
        self.cosine: Tensor | None = None
        self._final = lambda m: gradient_scores(m, batch, tests, cosine=True)

    def watch(self, steps: int) -> Callable[[Any, int], None]:
        """What is called after the steps of a run of that many."""

        def watched(model: Any, step: int) -> None:
            if not step:
                return
            for tracker in self.trackers.values():
                tracker.step(model, step, keep=step == steps)
            if step == steps:
                self.cosine = self._final(model)
                self.file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(
                    {n: t.scores for n, t in self.trackers.items()} | {"cosine": self.cosine},
                    self.file,
                )

        return watched


def _inputs(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: rows[k] for k in ("input_ids", "labels", "attention_mask")}


def record(
    made: Material,
    model: Any,
    config: RecordConfig,
    folder: Path,
    *,
    gradients: Iterable[int] = (),
    every: int = 8,
    last: int = 8,
    step: Callable[[str], None] = lambda text: None,
) -> RunSet:
    """Records all runs of the settings (or reads them); gradient scores are kept of the runs ``gradients``."""
    wanted = set(gradients)

    def watch(run: int) -> Callable[[Any, int], None] | None:
        if run not in wanted:
            return None
        steps = len(make_curricula(config, made.groups)[run].order)
        return StoredScores(folder / f"{run:03d}", made, every, last).watch(steps)

    folders = record_runs(
        model, made.rows, made.test_rows, folder, config, groups=made.groups, watch=watch, step=step
    )
    return RunSet.of([read_run(f) for f in folders], train_ids=range(len(made.samples)))


def text_features(made: Material, encoder: Any) -> tuple[Features, Features]:
    """Features of examples and tests, by their numbers."""

    def of(samples: list[Any]) -> Features:
        return Features.of_texts(range(len(samples)), [s["text"] for s in samples], encoder)

    return of(made.samples), of(made.tests)


def contestants(
    features: tuple[Features, Features], names: Iterable[str], **changes: Any
) -> dict[str, Any]:
    """What predicts without gradients, by name; ``changes`` are fields of the simulators' settings."""
    made: dict[str, Any] = {}
    for name in names:
        if name in ("default", "reference"):
            made[name] = Simulator(*features, SimulatorConfig.from_preset(name, **changes))
        else:
            made[name] = {
                "constant": baselines.Constant,
                "mean": baselines.MeanTrajectory,
                "ridge": baselines.SimfluenceRidge,
                "table": lambda: baselines.SimfluenceTable("normal"),
                "similarity": lambda: baselines.Similarity(*features),
            }[name]()
    return made


def predicted(one: Any, runs: RunSet) -> Tensor:
    """[R, S, Q] by a simulator or a baseline."""
    found = one.predict(runs)
    return found.values if isinstance(one, Simulator) else found


def gradient_predictions(runs: RunSet, folder: Path, config: RecordConfig) -> dict[str, Tensor]:
    """[R, S, Q] by stored scores: TracIn-CP (all parameters; head), Grad-Dot and Grad-cosine of the last state."""
    rates = learning_rates(config, runs.order.shape[1] - 1)
    curves: dict[str, list[Tensor]] = {}
    for name, order, y in zip(runs.names, runs.order, runs.y):
        kept = torch.load(folder / name / "scores.pt")
        final = kept["all"][max(kept["all"])]
        for method, scores in (("tracin", kept["all"]), ("tracin, head", kept["head"]), ("grad-dot", final),
                               ("grad-cosine", kept["cosine"])):  # fmt: skip
            curve = gradient_curve(order[1:], y[0], rates, scores)
            curves.setdefault(method, []).append(curve[runs.steps])
    return {name: torch.stack(parts) for name, parts in curves.items()}


def judged_gradients(
    test: RunSet, train: RunSet | None, folder: Path, config: RecordConfig
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Evaluations of gradient methods: raw, scaled by a factor from training runs, by the best in hindsight."""
    curves = gradient_predictions(test, folder, config)
    own = gradient_predictions(train, folder, config) if train is not None and len(train) else {}
    found = {}
    for name, values in curves.items():
        made = evaluate_gradients(values, test, own.get(name), train if own else None)
        found[name] = {kind: e.to_json() for kind, e in made.items()}
    return found


def judged(made: Mapping[str, Any], test: RunSet) -> dict[str, dict[str, Any]]:
    """Evaluations of fitted contestants."""
    return {name: evaluate(predicted(one, test), test).to_json() for name, one in made.items()}


def removals(
    curriculum: Curriculum, groups: Sequence[str], count: int, size: int, seed: int = 0
) -> list[list[int]]:
    """Sets of examples to leave out of a curriculum: all of each task that it has, then random ones of ``size``."""
    there = curriculum.examples.tolist()
    sets = [[i for i in there if groups[i] == g] for g in dict.fromkeys(groups[i] for i in there)]
    draw = random.Random(seed)
    while len(sets) < count:
        sets.append(sorted(draw.sample(there, min(size, len(there)))))
    return [s for s in sets[:count] if len(s) < len(there)]


def counterfactuals(
    simulator: Simulator,
    made: Material,
    model: Any,
    config: RecordConfig,
    curriculum: Curriculum,
    sets: Sequence[Sequence[int]],
    folder: Path,
    step: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """ "Without these examples", simulated and really trained: final changes [N, Q] and curves of one set.

    The places of removed examples stay empty, in the simulation and in the training; the others count no more for it.
    """
    from tenfold.gptfluence.influence import without

    full = _retrained(made, model, config, curriculum, folder / "full")
    simulated, real, curves = [], [], []
    for number, removed in enumerate(sets):
        true = _retrained(
            made, model, config, curriculum.without(removed), folder / f"{number:03d}"
        )
        found = without(simulator, removed, curriculum.order, full[0])
        simulated.append(found.change)
        real.append(full[-1] - true[-1])
        curves.append(
            {"removed": list(removed), "simulated": found.without.tolist(), "real": true.tolist()}
        )
        step(f"without {len(removed)} examples")
    return {
        "agreement": agreement(torch.stack(simulated), torch.stack(real)),
        "curves": curves,
        "full": full.tolist(),
        "simulated": torch.stack(simulated).tolist(),
        "real": torch.stack(real).tolist(),
    }


def _retrained(
    made: Material, model: Any, config: RecordConfig, curriculum: Curriculum, folder: Path
) -> Tensor:
    """The measured curve [T + 1, Q] of a training along a curriculum; read where it was made before."""
    if not (folder / "curves.json").exists() or not read_finished(folder):
        metric, tests = LossMetric(made.test_rows), range(len(made.tests))
        recorder = Recorder(folder, tests, [metric], about={"order": curriculum.order.tolist()})
        record_run(
            copy.deepcopy(model), made.rows, range(len(made.samples)), curriculum, recorder, config
        )
    kept = read_run(folder)
    if kept.about["order"] != curriculum.order.tolist():
        raise ValueError(f"{folder} has a run of another curriculum; remove it")
    # A step without examples changes nothing.
    whole = torch.zeros(len(curriculum.order) + 1, dtype=torch.int64)
    whole[torch.tensor(curriculum.steps) + 1] = 1
    return kept.values["loss"][whole.cumsum(0)]


def read_finished(folder: Path) -> bool:
    """Is the run in a folder over?"""
    return bool(json.loads((folder / "curves.json").read_text())["finished"])
