# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks: python themis_ranks.py FOLDER [STEP], after which the last rank is killed."""

import os
import sys

import ranks
import themis_models as tiny
import torch

from tenfold.themis.config import ThemisConfig
from tenfold.themis.training import train_themis

FORMAT = tiny.format(256)
KINDS = {
    # Ranks have texts of unlike length, and more than one micro-batch, of unlike size.
    "full": {"micro_batch_size": 2},
    "lora": {"lora_rank": 2, "lora_dropout": 0.0, "lm_reduce": "component_sum", "packed": True},
}


def train(kind, out=None, callback=None):
    changes = {"steps": 3, "batch_size": 6, "max_length": 256, "learning_rate": 1e-3, "checkpoint_every": 1,
               "eval_every": 2, "obs_dropout": 0.3, "warmup": 0.0} | KINDS[kind]  # fmt: skip
    model = tiny.reward_model(tied=kind == "lora")
    record = train_themis(model, tiny.pairs(14, context=True), FORMAT, ThemisConfig(**changes), out=out,
                          validation=tiny.pairs(5, 1), callback=callback)  # fmt: skip
    return model, record


def main(folder, step=None):
    for kind in KINDS:
        model, _ = train(kind, os.path.join(folder, kind), ranks.killed_after(step))
        ranks.agree(model)
    ranks.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
