# SPDX-License-Identifier: Apache-2.0
"""How good simulated runs are: errors, the order of the tests at the end, mislabelled examples (section 3.6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.gptfluence.gradients import fit_scale, scaled
from tenfold.gptfluence.runs import RunSet
from tenfold.training.metrics import spearman


@dataclass(frozen=True)
class Evaluation:
    """Errors of predicted runs.

    Attributes:
        mse, mae: means over all trajectories (run, test) of their mean over the predicted steps, the first
            measurement not among
            them. mse_std, mae_std: over trajectories. trajectories: how many.
        spearman: mean over runs of the rank correlation over tests of the last values; NaN where it has none.
        spearman_std: over runs.
        final_mse: of the last values.
    """

    mse: float
    mse_std: float
    mae: float
    mae_std: float
    spearman: float
    spearman_std: float
    final_mse: float
    trajectories: int

    def to_json(self) -> dict[str, Any]:
        """All numbers; None for NaN."""
        return {
            k: None if isinstance(v, float) and math.isnan(v) else v
            for k, v in asdict(self).items()
        }


def evaluate(predicted: Tensor, runs: RunSet) -> Evaluation:
    """Compares predictions [R, S, Q] with recorded runs, over the predicted steps (all but the first measurement).

    Missing measurements, and trajectories without a first one, are left out. ValueError for another shape.
    """
    if predicted.shape != runs.y.shape:
        raise ValueError(
            f"predictions must be {list(runs.y.shape)} as the runs, got shape {list(predicted.shape)}"
        )
    wrong = (predicted - runs.y)[:, 1:].double()
    known = runs.y[:, 1:].isfinite() & runs.y[:, :1].isfinite()
    count = known.sum(1)
    there = count > 0
    if not bool(there.any()):
        raise ValueError("no run has a first measurement and a later one")

    def per_trajectory(values: Tensor) -> Tensor:
        return (torch.where(known, values, 0.0).sum(1) / count.clamp_min(1))[there]

    mse, mae = per_trajectory(wrong.square()), per_trajectory(wrong.abs())
    ranks = [
        _final_spearman(p[-1], y[-1], name) for p, y, name in zip(predicted, runs.y, runs.names)
    ]
    found = np.array([r for r in ranks if not math.isnan(r)])
    last = wrong[:, -1][known[:, -1]].square()
    return Evaluation(
        float(mse.mean()), _std(mse), float(mae.mean()), _std(mae), float(found.mean()) if len(found) else math.nan,
        float(found.std()) if len(found) else math.nan, float(last.mean()) if len(last) else math.nan, len(mse),
    )  # fmt: skip


def _std(values: Tensor) -> float:
    return float(values.std(correction=0))


def _final_spearman(predicted: Tensor, true: Tensor, name: str) -> float:
    known = true.isfinite() & predicted.isfinite()
    p, y = predicted[known].numpy(), true[known].numpy()
    if len(y) < 3 or np.ptp(y) == 0 or np.ptp(p) == 0:
        why = f"{len(y)} tests" if len(y) < 3 else "constant values"
        warnings.warn(f"run {name!r} has no rank correlation at the end: {why}", stacklevel=3)
        return math.nan
    return spearman(p, y)


def evaluate_gradients(
    curves: Tensor,
    runs: RunSet,
    train_curves: Tensor | None = None,
    train_runs: RunSet | None = None,
) -> Mapping[str, Evaluation]:
    """Three evaluations of trajectories by gradients: ``raw``; ``fitted``: scaled by a factor from training runs;
    ``oracle``: scaled by the factor that fits these very runs best, which nobody has beforehand."""
    found = {"raw": evaluate(curves, runs)}
    if train_curves is not None and train_runs is not None:
        found["fitted"] = evaluate(scaled(curves, fit_scale(train_curves, train_runs.y)), runs)
    found["oracle"] = evaluate(scaled(curves, fit_scale(curves, runs.y)), runs)
    return found


def mislabel_curve(
    scores: Sequence[float] | Tensor, flipped: Sequence[bool] | Tensor
) -> dict[str, Any]:
    """How soon mislabelled examples are found when examples are inspected from the highest score down.

    Returns:
        ``found`` [N]: share of the mislabelled ones among the first 1, 2, ... examples; ``area`` under that curve
        (0.5: at random) and
        ``ideal``, the largest that it can be.

    Raises ValueError for lists of different lengths or without a mislabelled example.
    """
    values, bad = torch.as_tensor(scores).double(), torch.as_tensor(flipped).bool()
    if values.shape != bad.shape or values.ndim != 1 or not bool(bad.any()):
        raise ValueError(
            f"scores and flipped must be lists of N with a mislabelled example, got {list(values.shape)} and "
            f"{list(bad.shape)}, {int(bad.sum())} of them mislabelled"
        )
    at = values.argsort(descending=True, stable=True)
    found = bad[at].double().cumsum(0) / bad.sum()
    # The mean rank, so that a random order has 0.5.
    area = float(found.mean()) - 0.5 / len(found)
    ideal = float(
        (torch.arange(1, len(bad) + 1).clamp_max(int(bad.sum())) / bad.sum()).mean()
    ) - 0.5 / len(found)
    return {"found": found.tolist(), "area": area, "ideal": ideal}


def agreement(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Predicted and real changes [N, Q] by removed examples: correlations over all, share of equal signs, error."""
    p, t = predicted.flatten().double().numpy(), true.flatten().double().numpy()
    return {
        "pearson": float(np.corrcoef(p, t)[0, 1]) if np.ptp(p) and np.ptp(t) else math.nan,
        "spearman": spearman(p, t),
        "signs": float((np.sign(p) == np.sign(t)).mean()),
        "mse": float(((p - t) ** 2).mean()),
        "variance": float((t**2).mean()),
    }
