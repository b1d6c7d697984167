# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks, one of them killed on the way, make the steps of one process: all of DualGPT, a classifier."""

import functools
from pathlib import Path

import pixelgpt_runs as runs
import pytest
import torch
from ranks import MODES
from test_pixelgpt_finetune import tuned

from tenfold.pixelgpt.classifier import PixelGPTForSequenceClassification
from tenfold.pixelgpt.model import PixelGPTForCausalLM
from tenfold.pixelgpt.pretraining import pretrain
from tenfold.pixelgpt.record import FineTuneRecord, PretrainRecord
from tenfold.testing import processes

HERE = Path(__file__).resolve().parent


def ranks(folder, what, mode):
    done = processes.ranks(HERE / "pixelgpt_ranks.py", folder, 0, what, env=MODES[mode])
    assert done.returncode == 0, done.stderr[-4000:]


def near(a, b):
    for name in a:
        assert abs(a[name] - b[name]) < 2e-3 * max(1.0, abs(b[name])), name


@functools.cache
def alone():
    """(model, record) of one process."""
    model = runs.model()
    held = runs.streams("dualgpt", held=True)
    return model, pretrain(model, runs.streams("dualgpt"), runs.config("dualgpt"), held_out=held)


@pytest.mark.parametrize("mode", MODES)
def test_pretraining(tmp_path, mode):
    killed = processes.ranks(HERE / "pixelgpt_ranks.py", tmp_path, 2, "pretrain", env=MODES[mode])
    assert killed.returncode and "killed" in killed.stdout, killed.stderr[-4000:]
    ranks(tmp_path, "pretrain", mode)
    model, want = alone()
    made = PretrainRecord.read(tmp_path / "record.json")
    assert len(made.curve) == len(want.curve)
    for a, b in zip(made.curve + made.validation, want.curve + want.validation):
        near(a, b)
    weights = PixelGPTForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, p in model.state_dict().items():
        torch.testing.assert_close(weights[name], p, atol=2e-3, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_finetuning(tmp_path, mode):
    ranks(tmp_path, "finetune", mode)
    model, want = tuned("pixel")
    made = FineTuneRecord.read(tmp_path / "record.json")
    for a, b in zip(made.validation, want.validation):
        near(a, b)
    assert made.best == want.best
    weights = PixelGPTForSequenceClassification.from_pretrained(tmp_path).state_dict()
    for name, p in model.state_dict().items():
        torch.testing.assert_close(weights[name], p, atol=2e-3, rtol=2e-2)
