# SPDX-License-Identifier: Apache-2.0
"""Themis: a reward model that calls tools, writes down what it found, and then scores (arXiv 2310.01045)."""

import importlib
from typing import Any

# Where each name lives; modules are loaded when a name of theirs is asked for.
_HOMES = {
    "benchmarks": ("multiple_choice", "read_choices", "read_rewardbench", "rewardbench"),
    "calibration": ("Calibration",),
    "client": ("RemoteError", "RemoteScorer"),
    "config": ("ThemisConfig",),
    "data": ("Candidate", "Pair", "Pairs", "read_tara", "write_tara"),
    "evaluate": ("Evaluation", "PlainJudge", "best_of_n", "judge_all"),
    "inputs": ("load_judge",),
    "judgement": ("CallRecord", "Judgement"),
    "loop": ("ToolLoop",),
    "model": ("ThemisRewardModel",),
    "normalize": ("Normalizer",),
    "record": ("JudgementLog",),
    "rewards": ("ThemisReward",),
    "scorer": ("Scored", "Scorer", "ScorerFull"),
    "serve": ("Limits", "Server"),
    "small": ("small_model",),
    "synthetic": ("synthetic_mixture", "synthetic_pairs", "synthetic_tools"),
    "tokens": ("byte_tokenizer",),
    "tools": ("Rate", "Tool", "ToolCache", "Toolbox", "default_tools"),
    "traces": ("Query", "Step", "Trace", "TraceFormat", "prepare_tokenizer"),
    "training": ("ThemisRecord", "train_themis"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.themis' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.themis.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
