# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks: python upit_ranks.py FOLDER [STEP], after which the last rank is killed."""

import os
import sys

import ranks
import torch
import upit_mixtures as tiny

from tenfold.upit import PostTrainingConfig
from tenfold.upit.post_train import post_train


def settings(**changes):
    return PostTrainingConfig(**({"steps": 4, "batch_size": 4, "learning_rate": 2e-3, "aux_coef": 0.3,
                                  "checkpoint_every": 1} | changes))  # fmt: skip


def data():
    """Rows whose ranks have different numbers of tokens, for the loss and for the balance."""
    rows = {"input_ids": tiny.rows(16), "attention_mask": torch.ones(16, 12, dtype=torch.int64)}
    for i in range(16):
        rows["attention_mask"][i, 12 - i // 2 :] = 0
    return rows


def train(folder, callback=None):
    return post_train(tiny.mixtral(), data(), config=settings(), out=os.path.join(folder, "out"), callback=callback,
                      eval_rows=tiny.rows(4, seed=5))  # fmt: skip


def main(folder, step=None):
    made = train(folder, ranks.killed_after(step))
    ranks.agree(made.model)
    if torch.distributed.get_rank() == 0:
        torch.save(
            {"model": made.model.state_dict(), "result": made.to_json()},
            os.path.join(folder, "made.pt"),
        )
    ranks.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
