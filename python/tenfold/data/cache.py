# SPDX-License-Identifier: Apache-2.0
"""The cache folder, and building something in it once: atomic, and locked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_dir() -> Path:
    """``$TENFOLD_HOME``, else ``$XDG_CACHE_HOME/tenfold``, else ``~/.cache/tenfold``."""
    named = os.environ.get("TENFOLD_HOME")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "tenfold"


@contextlib.contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Holds an exclusive lock on ``path``; says ``waiting`` on stderr if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_once(target: Path, build: Callable[[Path], None], message: str | None = None) -> Path:
    """Returns the folder ``target``, made by ``build(empty folder)`` if it is not there yet.

    ``target`` appears complete or not at all: a killed build leaves only a hidden folder, which the
    next one removes. Processes that arrive meanwhile wait for the first.
    """
    if target.is_dir():
        return target
    with locked(
        target.with_name(f".{target.name}.lock"),
        f"tenfold: another process is making {target}; waiting for it",
    ):
        if target.is_dir():
            return target
        for left_over in target.parent.glob(f".{target.name}.tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if message:
            print(message, file=sys.stderr, flush=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        try:
            build(work)
            work.chmod(0o755)
            work.rename(target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return target
