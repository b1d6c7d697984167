# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks: DDP through accelerate with new draws and a kill, FSDP2's DTensors."""

from pathlib import Path

import hft_models as tiny
import pytest
import torch

from tenfold import hft
from tenfold.hft.config import HFTConfig
from tenfold.testing import processes

HERE = Path(__file__).resolve().parent


def ranks(folder, *arguments):
    return processes.ranks(HERE / "hft_ranks.py", folder, *arguments)


def test_ddp_is_killed_resumes_and_agrees_with_one_process(tmp_path):
    killed = ranks(tmp_path, "ddp", "round-1", "2")
    assert killed.returncode != 0 and (tmp_path / "round-0.json").exists(), killed.stderr[-3000:]
    done = ranks(tmp_path, "ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    model = tiny.tiny(2)
    from hft_ranks import tasks

    config = HFTConfig.from_preset(
        "small", steps=4, batch_size=4, learning_rate=1e-2, reselect="steps:3"
    )
    record = hft.continual(model, tasks(), config)
    made = torch.load(tmp_path / "model.pt")
    for name, want in model.state_dict().items():
        torch.testing.assert_close(made[name], want, atol=2e-3, rtol=2e-2)
    again = hft.TuneRecord.read(tmp_path / "record.json")
    assert [p["digest"] for p in again.plans] == [p["digest"] for p in record.plans]


@pytest.mark.parametrize("what", ["fsdp2", "rewrap"])
def test_two_ranks(tmp_path, what):
    done = ranks(tmp_path, what)
    assert done.returncode == 0 and (tmp_path / "done").exists(), done.stderr[-4000:]
