# SPDX-License-Identifier: Apache-2.0
"""Themis' objective: pair loss of the rewards plus the weighted next-token loss of the traces.

    L = rm_coef * L_RM + alpha * L_LM
    L_RM = (1/B) sum_i softplus(-(r_i+ - r_i-)) + center * (1/B) sum_i (r_i+ + r_i-)^2
    L_LM = sum_t w_t nll_t / sum_t w_t                                         token_mean
    L_LM = (1/2B) sum_rows sum_components w_c * mean of nll over the component  component_sum

w: 1 for tool calls and the end token, beta for observations, omega for rationales, and for the answers of preferred
rows 1 if ``lm_on_positive``. Components of a row: each tool call, each observation, the rationale; the end token and
the answer, which the paper's formula does not speak of, are components of their own, since nothing else would teach
the model to stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenfold import ops
from tenfold.themis.trace_types import ANSWER, EOS, IGNORE, OBSERVATION, RATIONALE, TOOL
from tenfold.training.checks import one_of

if TYPE_CHECKING:
    from tenfold.themis.config import ThemisConfig

CLASS_NAMES = {
    ANSWER: "answer",
    TOOL: "tool",
    OBSERVATION: "observation",
    RATIONALE: "rationale",
    EOS: "eos",
}


@dataclass(frozen=True)
class Normaliser:
    """What sums are divided by: of all micro-batches and ranks of a step together, so that rows count equally.

    ``weight``: sum of the target weights (token_mean) or the number of rows (component_sum). ``pairs``: B.
    Add those of the parts (``a + b``), over ranks too, and give the sum to :func:`joint_loss` of every part: the
    losses of the parts then add up to the loss of the whole. Where gradients are averaged over ranks (DDP), multiply
    the loss by the number of ranks.
    """

    weight: float
    pairs: float

    def __add__(self, other: Normaliser) -> Normaliser:
        return Normaliser(self.weight + other.weight, self.pairs + other.pairs)

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], config: ThemisConfig) -> Normaliser:
        """Of one batch from :func:`tenfold.themis.collate.collate`."""
        rows = len(batch["is_pos"])
        if config.lm_reduce == "component_sum":
            return cls(float(rows), rows / 2)
        return cls(float(target_weights(batch).sum(dtype=torch.float64)), rows / 2)


@dataclass(frozen=True)
class ThemisLoss:
    """The loss of a batch and its parts.

    ``loss``, ``rm``, ``lm``: scalars fp32; ``loss = rm_coef * rm + alpha * lm``. ``rewards`` [2B], ``delta`` [B] fp32.
    ``nll_sum``, ``nll_count`` [6]: by class of the targets with a weight, float64, without gradient; divide to get
    the mean. ``correct``: pairs with delta > 0.
    """

    loss: Tensor
    rm: Tensor
    lm: Tensor
    rewards: Tensor
    delta: Tensor
    nll_sum: Tensor
    nll_count: Tensor
    correct: Tensor

    def metrics(self) -> dict[str, float]:
        """``loss``, ``loss/rm``, ``loss/lm``, ``loss/tool`` and so on, ``accuracy``, ``margin``.

        Only classes that count have a loss.
        """
        scalars = torch.stack([self.loss, self.rm, self.lm]).detach().tolist()
        made = dict(zip(("loss", "loss/rm", "loss/lm"), scalars))
        sums, counts = self.nll_sum.tolist(), self.nll_count.tolist()
        made |= {
            f"loss/{name}": sums[i] / counts[i] for i, name in CLASS_NAMES.items() if counts[i]
        }
        return made | {"accuracy": float(self.correct) / len(self.delta),
                       "margin": float(self.delta.detach().mean())}  # fmt: skip


def target_weights(batch: Mapping[str, Tensor]) -> Tensor:
    """Weights of the tokens as targets, as in ``batch`` but 0 for the first column, which nothing predicts."""
    weights = batch["weights"].clone()
    weights[:, :1] = 0
    return weights


def component_weights(batch: Mapping[str, Tensor]) -> Tensor:
    """Weights for which ``sum(w nll)`` is the sum over rows of the components' means, times beta and so on.

    A component is a run of tokens of one class: the answer, a call up to its ``<start_observation>``, an observation,
    the end. The rationale's begins with ``<start_work>``, whose own weight stays that of calls: alone it would weigh
    as much as a whole call.
    """
    weights = target_weights(batch)
    kind = torch.where(batch["mask"], batch["cls"], IGNORE)
    before_work = (kind[:, :-1] == TOOL) & (kind[:, 1:] == RATIONALE)
    kind[:, :-1].masked_fill_(before_work, RATIONALE)
    # Rows begin with tokens that are ignored, so that no run goes on from row to row, packed or not.
    begins = torch.ones_like(batch["mask"])
    begins[:, 1:] = kind[:, 1:] != kind[:, :-1]
    run = begins.flatten().cumsum(0) - 1
    return weights / torch.bincount(run)[run].view(weights.shape)


def rewards(
    hidden: Tensor, batch: Mapping[str, Tensor], value_head: Tensor, pooling: str = "last"
) -> Tensor:
    """Rewards [2B] fp32 of a batch, padded or packed; arguments as of :func:`joint_loss`."""
    head = value_head.flatten()
    if "offsets" not in batch:
        return ops.last_token_reward(hidden, batch["mask"], head, pooling)
    ends = batch["offsets"][1:]
    if pooling == "last":
        last = hidden[0, ends - 1][:, None]
        return ops.last_token_reward(last, torch.ones_like(last[..., 0], dtype=torch.bool), head)
    # The mean commutes with the head: one number per token, and the means of these.
    ones = torch.ones(hidden.shape[1], 1, dtype=torch.bool, device=hidden.device)
    values = ops.last_token_reward(hidden[0][:, None], ones, head)
    return torch.segment_reduce(values, "mean", lengths=batch["offsets"].diff())


def joint_loss(
    hidden: Tensor,
    batch: Mapping[str, Tensor],
    lm_head: Tensor | None,
    value_head: Tensor,
    config: ThemisConfig,
    *,
    normaliser: Normaliser | None = None,
) -> ThemisLoss:
    """The loss of a batch.

    Args:
        hidden: [2B, S, H] fp32/bf16/fp16, the trunk's final-norm output for ``batch["ids"]``; of a packed batch
            [1, N, H]. batch: from :func:`tenfold.themis.collate.collate`. lm_head: [V, H]; not read, and may be None,
            where alpha is 0. value_head: [H] or [1, H]. config: alpha, rm_coef, lm_reduce, center and pooling are
            read; beta, omega and lm_on_positive are in the batch's weights.
        normaliser: of the whole step; default: of this batch.

    Raises:
        ValueError: shapes; an odd number of rows, or none.
    """
    one_of("lm_reduce", config.lm_reduce, ("token_mean", "component_sum"))
    count = len(batch["is_pos"])
    if count == 0 or count % 2:
        raise ValueError(f"a batch has as many preferred as rejected rows, got {count} rows")
    if hidden.ndim != 3 or hidden.shape[:2] != batch["ids"].shape:
        raise ValueError(
            f"hidden must be {[*batch['ids'].shape, 'H']} as the batch's ids, got {list(hidden.shape)}"
        )
    over = normaliser or Normaliser.of(batch, config)
    scores = rewards(hidden, batch, value_head, config.pooling)
    rm, delta = ops.pairwise_logsigmoid(
        scores[: count // 2], scores[count // 2 :], None, config.center
    )
    rm = rm * (count / 2 / over.pairs)
    sums = torch.zeros(2, len(CLASS_NAMES) + 1, dtype=torch.float64, device=hidden.device)
    lm = rm.new_zeros(())
    if config.alpha > 0:
        if lm_head is None:
            raise ValueError(f"lm_head is needed where alpha is {config.alpha}")
        weights = (
            component_weights(batch)
            if config.lm_reduce == "component_sum"
            else target_weights(batch)
        )
        # Token t predicts token t + 1. The first token of a row has weight 0, so nothing crosses rows.
        targets, by = (x.flatten().roll(-1) for x in (batch["ids"], weights))
        total, _, nll = ops.weighted_linear_ce(hidden.flatten(0, 1), lm_head, targets, by)
        lm = total / over.weight if over.weight else total
        with torch.no_grad():
            kinds = batch["cls"].flatten().roll(-1).long() * (by != 0)
            sums[0].index_add_(0, kinds, nll.double())
            sums[1].index_add_(0, kinds, (by != 0).double())
    return ThemisLoss(
        config.rm_coef * rm + config.alpha * lm, rm, lm, scores, delta, sums[0], sums[1],
        (delta > 0).sum(),
    )  # fmt: skip
