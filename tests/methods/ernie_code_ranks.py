# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks: python ernie_code_ranks.py FOLDER [STEP], after which the last rank is killed."""

import os
import sys
from pathlib import Path

import ranks
from test_ernie_code_training import OPTIMIZERS, optimizers, run

if __name__ == "__main__":
    kill = ranks.killed_after(*sys.argv[2:])
    for name in optimizers("ACCELERATE_USE_FSDP" in os.environ):
        run(Path(sys.argv[1]) / name, callback=kill, steps=3, **OPTIMIZERS[name])
    ranks.leave()
