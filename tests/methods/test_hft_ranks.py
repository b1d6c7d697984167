# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks: DDP and FSDP2 through the loop with new draws and a kill, FSDP2's DTensors."""

import functools
from pathlib import Path

import hft_models as tiny
import pytest
import torch
from ranks import MODES

from tenfold import hft
from tenfold.hft.config import HFTConfig
from tenfold.testing import processes

HERE = Path(__file__).resolve().parent


def ranks(folder, *arguments, mode="ddp"):
    return processes.ranks(HERE / "hft_ranks.py", folder, *arguments, env=MODES[mode])


@functools.cache
def alone():
    """(model, record) of one process."""
    model = tiny.tiny(2)
    from hft_ranks import tasks

    config = HFTConfig.from_preset(
        "small", steps=4, batch_size=4, learning_rate=1e-2, reselect="steps:3"
    )
    return model, hft.continual(model, tasks(), config)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_are_killed_resume_and_agree_with_one_process(tmp_path, mode):
    killed = ranks(tmp_path, "continual", "round-1", "2", mode=mode)
    assert killed.returncode != 0 and (tmp_path / "round-0.json").exists(), killed.stderr[-3000:]
    done = ranks(tmp_path, "continual", mode=mode)
    assert done.returncode == 0, done.stderr[-3000:]
    model, record = alone()
    made = torch.load(tmp_path / "model.pt")
    for name, want in model.state_dict().items():
        torch.testing.assert_close(made[name], want, atol=2e-3, rtol=2e-2)
    again = hft.TuneRecord.read(tmp_path / "record.json")
    assert [p["digest"] for p in again.plans] == [p["digest"] for p in record.plans]


def test_other_kinds_in_shards(tmp_path):
    """SFT by a penalty and by drawn layers, DPO with a reference and with LoRA, of one process and of shards."""
    done = ranks(tmp_path, "kinds", mode="fsdp2")
    assert done.returncode == 0, done.stderr[-3000:]
    from hft_ranks import KINDS, kind

    for name in KINDS:
        model, record = kind(name)
        made, losses = torch.load(tmp_path / f"{name}.pt")
        assert losses == pytest.approx([m["loss"] for m in record.curves["round-0"]], rel=1e-3), (
            name
        )
        for key, want in model.state_dict().items():
            torch.testing.assert_close(made[key], want, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("what", ["fsdp2", "rewrap"])
def test_two_ranks(tmp_path, what):
    done = ranks(tmp_path, what)
    assert done.returncode == 0 and (tmp_path / "done").exists(), done.stderr[-4000:]
