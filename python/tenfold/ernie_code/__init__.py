# SPDX-License-Identifier: Apache-2.0
"""ERNIE-Code: an encoder-decoder for human and programming languages (arXiv 2212.06742)."""

from __future__ import annotations

import importlib
from typing import Any

# Name -> module. Loaded on first use: formatting needs neither torch nor transformers.
_HOMES = {
    "TruncationWarning": "batching",
    "code_bleu": "codebleu",
    "model_config": "config",
    "evaluate": "evaluation",
    "ranking": "evaluation",
    "generate": "generation",
    "log_likelihoods": "generation",
    "build_model": "model",
    "check_untied": "model",
    "load_model": "model",
    "parameter_count": "model",
    "untie_head": "model",
    "CodeTrainConfig": "train_config",
    "CodeRecord": "training",
    "train": "training",
    "PivotTranslationCollator": "collators",
    "SpanCorruptionCollator": "collators",
    "Corpora": "corpora",
    "packaged": "corpora",
    "UnformattedCodeWarning": "formatting",
    "decode_code": "formatting",
    "decode_text": "formatting",
    "encode_code": "formatting",
    "encode_text": "formatting",
    "format_code": "formatting",
    "scores": "metrics",
    "Mixture": "mixture",
    "MixtureBatchSampler": "mixture",
    "MixtureDataset": "mixture",
    "mixture_weights": "mixture",
    "PackedRows": "packing",
    "pack_texts": "packing",
    "raw_length": "packing",
    "Pair": "pairs",
    "PairRows": "pairs",
    "read_bugs2fix": "pairs",
    "read_pairs": "pairs",
    "extend_tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "sentinels": "tokenizer",
    "train_tokenizer": "tokenizer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tenfold.ernie_code' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.ernie_code.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
