# SPDX-License-Identifier: Apache-2.0
"""GPTfluence on packaged text: a small model is fine-tuned many times, and runs that it never saw are simulated.

A byte-level Llama, trained here, learns answers of four tasks, each time from other examples in another order. A
simulator learns from
these runs, predicts others from their curricula alone, and says what single examples did. Then some examples are really
left out. A demo of one seed: docs/methods/gptfluence.md has a study.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.data.sentences import sentence_model_path
from tenfold.gptfluence import report, speed, study
from tenfold.gptfluence.config import RecordConfig, SimulatorConfig
from tenfold.gptfluence.curricula import make_curricula
from tenfold.gptfluence.encoders import BAG, PACKAGED, encoder_of
from tenfold.gptfluence.runs import RunSet
from tenfold.report import Headline, Page, Speedup, TextTable, png_bytes
from tenfold.training import tiny
from tenfold.training.parents import trained
from tenfold.training.threads import threads

PER_TASK, TESTS, RUNS, VALIDATION, TEST = 20, 6, 15, 2, 3
LAYERS, HEADS, PARENT_STEPS, LENGTH, SETS = 2, 2, 40, 96, 5
RECORD: dict[str, Any] = {
    "runs": RUNS,
    "examples": 40,
    "epochs": 3.0,
    "batch_size": 4,
    "concentration": 0.3,
    "length": LENGTH,
    "learning_rate": 2e-3,
    "checkpoint_every": 100_000,
}
METHODS = ("default", "ridge", "similarity", "mean", "constant")
EPOCHS = 500  # of the fit
STEPS = 3 + RUNS + 1 + len(METHODS) + SETS
COLUMNS = report.COLUMNS
SPEED_COLUMNS = ("simulated", "op", "against", "times as fast", "largest difference")
PAIR_COLUMNS = ("effect", "task", "example")


@dataclass
class Demo:
    """What the demo found; ``speed``: of the simulation of all runs, ``apart``: from that in PyTorch, in nats."""

    found: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Tensor] = field(default_factory=dict)
    removed: dict[str, Any] = field(default_factory=dict)
    pairs: list[tuple[float, str, str]] = field(default_factory=list)
    asked: str = ""
    setting: str = ""
    runs: RunSet | None = None
    parameters: int = 0
    recorded: int = 0
    speed: Speedup | None = None
    apart: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {
            "setting": self.setting,
            "methods": self.found,
            "counterfactual": self.removed["agreement"],
        }


def run_demo(step: Callable[[str], None] = lambda text: None, seed: int = 0) -> Demo:
    """Runs it, on one thread; ``step`` is told after each piece.

    ``seed``: of the curricula, the simulator's weights and what is left out; the fine-tuned model is always the same.
    """
    with threads(1), tempfile.TemporaryDirectory() as folder:
        return _run(Path(folder), step, seed)


def parent() -> Any:
    """The byte-level model that is fine-tuned: trained once."""
    model = tiny.make_model(0, LAYERS, HEADS, 32)
    settings = {"layers": LAYERS, "heads": HEADS, "steps": PARENT_STEPS}
    return trained(
        "gptfluence", settings, model, lambda m: {"loss": study.train_parent(m, PARENT_STEPS)}
    )[0]


def _run(folder: Path, step: Callable[[str], None], seed: int) -> Demo:
    made = study.material(PER_TASK, TESTS, length=LENGTH)
    model = parent()
    step("a model to fine-tune")
    config = RecordConfig.from_preset("small", **RECORD, seed=seed)
    runs = study.record(
        made,
        model,
        config,
        folder / "runs",
        gradients=range(RUNS - TEST, RUNS),
        every=10_000,
        last=4,
        step=step,
    )
    train, held, test = runs.split(VALIDATION, TEST)
    encoder = PACKAGED if sentence_model_path() else BAG
    features = study.text_features(made, encoder_of(encoder))
    step("features of the texts")
    demo = Demo(runs=test, recorded=len(runs))
    demo.parameters = sum(p.numel() for p in model.parameters())
    start = SimulatorConfig.from_preset("default").seed
    contestants = study.contestants(features, METHODS, epochs=EPOCHS, seed=start + seed)
    for name, one in contestants.items():
        one.fit(train, held)
        demo.predicted[name] = study.predicted(one, test)
        step(f"{study.NAMES[name]}")
    demo.found = study.judged(contestants, test) | study.judged_gradients(
        test, None, folder / "runs", config
    )
    step("gradients")
    simulator = contestants["default"]
    demo.speed, demo.apart = speed.simulation(simulator, runs)
    step(str(demo.speed))
    curriculum = make_curricula(config, made.groups)[-1]
    sets = study.removals(curriculum, made.groups, SETS, 10, seed)
    demo.removed = study.counterfactuals(
        simulator, made, model, config, curriculum, sets, folder / "removed", step
    )
    _influences(demo, simulator, made)
    demo.setting = (
        f"A byte-level Llama of {demo.parameters / 1e3:.0f}k parameters, "
        f"{PARENT_STEPS} steps "
        f"of documentation; {RUNS} "
        f"fine-tunings of {RECORD['examples']} of {len(made.samples)} examples ({', '.join(study.TASKS)}), "
        f"{runs.order.shape[1] - 1} steps of "
        f"{RECORD['batch_size']}, AdamW; {len(train)} of them to learn from, {len(test)} to predict; "
        f"loss of {len(made.tests)} tests after every step. "
        f"Texts are encoded by {encoder}. One thread, one seed."
    )
    return demo


def _influences(demo: Demo, simulator: Any, made: study.Material) -> None:
    """The examples that help and harm one test most, by ``delta``."""
    scores = simulator.attribute(kind="delta")
    test = int(scores.std(0).argmax())
    order = scores[:, test].argsort().tolist()
    demo.asked = " ".join(made.tests[test]["text"].split())
    for i in (*order[:3], *order[-3:]):
        sample = made.samples[i]
        demo.pairs.append(
            (float(scores[i, test]), sample["group"], " ".join(sample["text"].split()))
        )


def table_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    return report.rows_of(demo.found, study.NAMES)


def pair_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``PAIR_COLUMNS``."""
    return [
        [f"{score:+.4f}", group, text if len(text) < 90 else text[:87] + "..."]
        for score, group, text in demo.pairs
    ]


def speed_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SPEED_COLUMNS``."""
    assert demo.speed is not None
    s = demo.speed
    return [[f"{demo.recorded} runs", s.op, s.against, f"{s.ratio:.1f}", f"{demo.apart:.1e}"]]


def headline(found: Demo) -> Headline:
    """Its line of the table of all methods."""
    assert found.speed is not None
    ours, mean = (found.found[n]["mse"] for n in ("default", "mean"))
    effects = found.removed["agreement"]["pearson"]
    return Headline(
        f"{found.parameters / 1e3:.0f}k byte Llama, fine-tuned {found.recorded} times",
        f"unseen runs: MSE {ours:.3f}, mean run {mean:.3f}; left-out examples r {effects:.2f}",
        found.speed,
    )


def tables(found: Demo) -> list[TextTable]:
    """What the terminal shows."""
    return [
        TextTable("Fine-tunings that were not learnt from", COLUMNS, table_rows(found)),
        TextTable(
            "What examples do to the loss of one test", PAIR_COLUMNS, pair_rows(found), prose=True
        ),
        TextTable("A simulation of all runs", SPEED_COLUMNS, speed_rows(found)),
    ]


def add_demo_section(demo: Demo, page: Page) -> None:
    """GPTfluence's part of the report page."""
    assert demo.runs is not None
    drawn = {n: demo.predicted[n] for n in ("default", "mean", "ridge", "similarity")}
    report.add_section(
        page,
        demo.runs,
        drawn,
        demo.found,
        title="GPTfluence: training runs, simulated",
        names=study.NAMES,
        lead=(
            "A fine-tuning is simulated from the list of its batches and the losses before it, without a model: "
            "each example moves each test's loss by factors that come from the texts' features. The simulator has "
            "learnt these from other runs.",
            demo.setting,
        ),
    )
    page.heading("Without these examples")
    page.text(
        f"From one run's curriculum {len(demo.removed['curves'])} sets of examples are left out: "
        "all of a task, or ten at random. The simulator says what they "
        "did to each test, and the model is trained again without them."
    )
    page.image(
        png_bytes(report.counterfactual_plot(demo.removed)),
        "A dot per set and test; a colour per set.",
        480,
    )
    real = torch.tensor(demo.removed["real"]).abs()
    number, test = divmod(int(real.argmax()), real.shape[1])
    page.image(
        png_bytes(report.removed_plot(demo.removed, number, test)),
        "The set and test with the largest change.",
    )
    page.heading("Which examples help, which harm")
    page.text(f"Test: {demo.asked}")
    page.table(PAIR_COLUMNS, pair_rows(demo))
    page.text(
        "The effect of one more such example in a batch on the loss of this test; negative: it lowers it.",
        soft=True,
    )
    page.heading("A simulation on these kernels, and in plain PyTorch")
    page.table(SPEED_COLUMNS, speed_rows(demo))
