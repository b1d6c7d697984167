# SPDX-License-Identifier: Apache-2.0
"""The published hyperparameters (MA-RLHF, README table and run script), one entry per model size and data set.

``summarize`` is TL;DR, ``hh`` is HH-RLHF, ``webgpt`` is WebGPT comparisons, ``apps`` is APPS; the models are
Gemma 2B and 7B, Gemma-2 27B, and CodeGemma 2B and 7B for APPS.
"""

from __future__ import annotations

from typing import Any

Recipe = dict[str, Any]
NAMES = ("summarize-2b", "hh-2b", "webgpt-2b", "summarize-7b", "hh-7b", "webgpt-7b", "summarize-27b",
         "apps-2b", "apps-7b")  # fmt: skip


def ppo(name: str) -> Recipe:
    """Fields of ``MARLHFConfig`` for a published run."""
    data, size = name.rsplit("-", 1)
    base: Recipe = {
        "n": 5, "sigma": "equal", "batch_size": 256, "micro_batch_size": 1, "minibatches": 1, "ppo_epochs": 1,
        "gamma": 1.0, "lam": 0.95, "eps_lo": 0.2, "eps_hi": 0.2, "value_clip": 0.2, "score_clip": 2.5,
        "beta": 0.05, "max_prompt": 512, "max_response": 512, "temperature": 0.8, "top_p": 1.0, "top_k": 50,
        "schedule": "linear", "warmup": 200, "betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0,
        "mixed_precision": "fp16", "seed": 1234,
    }  # fmt: skip
    rates = {"2b": (1.5e-5, 1.5e-5), "7b": (1e-6, 1e-6), "27b": (7e-7, 1e-6)}
    base["learning_rate"], base["critic_learning_rate"] = rates[size]
    if name == "webgpt-7b" or size == "27b":
        base["beta"] = 0.1
    if size == "27b":
        base |= {"warmup": 0, "mixed_precision": "bf16"}  # fp16 overflows at this size
    if data == "apps":
        base |= {"n": 10, "batch_size": 16, "learning_rate": 5e-7, "critic_learning_rate": 5e-5,
                 "max_prompt": 600, "warmup": 20, "temperature": 1.0, "top_k": 5}  # fmt: skip
    return base


def reward_model(name: str) -> Recipe | None:
    """Of the reward model's training; None for APPS, which needs none."""
    data, size = name.rsplit("-", 1)
    if data == "apps":
        return None
    batch = {
        "2b": {"webgpt": 32},
        "7b": {"summarize": 128, "webgpt": 32},
        "27b": {"summarize": 128},
    }
    rate = {"2b": 2e-5 if data == "webgpt" else 1e-5, "7b": 1e-6, "27b": 8e-6}
    return {"batch_size": batch[size].get(data, 64), "epochs": 1, "learning_rate": rate[size],
            "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.1, "sequence_length": 1024}  # fmt: skip


def sft(name: str) -> Recipe:
    """Of supervised fine-tuning before it."""
    data, size = name.rsplit("-", 1)
    if data == "apps":
        made = {"batch_size": 16 if size == "2b" else 32, "epochs": 1,
                "learning_rate": 5e-6 if size == "2b" else 2e-6, "warmup": 0.0}  # fmt: skip
    elif size == "2b":
        web = data == "webgpt"
        made = {
            "batch_size": 64 if web else 512,
            "epochs": 3,
            "learning_rate": 1e-4 if web else 5e-5,
        }
    elif size == "7b":
        made = {"batch_size": 128, "epochs": 5 if data == "webgpt" else 1, "learning_rate": 2e-5}
    else:
        made = {"batch_size": 128, "epochs": 3, "learning_rate": 5e-6}
    return {"schedule": "cosine", "warmup": 0.1, "weight_decay": 0.01} | made
