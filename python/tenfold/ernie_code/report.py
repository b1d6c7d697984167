# SPDX-License-Identifier: Apache-2.0
"""Pages and plots: losses by task, scores by pair of languages, rankings, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.ernie_code.evaluation import Evaluation
from tenfold.ernie_code.study import KINDS, Study, smoothed
from tenfold.ernie_code.training import CodeRecord
from tenfold.report import PALETTE, Page, figure, png_bytes

RANKING_COLUMNS = ("held-out rows", "model", "right of all candidates", "mean of 1 / rank", "rows")
SAMPLE_COLUMNS = ("from", "to", "source", "reference", "output")


def loss_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Any:
    """Nats per label token over steps, by task: a line for each task of each model."""
    made, axes = figure()
    lines = [(name, task) for name, points in curves.items() for task in ("sclm", "ptlm")
             if any(task in p for p in points)]  # fmt: skip
    for colour, (name, task) in zip(PALETTE, lines):
        points = [(p["step"], p[task]) for p in curves[name] if task in p]
        label = f"{name}: {'spans' if task == 'sclm' else 'translation'}"
        axes.plot(*zip(*points), color=colour, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return made


def ranking_plot(study: Mapping[str, Any]) -> Any:
    """Share of right targets by kind of row, of a result file; the line is chance."""
    made, axes = figure()
    names = list(study["variants"])
    kinds = [k for k in KINDS if k in next(iter(study["variants"].values()))["rankings"]]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        ranked = study["variants"][name]["rankings"]
        heights = [100 * ranked[k]["all"]["top1"] for k in kinds]
        axes.bar([j + i * width for j in range(len(kinds))], heights, width, color=PALETTE[i], label=name)  # fmt: skip
    axes.axhline(100 / study["config"]["candidates"], color="grey", linewidth=1, linestyle=":")
    axes.set_xticks(
        [j + 0.4 - width / 2 for j in range(len(kinds))],
        [KINDS[k].replace(" (", "\n(").replace(", ", ",\n") for k in kinds],
        fontsize=7,
    )
    axes.set_ylabel("right target found, %")
    axes.legend(frameon=False)
    return made


def ranking_rows(study: Mapping[str, Any]) -> list[list[str]]:
    """Rows for ``RANKING_COLUMNS`` of a result file."""
    rows = []
    for kind, title in KINDS.items():
        for name, variant in study["variants"].items():
            if kind in variant["rankings"]:
                own = variant["rankings"][kind]["all"]
                numbers = (f"{100 * own['top1']:.1f} %", f"{own['mrr']:.3f}", f"{own['rows']:.0f}")
                rows.append([title, name, *numbers])
    chance = 100 / study["config"]["candidates"]
    rows.append(["by chance", "–", f"{chance:.2f} %", "–", "–"])
    return rows


def score_columns(evaluation: Evaluation) -> tuple[str, ...]:
    """Column names for :func:`score_rows`."""
    return ("languages", "rows", *(n.replace("_", " ") for n in evaluation.scores))


def score_rows(evaluation: Evaluation) -> list[list[str]]:
    """A line for each pair of languages, and one for all."""
    names = list(evaluation.scores)
    rows = [
        [pair, f"{own['rows']:.0f}", *(f"{own[n]:.1f}" for n in names)]
        for pair, own in evaluation.by_pair.items()
    ]
    every = ["all", str(len(evaluation.rows)), *(f"{evaluation.scores[n]:.1f}" for n in names)]
    return [*rows, every] if len(rows) > 1 else rows


def sample_rows(rows: Sequence[Mapping[str, Any]], count: int = 8) -> list[list[str]]:
    """Rows for ``SAMPLE_COLUMNS``."""
    return [
        [r["source_language"], r["target_language"], r["source"], r["target"], r["output"]]
        for r in rows[:count]
    ]


def add_training(page: Page, record: CodeRecord) -> None:
    """Losses of a run, and on held-out rows."""
    page.heading("Training")
    every = max(1, len(record.curve) // 60)
    page.image(
        png_bytes(loss_plot({"training": smoothed(record.curve, every)})),
        f"{record.parameters / 1e6:.1f}M parameters, {sum(record.rows.values())} rows of {len(record.rows)} corpora; "
        f"{record.seconds:.0f} s.",
    )  # fmt: skip
    if record.validation:
        last = record.validation[-1]
        rows = [[k.removeprefix("corpus/"), f"{v:.3f}"] for k, v in last.items() if k != "step"]
        page.table(("held out, after the last step", "nats per token"), rows)


def add_evaluation(page: Page, evaluation: Evaluation, title: str = "Held-out rows") -> None:
    """Scores and samples."""
    page.heading(title)
    page.table(score_columns(evaluation), score_rows(evaluation))
    page.table(SAMPLE_COLUMNS, sample_rows(evaluation.rows))


def add_study(page: Page, study: Study, generated: Sequence[str] | None = None) -> None:
    """A study's part of a page; ``generated``: variants whose translations are shown, default all."""
    found = study.to_json(max(1, (study.settings.steps or 100) // 60))
    page.text(setting_of(found), soft=True)
    page.table(RANKING_COLUMNS, ranking_rows(found))
    page.image(png_bytes(ranking_plot(found)), "The line is chance.")
    curves = {name: v["curve"] for name, v in found["variants"].items()}
    page.image(png_bytes(loss_plot(curves)), "Loss of the training batches, by task.")
    for name in study.variants if generated is None else generated:
        variant = study.variants[name]
        for kind, evaluation in variant.generated.items():
            add_evaluation(page, evaluation, f"{KINDS[kind]}: beam search of {name}")


def setting_of(found: Mapping[str, Any]) -> str:
    """What was run, in a sentence, of a result file."""
    c, t = found["config"], found["training"]
    some = next(iter(found["variants"].values()))
    pairs = [n for n in found["sizes"] if "-" in n]
    count = sum(found["sizes"][n] for n in pairs)
    return (
        f"{some['parameters'] / 1e6:.1f}M parameters, {c['vocab_size']} ids; {len(c['languages'])} languages of "
        f"django's catalogues, English and Python; {count} pairs, all with English; {t['steps']} steps of "
        f"{t['batch_size']} rows for each model ({100 * c['pair_share']:.0f} % of them pairs where there are pairs). "
        f"Held out: {100 * c['share']:.0f} % of the messages, in all languages. One seed."
    )
