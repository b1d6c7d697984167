# SPDX-License-Identifier: Apache-2.0
"""MA-RLHF: PPO whose credit assignment is over macro actions (arXiv 2410.02743)."""

import importlib
from typing import Any

# Where each name lives; modules are loaded when a name of theirs is asked for.
_HOMES = {
    "best_of": ("BestOfN", "best_of_n", "expected_max", "rm_scores", "sample_answers"),
    "config": ("MARLHFConfig",),
    "critic": ("ActorCritic", "Critic"),
    "evaluate": (
        "Protocol",
        "WinRate",
        "compare_policies",
        "judge_pairs",
        "pass_at_k",
        "score_policy",
        "win_rate",
    ),
    "experience": ("Experience", "prepare", "response_mask"),
    "generation": ("hf_generate", "sampler"),
    "kl": ("AdaptiveKL", "FixedKL", "kl_controller"),
    "losses": ("policy_loss", "value_loss"),
    "preferences": (
        "Preference",
        "encode_preferences",
        "load_preferences",
        "packaged_preferences",
        "save_preferences",
    ),
    "programs": (
        "AssertTest",
        "CallTest",
        "ProgramReward",
        "StdioTest",
        "program_reward",
        "run_program",
    ),
    "record": ("PPORecord",),
    "report": ("write_report",),
    "reward_config": ("RewardConfig",),
    "reward_model": ("RewardModel",),
    "reward_training": ("RewardRecord", "score_pairs", "train_reward_model"),
    "rewards": ("ModelReward", "Rewards"),
    "segmenters": ("Segmenter", "make_segmenter"),
    "trainer": ("MAPPOTrainer",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.ma_rlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.ma_rlhf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
