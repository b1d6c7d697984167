"""MA-RLHF: PPO whose credit assignment is over macro actions (arXiv 2410.02743)."""

import importlib
from typing import Any

# Where each name lives; modules are loaded when a name of theirs is asked for.
_HOMES = {
    "config": ("MARLHFConfig",),
    "experience": ("Experience", "prepare", "response_mask"),
    "kl": ("AdaptiveKL", "FixedKL", "kl_controller"),
    "losses": ("policy_loss", "value_loss"),
    "segmenters": ("Segmenter", "make_segmenter"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.ma_rlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.ma_rlhf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
