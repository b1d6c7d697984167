# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and pages of simulated runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.gptfluence.runs import RunSet
from tenfold.report import PALETTE, Card, Page, figure, png_bytes

COLUMNS = ("method", "all-steps MSE", "all-steps MAE", "final-step Spearman", "final MSE")
KINDS = {"raw": "raw", "fitted": "scale from training runs", "oracle": "scale in hindsight"}


def number(value: float | None, digits: int = 4) -> str:
    """A number of a table; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def rows_of(
    found: Mapping[str, Mapping[str, Any]], names: Mapping[str, str] | None = None
) -> list[list[str]]:
    """Rows for ``COLUMNS``: of evaluations by name, and of those by name and kind of scale."""
    made = []
    for name, value in found.items():
        title = (names or {}).get(name, name)
        kinds = {"": value} if "mse" in value else {f", {KINDS[k]}": v for k, v in value.items()}
        for suffix, e in kinds.items():
            made.append(
                [
                    title + suffix,
                    number(e["mse"]),
                    number(e["mae"]),
                    number(e["spearman"], 3),
                    number(e["final_mse"]),
                ]
            )
    return made


def best_row(rows: Sequence[Sequence[str]]) -> list[int]:
    """The row with the smallest error, those with a scale in hindsight not counted."""
    fair = [i for i, r in enumerate(rows) if KINDS["oracle"] not in r[0] and r[1] != "–"]
    return [min(fair, key=lambda i: float(rows[i][1]))] if fair else []


def curves_plot(
    runs: RunSet, predicted: Mapping[str, Tensor], run: int = 0, tests: Sequence[int] | None = None
) -> Any:
    """True and simulated curves of some tests of one run: lines solid, dashed and dotted; a colour per test."""
    chosen = spread(runs, run) if tests is None else list(tests)
    made, axes = figure(7.2, 3.8)
    at = runs.steps.tolist()
    for place, test in enumerate(chosen):
        colour = PALETTE[place % len(PALETTE)]
        axes.plot(
            at,
            runs.y[run, :, test].tolist(),
            color=colour,
            lw=1.8,
            label=f"test {runs.test_ids[test]}",
        )
        for style, values in zip(("--", ":", "-."), predicted.values()):
            axes.plot(at, values[run, :, test].tolist(), style, color=colour, lw=1.2)
    for style, name in zip(("-", "--", ":", "-."), ("recorded", *predicted)):
        axes.plot([], [], style, color="#444", lw=1.2, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{runs.metric} ({runs.scale})" if runs.scale else runs.metric)
    axes.set_title(f"run {runs.names[run]}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return made


def spread(runs: RunSet, run: int, count: int = 4) -> list[int]:
    """Tests whose changes in a run are spread evenly from the smallest to the largest."""
    change = (runs.y[run, -1] - runs.y[run, 0]).nan_to_num()
    order = change.argsort().tolist()
    last = len(order) - 1
    return list(
        dict.fromkeys(
            order[round(i * last / max(1, count - 1))] for i in range(min(count, len(order)))
        )
    )


def final_plot(runs: RunSet, predicted: Mapping[str, Tensor]) -> Any:
    """Predicted against true last values of all tests and runs."""
    made, axes = figure(4.8, 4.2)
    true = runs.y[:, -1].flatten()
    known = true.isfinite()
    for colour, (name, values) in zip(PALETTE, predicted.items()):
        axes.scatter(
            true[known].tolist(),
            values[:, -1].flatten()[known].tolist(),
            s=6,
            alpha=0.6,
            color=colour,
            label=name,
        )
    low, high = float(true[known].min()), float(true[known].max())
    axes.plot([low, high], [low, high], color="#888", lw=0.8)
    axes.set_xlabel(f"recorded {runs.metric} at the end")
    axes.set_ylabel("simulated")
    axes.legend(frameon=False, fontsize=8)
    return made


def steps_plot(runs: RunSet, predicted: Mapping[str, Tensor]) -> Any:
    """Root of the mean squared error at every step."""
    made, axes = figure(6.4, 3.4)
    for colour, (name, values) in zip(PALETTE, predicted.items()):
        error = (values - runs.y).square().nanmean((0, 2)).sqrt()
        axes.plot(runs.steps.tolist(), error.tolist(), lw=1.4, color=colour, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("root mean squared error")
    axes.legend(frameon=False, fontsize=8)
    return made


def counterfactual_plot(found: Mapping[str, Any]) -> Any:
    """What removed examples change at the end, simulated against retrained: a dot per set and test."""
    made, axes = figure(4.8, 4.2)
    simulated, real = torch.tensor(found["simulated"]), torch.tensor(found["real"])
    for place, (s, r) in enumerate(zip(simulated, real)):
        axes.scatter(r.tolist(), s.tolist(), s=8, alpha=0.6, color=PALETTE[place % len(PALETTE)])
    ends = [float(real.min()), float(real.max())]
    axes.plot(ends, ends, color="#888", lw=0.8)
    axes.set_xlabel("change by these examples, retrained without them")
    axes.set_ylabel("simulated")
    a = found["agreement"]
    axes.set_title(f"correlation {a['pearson']:.2f}, rank {a['spearman']:.2f}", fontsize=10)
    return made


def removed_plot(found: Mapping[str, Any], number: int, test: int) -> Any:
    """One test's curve with all examples and without a set of them, simulated and real."""
    made, axes = figure(6.4, 3.4)
    one = found["curves"][number]
    axes.plot(
        [row[test] for row in found["full"]],
        color=PALETTE[6],
        lw=1.4,
        label="with all examples, real",
    )
    axes.plot(
        [row[test] for row in one["real"]],
        color=PALETTE[0],
        lw=1.6,
        label="without, real (retrained)",
    )
    axes.plot(
        [row[test] for row in one["simulated"]],
        "--",
        color=PALETTE[1],
        lw=1.4,
        label="without, simulated",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(f"{len(one['removed'])} examples removed", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return made


def mislabel_plot(found: Mapping[str, Mapping[str, Any]]) -> Any:
    """Share of the mislabelled examples found when examples are inspected by their scores."""
    made, axes = figure(5.6, 3.6)
    for colour, (name, one) in zip(PALETTE, found.items()):
        count = len(one["found"])
        shares = [i / count for i in range(count + 1)]
        axes.plot(
            shares, [0.0, *one["found"]], lw=1.4, color=colour, label=f"{name} ({one['area']:.2f})"
        )
    axes.plot([0, 1], [0, 1], ":", color="#888", lw=0.8, label="at random")
    axes.set_xlabel("share of examples inspected")
    axes.set_ylabel("mislabelled ones found")
    axes.legend(frameon=False, fontsize=8)
    return made


def fit_plot(record: Mapping[str, Any]) -> Any:
    """The fit's loss, and the simulated error of the validation runs."""
    made, axes = figure(6.4, 3.0)
    axes.plot(
        range(1, len(record["losses"]) + 1),
        record["losses"],
        lw=1.2,
        color=PALETTE[0],
        label="one step, training runs",
    )
    if record["validation"]:
        axes.plot(
            *zip(*record["validation"]),
            "o-",
            ms=3,
            lw=1.2,
            color=PALETTE[1],
            label="simulated, validation runs",
        )
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean squared error")
    axes.legend(frameon=False, fontsize=8)
    return made


def add_section(
    page: Page, runs: RunSet, predicted: Mapping[str, Tensor], found: Mapping[str, Mapping[str, Any]], *, title: str,
    names: Mapping[str, str] | None = None, shown: int = 2, lead: Sequence[str] = (),
) -> list[tuple[str, bytes]]:  # fmt: skip
    """The part of a page about simulated runs; returns the plots as (name, PNG bytes).

    Args:
        predicted: by name, [R, S, Q]; curves are drawn of at most three of them. found: evaluations. shown: runs
            whose curves are drawn. lead: paragraphs before the numbers; the last one says what was run.
    """
    page.section(title)
    for place, text in enumerate(lead):
        page.text(text, soft=place == len(lead) - 1)
    drawn: list[tuple[str, bytes]] = []

    def plot(made: Any, name: str, caption: str, width: int | None = None) -> None:
        drawn.append((name, png_bytes(made)))
        page.image(drawn[-1][1], caption, width)

    rows = rows_of(found, names)
    if rows:
        best = best_row(rows)
        page.cards([Card(rows[i][1], f"all-steps MSE, {rows[i][0]}") for i in best])
        page.table(COLUMNS, rows, best)
        page.text(
            "Errors over all steps but the first, mean over runs and tests; "
            "Spearman's correlation over tests of the last values, mean "
            "over runs. A scale in hindsight is fitted to the very runs that are predicted: nobody has it.",
            soft=True,
        )
    titles = {(names or {}).get(n, n): v for n, v in predicted.items()}
    few = dict(list(titles.items())[:3])
    for run in range(min(shown, len(runs))):
        plot(
            curves_plot(runs, few, run),
            f"curves-{runs.names[run]}",
            "Recorded curves, and those simulated from the curriculum and the first value alone.",
        )
    if titles:
        plot(steps_plot(runs, titles), "errors", "How errors grow along a run.")
        plot(final_plot(runs, few), "final", "Last values of all tests.", 480)
    return drawn


def write_report(
    path: str | Path, runs: RunSet, predicted: Mapping[str, Tensor], found: Mapping[str, Mapping[str, Any]],
    record: Mapping[str, Any] | None = None, subtitle: str = "",
) -> Path:  # fmt: skip
    """A page of simulated runs at ``path``, with the plots beside it as PNG files."""
    path = Path(path)
    page = Page("GPTfluence: simulated training runs", subtitle)
    drawn = add_section(
        page,
        runs,
        predicted,
        found,
        title=f"{len(runs)} runs, {len(runs.test_ids)} tests: {runs.metric}",
    )
    if record:
        drawn.append(("fit", png_bytes(fit_plot(record))))
        page.heading("The fit")
        page.image(
            drawn[-1][1], "Its loss from step to step, and the error of whole simulated runs."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, png in drawn:
        safe = "".join(c if c.isalnum() or c == "-" else "-" for c in name.lower())
        (path.parent / f"{safe}.png").write_bytes(png)
    return page.write(path)
