# SPDX-License-Identifier: Apache-2.0
"""Proves the CUDA kernels on a GPU: tests, sanitizer, benchmarks; writes the result that the ledger reads.

    python bench/gpu.py --ops PATH/_ops.so --out FOLDER                      all steps
    python bench/gpu.py ... --skip sanitizer bench                           tests only
    python bench/gpu.py ... --skip tests bench --tool memcheck               one tool of the sanitizer
    python bench/gpu.py ... --skip tests sanitizer --select ragged_decode    some benchmarks
    python bench/gpu.py ... --skip tests sanitizer bench --with OLD OLDER    no step (and no GPU needed):
                                                                             the verdict on earlier ones

Runs from a checkout on a machine with torch >= 2.10 and CUDA 13; tenfold need not be installed there.
``--ops`` takes a built library (the stable ABI loads on any torch >= 2.10); without it the script
builds one with cmake. Each step leaves ``<out>/steps/<name>.json``; ``--with`` adds steps and benchmark
records of earlier commands, if they ran the same CUDA sources and the same library on the same model of
GPU. What the steps print goes to ``<out>/log.txt``.

``<out>/<gpu>/<family>.json`` is the benchmark record of all those commands. It gets
``verified_cuda_hash`` only if every test and every sanitizer tool passed and no benchmark found our
result wrong; copy that folder to ``bench/results``. Status: 0 verified; 1 something failed; 2 it could
not start; 3 all steps of this command passed, but the proof is not complete.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from bench import gpu_proof as proof  # noqa: E402

STEPS = ("tests", "sanitizer", "bench")
# Folders that need no installed tenfold; pyproject.toml's addopts has -q, a second hides the counts.
PYTEST = ("-m", "pytest", "-m", "cuda")
TESTED = ("tests/ops", "tests/methods")
SANITIZED = ("tests/ops",)


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
    """Of the steps: this checkout's Python sources, that library, and no options of pytest's."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    return {**kept, "TENFOLD_OPS_PATH": str(ops.resolve()),
            "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"}  # fmt: skip


def kill_group(leader: subprocess.Popen[bytes]) -> None:
    """Ends a command and everything that it started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


def run(command: list[str], env: dict[str, str], log: Path, limit: float) -> tuple[int, str]:
    """Status and output of a command, which is added to ``log`` as it comes; a time-out is 124."""
    start = time.monotonic()
    with log.open("ab") as sink:
        sink.write(f"$ {' '.join(command)}\n".encode())
        sink.flush()
        begin = sink.tell()
        # A group, not a session: a device machine that stops this script finds its children too.
        child = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=sink,
            stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = proof.STOPPED
        finally:
            kill_group(child)
    text = log.read_bytes()[begin:].decode(errors="replace")
    tail = "\n".join(text.strip().splitlines()[-6:])
    say(f"status {status} after {time.monotonic() - start:.0f} s: {' '.join(command[-6:])}\n{tail}")
    return status, text


def _judged(status: int, text: str) -> dict[str, Any]:
    found = proof.counts(text)
    return {"status": status, "passed": found.get("passed", 0), "skipped": found.get("skipped", 0)}


def tests(env: dict[str, str], log: Path, limit: float) -> dict[str, Any]:
    """Every test marked ``cuda``; none may be skipped, and there must be some."""
    command = [sys.executable, *PYTEST, *TESTED, "--durations=5"]
    return _judged(*run(command, env, log, limit))


def sanitizer(
    tool: str, env: dict[str, str], log: Path, limit: float, selection: str = proof.SMALL
) -> dict[str, Any]:
    """One tool of compute-sanitizer over the op tests; a missing program is reported as such."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"status": None, "note": "compute-sanitizer was not found", "selection": selection}
    env = {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor its own allocation
    # torch asks the runtime questions whose errors it expects; it raises those of launches itself.
    command = [program, f"--tool={tool}", "--error-exitcode=86", "--target-processes=all",
               "--report-api-errors=no"]  # fmt: skip
    if tool != "memcheck":  # far slower; races and barriers of torch's kernels are not ours to find
        command += ["--kernel-name", "kns=tenfold"]
    chosen = f"({selection}) and " * bool(selection) + f"not {proof.CAPTURES}"
    command += [sys.executable, *PYTEST, *SANITIZED, "-k", chosen, "--maxfail=3"]
    return {**_judged(*run(command, env, log, limit)), "selection": selection}


def bench(
    env: dict[str, str], log: Path, limit: float, out: Path, quick: bool = False, select: str = ""
) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench", "--device", "cuda", "--out", str(out)]
    command += ["--quick"] * quick + (["--select", select] if select else [])
    return {"status": run(command, env, log, limit)[0], "selection": select, "quick": quick}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/gpu.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ops", type=Path, help="a built _ops.so; default: build one")
    parser.add_argument("--out", type=Path, default=ROOT / "tenfold-report" / "gpu")
    parser.add_argument("--with", dest="earlier", type=Path, nargs="+", default=[],
                        metavar="FOLDER", help="--out folders of earlier commands")  # fmt: skip
    parser.add_argument("--skip", nargs="+", choices=STEPS, default=[])
    parser.add_argument("--tool", nargs="+", choices=proof.TOOLS, default=list(proof.TOOLS),
                        help="tools of the sanitizer, each a step of its own; default: all")  # fmt: skip
    parser.add_argument("-k", dest="selection", default=proof.SMALL, metavar="EXPRESSION",
                        help="pytest's -k for the sanitizer; default: %(default)r; '' is every test "
                             "but those that capture graphs; any other choice proves nothing")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="benchmarks: quick cases, few samples")
    parser.add_argument(
        "--select", default="", help="benchmarks: cases whose name contains this; they add up"
    )
    parser.add_argument("--limit", type=float, default=540, help="seconds per step")
    parser.add_argument("--commit", help="what was checked out, where there is no .git")
    chosen = parser.parse_args(arguments)
    for folder in chosen.earlier:
        if not folder.is_dir():
            parser.error(f"--with {folder} is not a folder")
    if chosen.ops and not chosen.ops.is_file():
        parser.error(f"--ops {chosen.ops} does not exist")
    return chosen


def steps_to_run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Names and calls of the steps that this command runs."""
    made: dict[str, Any] = {}
    if "tests" not in chosen.skip:
        made["tests"] = tests
    if "sanitizer" not in chosen.skip:
        for tool in chosen.tool:
            made[tool] = lambda *a, tool=tool: sanitizer(tool, *a, selection=chosen.selection)
    if "bench" not in chosen.skip:
        part = re.sub(r"[^A-Za-z0-9]+", "_", chosen.select)
        name = "bench" + f"-{part}" * bool(part) + "-quick" * chosen.quick
        made[name] = lambda *a: bench(*a, chosen.out, chosen.quick, chosen.select)
    return made


def device_name() -> str | None:
    """The GPU's own name; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def conclude(
    family: str, folders: list[Path], out: Path, sha: str, device: str, commit: str | None
) -> list[str]:
    """Writes a family's record with the verdict; returns what is missing or wrong."""
    from bench.results import save, wrong
    from bench.sources import cuda_hash

    mine = (family, cuda_hash(ROOT, family) or "", sha, device)
    steps, refused = proof.usable(proof.read_steps(folders), *mine)
    for line in refused:
        say(f"not counted: {line}")
    record = proof.merge_records(proof.read_records(folders, *mine))
    found = proof.doubts(steps, record, [] if record is None else wrong(record))
    if record is not None:
        record["commit"] = record["commit"] or commit
        record["gpu_checks"] = steps
        record["verified_cuda_hash"] = None if found else mine[1]
        path = save(record, out)
        path.with_suffix(".json.partial").unlink(missing_ok=True)
        say(f"{path}: {'not verified' if found else 'verified'}")
    for line in found:
        say(f"{family} is not proven: {line}")
    return found


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    todo = steps_to_run(chosen)
    folders = [*chosen.earlier, chosen.out]
    device = device_name()
    if todo and device is None:
        print("bench/gpu.py needs a GPU, and torch finds none here", file=sys.stderr)
        return 2
    from bench.sources import cuda_hash, families

    chosen.out.mkdir(parents=True, exist_ok=True)
    if todo:
        ops = chosen.ops or build(ROOT / "build" / "gpu")
        sha, env = hashlib.sha256(ops.read_bytes()).hexdigest(), environment(ops)
    else:
        seen = {(step["device"], step["ops_sha256"]) for step in proof.read_steps(folders)}
        if len(seen) != 1:
            found = f"found {sorted(seen)}" if seen else "found none"
            print(f"bench/gpu.py: steps of one GPU and one _ops.so are needed, {found}",
                  file=sys.stderr)  # fmt: skip
            return 2
        (device, sha), env = seen.pop(), {}
    shared = {"cuda_hash": {f: cuda_hash(ROOT, f) for f in families(ROOT)}, "ops_sha256": sha,
              "device": device, "commit": chosen.commit}  # fmt: skip
    failed = False
    for name, step in todo.items():
        say(name)
        start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        found = step(env, chosen.out / "log.txt", chosen.limit)
        failed |= found["status"] != 0
        proof.write_step(chosen.out, {"name": name, "time": start, **found, **shared})
    proven = [
        not conclude(family, folders, chosen.out, sha, str(device), chosen.commit)
        for family, known in shared["cuda_hash"].items() if known
    ]  # fmt: skip
    if failed:
        return 1
    return 0 if all(proven) else 3


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step's group is ended
    raise SystemExit(main())
