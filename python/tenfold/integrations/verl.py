# SPDX-License-Identifier: Apache-2.0
"""Macro actions (MA-RLHF) in verl's PPO: its GAE replaced by :class:`MacroActions`.

    # my_macro.py, on PYTHONPATH
    from tenfold.integrations import verl
    verl.install(n=5)

    VERL_USE_EXTERNAL_MODULES=my_macro python -m verl.trainer.main_ppo algorithm.adv_estimator=gae ...

verl imports the modules of that variable in every process of its own, also in the Ray actor that computes
advantages. ``gae`` is *replaced* because verl hands values to no other estimator, and makes a critic for no other.
Importing this module imports and changes nothing of verl.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tenfold.integrations._hosts import Replacement, check_signature, check_version
from tenfold.integrations.macro_actions import MacroActions, Segment

__all__ = ["TESTED", "MacroActions", "estimator", "install"]

TESTED = ("0.9.1",)
_ARGUMENTS = ("token_level_rewards", "values", "response_mask", "gamma", "lam")


def estimator(macro: MacroActions | None = None, *, whiten: bool = True) -> Callable:
    """A function with the signature and the conventions of verl's ``compute_gae_advantage_return``.

    It takes ``token_level_rewards, values, response_mask`` [B, R] and the numbers ``gamma, lam``, and gives
    advantages and returns, float32 [B, R], as verl's own for ``MacroActions(n=1)`` but for masked tokens,
    which are 0. ``response_mask`` may have holes (tool output); rewards on them are dropped, as verl does.

    Args:
        macro: None is ``MacroActions()``.
        whiten: by verl's ``masked_whiten`` over the valid tokens of the batch, as verl's GAE does; the
            reference code of MA-RLHF does not.

    Raises:
        ValueError (when called): see :meth:`MacroActions.advantages`; from verl, fewer than two valid tokens.
    """
    macro = macro or MacroActions()

    def compute_gae_advantage_return(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        adv, ret = macro.advantages(token_level_rewards, values, response_mask, gamma, lam)
        if whiten:
            from verl.utils.torch_functional import masked_whiten

            adv = masked_whiten(adv, response_mask) * (response_mask != 0)
        return adv, ret

    return compute_gae_advantage_return


def install(
    n: int | None = 5, *, segment: Segment | None = None, sigma: str = "equal",
    reward_reduce: str = "sum", discount: str = "per_macro", holes: str = "bridge", whiten: bool = True,
    allow_untested: bool = False,
) -> Replacement:  # fmt: skip
    """Makes ``algorithm.adv_estimator=gae`` of this process estimate over macro actions.

    Args:
        n, segment, sigma, reward_reduce, discount, holes: of :class:`MacroActions`.
        whiten: see :func:`estimator`.
        allow_untested: accept verl versions other than ``TESTED``.

    Returns:
        The replacement; ``remove()``, or using it as a context manager, restores verl's GAE.

    Raises:
        ImportError: verl is missing, of an untested version, or its function takes other arguments.
        RuntimeError: installed already. ValueError: a setting, by name. Nothing is changed then.
    """
    macro = MacroActions(n, segment, sigma, reward_reduce, discount, holes)
    check_version("verl", TESTED, allow_untested)
    from verl.trainer.ppo import core_algos

    registry = core_algos.ADV_ESTIMATOR_REGISTRY
    original = registry["gae"]
    check_signature("verl", original, _ARGUMENTS)
    # verl's own trainers call the module's function, others look "gae" up.
    return Replacement(
        estimator(macro, whiten=whiten), original,
        [(core_algos, "compute_gae_advantage_return"), (registry, "gae")],
    )  # fmt: skip
