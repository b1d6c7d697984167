# SPDX-License-Identifier: Apache-2.0
"""Result files: ``<out>/<machine>/<family>.json``, one family measured in one run.

A file says what was measured (commit, hashes of sources and binary), where (device, ISA, threads,
versions, load), against which ceilings, and the numbers of every case and provider.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import sources
from .ceilings import Ceilings, void_reason
from .harness import Options, Result

SCHEMA = 1
Record = dict[str, Any]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_model() -> str:
    """Name that the CPU gives itself."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What can be set to measure a CPU as if it were a lesser one; for a fair run, both together.
LIMITS = ("TENFOLD_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def machine_name(device: torch.device) -> str:
    """Folder of this machine's results: ``h200``, ``h100``, or the CPU's model and cores.

    A forced ``TENFOLD_CPU_CAPABILITY`` is part of the name, and so is that of a CPU without bf16 instructions:
    virtual machines call several generations of a CPU alike.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = re.search(r"\b([A-Z]{1,3}\d{2,4})\b", name)
        return found.group(1).lower() if found else _slug(name)
    model = re.sub(r"\((R|TM)\)|\bCPU\b|@.*|\b\d+-Core\b|Processor", " ", cpu_model())
    import tenfold  # not above: who reads results needs no kernels

    forced = os.environ.get(LIMITS[0])
    isa = forced or tenfold.cpu_capability()
    told = forced or isa in ("scalar", "avx2", "avx512")
    return f"{_slug(model)}-{num_cores()}c" + (f"-{_slug(isa)}" if told else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source_state(family: str) -> Record:
    """Commit, dirty flag and hashes; all None in an installed wheel, which has no sources."""
    root = sources.repository_root()
    if root is None:
        return {"commit": None, "dirty": None, "sources": None, "cuda_sources": None}
    built_from = ["csrc", "python", "bench/*.py", "CMakeLists.txt"]
    changes = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *built_from)
    return {
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "sources": sources.measured_hash(root, family),
        "cuda_sources": sources.cuda_hash(root, family),
    }


def _tenfold() -> Record:
    try:
        import tenfold
        from tenfold import _load
    except ImportError as error:
        return {"tenfold": f"not importable: {error}"}
    root, binary = sources.repository_root(), Path(_load.PATH)
    newer = root is not None and any(
        p.stat().st_mtime > binary.stat().st_mtime for p in sources._sources(root / "csrc")
    )
    return {
        "tenfold": tenfold.__version__,
        "ops_sha256": hashlib.sha256(binary.read_bytes()).hexdigest(),
        "ops_older_than_sources": newer,
        "compiler": _load.native.build_compiler(),
        "built_for_cuda": _load.native.build_cuda() or None,
        "built_with_torch": _load.native.build_torch(),
        "isa": tenfold.cpu_capability(),
    }


def _gpu(device: torch.device) -> Record:
    properties = torch.cuda.get_device_properties(device)
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout
        values = found.strip().splitlines()[device.index or 0].split(", ")
        smi: Record = dict(zip(query.split(","), values, strict=True))
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        smi = {}
    return {
        "device": properties.name,
        "sm": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        **smi,
    }


def environment(device: torch.device) -> Record:
    """Hardware, software and the load that was there before the run."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    versions["python"] = platform.python_version()
    for name in ("numpy", "scipy", "triton", "kvpress", "flash_attn", "flashinfer"):
        module = sys.modules.get(name)
        if module is not None:
            versions[name] = getattr(module, "__version__", "?")
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "os": platform.platform(terse=True),
        "load_before": None if load is None else [round(x, 2) for x in load],
        "versions": versions,
        "limits": {name: os.environ[name] for name in LIMITS if os.environ.get(name)},
        **_tenfold(),
        **({"device": cpu_model()} if device.type == "cpu" else _gpu(device)),
    }


def make_record(
    family: str, results: Iterable[Result], ceilings: Ceilings, env: Record, state: Record,
    options: Options, partial: bool = False, all_cases: Iterable[str] = (),
) -> Record:  # fmt: skip
    """One family's file. ``partial`` marks one of some cases only, ``all_cases`` names those of a full run."""
    return {
        "schema": SCHEMA,
        "family": family,
        "machine": machine_name(options.device),
        "device_type": options.device.type,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **state,
        "environment": env,
        "quick": options.quick,
        "partial": partial,
        "void": void_reason(ceilings),
        "ceilings": ceilings,
        "all_cases": list(all_cases),
        "cases": [r.to_json() for r in results],
    }


def problems(record: Record) -> list[str]:
    """Why a record must not be published; empty if it may."""
    found = []
    if record.get("void"):
        found.append(f"void: {record['void']}")
    for flag, why in (("quick", "quick run"), ("partial", "selected cases only")):
        if record.get(flag):
            found.append(why)
    if record["environment"].get("ops_older_than_sources") and record["device_type"] == "cpu":
        found.append("the binary is older than the sources: build first")
    return found + wrong(record)


def wrong(record: Record) -> list[str]:
    """Cases in which tenfold's own provider disagreed, raised or could not run."""
    bad = []
    for case in record["cases"]:
        ours = next(p for p in case["providers"].values() if p["kind"] == "tenfold")
        if ours["status"] != "ok":
            bad.append(f"{case['name']}: tenfold {ours['status']}: {ours['note']}")
    return bad


def path_of(record: Record, out: Path) -> Path:
    return out / record["machine"] / f"{record['family']}.json"


def plain(value: Any) -> Any:
    """Floats of six significant digits: enough for any clock, and diffs stay readable.

    JSON has no infinity and no NaN (the error of a result of another shape): None stands for them.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def save(record: Record, out: Path, suffix: str = ".json") -> Path:
    """Writes the record in one step, so that a kill never leaves half a file."""
    path = path_of(record, out).with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    text = json.dumps(plain(record), indent=1, allow_nan=False)
    # One line per list of numbers: the samples would otherwise fill thousands of lines.
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def load(path: Path) -> Record:
    """Reads a result file; raises ValueError if it is not one of this schema."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a result file: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result file of schema {SCHEMA}")
    return record


def load_all(folder: Path) -> list[Record]:
    """All result files under ``folder``, by machine and family."""
    return [load(p) for p in sorted(folder.glob("*/*.json"))]
