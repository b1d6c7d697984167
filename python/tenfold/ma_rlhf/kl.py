# SPDX-License-Identifier: Apache-2.0
"""The weight of the KL penalty: fixed, or moved towards a target."""

from __future__ import annotations

from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.training.checks import not_negative, positive


class FixedKL:
    """A weight that stays."""

    def __init__(self, beta: float) -> None:
        not_negative("beta", beta)
        self.beta = beta

    def update(self, kl: float, rows: int) -> float:
        """The weight of the next rollout."""
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The inverse of :meth:`state_dict`."""
        not_negative("beta", state["beta"])
        self.beta = state["beta"]


class AdaptiveKL(FixedKL):
    """Proportional control of the weight (Ziegler et al., arXiv 1909.08593, section 2.2).

    ``beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) min(rows / horizon, 1))``, with the KL in nats per response
    (:attr:`Experience.kl_response`, its mean over all ranks) and the responses since the last update.
    """

    bound = 0.2

    def __init__(self, beta: float, target: float, horizon: int) -> None:
        super().__init__(beta)
        positive("target", target)
        positive("horizon", horizon)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, rows: int) -> float:
        """The weight of the next rollout; ``kl`` must be finite."""
        if not abs(kl) < float("inf"):
            raise ValueError(f"kl must be a finite number, got {kl}")
        error = min(max(kl / self.target - 1, -self.bound), self.bound)
        # at most one horizon at a time: a huge rollout must not turn the weight to 0 or below
        self.beta *= 1 + error * min(rows / self.horizon, 1.0)
        return self.beta


def kl_controller(config: MARLHFConfig) -> FixedKL:
    """What ``config.kl_controller`` says."""
    if config.kl_controller == "adaptive":
        return AdaptiveKL(config.beta, config.kl_target, config.kl_horizon)
    return FixedKL(config.beta)
