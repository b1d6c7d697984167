# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks converting a tiny model: python dha_ranks.py FOLDER [kill STAGE STEP]."""

import os
import signal
import sys

import dha_models as tiny
import torch

import tenfold.dha  # noqa: F401
from tenfold.dha.conversion import convert


def main(folder, stage=None, step=0):
    torch.set_num_threads(1)

    def callback(progress):
        if progress.stage == stage and progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    made = convert(
        tiny.make(), 0.25, tiny.rows(), tiny.config(), work_dir=folder, callback=callback,
        eval_rows=tiny.rows(4, seed=9),
    )  # fmt: skip
    if torch.distributed.is_initialized():
        # All ranks hold the same model.
        total = torch.stack([p.double().sum() for p in made.parameters()])
        other = [torch.empty_like(total) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(other, total)
        assert all(torch.equal(total, o) for o in other)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *(sys.argv[2:3] or [None]), *(map(int, sys.argv[3:4])))
