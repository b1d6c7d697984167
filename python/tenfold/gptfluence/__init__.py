# SPDX-License-Identifier: Apache-2.0
"""GPTfluence: a simulator of training runs that says what each training example does (arXiv 2404.07840)."""

from __future__ import annotations

import importlib
from typing import Any

# Module -> names. Loaded on first use: runs and simulators need no transformers, the recorder of its Trainer does.
_HOMES = {
    "baselines": ("Constant", "MeanTrajectory", "Similarity", "SimfluenceRidge", "SimfluenceTable"),
    "callback": ("DynamicsCallback",),
    "config": ("RecordConfig", "SimulatorConfig"),
    "curricula": ("Curriculum", "make_curricula"),
    "encoders": ("BagEncoder", "TextEncoder", "encoder_of"),
    "evaluation": ("Evaluation", "evaluate", "mislabel_curve"),
    "features": ("Features",),
    "gradients": ("GradientTracker", "gradient_curve", "gradient_scores", "last_layer_scores"),
    "ids": ("UnknownId",),
    "influence": ("Counterfactual",),
    "metrics": ("FunctionMetric", "GenerationMetric", "LossMetric"),
    "recorder": ("Recorder",),
    "recording": ("record_runs",),
    "reference_format": ("read_reference", "read_samples"),
    "report": ("write_report",),
    "runs": ("Run", "RunSet", "read_run", "read_runs"),
    "simulator": ("Prediction", "Simulator"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.gptfluence' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.gptfluence.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
