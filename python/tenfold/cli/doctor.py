# SPDX-License-Identifier: Apache-2.0
"""``tenfold doctor``: versions, hardware, what is missing, and a self-test of every kernel path."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

import tenfold
from tenfold import _load
from tenfold.cli.common import out, write_json

DRIVER_NEEDED = 580  # of the static CUDA 13 runtime
EXTRAS = {
    "transformers": "hf", "gguf": "hf", "accelerate": "train", "peft": "train", "matplotlib": "report",
    "spacy": "parse", "pysbd": "parse", "pytest": "bench", "kvpress": "", "verl": "", "openrlhf": "",
    "skyrl": "", "trl": "",
}  # fmt: skip


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    """Can the CUDA kernels run here? ``why`` says why not."""
    built = _load.native.build_cuda() if _load.error is None else ""
    found: dict[str, Any] = {"kernels_built_for": built or None, "driver": _driver()}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["devices"] = devices
    if _load.error is not None:
        found["why"] = "tenfold's native library did not load"
    elif not built:
        found["why"] = "this build has no CUDA kernels (nvcc was not found when it was built)"
    elif torch.version.cuda is None:
        found["why"] = f"torch {torch.__version__} is a CPU-only build"
    elif not devices:
        found["why"] = "torch finds no GPU"
    elif found["driver"] and int(found["driver"].split(".")[0]) < DRIVER_NEEDED:
        found["why"] = f"driver {found['driver']} is too old; the kernels need {DRIVER_NEEDED}"
    else:
        found["why"] = ""
    found["usable"] = not found["why"]
    return found


def _self_test(gpu: bool) -> list[dict[str, Any]]:
    """Ops of every family in every dtype on every path against their definitions."""
    from tenfold.cli.self_test import wrong_op
    from tenfold.testing import forced_isa

    def check(path: str, device: str) -> dict[str, Any]:
        try:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if wrong := wrong_op(device, dtype):
                    name = str(dtype).removeprefix("torch.")
                    return {"path": path, "ok": False, "note": f"wrong result: {wrong}, {name}"}
            return {"path": path, "ok": True, "note": ""}
        except Exception as error:
            return {"path": path, "ok": False, "note": f"{type(error).__name__}: {error}"}

    results = []
    for name in tenfold.cpu_capabilities():
        with forced_isa(name):
            results.append(check(f"cpu {name}", "cpu"))
    if gpu:
        results.append(check("cuda", "cuda"))
    return results


def facts() -> dict[str, Any]:
    """Everything that ``tenfold doctor`` prints."""
    gpu = _gpu()
    loaded = _load.error is None
    return {
        "tenfold": tenfold.__version__,
        "library": str(_load.PATH) if loaded else None,
        "error": None if loaded else str(_load.error),
        "compiler": _load.native.build_compiler() if loaded else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_paths": tenfold.cpu_capabilities() if loaded else [],
        "cpu_path": tenfold.cpu_capability() if loaded else None,
        "ops": list(tenfold.ops.__all__) if loaded else [],
        "gpu": gpu,
        "packages": {name: _version(name) for name in EXTRAS},
        "model": _model_state(),
        "sandbox": _sandbox(),
        "self_test": _self_test(gpu["usable"]) if loaded else [],
    }


def _model_state() -> str:
    from tenfold.data.models import converted_path, gguf_path

    if converted_path().is_dir():
        return "ready"
    return "wheel installed" if gguf_path() else "missing"


def _sandbox() -> dict[str, Any]:
    """Can programs (code as a reward, the tool ``code_run``) be run here, and what protects from them?"""
    from tenfold.sandbox import Sandbox, SandboxError

    try:
        return {"usable": True, "protection": Sandbox().protection(), "why": ""}
    except (SandboxError, OSError) as error:
        return {"usable": False, "protection": {}, "why": str(error)}


def run(json: bool) -> int:
    """Prints the facts; returns 1 if the library does not load or a self-test fails, else 0."""
    found = facts()
    bad = bool(found["error"]) or not all(t["ok"] for t in found["self_test"])
    if json:
        write_json(found)
        return int(bad)

    def line(name: str, text: str) -> None:
        out.print(f"{name:<12} {text}", highlight=False, soft_wrap=True, markup=False)

    line("tenfold", f"{found['tenfold']}, {found['library'] or 'not loaded'}")
    if found["error"]:
        line("", found["error"])
    line("python", f"{found['python']}, torch {found['torch']}, {found['threads']} threads")
    if found["compiler"]:
        line("built with", found["compiler"])
        paths = [f"[{n}]" if n == found["cpu_path"] else n for n in found["cpu_paths"]]
        line("CPU paths", f"{' '.join(paths)}   (TENFOLD_CPU_CAPABILITY=name forces one)")
        line("ops", " ".join(found["ops"]))
    gpu = found["gpu"]
    if gpu["usable"]:
        line("CUDA", f"{', '.join(gpu['devices'])}; driver {gpu['driver']}, needed {DRIVER_NEEDED}")
    else:
        line("CUDA", f"not used: {gpu['why']}")
    if gpu["kernels_built_for"]:
        line("", f"kernels built with {gpu['kernels_built_for']}")
    for name, version in found["packages"].items():
        extra = f" (pip install 'tenfold[{EXTRAS[name]}]')" if EXTRAS[name] else ""
        line("package" if name == "transformers" else "", f"{name} {version or 'missing' + extra}")
    fix = "" if found["model"] == "ready" else ": run `python -m tenfold.data prepare`"
    line("SmolLM2", found["model"] + fix)
    sandbox = found["sandbox"]
    means = ", ".join(f"{name}: {what}" for name, what in sandbox["protection"].items())
    line("sandbox", means if sandbox["usable"] else f"no programs can be run: {sandbox['why']}")
    for test in found["self_test"]:
        line("self-test", f"{test['path']}: {'ok' if test['ok'] else test['note']}")
    return int(bad)
