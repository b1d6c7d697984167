"""UpIT: a dense instruction tuning becomes a mixture of experts (arXiv 2410.01610)."""

import importlib
from typing import Any

# Where each name lives; modules are loaded when a name of theirs is asked for.
_HOMES = {
    "config": ("UpITConfig",),
    "collect": ("collect", "pick_checkpoints"),
    "expand": ("expand",),
    "pipeline": ("run",),
    "recipe": ("Recipe", "load_recipe"),
    "seeds": ("assign_buckets", "nll_matrix", "sample_rows"),
    "selection": ("choose_pair", "similarities"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.upit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.upit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
