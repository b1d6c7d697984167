# SPDX-License-Identifier: Apache-2.0
"""Macro actions (MA-RLHF) in TRL's GRPO: advantages [B, T] instead of one number per completion.

    from trl import GRPOTrainer
    from tenfold.integrations.trl import MacroActions, MacroAdvantages

    class Trainer(MacroAdvantages, GRPOTrainer):
        def token_rewards(self, inputs, batch):  # optional: e.g. a verifier's scores at the ends of steps
            return my_step_scores(batch["completion_ids"])

    Trainer(model, reward_funcs, macro=MacroActions(n=5), macro_gamma=0.99, args=..., train_dataset=...)

Nothing of TRL is changed, and importing this module does not import it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold.integrations._hosts import check_version
from tenfold.integrations.macro_actions import MacroActions

__all__ = ["TESTED", "MacroActions", "MacroAdvantages"]

TESTED = ("1.12.0", "1.16.0")
_HOOK = "_generate_and_score_completions"


class MacroAdvantages:
    """To stand before ``GRPOTrainer`` among the bases of a class.

    GRPO's group-relative advantage of a completion becomes the reward of its last valid token; token rewards
    are added; advantages of the macro actions come from GAE with the values given, or 0. So with
    neither rewards nor values, and gamma = lambda = 1, training is GRPO's own, bit for bit. Tokens of tools
    (``tool_mask``) belong to no macro action and do not count in its discount.

    Args:
        macro: None is ``MacroActions()``.
        macro_gamma, macro_lam: of GAE, in [0, 1].
        allow_untested: accept TRL versions other than ``TESTED``.
        args, kwargs: as GRPOTrainer takes them.

    Raises:
        ImportError: TRL is missing or of an untested version. TypeError: no GRPOTrainer follows.
        ValueError: gamma or lambda out of range.
    """

    def __init__(
        self, *args: Any, macro: MacroActions | None = None, macro_gamma: float = 1.0,
        macro_lam: float = 1.0, allow_untested: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        check_version("trl", TESTED, allow_untested)
        if not hasattr(super(), _HOOK):
            raise TypeError(
                f"{type(self).__name__} must derive from (MacroAdvantages, trl.GRPOTrainer), in this order"
            )
        for name, value in {"macro_gamma": macro_gamma, "macro_lam": macro_lam}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {value}")
        self.macro, self.macro_gamma, self.macro_lam = (
            macro or MacroActions(),
            macro_gamma,
            macro_lam,
        )
        super().__init__(*args, **kwargs)

    def token_rewards(
        self, inputs: list[dict[str, Any]], batch: dict[str, Tensor]
    ) -> Tensor | None:
        """Rewards [B, T] of single tokens, in units of the group-relative advantage; None: there are none.

        Args:
            inputs: examples of the dataset, one per completion, of this process.
            batch: what TRL's loss gets, with ``completion_ids`` and ``completion_mask`` [B, T].
        """
        return None

    def token_values(self, inputs: list[dict[str, Any]], batch: dict[str, Tensor]) -> Tensor | None:
        """Values [B, T] of a critic of yours, before each token; None: 0. Arguments as above."""
        return None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = getattr(super(), _HOOK)(inputs)
        mask = batch["completion_mask"]
        if batch.get("tool_mask") is not None:
            mask = mask * batch["tool_mask"]
        with torch.no_grad():
            given = self.token_rewards(inputs, batch)
            values = self.token_values(inputs, batch)
        group = batch["advantages"]
        rewards = torch.zeros(mask.shape, dtype=group.dtype, device=mask.device)
        if given is not None:
            if given.shape != mask.shape:
                raise ValueError(
                    f"token_rewards must give [B, T] = {list(mask.shape)}; got {list(given.shape)}"
                )
            rewards = torch.where(mask != 0, given.to(rewards), 0)
        steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        last = ((mask != 0) * steps).argmax(1, keepdim=True)
        rewards.scatter_add_(1, last, group[:, None])
        values = torch.zeros_like(rewards) if values is None else values
        batch["advantages"], _ = self.macro.advantages(
            rewards, values, mask, self.macro_gamma, self.macro_lam
        )
        return batch
