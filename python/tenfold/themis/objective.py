"""Themis' objective: pair loss plus the weighted next-token loss of traces."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """Coefficients of the joint loss (spec of Themis, section 4); ``ThemisConfig`` has fields of these names."""

    alpha: float = 1.0
    beta: float = 1.0
    omega: float = 1.0
    rm_coef: float = 1.0
    lm_reduce: str = "token_mean"
    lm_on_positive: bool = True
    center: float = 0.0
    pooling: str = "last"
