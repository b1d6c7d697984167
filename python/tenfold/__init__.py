# SPDX-License-Identifier: Apache-2.0
"""tenfold: fused CPU and CUDA ops for ten LLM methods, as ``torch.ops.tenfold.*`` and ``tenfold.ops``."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import warnings
from typing import Any

from tenfold import _load

load_error: _load.LoadError | None = _load.error
if load_error is None:
    # What torch has loaded is large: one full collection on the way would double the time of this import.
    _collecting = gc.isenabled()
    gc.disable()
    try:
        from tenfold import ops as ops
    finally:
        if _collecting:
            gc.enable()

    __version__: str = _load.native.version()
else:
    # A broken installation must neither take down the program that imports it nor stay unnoticed;
    # `tenfold.ops` raises the same sentence, and `tenfold doctor` still runs.
    warnings.warn(str(load_error), RuntimeWarning, stacklevel=2)
    try:
        __version__ = importlib.metadata.version("tenfold")
    except importlib.metadata.PackageNotFoundError:
        __version__ = "unknown"

# Loaded on first use: importing tenfold must stay cheap.
_LAZY = ("data", "dha", "hft", "integrations", "nacl", "optim", "reference", "report", "testing")

__all__ = [
    "__version__",
    "cpu_capabilities",
    "cpu_capability",
    "load_error",
    "ops",
    "set_cpu_capability",
    *_LAZY,
]


def cpu_capability() -> str:
    """Name of the active CPU path: ``scalar``, ``avx2``, ``avx512``, ``avx512_bf16`` or
    ``avx512_amx``."""
    return _load.native.cpu_capability()


def cpu_capabilities() -> list[str]:
    """Names of all CPU paths this machine can run, weakest first."""
    return list(_load.native.cpu_capabilities())


def set_cpu_capability(name: str) -> None:
    """Forces a CPU path for the whole process (``TENFOLD_CPU_CAPABILITY`` does it from the start).

    Raises ValueError if ``name`` is unknown or this CPU does not support it.
    """
    if not _load.native.set_cpu_capability(name):
        raise ValueError(
            f"CPU capability {name!r} is not supported here; supported: {cpu_capabilities()}"
        )


def __getattr__(name: str) -> Any:
    if name == "ops" and load_error is not None:
        raise load_error
    if name in _LAZY:
        return importlib.import_module(f"tenfold.{name}")
    raise AttributeError(f"module 'tenfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
