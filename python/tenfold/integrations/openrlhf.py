# SPDX-License-Identifier: Apache-2.0
r"""Macro actions (MA-RLHF) in OpenRLHF's PPO: its GAE replaced by :class:`MacroActions`.

    # my_macro.py, on PYTHONPATH of the cluster
    from tenfold.integrations import openrlhf

    def setup():
        openrlhf.install_on_import(n=5)

    ray job submit --runtime-env-json '{"worker_process_setup_hook": "my_macro.setup"}' \
        -- python -m openrlhf.cli.train_ppo_ray --algo.advantage.estimator gae ...

OpenRLHF computes advantages in a Ray actor, so Ray's hook has to install there; it runs in all of Ray's workers,
and only the one that imports OpenRLHF's experience maker is changed.
Importing this module imports and changes nothing of OpenRLHF.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tenfold.integrations._hosts import Replacement, after_import, check_signature, check_version
from tenfold.integrations.macro_actions import MacroActions, Segment

__all__ = ["TESTED", "MacroActions", "install", "install_on_import"]

TESTED = ("0.11.2",)
_MODULE = "openrlhf.trainer.ppo_utils.experience_maker"
_ARGUMENTS = ("self", "values", "rewards", "action_mask", "gamma", "lambd")


def install(
    n: int | None = 5, *, segment: Segment | None = None, sigma: str = "equal",
    reward_reduce: str = "sum", discount: str = "per_macro", holes: str = "bridge",
    allow_untested: bool = False,
) -> Replacement:  # fmt: skip
    """Makes ``--algo.advantage.estimator gae`` of this process estimate over macro actions.

    Replaces ``RemoteExperienceMaker.get_advantages_and_returns``; OpenRLHF then whitens over the whole
    rollout, as it always does. With n = 1 results are OpenRLHF's own, except across holes of the action mask
    (tool output): OpenRLHF lets advantages decay there and sets the value to 0, tenfold skips them, as verl does.

    Args:
        n, segment, sigma, reward_reduce, discount, holes: of :class:`MacroActions`.
        allow_untested: accept OpenRLHF versions other than ``TESTED``.

    Returns:
        The replacement; ``remove()``, or using it as a context manager, restores OpenRLHF's GAE.

    Raises:
        ImportError: OpenRLHF is missing, of an untested version, or its method takes other arguments.
        RuntimeError: installed already. ValueError: a setting, by name. Nothing is changed then.
    """
    macro = MacroActions(n, segment, sigma, reward_reduce, discount, holes)
    check_version("openrlhf", TESTED, allow_untested)
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    def get_advantages_and_returns(
        self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        return macro.advantages(rewards, values, action_mask, gamma, lambd)

    original = RemoteExperienceMaker.get_advantages_and_returns
    check_signature("openrlhf", original, _ARGUMENTS)
    place = (RemoteExperienceMaker, "get_advantages_and_returns")
    return Replacement(get_advantages_and_returns, original, [place])


def install_on_import(*, allow_untested: bool = False, **settings: Any) -> None:
    """:func:`install`, with its settings, once this process imports OpenRLHF's experience maker.

    So nothing of OpenRLHF, and no DeepSpeed, is imported into workers that do not need it (vLLM's).

    Raises:
        ImportError: OpenRLHF is missing or of an untested version; at its import, another signature.
        ValueError, TypeError: a setting, by name.
    """
    MacroActions(**settings)
    check_version("openrlhf", TESTED, allow_untested)
    after_import(_MODULE, partial(install, allow_untested=allow_untested, **settings))
