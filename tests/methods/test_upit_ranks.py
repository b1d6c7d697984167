"""Two gloo ranks: post-training over DDP is killed, resumes, and makes the steps of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import upit_mixtures as tiny

from tenfold.upit.post_train import post_train

HERE = Path(__file__).resolve().parent


def ranks(folder, *arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               str(HERE / "upit_ranks.py"), str(folder), *arguments]  # fmt: skip
    return subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)


def test_two_ranks_are_killed_resume_and_agree_with_one_process(tmp_path):
    from upit_ranks import data, settings

    killed = ranks(tmp_path, "2")
    assert killed.returncode != 0 and not (tmp_path / "made.pt").exists(), killed.stderr[-3000:]
    done = ranks(tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "made.pt")
    model = tiny.mixtral()
    alone = post_train(model, data(), config=settings(), eval_rows=tiny.rows(4, seed=5))
    for one, other in zip(found["result"]["curve"], alone.curve, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), name
    assert found["result"]["losses"]["after"] == pytest.approx(alone.losses["after"], rel=1e-3)
    for name, want in model.state_dict().items():
        torch.testing.assert_close(found["model"][name], want, atol=1e-3, rtol=1e-2)
