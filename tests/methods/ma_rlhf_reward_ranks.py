# SPDX-License-Identifier: Apache-2.0
"""A reward model for tests, and one of several gloo ranks training it: python ... FOLDER STOP_AT_STEP."""

import contextlib
import os
import sys

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


class Killed(Exception):
    pass


def main(folder, stop):
    def callback(progress):
        steps.append(progress.step)
        if progress.step == stop and len(steps) == stop:
            raise Killed

    steps = []
    # More pieces than one per rank, of unequal size.
    options = {"work_dir": folder, "callback": callback, "held_out": pairs(seed=2)}
    with contextlib.suppress(Killed):
        train_reward_model(model(), pairs(), config(micro_batch_size=3), **options)
    trained = model()
    record = train_reward_model(trained, pairs(), config(micro_batch_size=3), **options)
    assert steps == list(range(1, 7)), steps
    total = torch.stack([p.double().sum() for p in trained.parameters()])
    other = [torch.empty_like(total) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(other, total)
    assert all(torch.equal(total, o) for o in other)
    if torch.distributed.get_rank() == 0:
        torch.save(trained.state_dict(), os.path.join(folder, "model.pt"))
        record.write(os.path.join(folder, "record.json"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
