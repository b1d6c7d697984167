"""Runs a build command, shows how far it is, and its log only if it fails.

    python tools/progress.py pip install -v .

Lines such as ``[12/80] Building ...`` become one counter; everything is kept in ``build/last.log``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] (.*)")
LOG = Path("build/last.log")
TAIL = 60


def show(done: int, total: int, what: str, last: bool) -> None:
    """A line that is rewritten on a terminal, and about ten lines in a log file."""
    name = what.split("/")[-1]
    if sys.stdout.isatty():
        print(f"\r\033[K   [{done}/{total}] {name}", end="\n" if last else "", flush=True)
    elif last or done % max(1, total // 10) == 0:
        print(f"   [{done}/{total}] {name}", flush=True)


def main(command: list[str]) -> int:
    """Runs the command; returns its exit status."""
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL)
    LOG.parent.mkdir(exist_ok=True)
    with (
        LOG.open("w") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            tail.append(line)
            step = STEP.match(line)
            if step and int(step[1]) > 0:
                show(int(step[1]), int(step[2]), step[3], step[1] == step[2])
    if process.returncode != 0:
        print(f"{''.join(tail)}\nfailed (exit {process.returncode}); the whole log: {LOG}")
    else:
        print(f"   done in {time.monotonic() - start:.0f} s")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
