# SPDX-License-Identifier: Apache-2.0
"""The smallest task on which macro actions can be seen to help: a table as the policy, seconds per run.

The policy is a table of logits [positions, tokens], the critic one number per position. A response is one token per
position, and its score is twice the share of one good token. The table begins uniform, and is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tenfold import ops
from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.experience import prepare
from tenfold.ma_rlhf.losses import policy_loss, value_loss
from tenfold.ma_rlhf.segmenters import make_segmenter
from tenfold.training.checks import integers, positive


@dataclass(frozen=True)
class TabularTask:
    """Sizes of the task and of its training; the defaults are those of the method's acceptance check."""

    positions: int = 16
    tokens: int = 8
    good: int = 3
    batch_size: int = 32
    learning_rate: float = 0.1
    epochs: int = 2
    updates: int = 150

    def __post_init__(self) -> None:
        integers(
            self,
            {"positions": 1, "tokens": 2, "good": 0, "batch_size": 1, "epochs": 1, "updates": 1},
        )
        positive("learning_rate", self.learning_rate)
        if self.good >= self.tokens:
            raise ValueError(f"good must be one of {self.tokens} tokens, got {self.good}")


@dataclass(frozen=True)
class TabularRun:
    """Per update: mean probability of the good token before it, and mean score of its rollout."""

    probability: list[float]
    score: list[float]


def train(config: MARLHFConfig, seed: int, task: TabularTask | None = None) -> TabularRun:
    """PPO on the table.

    Args:
        config: of macro actions, advantages and losses; what concerns optimisers and rollouts is the task's.
        seed: of the rollouts.

    Returns:
        One entry per update, and one after the last of them.
    """
    task = task or TabularTask()
    generator = torch.Generator().manual_seed(seed)
    shape = (task.batch_size, task.positions)
    logits = torch.zeros(task.positions, task.tokens, requires_grad=True)
    values = torch.zeros(task.positions, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=task.learning_rate)
    segmenter = make_segmenter(config)
    mask = torch.ones(shape, dtype=torch.bool)
    uniform = torch.full(shape, -torch.log(torch.tensor(float(task.tokens))).item())
    run = TabularRun([], [])

    def logp(ids: torch.Tensor) -> torch.Tensor:
        return ops.selective_logprob(logits.expand(task.batch_size, -1, -1), ids)[0]

    for _ in range(task.updates + 1):
        with torch.no_grad():
            share = torch.softmax(logits, 1)
            ids = torch.multinomial(
                share, task.batch_size, True, generator=generator
            ).T.contiguous()
            score = 2.0 * (ids == task.good).float().mean(1)
            run.probability.append(share[:, task.good].mean().item())
            run.score.append(score.mean().item())
            if len(run.score) > task.updates:
                break
            exp = prepare(
                config, segmenter, mask=mask, logp_old=logp(ids), logp_ref=uniform, score=score,
                value_old=values.expand(shape), generator=generator,
            )  # fmt: skip
        for _ in range(task.epochs):
            loss, _ = policy_loss(config, exp, logp(ids))
            if not config.critic_free:
                loss = loss + config.vf_coef * value_loss(config, exp, values.expand(shape))[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return run
