# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks: python pixelgpt_ranks.py FOLDER [STEP] [finetune], after which the last is killed."""

import os
import sys

import pixelgpt_runs as runs
import torch
from ranks import agree, killed_after, leave

from tenfold.pixelgpt.pretraining import pretrain


def main(folder, step="0", what="pretrain"):
    callback = killed_after(step)
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
    leave()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(*sys.argv[1:])
