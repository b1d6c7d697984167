# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks: post-training over DDP and FSDP2 loses a rank, goes on, and makes the steps of one process."""

import functools
from pathlib import Path

import pytest
import torch
import upit_mixtures as tiny
from ranks import MODES

from tenfold.testing import processes
from tenfold.upit.post_train import post_train

HERE = Path(__file__).resolve().parent


@functools.cache
def trained():
    """(model, what was made) of one process."""
    from upit_ranks import data, settings

    model = tiny.mixtral()
    return model, post_train(model, data(), config=settings(), eval_rows=tiny.rows(4, seed=5))


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_one_of_them_killed_on_the_way_agree_with_one_process(tmp_path, mode):
    killed = processes.ranks(HERE / "upit_ranks.py", tmp_path, "2", env=MODES[mode])
    assert killed.returncode and "killed" in killed.stdout, killed.stderr[-4000:]
    done = processes.ranks(HERE / "upit_ranks.py", tmp_path, env=MODES[mode])
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "made.pt")
    model, alone = trained()
    for one, other in zip(found["result"]["curve"], alone.curve, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), name
    assert found["result"]["losses"]["after"] == pytest.approx(alone.losses["after"], rel=1e-3)
    for name, want in model.state_dict().items():
        torch.testing.assert_close(found["model"][name], want, atol=1e-3, rtol=1e-2)
