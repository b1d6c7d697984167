"""Themis' objective: pair loss of the rewards plus the weighted next-token loss of the traces.

    L = rm_coef * L_RM + alpha * L_LM
    L_RM = (1/B) sum_i softplus(-(r_i+ - r_i-)) + center * (1/B) sum_i (r_i+ + r_i-)^2
    L_LM = sum_t w_t nll_t / sum_t w_t                                         token_mean
    L_LM = (1/2B) sum_rows sum_components w_c * mean of nll over the component  component_sum

w: 1 for tool calls and the end token, beta for observations, omega for rationales, and for the answers of preferred
rows 1 if ``lm_on_positive``. Components of a row: each tool call, each observation, the rationale; the end token and the
answer, which the paper's formula does not speak of, are components of their own, since nothing else would teach the
model to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tenfold.themis.config import ThemisConfig


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
        """Numbers to log: loss, loss/rm, loss/lm, loss/tool, ..., accuracy, margin."""
        raise NotImplementedError


def normaliser(batch: dict[str, Tensor], config: ThemisConfig) -> Normaliser:
    """Of one batch from :func:`tenfold.themis.collate.collate`."""
    raise NotImplementedError


def joint_loss(
    hidden: Tensor,
    batch: dict[str, Tensor],
    lm_head: Tensor,
    value_head: Tensor,
    config: ThemisConfig,
    *,
    normaliser: Normaliser | None = None,
) -> ThemisLoss:
    """The loss of a batch.

    Args:
        hidden: [2B, S, H] fp32/bf16/fp16, the trunk's final-norm output for ``batch["ids"]``; of a packed batch
            [1, N, H]. batch: from :func:`tenfold.themis.collate.collate`. lm_head: [V, H]. value_head: [H] or
            [1, H]. config: alpha, rm_coef, lm_reduce, center and pooling are read; beta, omega and lm_on_positive
            are in the batch's weights.
        normaliser: of the whole step; default: of this batch.

    Raises:
        ValueError: shapes; an odd number of rows.
    """
    raise NotImplementedError
