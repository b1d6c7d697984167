# SPDX-License-Identifier: Apache-2.0
"""MA-RLHF: PPO whose credit assignment is over macro actions (arXiv 2410.02743)."""

import importlib
from typing import Any

# Where each name lives; modules are loaded when a name of theirs is asked for.
_HOMES = {
    "rlhf.best_of": ("BestOfN", "best_of_n", "expected_max", "rm_scores", "sample_answers"),
    "ma_rlhf.config": ("MARLHFConfig",),
    "ma_rlhf.critic": ("ActorCritic", "Critic"),
    "rlhf.evaluate": (
        "Protocol",
        "WinRate",
        "compare_policies",
        "judge_pairs",
        "pass_at_k",
        "score_policy",
        "win_rate",
    ),
    "ma_rlhf.experience": ("Experience", "prepare", "response_mask"),
    "rlhf.generation": ("hf_generate", "sampler"),
    "ma_rlhf.kl": ("AdaptiveKL", "FixedKL", "kl_controller"),
    "ma_rlhf.losses": ("policy_loss", "value_loss"),
    "rlhf.preferences": (
        "Preference",
        "encode_preferences",
        "load_preferences",
        "packaged_preferences",
        "save_preferences",
    ),
    "rlhf.programs": (
        "AssertTest",
        "CallTest",
        "ProgramReward",
        "StdioTest",
        "program_reward",
        "run_program",
    ),
    "ma_rlhf.record": ("PPORecord",),
    "ma_rlhf.report": ("write_report",),
    "rlhf.reward_config": ("RewardConfig",),
    "rlhf.reward_model": ("RewardModel",),
    "rlhf.reward_training": ("RewardRecord", "score_pairs", "train_reward_model"),
    "ma_rlhf.rewards": ("ModelReward", "Rewards"),
    "ma_rlhf.segmenters": ("Segmenter", "make_segmenter"),
    "ma_rlhf.trainer": ("MAPPOTrainer",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tenfold.ma_rlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tenfold.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
