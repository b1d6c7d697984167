# SPDX-License-Identifier: Apache-2.0
"""PixelGPT: language models that read rendered text (arXiv 2404.10710)."""

from __future__ import annotations

import importlib
from typing import Any

# Name -> module. Loaded on first use: the renderer needs neither torch nor transformers, models need both.
_HOMES = {
    "PixelGPTConfig": "config",
    "PixelGPTModel": "model",
    "PixelGPTForCausalLM": "model",
    "PixelGPTForSequenceClassification": "classifier",
    "PretrainConfig": "train_config",
    "FineTuneConfig": "train_config",
    "pretrain": "pretraining",
    "finetune": "finetuning",
    "generate_patches": "generate",
    "reconstruct": "generate",
    "make_streams": "streams",
    "load": "loading",
    "recipe": "recipes",
    "write_report": "report",
    "PixelBatch": "batches",
    "PixelCollator": "batches",
    "packed_batches": "batches",
    "FontFile": "fonts",
    "default_fonts": "fonts",
    "strip_picture": "picture",
    "write_png": "picture",
    "PixelProcessor": "processor",
    "register": "auto",
    "RendererMismatch": "saved",
    "RenderSettings": "settings",
    "MissingGlyphWarning": "shaping",
    "next_patch": "strips",
    "patch_mask": "strips",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tenfold.pixelgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.pixelgpt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
