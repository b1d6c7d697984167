# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks: python ma_rlhf_ranks.py FOLDER KIND,... [STEP], after which the last is killed."""

import os
import sys

import ma_rlhf_models as small
import torch
from ranks import agree, killed_after, leave

KINDS = {
    "own": {"batch_size": 12, "minibatches": 3, "ppo_epochs": 2, "micro_batch_size": 1, "termination": "random",
            "lengths": (1, 2, 3), "whiten_adv": "macro", "kl_controller": "adaptive"},
    # Of 4 rows some are dropped, and then a rank has none of a minibatch.
    "shared": {"batch_size": 4, "minibatches": 2, "min_response": 6, "agg": "seq_mean_token_mean",
               "bootstrap_truncated": True, "missing_eos_penalty": 0.5},
    "free": {"batch_size": 8, "minibatches": 2, "advantage": "rloo", "group_size": 4, "lora_rank": 2},
}  # fmt: skip


def make(kind, **kwargs):
    # Small rates: AdamW's update is the gradient's sign where that is nearly 0, and rounding decides it.
    changes = {"steps": 3, "learning_rate": 1e-4, "critic_learning_rate": 1e-4} | KINDS[kind]
    critic = "shared" if kind == "shared" else None
    return small.trainer(critic=critic, config=small.settings(**changes), sample_every=2, **kwargs)


def main(folder, kinds, step=None):
    for kind in kinds.split(","):
        trainer = make(kind, folder=os.path.join(folder, kind), callback=killed_after(step))
        trainer.train()
        if torch.distributed.is_initialized():
            agree(trainer.module)
        if trainer.accelerator.is_main_process:
            torch.save(small.weights(trainer.module), os.path.join(folder, f"{kind}.pt"))
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
