# SPDX-License-Identifier: Apache-2.0
"""Runs families: cases, ceilings before and after, a table on the terminal, JSON and a page.

``tenfold bench``, ``python -m bench`` and ``pytest bench/`` all end here.
"""

from __future__ import annotations

import gc
import importlib
import json as json_module
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tenfold.training.allocator import keep_freed_memory

from .case import Case
from .ceilings import measure_ceilings, merge
from .harness import Options, Result, measure, quick_options
from .memory import measure_peaks
from .results import Record, environment, make_record, plain, problems, save, source_state, wrong

FAMILIES = (
    "attention", "corruption", "diffusion", "influence", "kv_eviction", "loss", "merge", "moe", "norm", "optim",
    "pixels", "rl",
)  # fmt: skip
PARTIAL = ".json.partial"  # a run that has not ended, or that was stopped
_PAGE = 1 << 12


def cases_of(family: str) -> list[Case]:
    """The cases of a family; ValueError names the known ones."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are: {', '.join(FAMILIES)}")
    return importlib.import_module(f"{__package__}.bench_{family}").cases()


def choose(family: str, quick: bool, select: str) -> list[Case]:
    """Cases that are asked for; none where no name contains ``select``."""
    return [
        c for c in cases_of(family) if (c.quick or not quick) and select.lower() in c.name.lower()
    ]


def families_with(families: Sequence[str], quick: bool, select: str) -> list[str]:
    """The families that have a case that is asked for; ValueError if none has."""
    found = [family for family in families if choose(family, quick, select)]
    if not found:
        raise ValueError(
            f"no {'quick ' if quick else ''}case of {', '.join(families)} contains {select!r}"
        )
    return found


def settle(device: torch.device, most: int = 3 << 30) -> None:
    """Touches memory once and lets the process keep it: whoever is handed fresh pages pays for them otherwise.

    A virtual machine gives free memory back to its host within seconds, and its next use takes up to 6 ms per
    megabyte: several times the work on it, for the provider whose turn it happens to be. (glibc only.)
    """
    if device.type != "cpu":
        return
    from .harness import free_memory

    keep_freed_memory()
    held = torch.empty(min(most, free_memory(device) // 4), dtype=torch.uint8)
    held[::_PAGE] = 0
    del held
    gc.collect()


def run_cases(
    chosen: Sequence[Case], options: Options,
    step: Callable[[list[Result], dict[str, Any]], None] = lambda results, ceilings: None,
) -> tuple[list[Result], dict[str, Any]]:  # fmt: skip
    """Measures cases between two measurements of the ceilings; shares use the better of the two.

    ``step`` gets the results so far and the first ceilings.
    """
    settle(options.device)
    ceilings = measure_ceilings(options.device)
    results = []
    for case in chosen:
        results.append(measure(case, options, ceilings))
        gc.collect()
        step(results, ceilings)
    best = merge(ceilings, measure_ceilings(options.device))
    for result in results:
        rescale(result, ceilings, best)
    return results, best


def rescale(result: Result, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Shares against ceilings that turned out higher after the cases."""
    floor = max(
        result.bytes / (new[result.traffic]["value"] * 1e9),
        result.flops / (new[result.peak]["value"] * 1e9) if result.peak else 0.0,
    )
    for m in result.providers.values():
        if m.p50_s is not None:
            m.share = floor / m.p50_s


def add_peaks(
    family: str, cases: Sequence[Case], results: Sequence[Result], device: torch.device
) -> None:
    """What a call allocates, of the providers that were timed in cases that ask for it."""
    wanted = {c.name for c in cases if c.memory}
    timed = {r.name: [n for n, m in r.providers.items() if m.p50_s is not None]
             for r in results if r.name in wanted}  # fmt: skip
    peaks = measure_peaks(family, timed, device)
    for result in results:
        for name, peak in peaks.get(result.name, {}).items():
            result.providers[name].peak_bytes = peak


def line_of(result: Result) -> str:
    """One case as a line of text."""
    ours, r = result.tenfold, result.ratios
    if ours.p50_s is None:
        return f"{result.name}: {ours.status} {ours.note}"
    unit = f"{ours.gflop_s:.0f} GFLOP/s" if result.bound == "compute" else f"{ours.gb_s:.1f} GB/s"
    others = "  ".join(f"{k} {v:.2f}x" for k, v in r.items())
    return f"{result.name}: {_time(ours.p50_s)}  {unit}  {100 * (ours.share or 0):.0f} %  {others}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def run_family(
    family: str, options: Options, select: str = "",
    step: Callable[[Result], None] = lambda r: None, out: Path | None = None,
) -> Record:  # fmt: skip
    """One family's record. What was measured so far lies in ``<out>/<machine>/<family>.json.partial``."""
    state, env = source_state(family), environment(options.device)
    chosen = choose(family, options.quick, select)
    every = [c.name for c in choose(family, options.quick, "")]

    def record(results: list[Result], ceilings: dict[str, Any], partial: bool) -> Record:
        return make_record(family, results, ceilings, env, state, options, partial, every)

    def after(results: list[Result], ceilings: dict[str, Any]) -> None:
        step(results[-1])
        if out is not None:
            save(record(results, ceilings, True), out, PARTIAL)

    results, ceilings = run_cases(chosen, options, after)
    add_peaks(family, chosen, results, options.device)
    return record(results, ceilings, bool(select))


def run(
    families: Sequence[str] | None, quick: bool = False, device: str = "cpu", select: str = "",
    out: str | Path = "tenfold-report/bench", json: bool = False, quiet: bool = False,
) -> int:  # fmt: skip
    """Runs families and writes their results; returns 1 if a tenfold provider was wrong."""
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device takes cpu or cuda, got {device!r}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; `tenfold doctor` says why")
    options = Options(device=where)
    if quick:
        options = quick_options(options)
    asked = families_with(families or FAMILIES, quick, select)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # fails now, not after the measurements
    records: list[Record] = []
    paths: list[Path] = []
    for family in asked:
        if not (json or quiet):
            print(f"{family}: {len(choose(family, quick, select))} cases", file=sys.stderr)

        def step(result: Result) -> None:
            if not json:
                print(line_of(result), flush=True)

        records.append(run_family(family, options, select, step, folder))
        paths.append(save(records[-1], folder))
        paths[-1].with_suffix(PARTIAL).unlink(missing_ok=True)
    from .report import write_page

    page = write_page(records, folder / "index.html")
    bad = [line for record in records for line in wrong(record)]
    if json:
        json_module.dump(plain(records), sys.stdout, indent=1)
        print()
    else:
        for record in records:
            for reason in problems(record):
                print(f"not for publication: {reason}")
        print(f"results: {', '.join(map(str, [*paths, page]))}")
    return int(bool(bad))
