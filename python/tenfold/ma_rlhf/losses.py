"""PPO's losses of a prepared batch or of a shard of one."""

from __future__ import annotations

from torch import Tensor

from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.experience import Experience

Metrics = dict[str, Tensor]


def policy_loss(
    config: MARLHFConfig, exp: Experience, logp_new: Tensor, *, tokens: int | None = None,
    sequences: int | None = None, macros: int | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    raise NotImplementedError


def value_loss(
    config: MARLHFConfig, exp: Experience, value_new: Tensor, *, tokens: int | None = None,
    sequences: int | None = None, macros: int | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    raise NotImplementedError
