# SPDX-License-Identifier: Apache-2.0
"""Compiles the emulated kernels with g++, ASan and UBSan, once per state of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Of UBSan's checks those are left out that ASan makes better, and that take a third of the compiler's time.
FLAGS = ["-std=c++20", "-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
         "-fno-sanitize=null,pointer-overflow,object-size,vptr,return,unreachable",
         "-march=native", "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]  # fmt: skip


def _hash(source: Path) -> str:
    state = hashlib.sha256(" ".join(FLAGS).encode())
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh")]
    for path in sorted([*files, *HERE.glob("*.h"), source]):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def build(name: str, *extra: str) -> Path:
    """Path of the compiled ``name``.cpp; processes that ask for the same one wait for each other."""
    source = HERE / f"{name}.cpp"
    target = ROOT / "build" / "cuda_emu" / f"{name}-{_hash(source)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_suffix(".part")
            command = ["g++", *FLAGS, *extra, str(source), "-o", str(part)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            part.rename(target)
    return target
