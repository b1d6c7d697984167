"""``tenfold doctor``: versions, hardware, what is missing, and a self-test of every kernel path."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Callable
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


def _wrong_op(device: str, dtype: torch.dtype) -> str:
    """The first op whose result differs from its definition, or ''."""
    from tenfold import ops, reference

    made = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, n, 64, generator=made).to(dtype) for h, n in ((6, 24), (2, 200), (2, 200))
    )
    close = 1e-4 if dtype == torch.float32 else 2e-2
    move = lambda *tensors: tuple(t.to(device) for t in tensors)  # noqa: E731

    def near(got: torch.Tensor, want: torch.Tensor) -> bool:
        return torch.allclose(got.cpu().float(), want.float(), rtol=close, atol=close)

    scores = reference.proxy_scores(q.float(), k.float())[0]
    if not near(ops.proxy_scores(*move(q, k))[0], scores):
        return "proxy_scores"
    counts: dict[str, Any] = {"n_sink": 4, "n_recent": 8, "n_topk": 20, "n_random": 12, "seed": 1}
    idx, _ = reference.nacl_select(scores, **counts)
    if not torch.equal(ops.nacl_select(*move(scores), **counts)[0].cpu(), idx):
        return "nacl_select"
    want = reference.kv_gather(k, v, idx)
    if not all(torch.equal(g.cpu(), w) for g, w in zip(ops.kv_gather(*move(k, v, idx)), want)):
        return "kv_gather"
    mine = move(k.clone(), v.clone())
    ops.kv_compact_(*mine, *move(idx))
    if not all(torch.equal(m.cpu()[:, :, : idx.shape[-1]], w) for m, w in zip(mine, want)):
        return "kv_compact_"
    evicted = ops.nacl_evict(*move(q, k, v), **counts)
    if evicted[0].shape != want[0].shape or not bool(evicted[0].isfinite().all()):
        return "nacl_evict"
    flat_k, flat_v = (t.reshape(-1, 64).contiguous() for t in want)
    offsets = torch.arange(3) * idx.shape[-1]
    attended = reference.ragged_decode(
        q[:, :, -1:].float(), flat_k.float(), flat_v.float(), offsets
    )[0]
    if not near(
        ops.ragged_decode(*move(q[:, :, -1:].contiguous(), flat_k, flat_v, offsets))[0], attended
    ):
        return "ragged_decode"
    return _wrong_attention(move, near, q, k, v)


def _wrong_attention(
    move: Callable[..., tuple[torch.Tensor, ...]],
    near: Callable[[torch.Tensor, torch.Tensor], bool],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> str:
    """The first op of the attention family that is wrong, or ''; q [1, 6, 24, 64], k and v [1, 2, 200, 64]."""
    from tenfold import ops, reference

    maps = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 0, 1])
    wide = q.float(), k.float(), v.float()
    out, lse = reference.dha_attention(*wide, *maps)
    (mine, keys, values), (kmap, vmap) = move(q, k, v), move(*maps)
    found, found_lse = ops.dha_attention(mine, keys, values, kmap, vmap)
    if not near(found, out) or not near(found_lse, lse):
        return "dha_attention"
    grads = ops.dha_attention_backward(mine, mine, keys, values, found, found_lse, kmap, vmap)
    want = reference.dha_attention_backward(wide[0], *wide, out, lse, *maps)
    if not all(near(g, w) for g, w in zip(grads, want)):
        return "dha_attention_backward"
    newest = mine[:, :, -4:].contiguous()
    lens = torch.tensor([keys.shape[2]], dtype=torch.int32, device=keys.device)
    if not near(ops.dha_decode(newest, keys, values, kmap, vmap, lens)[0], out[:, :, -4:]):
        return "dha_decode"
    weights, groups = k[0].contiguous(), torch.tensor([[0, 1]], dtype=torch.int32)
    omega = torch.rand(1, 2, 2, 200, generator=torch.Generator().manual_seed(0))
    fused = ops.fuse_heads(*move(weights, omega, groups))
    if not near(fused, reference.fuse_heads(wide[1][0], omega, groups)):
        return "fuse_heads"
    return ""


def _self_test(gpu: bool) -> list[dict[str, Any]]:
    """Every op in every dtype on every path against its definition."""
    from tenfold.testing import forced_isa

    def check(path: str, device: str) -> dict[str, Any]:
        try:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if wrong := _wrong_op(device, dtype):
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
        "self_test": _self_test(gpu["usable"]) if loaded else [],
    }


def _model_state() -> str:
    from tenfold.data.models import converted_path, gguf_path

    if converted_path().is_dir():
        return "ready"
    return "wheel installed" if gguf_path() else "missing"


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
    for test in found["self_test"]:
        line("self-test", f"{test['path']}: {'ok' if test['ok'] else test['note']}")
    return int(bad)
