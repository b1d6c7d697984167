# SPDX-License-Identifier: Apache-2.0
"""How results of ``tenfold themis`` are shown and kept: runs, judgements, evaluations of three forms."""

from __future__ import annotations

import contextlib
import json as json_module
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.cli import themis_options as own
from tenfold.cli.common import out, progress, table, write_json

FILE = "evaluation.json"


def _some(rows: Sequence[Any], limit: int | None) -> list[Any]:
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def trained(record: Any, folder: Path, title: str, json: bool) -> None:
    """A run's page, and its numbers."""
    from tenfold.themis.report import write_page

    page = write_page(folder / "report" / "index.html", title, records={title: record})
    if json:
        write_json({
            "model": str(folder), "report": str(page), "steps": len(record.curve), "pairs": record.pairs,
            "before": record.before, "after": record.after, "best": record.best, "last": record.curve[-1],
            "config": record.config, "seconds": record.seconds, "parameters": record.parameters,
        })  # fmt: skip
        return
    rows = [[k, f"{record.before[k]:.4f}", f"{v:.4f}"] for k, v in record.after.items()]
    if rows:
        out.print(table(f"{title}: held-out pairs, traces given", ("", "before", "after"), rows))
    out.print(f"reward model: {folder}   report: {page}", highlight=False, soft_wrap=True)


def judged(queries: Sequence[Any], found: Sequence[Any], json: bool, trace: bool) -> None:
    """Rewards of single answers, and their traces."""
    from tenfold.themis.record import judgement_json

    if json:
        write_json([judgement_json(j, trace=trace) for j in found])
        return
    for query, j in zip(queries, found):
        about = f"reward {j.reward:.4f}   {j.finish}   {len(j.calls)} calls   {j.new_tokens} tokens"
        out.print(about, highlight=False)
        text = j.text if trace else f"{query.question}\n{query.answer}"
        out.print(text, markup=False, highlight=False, soft_wrap=True)
        if j.message:
            out.print(j.message, markup=False, highlight=False, soft_wrap=True)
    if len(queries) > 1 and len({(q.question, q.context) for q in queries}) == 1:
        rewards = [j.reward for j in found]
        top = math.nan if any(map(math.isnan, rewards)) else max(rewards)
        best = [q.answer for q, r in zip(queries, rewards) if r == top]
        said = best[0] if len(best) == 1 else "none, by a tie or a missing reward"
        out.print(f"preferred: {said}", markup=False, highlight=False, soft_wrap=True)


def evaluated(models: Mapping[str, str], given: dict[str, Any], device: str) -> None:
    """Evaluates models, by name, as the verb's options say."""
    if given["form"] == "tara":
        _pairs(models, given, device)
    else:
        _others(models, given, device)


def _pairs(models: Mapping[str, str], given: dict[str, Any], device: str) -> None:
    from tenfold.themis import report
    from tenfold.themis.evaluate import evaluate
    from tenfold.themis.inputs import read_pairs
    from tenfold.training.store import write_text

    pairs = _some(read_pairs([given["data"]], need_traces=False), given["limit"])
    found = {}
    with progress(
        len(models) * 2 * len(pairs) * (1 + given["swap"]), given["quiet"] or given["json"]
    ) as step:
        for name, path in models.items():

            def told(count: int, name: str = name) -> None:
                for _ in range(count):
                    step(name)

            with own.judge_of(path, given, device) as loaded:
                made = evaluate(loaded.judge, pairs, swap=given["swap"], name=name, step=told,
                                batch_size=given["batch_size"])  # fmt: skip
            found[name] = made.to_json()
    folder: Path = given["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json_module.dumps(found) + "\n")
    page = report.write_page(folder / "index.html", str(given["data"]), found)
    if given["json"]:
        short = {
            n: {k: v for k, v in e.items() if k not in ("pairs", "samples")}
            for n, e in found.items()
        }
        write_json({"report": str(page), "models": short})
        return
    out.print(
        table("Pairs ranked right, %", report.accuracy_columns(found), report.accuracy_rows(found))
    )
    rows = report.call_rows(found)
    if rows:
        out.print(table("Tool calls", report.CALL_COLUMNS, rows))
    for name, e in found.items():
        if e["swapped"] is not None:
            out.print(
                f"{name}: {100 * e['swapped']:.1f} % the same in reverse order", highlight=False
            )
    out.print(f"report: {page}", highlight=False, soft_wrap=True)


def _others(models: Mapping[str, str], given: dict[str, Any], device: str) -> None:
    from tenfold.themis import benchmarks

    bench = given["form"] == "rewardbench"
    read = benchmarks.read_rewardbench if bench else benchmarks.read_choices
    rows: Any = _some(read(given["data"]), given["limit"])
    answers = sum(len(r.answers if bench else r.options) for r in rows)
    found: dict[str, Any] = {}
    with (
        progress(len(models) * answers, given["quiet"] or given["json"]) as step,
        contextlib.ExitStack() as stack,
    ):
        for name, path in models.items():

            def told(count: int, name: str = name) -> None:
                for _ in range(count):
                    step(name)

            judge = stack.enter_context(own.judge_of(path, given, device)).judge
            options = {"batch_size": given["batch_size"], "step": told}
            if bench:
                found[name] = benchmarks.rewardbench(judge, rows, ties=given["ties"], **options)
            else:
                found[name] = benchmarks.multiple_choice(judge, rows, **options)
    if given["json"]:
        write_json({n: f.to_json() if bench else vars(f) for n, f in found.items()})
        return
    if not bench:
        cells = [[n, f"{100 * f.value:.1f}", f"{100 * f.low:.1f} to {100 * f.high:.1f}", str(f.count)]
                 for n, f in found.items()]  # fmt: skip
        out.print(
            table("Questions answered right", ("model", "%", "95 % interval", "questions"), cells)
        )
        return
    sections = list(next(iter(found.values())).sections)
    cells = [[s, *(f"{100 * f.sections[s]:.1f}" for f in found.values())] for s in sections]
    cells.append(["all sections", *(f"{100 * f.overall:.1f}" for f in found.values())])
    out.print(table("Sections, %", ("section", *found), cells))


def read_results(files: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(records of runs, evaluations) of files and folders, by name. ValueError for anything else."""
    from tenfold.themis.inputs import RECORD
    from tenfold.themis.training import ThemisRecord

    records: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for given in files:
        here = (
            [given / n for n in (RECORD, FILE) if (given / n).is_file()]
            if given.is_dir()
            else [given]
        )
        if not here or not here[0].is_file():
            raise ValueError(
                f"{given} has no {RECORD} (of `tenfold themis train`) and no {FILE} (of eval)"
            )
        for file in here:
            try:
                value = json_module.loads(file.read_text())
                if "curve" in value:
                    records[file.parent.name or str(given)] = ThemisRecord(**value)
                else:
                    found |= {name: e for name, e in value.items() if e["accuracy"] and e["pairs"]}
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{file} is no result of `tenfold themis train` or `eval`"
                ) from None
    return records, found
