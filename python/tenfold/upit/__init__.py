# SPDX-License-Identifier: Apache-2.0
"""UpIT: upcycling instruction tuning, from checkpoints of a dense model to a mixture of experts (arXiv 2410.01610)."""

import importlib
from typing import Any

# Where each name lives; modules are loaded when a name of theirs is asked for.
_HOMES = {
    "baselines": ("btx", "continue_dense", "upcycle"),
    "checkpoints": ("checkpoints_in", "load_expert", "pick_checkpoints"),
    "config": ("CollectConfig", "ExpandConfig", "SeedsConfig", "UpITConfig"),
    "families": ("Families", "family_losses"),
    "layout": ("convert_layout",),
    "loading": ("load",),
    "lora": ("LoraExperts",),
    "lora_model": ("add_lora_experts", "load_lora_experts", "save_lora_experts"),
    "measure": ("affinity", "expert_load"),
    "options": ("AssemblyConfig", "LoraExpertsConfig", "PostTrainingConfig", "RouterConfig"),
    "pipeline": ("Pipeline", "run"),
    "post_train": ("PostTrained",),
    "recipe": ("Recipe", "load_recipe"),
    "report": ("add_experts",),
    "router": ("equal_steps", "train_router"),
    "seeds": ("assign_buckets", "nll_matrix", "sample_rows"),
    "selection": ("choose_pair", "similarities"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
# The functions ``collect.collect``, ``expand.expand`` and so on are not in the list: here these names are the modules.
_MODULES = ("assemble", "collect", "expand", "post_train")

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tenfold.upit.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.upit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.upit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
