# SPDX-License-Identifier: Apache-2.0
"""The cache folder, and building something in it once: atomic, and locked. What is found in files, kept in it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


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


def remembered(name: str, files: Iterable[Path], find: Callable[[], Any], version: int = 1) -> Any:
    """What ``find()`` finds in ``files``, kept as JSON in the cache folder until one of them, or Python, changes.

    For what takes seconds to find; ``version`` is raised when ``find`` changes. A cache that cannot be read or
    written is none: nothing fails by it.
    """
    seen = [(str(path), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]
    key = hashlib.sha256(repr([version, sys.version, seen]).encode()).hexdigest()[:16]
    target = cache_dir() / "found" / f"{name}-{key}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(target.read_text())
    found = find()
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work:
            (Path(work) / name).write_text(json.dumps(found))
            (Path(work) / name).replace(target)
    return found
