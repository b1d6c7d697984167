# SPDX-License-Identifier: Apache-2.0
"""DHA: keys and values shared by heads that were fused first (arXiv 2406.06567).

Importing it registers the model type ``dha_llama`` and ``attn_implementation="tenfold"`` with
transformers, where that is installed.
"""

import importlib
import importlib.util
from typing import Any

# Where each name lives; modules are loaded when a name of theirs is asked for.
_HOMES = {
    "layout": ("Component", "HeadLayout", "permute_query_heads", "sort_query_heads"),
    "cache": ("DhaStaticCache", "DhaStaticLayer"),
    "model": ("DhaLlamaAttention", "DhaLlamaConfig", "DhaLlamaForCausalLM", "DhaLlamaModel"),
    "config": ("ConversionError", "DhaConfig"),
    "conversion": ("convert", "convert_to_dha"),
    "record": ("ConversionRecord",),
    "recovery": ("recover",),
    "report": ("write_report",),
    "export": ("dha_to_gqa", "dha_to_mha", "from_mha"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.dha' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.dha.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))


if importlib.util.find_spec("transformers") is not None:
    importlib.import_module("tenfold.dha.model")
