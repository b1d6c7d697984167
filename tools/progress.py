# SPDX-License-Identifier: Apache-2.0
"""Runs a build command, shows how far it is, and its log only if it fails.

    python tools/progress.py pip install -v .

Lines such as ``[12/80] Building ...`` become one counter, pip's many lines one that is rewritten;
everything is kept in ``build/last.log``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] (.*)")
PIP = re.compile(r"^\s*(?:Collecting|Processing|Downloading|Building wheel for) (.+)")
INSTALL = re.compile(r"^Installing collected packages: (.*)")
LOG = Path("build/last.log")
TAIL = 60


def show(text: str, keep: bool) -> None:
    """A line that is rewritten on a terminal; elsewhere, and at milestones, one that stays."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K   {text}"[: width + 4], end="\n" if keep else "", flush=True)
    elif keep:
        print(f"   {text}", flush=True)


def follow(line: str) -> None:
    """Shows what one line of the log says about progress, if anything."""
    if step := STEP.match(line):
        done, total = int(step[1]), int(step[2])
        if done > 0:
            milestone = done == total or (
                not sys.stdout.isatty() and done % max(1, total // 10) == 0
            )
            show(f"[{done}/{total}] {step[3].split('/')[-1]}", milestone)
    elif install := INSTALL.match(line):
        show(f"installing {install[1].count(',') + 1} packages", True)
    elif package := PIP.match(line):
        show(package[1].split("/")[-1], False)


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
            follow(line)
    if process.returncode != 0:
        print(f"{''.join(tail)}\nfailed (exit {process.returncode}); the whole log: {LOG}")
    else:
        show(f"done in {time.monotonic() - start:.0f} s", True)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
