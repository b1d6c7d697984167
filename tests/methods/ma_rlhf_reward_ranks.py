# SPDX-License-Identifier: Apache-2.0
"""A reward model for tests, and one of several gloo ranks training it: ... FOLDER [STEP], where the last is killed."""

import os
import sys

import ranks
import torch

from tenfold.rlhf.reward_config import RewardConfig
from tenfold.rlhf.reward_model import RewardModel
from tenfold.rlhf.reward_training import train_reward_model
from tenfold.rlhf.small import make_policy


def model(seed=0):
    return RewardModel.from_model(make_policy(seed, layers=1, heads=2, head_dim=8), seed=seed)


def config(**changes):
    return RewardConfig(**({"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 1,
                            "weight_decay": 0.01} | changes))  # fmt: skip


def pairs(count=32, length=10, seed=1):
    """Chosen answers have more small bytes; lengths differ, padding holds anything."""
    made = torch.Generator().manual_seed(seed)
    rows = {}
    for name, low, high in (("", 10, 120), ("rejected_", 100, 250)):
        rows[f"{name}input_ids"] = torch.randint(low, high, (count, length), generator=made)
        lengths = torch.randint(4, length + 1, (count, 1), generator=made)
        rows[f"{name}attention_mask"] = (torch.arange(length) < lengths).long()
    for name in ("", "rejected_"):
        rows[f"{name}input_ids"][:, :2] = 65  # the prompt
    return rows


def main(folder, step=None):
    # More pieces than one per rank, of unequal size.
    trained = model()
    record = train_reward_model(
        trained, pairs(), config(micro_batch_size=3), work_dir=folder, callback=ranks.killed_after(step),
        held_out=pairs(seed=2),
    )  # fmt: skip
    ranks.agree(trained)
    if torch.distributed.get_rank() == 0:
        torch.save(trained.state_dict(), os.path.join(folder, "model.pt"))
        record.write(os.path.join(folder, "record.json"))
    ranks.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
