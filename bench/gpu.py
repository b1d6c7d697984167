"""Proves the CUDA kernels on a GPU: tests, sanitizer, benchmarks; writes the result that the ledger reads.

    python bench/gpu.py [--ops PATH/_ops.so] [--out FOLDER] [--skip sanitizer ...]

Runs from a checkout on a machine with torch >= 2.10 and CUDA 13; tenfold need not be installed there.
``--ops`` takes a built library (the stable ABI loads on any torch >= 2.10); without it the script
builds one with cmake. ``<out>/<gpu>/<family>.json`` gets ``verified_cuda_hash`` only if every test and
the sanitizer passed; copy that folder to ``bench/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

STEPS = ("tests", "sanitizer", "bench")
# Every kernel, at small shapes, under compute-sanitizer's tools.
SANITIZED = "tests/ops"
TOOLS = ("memcheck", "racecheck", "synccheck")


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def build(folder: Path) -> Path:
    """Builds ``_ops.so`` with CUDA; returns its path."""
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DTENFOLD_CUDA=ON",
                 f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    return folder / "_ops.so"


def environment(ops: Path) -> dict[str, str]:
    return {**os.environ, "TENFOLD_OPS_PATH": str(ops.resolve()),
            "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"}  # fmt: skip


def run(command: list[str], env: dict[str, str], log: Path, limit: float) -> tuple[int, str]:
    """Status and output of a command; a time-out is status 124."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, text=True, timeout=limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        status, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        status, text = 124, out.decode(errors="replace") if isinstance(out, bytes) else out
    log.write_text(text, encoding="utf-8")
    tail = "\n".join(text.strip().splitlines()[-6:])
    say(f"status {status} after {time.monotonic() - start:.0f} s: {' '.join(command[-6:])}\n{tail}")
    return status, text


def passed(text: str) -> int:
    found = re.findall(r"(\d+) passed", text)
    return int(found[-1]) if found else 0


def tests(env: dict[str, str], out: Path, limit: float) -> dict[str, Any]:
    """Every test marked ``cuda``; none may be skipped, and there must be some."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "cuda", "-q", "--durations=5"]
    status, text = run(command, env, out / "tests.log", limit)
    skipped = re.findall(r"(\d+) skipped", text)
    return {"status": status, "passed": passed(text), "skipped": int(skipped[-1]) if skipped else 0}


def sanitizer(env: dict[str, str], out: Path, limit: float) -> dict[str, Any]:
    """compute-sanitizer over the op tests; a missing tool is reported as such."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"status": None, "note": "compute-sanitizer was not found"}
    found: dict[str, Any] = {"status": 0}
    env = {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor its own allocation
    for tool in TOOLS:
        command = [program, f"--tool={tool}", "--error-exitcode=86", "--target-processes=all",
                   sys.executable, "-m", "pytest", SANITIZED, "-m", "cuda", "-q", "-x"]  # fmt: skip
        status, text = run(command, env, out / f"{tool}.log", limit)
        found[tool] = status
        if status != 0 or passed(text) == 0:
            found["status"] = status or 1
    return found


def bench(env: dict[str, str], out: Path, limit: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench", "--device", "cuda", "--out", str(out)]
    return {"status": run(command, env, out / "bench.log", limit)[0]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/gpu.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ops", type=Path, help="a built _ops.so; default: build one")
    parser.add_argument("--out", type=Path, default=ROOT / "tenfold-report" / "gpu")
    parser.add_argument("--skip", nargs="*", choices=STEPS, default=[])
    parser.add_argument("--limit", type=float, default=540, help="seconds per step")
    chosen = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        print("bench/gpu.py needs a GPU, and torch finds none here", file=sys.stderr)
        return 2
    from bench.sources import cuda_hash, families

    chosen.out.mkdir(parents=True, exist_ok=True)
    ops = chosen.ops or build(ROOT / "build" / "gpu")
    if not ops.is_file():
        parser.error(f"--ops {ops} does not exist")
    env = environment(ops)
    found = {
        name: globals()[name](env, chosen.out, chosen.limit)
        for name in STEPS if name not in chosen.skip
    }  # fmt: skip
    proven = all(found.get(n, {}).get("status") == 0 for n in ("tests", "sanitizer"))
    proven = proven and found["tests"]["passed"] > 0 and found["tests"]["skipped"] == 0
    for family in families(ROOT):
        for path in chosen.out.glob(f"*/{family}.json"):
            record = json.loads(path.read_text())
            record["gpu_checks"] = found
            record["verified_cuda_hash"] = cuda_hash(ROOT, family) if proven else None
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            say(f"{path}: {'verified' if proven else 'not verified'}")
    return 0 if proven and found.get("bench", {"status": 0})["status"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
