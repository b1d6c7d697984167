"""Compiles the emulated kernels with g++, ASan and UBSan, once per state of the sources."""

from __future__ import annotations

import collections
import hashlib
import subprocess
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
         "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]  # fmt: skip


_building: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)


def _hash(source: Path) -> str:
    state = hashlib.sha256(" ".join(FLAGS).encode())
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh")]
    for path in sorted([*files, *HERE.glob("*.h"), source]):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def build(name: str, *extra: str) -> Path:
    """Path of the compiled ``name``.cpp; threads that ask for the same one wait for each other."""
    with _building[name]:
        return _build(name, *extra)


def _build(name: str, *extra: str) -> Path:
    source = HERE / f"{name}.cpp"
    target = ROOT / "build" / "cuda_emu" / f"{name}-{_hash(source)}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        command = ["g++", *FLAGS, *extra, str(source), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        part.rename(target)
    return target
