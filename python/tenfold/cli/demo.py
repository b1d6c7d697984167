# SPDX-License-Identifier: Apache-2.0
"""``tenfold demo``: methods end to end on real input, a table, and ``tenfold-report/index.html``."""

from __future__ import annotations

import json as json_module
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from tenfold.cli.common import err, out, table, write_json
from tenfold.cli.demo_method import Outcome
from tenfold.report import Page

METHODS = {
    name: f"tenfold.{name.replace('-', '_')}.demo"
    for name in (
        "nacl", "dha", "hft", "ma-rlhf", "upit", "themis", "pixelgpt", "gptfluence", "ernie-music", "ernie-code",
    )
}  # fmt: skip
COLUMNS = (
    "method",
    "what was run",
    "result",
    "kernel, measured in this run",
    "peak memory",
    "time",
)
MOST_JOBS = 4  # a method takes up to 3 GB


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


class Runner:
    """Runs methods, ``jobs`` at a time, each in a process of its own with its share of the cores."""

    def __init__(self, methods: Sequence[str], seed: int, jobs: int, quiet: bool) -> None:
        self.methods, self.seed, self.jobs, self.quiet = methods, seed, jobs, quiet
        self.threads = max(1, cores() // jobs)
        self.over = False  # nothing starts any more
        self.running: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.bar = Progress(
            TextColumn("{task.fields[name]:11}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.description}"), console=err, disable=quiet or not err.is_terminal,
        )  # fmt: skip

    def run(self) -> list[Outcome]:
        """Outcomes in the order of ``methods``. An interrupt ends all processes."""
        with tempfile.TemporaryDirectory(prefix="tenfold-demo-") as folder, self.bar:
            pool = ThreadPoolExecutor(self.jobs)
            try:
                return list(pool.map(lambda name: self._one(name, Path(folder)), self.methods))
            finally:
                with self.lock:
                    self.over = True
                    for process in self.running:
                        process.terminate()
                pool.shutdown(cancel_futures=True)

    def _one(self, name: str, folder: Path) -> Outcome:
        file, said, start = folder / f"{name}.pickle", folder / f"{name}.stderr", time.monotonic()
        count = str(self.threads)
        with said.open("w") as errors, self.lock:
            if self.over:
                return Outcome(name, error="not started")
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tenfold.cli.demo_method", name, METHODS[name], str(self.seed), str(file)],
                stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True,
                env=os.environ | {"OMP_NUM_THREADS": count, "OMP_WAIT_POLICY": "passive"},
            )  # fmt: skip
            self.running.add(process)
        task = self.bar.add_task("starting", total=None, name=name)
        assert process.stdout is not None
        for line in process.stdout:
            event = json_module.loads(line)
            if "steps" in event:
                self.bar.update(task, total=event["steps"])
            else:
                self.bar.update(task, advance=1, description=event["step"])
        status = process.wait()
        with self.lock:
            self.running.discard(process)
        if file.is_file() and status == 0:
            made: Outcome = pickle.loads(file.read_bytes())
        else:
            last = "".join(said.read_text(errors="replace").splitlines(keepends=True)[-12:])
            why = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            made = Outcome(
                name, time.monotonic() - start, error=f"its process ended with {why}", details=last
            )
        self._ended(task, made)
        return made

    def _ended(self, task: TaskID, made: Outcome) -> None:
        total = self.bar.tasks[task].total or 1
        words = f"failed: {made.error.splitlines()[0]}" if made.error else "done"
        self.bar.update(task, total=total, completed=0 if made.error else total, description=words)
        self.bar.stop_task(task)
        if not self.quiet and not err.is_terminal:
            err.print(
                f"tenfold demo {made.name}: {words} ({made.seconds:.0f} s)",
                highlight=False,
                soft_wrap=True,
            )


def line_of(made: Outcome) -> list[str]:
    """A method's line, for ``COLUMNS``."""
    took = f"{made.seconds:.0f} s"
    if made.headline is None:
        return [made.name, "failed", made.error.splitlines()[0], "–", "–", took]
    line = made.headline
    return [
        made.name,
        line.ran,
        line.result,
        str(line.speed),
        f"{made.peak_bytes / 1e9:.1f} GB",
        took,
    ]


def page_of(outcomes: Sequence[Outcome], setting: str) -> Page:
    """The report: the lines of all methods, then each one's section."""
    page = Page("tenfold", "Every method end to end on real input, on this machine.")
    if len(outcomes) > 1:
        page.section("All methods")
        page.table(COLUMNS, [line_of(made) for made in outcomes])
    page.text(setting, soft=True)
    for made in outcomes:
        if made.error:
            page.section(f"{made.name}: failed")
            page.failure(made.error)
            if made.details:
                page.preformatted(made.details)
        else:
            page.add(made.page)
    return page


def show(outcomes: Sequence[Outcome]) -> None:
    """Each method's tables, then a line for each."""
    for made in outcomes:
        for t in made.tables:
            out.print(table(t.title, t.columns, t.rows, text=t.prose))
            out.print()
        if made.error:
            out.print(
                f"{made.name} failed: {made.error}", style="red", highlight=False, soft_wrap=True
            )
            if made.details:
                out.print(made.details, highlight=False, soft_wrap=True, markup=False)
    lines = Table(
        title="All methods" if len(outcomes) > 1 else None,
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for i, name in enumerate(COLUMNS):
        lines.add_column(name, justify="right" if i > 3 else "left", no_wrap=i in (0, 4, 5))
    for made in outcomes:
        lines.add_row(*line_of(made), style="red" if made.error else None)
    out.print(lines)


def run(
    methods: list[str], folder: Path, seed: int, jobs: int | None, json: bool, quiet: bool
) -> int:
    """Runs the methods' demos; returns the exit status: 1 if one failed."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}; there are: {', '.join(METHODS)}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be 1 or more, got {jobs}")
    if not 0 <= seed < 1 << 31:
        raise ValueError(f"--seed must be in [0, 2^31), got {seed}")
    chosen = list(dict.fromkeys(methods or METHODS))
    runner = Runner(chosen, seed, jobs or min(len(chosen), cores(), MOST_JOBS), quiet or json)
    start = time.monotonic()
    outcomes = runner.run()
    total = time.monotonic() - start
    together = f"{runner.jobs} at a time, " if len(chosen) > 1 else ""
    threads = "one thread" if runner.threads == 1 else f"{runner.threads} threads"
    setting = f"{together}{threads} each; seed {seed}; {total:.0f} s."
    path = page_of(outcomes, setting).write(folder / "index.html")
    if json:
        write_json({"report": str(path), "seed": seed, "seconds": round(total, 1)}
                   | {made.name: made.to_json() for made in outcomes})  # fmt: skip
    else:
        show(outcomes)
        out.print(f"report: {path} ({total:.0f} s)", highlight=False, soft_wrap=True)
    return int(any(made.error for made in outcomes))
