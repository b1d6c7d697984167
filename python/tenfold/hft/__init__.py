# SPDX-License-Identifier: Apache-2.0
"""HFT: half fine-tuning (arXiv 2404.18466), and what to compare it with."""

import importlib
from typing import Any

# Where each name lives; modules are loaded when a name of theirs is asked for.
_HOMES = {
    "hft.architecture": ("describe",),
    "hft.freeze": ("SoftFreeze", "apply", "current_plan", "release"),
    "hft.baselines": ("add_lora", "merge_lora"),
    "hft.callback": ("HalfFineTuneCallback", "optimizer_cls_and_kwargs"),
    "hft.config": ("HFTConfig",),
    "hft.sequence": ("continual",),
    "hft.delta": ("apply_delta", "average", "half_reset", "restore", "save_delta", "snapshot"),
    "hft.preference": ("dpo", "dpo_loss", "make_reference"),
    "hft.metrics": ("backward_transfer", "overall_performance"),
    "hft.plan": ("Part", "Plan"),
    "hft.record": ("TuneRecord",),
    "hft.report": ("write_report",),
    "hft.selection": ("select",),
    "hft.supervised": ("sft",),
    "training.scoring": ("score",),
    "training.tasks": ("Task",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.hft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
