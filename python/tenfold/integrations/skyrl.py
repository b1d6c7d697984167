# SPDX-License-Identifier: Apache-2.0
"""Macro actions (MA-RLHF) as an advantage estimator of SkyRL, under a name of its own.

    # in your entry point, before the trainer is made
    from tenfold.integrations import skyrl
    skyrl.register(n=5, cfg=cfg)

    # trainer.algorithm.advantage_estimator=macro_gae  trainer.critic.model.path=...

SkyRL's registry carries it to its other processes, in which tenfold must be installed. Importing this module
imports and changes nothing of SkyRL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tenfold.integrations._hosts import check_version
from tenfold.integrations.macro_actions import MacroActions, Segment

__all__ = ["TESTED", "MacroActions", "MacroGAE", "register", "unregister"]

TESTED = ("0.3.0",)


@dataclass(frozen=True)
class MacroGAE:
    """An estimator as SkyRL calls it; with ``MacroActions(n=1)``, SkyRL's GAE.

    SkyRL's ``response_mask`` marks all of a response, which is padded on the left; tool output inside it, which
    only the loss mask tells, belongs to macro actions like other tokens.

    Attributes:
        macro: how responses are cut.
        whiten: by SkyRL's ``masked_whiten`` over the valid tokens of the batch, as its GAE does.
    """

    macro: MacroActions = field(default_factory=MacroActions)
    whiten: bool = True

    def __call__(
        self, token_level_rewards: Tensor, values: Tensor | None, response_mask: Tensor, gamma: float,
        lambd: float, **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Advantages and returns, float32 [B, R], 0 at padding.

        Raises:
            ValueError: no values (SkyRL runs without a critic), and see :meth:`MacroActions.advantages`.
        """
        if values is None:
            raise ValueError("macro actions need values; set trainer.critic.model.path")
        adv, ret = self.macro.advantages(token_level_rewards, values, response_mask, gamma, lambd)
        if self.whiten:
            from skyrl.backends.skyrl_train.utils.ppo_utils import masked_whiten

            adv = masked_whiten(adv, response_mask) * (response_mask != 0)
        return adv, ret


def register(
    name: str = "macro_gae", n: int | None = 5, *, segment: Segment | None = None,
    sigma: str = "equal", reward_reduce: str = "sum", discount: str = "per_macro",
    holes: str = "bridge", whiten: bool = True, cfg: Any = None, allow_untested: bool = False,
) -> MacroGAE:  # fmt: skip
    """Registers the estimator for ``trainer.algorithm.advantage_estimator=<name>``.

    Args:
        name: a new one. A built-in name could be replaced in one process only: SkyRL's other processes prefer
            their own built-ins.
        n, segment, sigma, reward_reduce, discount, holes: of :class:`MacroActions`. ``segment`` must be
            picklable.
        whiten: see :class:`MacroGAE`.
        cfg: SkyRL's configuration, to be checked for what SkyRL itself checks only for ``"gae"``.
        allow_untested: accept SkyRL versions other than ``TESTED``.

    Raises:
        ImportError: SkyRL is missing or of an untested version. ValueError: the name is taken, a setting,
            or ``cfg`` has no critic or step-wise trajectories. Nothing is changed then.
    """
    macro = MacroActions(n, segment, sigma, reward_reduce, discount, holes)
    if cfg is not None and cfg.generator.step_wise_trajectories:
        raise ValueError(
            "generator.step_wise_trajectories must be False: SkyRL then keeps one number per trajectory"
        )
    if cfg is not None and not cfg.trainer.critic.model.path:
        raise ValueError("trainer.critic.model.path must name a critic; got none")
    check_version("skyrl", TESTED, allow_untested)
    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry

    made = MacroGAE(macro, whiten)
    AdvantageEstimatorRegistry.register(name, made)
    return made


def unregister(name: str = "macro_gae") -> None:
    """Undoes :func:`register`. Raises ValueError if nothing, or a function of others, has that name."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry

    found = AdvantageEstimatorRegistry.get(name)
    if not isinstance(found, MacroGAE):
        raise ValueError(f"{name!r} is not an estimator of tenfold: {found!r}")
    AdvantageEstimatorRegistry.unregister(name)
