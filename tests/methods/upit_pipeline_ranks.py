# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks: python upit_pipeline_ranks.py FOLDER."""

import sys

import torch
import upit_dense as dense
from ranks import leave
from test_upit_pipeline import RECIPE, data

from tenfold.upit.pipeline import Pipeline


def main(folder):
    run = Pipeline(RECIPE, folder, model=dense.llama(), data=data())
    found = run.run()
    assert list(found)[-1] == "report" and [run.mine(i) for i in range(3)].count(True) in (1, 2)
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
