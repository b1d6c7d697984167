"""tenfold: fused CPU and CUDA ops for ten LLM methods, as ``torch.ops.tenfold.*`` and ``tenfold.ops``."""

from __future__ import annotations

import importlib
from typing import Any

from tenfold import _load
from tenfold import ops as ops

__version__: str = _load.native.version()

# Loaded on first use: importing tenfold must stay cheap.
_LAZY = ("data", "integrations", "nacl", "reference", "report", "testing")

__all__ = [
    "__version__",
    "cpu_capabilities",
    "cpu_capability",
    "ops",
    "set_cpu_capability",
    *_LAZY,
]


def cpu_capability() -> str:
    """Name of the active CPU path: ``scalar``, ``avx2``, ``avx512`` or ``avx512_bf16``."""
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
    if name in _LAZY:
        return importlib.import_module(f"tenfold.{name}")
    raise AttributeError(f"module 'tenfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
