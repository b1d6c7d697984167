"""Two gloo ranks: post-training over DDP stops, goes on, and makes the steps of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import upit_mixtures as tiny

from tenfold.upit.post_train import post_train

HERE = Path(__file__).resolve().parent


def test_two_ranks_stop_resume_and_agree_with_one_process(tmp_path):
    from upit_ranks import data, settings

    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               str(HERE / "upit_ranks.py"), str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("stopped") == 2, done.stderr[-4000:]
    found = torch.load(tmp_path / "made.pt")
    model = tiny.mixtral()
    alone = post_train(model, data(), config=settings(), eval_rows=tiny.rows(4, seed=5))
    for one, other in zip(found["result"]["curve"], alone.curve, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), name
    assert found["result"]["losses"]["after"] == pytest.approx(alone.losses["after"], rel=1e-3)
    for name, want in model.state_dict().items():
        torch.testing.assert_close(found["model"][name], want, atol=1e-3, rtol=1e-2)
