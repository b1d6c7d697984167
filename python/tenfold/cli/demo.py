# SPDX-License-Identifier: Apache-2.0
"""``tenfold demo``: methods end to end on real input, a table, and ``tenfold-report/index.html``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tenfold.cli.common import err, out, progress, table, write_json
from tenfold.report import Page

Step = Callable[[str], None]


def _nacl(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.data import smollm2
    from tenfold.nacl import demo

    with progress(demo.STEPS, quiet) as step:
        found = demo.run_demo(*smollm2(), step=step)
    demo.add_section(found, page)
    tables: list[Any] = []
    for story in found.stories:
        title = f"{story.case.document}: the right answer is {story.case.answer_text}"
        tables.append(table(title, demo.SPEED_COLUMNS, demo.speed_rows(story)))
    rows = [row[2:] for row in demo.table_rows(found.summary)]
    tables.append(table("One fact in 1,536 tokens, five depths", demo.COLUMNS[2:], rows))
    return found.to_json(), tables


def _dha(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.data import smollm2
    from tenfold.dha import demo

    with progress(demo.STEPS, quiet) as step:
        found = demo.run_demo(*smollm2(), step=step)
    demo.add_demo_section(found, page)
    title = "SmolLM2-135M-Instruct (9 query, 3 KV heads) at 25 % of MHA's key and value heads"
    return found.to_json(), [table(title, demo.COLUMNS, demo.table_rows(found))]


def _hft(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.data import smollm2
    from tenfold.hft import demo, speed

    with progress(demo.STEPS, quiet) as step:
        found = demo.run_demo(*smollm2(), step=step)
    demo.add_demo_section(found, page)
    tables = [
        table(
            "SmolLM2-135M-Instruct: German, then docstrings", demo.COLUMNS, demo.table_rows(found)
        ),
        table("A training step", speed.COLUMNS, speed.table_rows(found.speed)),
    ]
    return found.to_json(), tables


def _ma_rlhf(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.ma_rlhf import demo

    with progress(demo.STEPS, quiet) as step:
        found = demo.run_demo(step=step)
    demo.add_demo_section(found, page)
    tables = [
        table("A byte-level model that learns to spell", demo.COLUMNS, demo.table_rows(found)),
        table("What it writes", demo.ANSWER_COLUMNS, demo.answer_rows(found)),
        table("Ways to cut", demo.CUT_COLUMNS, demo.cut_rows(found)),
        table("Credit assignment of a rollout", demo.SPEED_COLUMNS, demo.speed_rows(found)),
    ]
    return found.to_json(), tables


def _upit(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.upit import demo

    with progress(demo.steps(), quiet) as step:
        found = demo.run_demo(step=step)
    demo.add_demo_section(found, page)
    title = "Loss per answer byte; 4 experts, 2 per byte"
    return found.to_json(), [table(title, demo.COLUMNS, demo.table_rows(found))]


def _themis(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.themis import demo

    with progress(demo.STEPS, quiet) as step:
        found = demo.run_demo(step=step)
    demo.add_demo_section(found, page)
    tables = [
        table("Is an answer to a sum right?", demo.COLUMNS, demo.table_rows(found)),
        table(
            "What it writes about two answers",
            demo.TRACE_COLUMNS,
            demo.trace_rows(found),
            text=True,
        ),
        table("Scores, all at once", demo.SPEED_COLUMNS, demo.speed_rows(found)),
    ]
    return found.to_json(), tables


def _pixelgpt(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.pixelgpt import demo

    with progress(demo.STEPS, quiet) as step:
        found = demo.run_demo(step=step)
    demo.add_demo_section(found, page)
    tables = [
        table("Held-out losses, pixels and tokens", demo.COLUMNS, demo.table_rows(found)),
        table("Which language is it?", demo.TUNE_COLUMNS, demo.tune_rows(found)),
    ]
    return found.to_json(), tables


def _gptfluence(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.gptfluence import demo

    with progress(demo.STEPS, quiet) as step:
        found = demo.run_demo(step=step)
    demo.add_demo_section(found, page)
    tables = [
        table("Fine-tunings that were not learnt from", demo.COLUMNS, demo.table_rows(found)),
        table("What examples do to one test", demo.PAIR_COLUMNS, demo.pair_rows(found), text=True),
    ]
    return found.to_json(), tables


def _ernie_music(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.ernie_music import demo

    with progress(demo.STEPS, quiet) as step:
        found = demo.run_demo(step=step)
    demo.add_demo_section(found, page)
    title = "Sounds of held-out prompts: is it what was asked for?"
    tables = [
        table(title, demo.COLUMNS, demo.table_rows(found)),
        table("One call of the U-Net", demo.SPEED_COLUMNS, demo.speed_rows(found)),
    ]
    return found.to_json(), tables


def _ernie_code(page: Page, quiet: bool) -> tuple[dict[str, Any], list[Any]]:
    from tenfold.ernie_code import demo, report

    with progress(demo.STEPS, quiet) as step:
        found = demo.run_demo(step=step)
    demo.add_demo_section(found, page)
    tables = [
        table("Which of eight is the translation?", demo.COLUMNS, demo.table_rows(found)),
        table("Held-out messages", report.SAMPLE_COLUMNS, demo.sample_rows(found), text=True),
        table("A training step", demo.SPEED_COLUMNS, demo.speed_rows(found)),
    ]
    return found.to_json(), tables


METHODS: dict[str, Callable[[Page, bool], tuple[dict[str, Any], list[Any]]]] = {
    "nacl": _nacl,
    "dha": _dha,
    "hft": _hft,
    "ma-rlhf": _ma_rlhf,
    "upit": _upit,
    "themis": _themis,
    "pixelgpt": _pixelgpt,
    "gptfluence": _gptfluence,
    "ernie-music": _ernie_music,
    "ernie-code": _ernie_code,
}


def run(methods: list[str], folder: Path, json: bool, quiet: bool) -> int:
    """Runs the methods' demos; returns the exit status."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}; there are: {', '.join(METHODS)}")
    page = Page("tenfold", "Every method end to end on real input, on this machine.")
    results = {}
    for name in methods or list(METHODS):
        start = time.monotonic()
        if not (quiet or json):
            err.print(f"tenfold demo {name}")
        results[name], tables = METHODS[name](page, quiet or json)
        results[name]["seconds"] = round(time.monotonic() - start, 1)
        if not json:
            for made in tables:
                out.print(made)
                out.print()
    path = page.write(folder / "index.html")
    if json:
        write_json({"report": str(path), **results})
    else:
        total = sum(r["seconds"] for r in results.values())
        out.print(f"report: {path} ({total:.0f} s)", highlight=False, soft_wrap=True)
    return 0
