# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks: tuning over DDP, experts side by side, and the numbers of one process."""

from pathlib import Path

import pytest
import torch
import upit_dense as dense
from ranks import MODES
from safetensors.torch import load_file
from test_upit_pipeline import RECIPE, data

from tenfold.testing import processes
from tenfold.upit.pipeline import Pipeline

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("mode", MODES)
def test_a_recipe_on_two_ranks(tmp_path, mode):
    done = processes.ranks(HERE / "upit_pipeline_ranks.py", tmp_path / "two", env=MODES[mode])
    assert done.returncode == 0, done.stderr[-4000:]
    want = Pipeline(RECIPE, tmp_path / "one", model=dense.llama(), data=data()).run("route")
    one, two = (
        load_file(tmp_path / n / "collect" / "checkpoint-8" / "model.safetensors")
        for n in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
    again = Pipeline(RECIPE, tmp_path / "two", model=dense.llama(), data=data()).run("route")
    assert again["expand"]["children"][0]["parents"] == want["expand"]["children"][0]["parents"]
    assert again["seeds"]["mean_nll"] == pytest.approx(want["seeds"]["mean_nll"], rel=1e-4)
    routers = [load_file(f["route"]["routers"])["routers"] for f in (again, want)]
    assert again["seeds"]["buckets"] == want["seeds"]["buckets"]
    torch.testing.assert_close(*routers, atol=1e-3, rtol=1e-2)
