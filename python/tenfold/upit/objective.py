# SPDX-License-Identifier: Apache-2.0
"""The objective of post-training as a module, so that DDP sees one forward: L_lm + c mean over layers of L_load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold import ops
from tenfold.upit.language import lm_loss
from tenfold.upit.mixture import MixtureLayer, Routing, routings
from tenfold.upit.options import PostTrainingConfig


def balance_loss(
    said: Sequence[Routing],
    layers: Sequence[MixtureLayer],
    mask: Tensor | None,
    norm: str,
    accelerator: Any = None,
) -> tuple[Tensor, Tensor]:
    """(mean over layers of L_load, shares of slots [L, n]) of what routers said of the tokens where mask is not 0.

    F, the share of slots, is that of all ranks; it has no gradient. So the mean over ranks of these losses is the
    loss of one process with all of their tokens.
    """
    counts = torch.stack([routing.counts(mask) for routing in said])
    scale: Tensor | float = 1.0
    if accelerator is not None and accelerator.num_processes > 1:
        tokens = mask.ne(0).sum() if mask is not None else counts.new_tensor(len(said[0].logits))
        both = torch.cat([counts.flatten(), tokens.reshape(1)]).double()
        both = accelerator.reduce(both, "sum")
        counts = both[:-1].view(counts.shape).round().int()
        # The op divides by this rank's tokens twice, for F and for the mean of P; all of them are meant.
        scale = (accelerator.num_processes * (tokens / both[-1].clamp_min(1)) ** 2).float()
    losses = [
        ops.load_balance_loss(routing.logits, own, mask, layer.top_k, norm)
        for routing, own, layer in zip(said, counts, layers)
    ]
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return torch.stack(losses).mean() * scale, shares


class MixtureLoss(nn.Module):
    """A causal LM whose forward gives its loss and what is worth knowing of it.

    Args:
        model: the LM. layers: its mixture layers, none for a dense one.

    Attributes:
        share: weight of the language model's loss among the ranks.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[MixtureLayer],
        config: PostTrainingConfig,
        accelerator: Any = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.layers, self.config, self.accelerator = list(layers), config, accelerator
        self.share = 1.0

    def _check(self, said: Sequence[Routing]) -> None:
        if len(said) != len(self.layers):
            raise RuntimeError(
                f"{len(said)} routers spoke in a forward of {len(self.layers)} mixture layers"
            )
        trained = any(p.requires_grad for layer in self.layers for p in layer.router.parameters())
        if torch.is_grad_enabled() and trained and not said[0].logits.requires_grad:
            raise RuntimeError(
                "the routers' logits have no gradient: gradient checkpointing must be the one without reentrance "
                "(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of rows; the metrics have no gradient."""
        with routings(self.layers) as said:
            lm = lm_loss(self.model, batch, self.config.fused_loss) * self.share
        metrics = {"lm_loss": lm.detach()}
        if not self.layers:
            return lm, metrics
        self._check(said)
        balance, shares = balance_loss(
            said, self.layers, batch.get("attention_mask"), self.config.lb_norm, self.accelerator
        )
        metrics["balance"] = balance.detach()
        metrics |= {f"load/{e}": share for e, share in enumerate(shares.float().mean(0))}
        return lm + self.config.aux_coef * balance, metrics
