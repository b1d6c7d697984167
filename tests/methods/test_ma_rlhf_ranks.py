# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks give what one process gives, with rows dropped, uneven shares and a kill on the way."""

import functools
from pathlib import Path
from types import SimpleNamespace

import ma_rlhf_models as small
import pytest
import torch
from ma_rlhf_ranks import KINDS, make
from ranks import MODES

from tenfold.ma_rlhf.record import PPORecord
from tenfold.ma_rlhf.trainer import _check_ranks
from tenfold.testing import processes

HERE = Path(__file__).resolve().parent


def ranks(mode, folder, *arguments):
    return processes.ranks(HERE / "ma_rlhf_ranks.py", folder, *arguments, env=MODES[mode])


@functools.cache
def trained(kind):
    """(trainer, record) of one process."""
    alone = make(kind)
    return alone, alone.train()


@pytest.fixture(scope="module", params=MODES)
def folder(request, tmp_path_factory):
    """What two ranks made, killed once on the way."""
    made, mode = tmp_path_factory.mktemp("ranks"), request.param
    killed = ranks(mode, made, "own", "2")
    assert killed.returncode != 0 and (made / "own" / "ppo-2").is_dir(), killed.stderr[-3000:]
    done = ranks(mode, made, ",".join(KINDS))
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_agree_with_one_process(folder, kind):
    alone, want = trained(kind)
    made = torch.load(folder / f"{kind}.pt")
    small.close(made, small.weights(alone.module), atol=2e-5, rtol=1e-3)
    got = PPORecord.read(folder / kind / "record.json")
    assert got.ranks == 2
    assert [s["segments"] for s in got.samples] == [s["segments"] for s in want.samples]
    for a, b in zip(got.curve, want.curve):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), name
    if kind == "shared":
        # Minibatches of one row: one rank worked on a row for nothing.
        assert any(0 < d < 4 for d in want.series("rows/dropped"))


def test_what_ranks_can_do():
    def of(ranks):
        return SimpleNamespace(num_processes=ranks)

    _check_ranks(small.settings(), of(4))
    with pytest.raises(
        ValueError, match="batch_size must be a multiple of the number of ranks, got 8 and 3"
    ):
        _check_ranks(small.settings(), of(3))
