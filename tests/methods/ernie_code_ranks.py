# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks: python ernie_code_ranks.py FOLDER."""

import sys
from pathlib import Path

import torch.distributed as dist
from test_ernie_code_training import run

if __name__ == "__main__":
    run(Path(sys.argv[1]) / "out", steps=3)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
