# SPDX-License-Identifier: Apache-2.0
"""One method's demo in a process of its own: ``python -m tenfold.cli.demo_method METHOD MODULE SEED FILE``.

It writes its progress as JSON lines and pickles an :class:`Outcome` to FILE.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.report import Headline, Page, TextTable


@dataclass
class Outcome:
    """What a method's demo gave; or ``error``: why it did not, and ``details``: where, if nobody expected it."""

    name: str
    seconds: float = 0.0
    peak_bytes: int = 0
    headline: Headline | None = None
    tables: Sequence[TextTable] = ()
    page: Page = field(default_factory=lambda: Page(""))
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    details: str = ""

    def to_json(self) -> dict[str, Any]:
        """Numbers; of a failure what is known."""
        common = {"seconds": round(self.seconds, 1), "peak_bytes": self.peak_bytes}
        if self.headline is None:
            return {"error": self.error} | common
        speed = self.headline.speed
        line = {"ran": self.headline.ran, "result": self.headline.result,
                "speedup": {"op": speed.op, "against": speed.against, "ratio": speed.ratio}}  # fmt: skip
        return self.result | {"headline": line} | common


def peak_bytes() -> int:
    """The most memory that this process held. What getrusage says includes that of the process which started it."""
    (line,) = (
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def perform(name: str, module: str, seed: int, tell: Callable[[dict[str, Any]], None]) -> Outcome:
    """Runs the demo of a module; ``tell`` gets its number of steps, then each step. What it raises is the outcome."""
    from tenfold.data.models import MissingData

    made = Outcome(name)
    start = time.monotonic()
    try:
        method = importlib.import_module(module)
        tell({"steps": method.STEPS})
        found = method.run_demo(step=lambda text: tell({"step": text}), seed=seed)
        method.add_demo_section(found, made.page)
        made.tables, made.result = method.tables(found), found.to_json()
        made.headline = method.headline(found)
    except MissingData as error:
        made.error = str(error)
    except Exception as error:
        made.error, made.details = f"{type(error).__name__}: {error}", traceback.format_exc()
    made.seconds = time.monotonic() - start
    made.peak_bytes = peak_bytes()
    return made


def main(name: str, module: str, seed: str, file: str) -> None:
    """What the process does."""
    # Whatever else writes to stdout must not be taken for progress.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    made = perform(name, module, int(seed), lambda event: print(json.dumps(event), file=events))
    Path(file).write_bytes(pickle.dumps(made))


if __name__ == "__main__":
    # By its name: what is pickled must not be a class of __main__.
    from tenfold.cli.demo_method import main as of_the_module

    of_the_module(*sys.argv[1:])
