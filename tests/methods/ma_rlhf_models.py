# SPDX-License-Identifier: Apache-2.0
"""Tiny byte-level policies, rewards and trainers for the tests of MA-RLHF's trainer."""

import torch

from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.trainer import MAPPOTrainer
from tenfold.rlhf.small import ByteTokenizer, make_policy

ENDS = (3, *range(200, 220))
TOKENIZER = ByteTokenizer()
PROMPTS = ["Tell me.", "a", "What is this about?", "Once upon a time", "No.", "and so"]


class Killed(Exception):
    pass


def kill_at(step):
    def told(progress):
        if progress.step == step:
            raise Killed

    return told


def tiny(seed=0, layers=1, **changes):
    """A policy of 10k parameters that many tokens end, so that responses have many lengths."""
    policy = make_policy(seed, layers, heads=2, head_dim=8, **changes)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter *= 3  # sharper than a random start: probabilities differ between states
    policy.generation_config.eos_token_id = list(ENDS)
    return policy


def vowels(completions, **columns):
    """TRL's style: the share of vowels, of bytes up to 127 and so of everything that decodes."""
    return [sum(c in "aeiouAEIOU" for c in text) / 4 for text in completions]


def low_bytes(completion_ids, **columns):
    """The share of tokens below 128."""
    return [sum(i < 128 for i in ids) / max(1, len(ids)) for ids in completion_ids]


def settings(**changes):
    return MARLHFConfig.from_preset("small", **({
        "steps": 4, "batch_size": 8, "max_response": 12, "learning_rate": 3e-3,
        "critic_learning_rate": 3e-3, "checkpoint_every": 1, "n": 3, "schedule": "constant",
    } | changes))  # fmt: skip


def trainer(policy=None, critic=None, *, reward=low_bytes, prompts=PROMPTS, config=None, **kwargs):
    names = ("ref", "reward_weights", "generate", "segmenter", "parser", "callback_starts", "folder",
             "callback", "quiet", "samples", "sample_every", "tokenizer")  # fmt: skip
    own = {k: kwargs.pop(k) for k in names if k in kwargs}
    return MAPPOTrainer(
        tiny() if policy is None else policy, critic, reward=reward, prompts=prompts,
        config=config or settings(**kwargs), **({"tokenizer": TOKENIZER} | own),
    )  # fmt: skip


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def close(a, b, atol=2e-5, rtol=1e-3):
    for n in a:
        torch.testing.assert_close(a[n], b[n], atol=atol, rtol=rtol, msg=lambda m, n=n: f"{n}: {m}")
