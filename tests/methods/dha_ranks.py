# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks converting a tiny model: dha_ranks.py FOLDER [STAGE STEP]: the last is killed there."""

import sys

import dha_models as tiny
import ranks
import torch

import tenfold.dha  # noqa: F401
from tenfold.dha.conversion import convert


def main(folder, stage=None, step=None):
    torch.set_num_threads(1)
    made = convert(
        tiny.make(), 0.25, tiny.rows(), tiny.config(), work_dir=folder, callback=ranks.killed_after(step, stage),
        eval_rows=tiny.rows(4, seed=9),
    )  # fmt: skip
    if torch.distributed.is_initialized():
        ranks.agree(made)
        ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
