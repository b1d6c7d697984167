"""UpIT: upcycling instruction tuning, from checkpoints of a dense model to a mixture of experts (arXiv 2410.01610)."""

import importlib
from typing import Any

# Where each name lives; modules are loaded when a name of theirs is asked for. ``assemble.assemble`` and
# ``post_train.post_train`` are not in the list: here these names are the modules.
_HOMES = {
    "baselines": ("btx", "continue_dense", "upcycle"),
    "layout": ("convert_layout",),
    "loading": ("load",),
    "lora": ("LoraExperts",),
    "lora_model": ("add_lora_experts", "load_lora_experts", "save_lora_experts"),
    "measure": ("affinity", "expert_load"),
    "options": ("AssemblyConfig", "LoraExpertsConfig", "PostTrainingConfig", "RouterConfig"),
    "post_train": ("PostTrained",),
    "report": ("add_experts",),
    "router": ("equal_steps", "train_router"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in ("assemble", "post_train"):
        return importlib.import_module(f"tenfold.upit.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.upit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.upit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
