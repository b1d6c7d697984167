# SPDX-License-Identifier: Apache-2.0
"""Results of tools, recorded and replayed: a run with a frozen cache gives the same traces on any machine and day.

A file has one JSON object per line: ``tool`` (the action name), ``key`` (a digest of what the result depends on),
``arguments`` (their beginning, for readers), ``status`` and ``text``. Of several lines for one key the last counts.
Only what a tool answered is kept (``ok`` and ``bad_args``): a failure may be gone the next time. Keys do not hold a
tool's settings: a cache belongs to tools that are made in the same way.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from tenfold.training.checks import one_of

MODES = ("off", "record", "replay", "both")
KEPT = ("ok", "bad_args")
_SHOWN = 200
_CHUNK = 1 << 16


def digest(key: str) -> str:
    """What a key is stored as."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class ToolCache:
    """Results by (tool, key). Safe for threads, and for processes that append to one file.

    Args:
        path: the file; None: in memory only. mode: ``"off"``; ``"record"``: every call is made and recorded;
            ``"replay"``: no call is made, what is not there fails; ``"both"``: what is there is replayed (of tools that
            are deterministic), else the call is made and recorded.
        entries: kept in memory, the oldest go first.

    Raises:
        ValueError: mode; a line that is no result (but one that a kill cut off is left out).
        FileNotFoundError: to replay, a file must be there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        mode: str = "off",
        *,
        entries: int = 1_000_000,
    ) -> None:
        one_of("mode", mode, MODES)
        if entries < 1:
            raise ValueError(f"entries must be >= 1, got {entries}")
        self.mode, self.entries = mode, entries
        self.path = None if path is None else Path(path)
        self._found: dict[tuple[str, str], tuple[str, str]] = {}
        self._lock = threading.Lock()
        if self.path is None or mode == "off":
            return
        if mode == "replay" or self.path.exists():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def calls(self) -> bool:
        """May tools be called?"""
        return self.mode != "replay"

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        lines.pop()  # after the last line's end: nothing, or what a kill left
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    self._keep(*_row(line))
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{path}, line {number}: no result of a tool") from None

    def _keep(self, tool: str, key: str, status: str, text: str) -> None:
        self._found.pop((tool, key), None)
        while len(self._found) >= self.entries:
            del self._found[next(iter(self._found))]
        self._found[tool, key] = (status, text)

    def get(self, tool: str, key: str, *, deterministic: bool = True) -> tuple[str, str] | None:
        """(status, text) to answer with, or None. Only replaying answers for a tool that is not deterministic."""
        if self.mode == "replay" or (self.mode == "both" and deterministic):
            with self._lock:
                return self._found.get((tool, digest(key)))
        return None

    def put(self, tool: str, key: str, arguments: str, status: str, text: str) -> None:
        """Records what a tool answered, if this mode records and the status is one of ``KEPT``."""
        if self.mode not in ("record", "both") or status not in KEPT:
            return
        row = {
            "tool": tool,
            "key": digest(key),
            "arguments": arguments[:_SHOWN],
            "status": status,
            "text": text,
        }
        with self._lock:
            known = self._found.get((tool, row["key"])) == (status, text)
            self._keep(tool, row["key"], status, text)
            if self.path is not None and not known:
                _append(self.path, row)


def _row(line: bytes) -> tuple[str, str, str, str]:
    row = json.loads(line)
    if not all(isinstance(row[name], str) for name in ("tool", "key", "status", "text")):
        raise TypeError
    if row["status"] not in KEPT:
        raise ValueError
    return row["tool"], row["key"], row["status"], row["text"]


def _append(path: Path, row: Mapping[str, str]) -> None:
    """One line, under a lock; what a kill left of a line is taken away first."""
    line = json.dumps(row).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with os.fdopen(opened, "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _CHUNK)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        file.truncate(end)
        file.seek(end)
        file.write(line)
