# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks: training loses a rank, goes on, and makes the steps of one process, whatever texts a rank has."""

import functools
from pathlib import Path

import pytest
import themis_models as tiny
from ranks import MODES
from themis_ranks import KINDS, train

from tenfold.testing import processes
from tenfold.themis.model import ThemisRewardModel
from tenfold.themis.training import ThemisRecord

HERE = Path(__file__).resolve().parent


@functools.cache
def trained(kind):
    """(model, record) of one process."""
    return train(kind)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_one_of_them_killed_on_the_way_agree_with_one_process(tmp_path, mode):
    killed = processes.ranks(HERE / "themis_ranks.py", tmp_path, "2", env=MODES[mode])
    assert killed.returncode and "killed" in killed.stdout, killed.stderr[-4000:]
    done = processes.ranks(HERE / "themis_ranks.py", tmp_path, env=MODES[mode])
    assert done.returncode == 0, done.stderr[-4000:]
    for kind in KINDS:
        alone, want = trained(kind)
        got = ThemisRecord.read(tmp_path / kind / "themis.json")
        pairs = [
            *zip(got.curve, want.curve),
            *zip(got.validation, want.validation),
            (got.before, want.before),
        ]
        assert len(pairs) == 3 + 2 + 1
        for one, other in pairs:
            assert one == pytest.approx(other, rel=2e-4, abs=1e-5)
        assert got.best["step"] == want.best["step"]
        assert tiny.close(ThemisRewardModel.from_pretrained(tmp_path / kind), alone, 1e-4)
