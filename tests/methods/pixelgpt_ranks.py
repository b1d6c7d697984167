# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks, or a process that kills itself: python pixelgpt_ranks.py FOLDER [STEP] [finetune]."""

import os
import signal
import sys

import pixelgpt_runs as runs
import torch

from tenfold.pixelgpt.pretraining import pretrain


def agree(model):
    total = torch.stack([p.double().sum() for p in model.parameters()])
    other = [torch.empty_like(total) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(other, total)
    assert all(torch.equal(total, o) for o in other)


def main(folder, step="0", what="pretrain"):
    def callback(progress):
        if progress.step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "finetune":
        from test_pixelgpt_finetune import tuned

        model, record = tuned("pixel", out=folder, callback=callback)
    else:
        model = runs.model()
        settings = runs.config("dualgpt", checkpoint_every=2)
        held = runs.streams("dualgpt", held=True) if "WORLD_SIZE" in os.environ else None
        record = pretrain(model, runs.streams("dualgpt"), settings, held_out=held, out=folder,
                          callback=callback)  # fmt: skip
    if torch.distributed.is_initialized():
        agree(model)
        if torch.distributed.get_rank() == 0:
            record.write(os.path.join(folder, "record.json"))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(*sys.argv[1:])
