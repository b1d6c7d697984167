# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from result files; the only way numbers get into README and docs.

python -m bench.report                     page of all committed results
python -m bench.report --readme [--check]  rewrite (or verify) the generated parts of README and docs,
                                           and the pictures of docs/performance.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from . import performance, sources, studies
from .tables import (
    RESULTS,
    Record,
    Rows,
    markdown,
    newest,
    ours_of,
    ratio_text,
    setting,
    shape_text,
    time_text,
)

COLUMNS = (
    "op",
    "shape",
    "dtype",
    "time",
    "rate",
    "of ceiling",
    "vs eager",
    "vs compile",
    "vs copy",
)
LEDGER_NAMES = {"verified": "verified on an H200", "stale": "verified earlier, changed since",
                "never": "never run on an H200"}  # fmt: skip


def row_of(case: Record) -> list[str]:
    """A case as a row of ``COLUMNS``."""
    ours = ours_of(case)
    variant = f" ({case['variant']})" if case["variant"] else ""
    head = [case["op"] + variant, shape_text(case), case["dtype"]]
    if ours["p50_s"] is None:
        return [*head, ours["status"], *["–"] * 5]
    rate = (
        f"{ours['gflop_s']:.0f} GFLOP/s"
        if case["bound"] == "compute"
        else f"{ours['gb_s']:.1f} GB/s"
    )
    ratios = case["ratios"]
    eager = max((ratios[k] for k in ("eager",) if k in ratios), default=None)
    return [*head, time_text(ours["p50_s"]), rate, f"{100 * ours['share']:.0f} %", ratio_text(eager),
            ratio_text(ratios.get("compile")), ratio_text(ratios.get("bound"))]  # fmt: skip


STUDIES = (
    "nacl",
    "dha",
    "hft",
    "ma_rlhf",
    "upit",
    "themis",
    "pixelgpt",
    "gptfluence",
    "ernie_music",
    "ernie_code",
)  # folders of methods


def load_records(root: Path) -> list[Record]:
    """All committed result files."""
    from .results import load

    return [
        load(p)
        for p in sorted((root / RESULTS).glob("*/*.json"))
        if not p.parent.name.startswith(STUDIES)
    ]


def ledger(root: Path) -> str:
    """The GPU ledger as a sentence per family."""
    from .gpu_status import others, status

    lines = []
    for f in sources.families(root):
        beside = "".join(f" ({m.upper()}: {state})" for m, state in others(root, f).items())
        lines.append(f"`{f}`: {LEDGER_NAMES[status(root, f)]}{beside}")
    return "CUDA kernels: " + "; ".join(lines) + "."


SUMMARY_COLUMNS = (
    "family",
    "op",
    "dtypes",
    "cases",
    "least",
    "median",
    "most",
    "of ceiling, median",
)


def summary_rows(record: Record) -> Rows:
    """A family's ops, by how many times as fast as the best other provider they were: rows of ``SUMMARY_COLUMNS``."""
    rows: Rows = []
    groups: dict[str, list[Record]] = {}
    for case in record["cases"]:
        groups.setdefault(case["op"], []).append(case)
    for op, cases in groups.items():
        ratios = [c["ratios"]["best_other"] for c in cases if c["ratios"].get("best_other")]
        ours = map(ours_of, cases)
        shares = [p["share"] for p in ours if p["share"] is not None]
        if ratios:
            spread = [ratio_text(f(ratios)) for f in (min, median, max)]
            share = f"{100 * median(shares):.0f} %" if shares else "–"
            dtypes = ", ".join(dict.fromkeys(c["dtype"] for c in cases))
            rows.append([record["family"], op, dtypes, str(len(ratios)), *spread, share])
    return rows


def summary_block(root: Path) -> str:
    """README's table of ops: the last measurement of every family, a row per op."""
    records = newest(load_records(root))
    rows = [row for r in records for row in summary_rows(r)]
    where = [f"`{r['family']}` on {setting(r).split('; ')[0]}." for r in records]
    return "\n".join([markdown(SUMMARY_COLUMNS, rows), "", *where, "", ledger(root)])


def ops_block(root: Path) -> str:
    """The table of all cases."""
    parts = []
    for record in load_records(root):
        parts += [f"`{record['family']}` on {setting(record)}.", "",
                  markdown(COLUMNS, map(row_of, record["cases"])), ""]  # fmt: skip
    return "\n".join(parts).strip()


MEMORY_COLUMNS = (
    "op",
    "shape",
    "dtype",
    "tenfold MB",
    "least of the others MB",
    "fastest other MB",
)


def memory_row(case: Record) -> list[str]:
    """What one call of ours allocates at its peak, beside others: a row of ``MEMORY_COLUMNS``."""
    others = [p for p in case["providers"].values()
              if p["kind"] in ("eager", "compile", "peer") and p.get("peak_bytes") is not None]  # fmt: skip
    ours = ours_of(case).get("peak_bytes")
    least = min((p["peak_bytes"] for p in others), default=None)
    fastest = min(others, key=lambda p: p["p50_s"], default={"peak_bytes": None})["peak_bytes"]
    sizes = ["–" if x is None else f"{x / 1e6:.1f}" for x in (ours, least, fastest)]
    return [*row_of(case)[:3], *sizes]


def memory_block(family: str) -> Callable[[Path], str]:
    """A table of the peaks of a family's cases."""

    def block(root: Path) -> str:
        parts = []
        for record in load_records(root):
            if record["family"] == family:
                parts += [f"{setting(record)}.", "",
                          markdown(MEMORY_COLUMNS, map(memory_row, record["cases"])), ""]  # fmt: skip
        return "\n".join(parts).strip() or "No measurement has been committed."

    return block


BLOCKS = {
    "ops": ops_block,
    "summary": summary_block,
    "loss-memory": memory_block("loss"),
    **studies.BLOCKS,
}


def rewrite(root: Path, path: Path) -> str:
    """The text of a file with its generated blocks renewed."""
    text = path.read_text(encoding="utf-8")
    for name, make in (BLOCKS | performance.blocks(root, load_records)).items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in text:
            pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
            block = f"{begin}\n{make(root)}\n{end}"
            text = pattern.sub(lambda _, b=block: b, text)
    return text


def generated_files(root: Path) -> list[Path]:
    """Files with generated blocks."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [p for p in found if p.is_file() and ":begin -->" in p.read_text(encoding="utf-8")]


def _ratio_plot(record: Record) -> Any:
    """Speed-up over the best other provider, a bar per case."""
    from tenfold.report.plots import PALETTE, figure

    cases = [c for c in record["cases"] if c["ratios"].get("best_other")]
    made, axes = figure(8.0, 0.8 + 0.24 * len(cases))
    names = [f"{c['op']}  {shape_text(c)}  {c['dtype']}" for c in cases]
    values = [c["ratios"]["best_other"] for c in cases]
    spots = range(len(cases))
    axes.barh(spots, values, color=[PALETTE[0] if v >= 1 else PALETTE[1] for v in values])
    for at, value in zip(spots, values):
        axes.text(value, at, f" {value:.2f}×", va="center", fontsize=7)
    axes.set_yticks(spots, names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the best other provider")
    return made


def _roofline(record: Record) -> Any:
    """Share of the ceiling by case."""
    from tenfold.report.plots import PALETTE, figure

    made, axes = figure(6.4, 3.6)
    for i, op in enumerate(dict.fromkeys(c["op"] for c in record["cases"])):
        points = []
        for c in record["cases"]:
            ours = ours_of(c)
            if c["op"] == op and ours["share"]:
                points.append((max(c["flops"], 1) / c["bytes"], 100 * ours["share"]))
        if points:
            axes.scatter(*zip(*points), label=op, color=PALETTE[i % len(PALETTE)], s=22)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_ylim(0, 105)
    axes.set_xlabel("useful FLOPs per byte of compulsory traffic")
    axes.set_ylabel("share of the ceiling (%)")
    if axes.collections:  # a record may have no case in which we could be timed
        axes.legend(frameon=False, fontsize=8)
    return made


def write_page(records: Sequence[Record], path: Path) -> Path:
    """One HTML page of some records: tables, plots, every provider of every case."""
    from tenfold.report import Page, png_bytes

    from .results import problems

    page = Page("tenfold benchmarks", "Medians of interleaved samples with a cold cache.")
    for record in records:
        page.section(f"{record['family']} on {record['machine']}")
        page.text(setting(record), soft=True)
        for reason in problems(record):
            page.failure(f"Not for publication: {reason}")
        page.table(COLUMNS, map(row_of, record["cases"]))
        if any(c["ratios"].get("best_other") for c in record["cases"]):
            page.image(png_bytes(_ratio_plot(record)), "Bars to the right of 1: tenfold is faster.")
        page.image(
            png_bytes(_roofline(record)), "100 %: the measured ceiling of memory or arithmetic."
        )
        page.heading("Every provider")
        rows: Rows = []
        for case in record["cases"]:
            for name, p in case["providers"].items():
                took = [time_text(p[k]) if p[k] else "–" for k in ("p20_s", "p50_s", "p80_s")]
                error = "–" if p["error"] is None else f"{p['error']:.1e}"
                rows.append([case["name"], name, p["status"], *took, error, p["note"]])
        page.table(("case", "provider", "status", "20 %", "median", "80 %", "error", "note"), rows)
    return page.write(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--readme", action="store_true", help="renew generated parts of README and docs"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; status 1 if not renewed"
    )
    parser.add_argument("--out", type=Path, default=Path("tenfold-report/bench/results.html"))
    chosen = parser.parse_args(arguments)
    root = sources.repository_root()
    if root is None:
        print("bench.report needs a checkout with bench/results", file=sys.stderr)
        return 2
    if not chosen.readme:
        print(write_page(load_records(root), chosen.out))
        return 0
    texts = {path: rewrite(root, path) for path in generated_files(root)}
    if (root / performance.PAGE).is_file():
        texts |= performance.pictures(root, load_records(root))
    stale = []
    for path, text in texts.items():
        if not path.is_file() or text != path.read_text(encoding="utf-8"):
            stale.append(path.relative_to(root))
            if not chosen.check:
                path.write_text(text, encoding="utf-8")
    for name in stale:
        print(
            f"{name}: {'not up to date; run python -m bench.report --readme' if chosen.check else 'renewed'}"
        )
    return int(bool(stale) and chosen.check)


if __name__ == "__main__":
    raise SystemExit(main())
