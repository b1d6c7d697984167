# SPDX-License-Identifier: Apache-2.0
"""The demo of ERNIE-Music at the size of a toy: its line, its tables, its page, and what the speed-up compares."""

import dataclasses

import pytest
import torch
from ernie_music_models import TINY, unet

from tenfold.ernie_music import blocks, demo, speed
from tenfold.report import Page


@pytest.fixture(scope="module")
def found():
    """A demo of two steps."""
    few = {"clips": 8, "test_clips": 4, "seconds": 0.5, "scores": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "RECIPE", dataclasses.replace(demo.RECIPE, **few))
        small = {k: TINY[k] for k in ("widths", "attn_levels", "layers_per_level")}
        patch.setattr(demo, "MODEL", demo.MODEL | small | {"sample_size": 256})
        patch.setattr(demo, "TRAIN", demo.TRAIN | {"steps": 2, "batch_size": 2, "log_every": 1})
        for name, value in {"PROMPTS": 4, "SAMPLING": 2, "JUDGE_STEPS": 4, "TELL": 1}.items():
            patch.setattr(demo, name, value)
        said: list[str] = []
        made = demo.run_demo(said.append, seed=3)
    assert len(said) == demo.STEPS - demo.TRAIN_STEPS // demo.TELL + 2
    assert made.run.record.config["seed"] == 3
    return made


def test_headline_is_what_was_found(found):
    best = found.run.evaluations[found.run.best]
    line = demo.headline(found)
    for name, share in best.accuracy.items():
        assert f"{name} {100 * share:.0f} %" in line.result
    assert "8 clips" in line.ran and line.speed is found.fused
    other = dataclasses.replace(best, accuracy=dict.fromkeys(best.accuracy, 0.125))
    run = dataclasses.replace(found.run, evaluations={1.0: other})
    assert demo.headline(dataclasses.replace(found, run=run)).result.count("12 %") == 3


def test_tables_and_page(found):
    sounds, net, fused = demo.tables(found)
    assert [r[0] for r in sounds.rows] == ["1", "3", "other prompts", "real audio"]
    assert [r[0] for r in net.rows] == ["forward", "training step"]
    assert fused.rows[0][2] == f"{found.fused.ratio:.2f}"
    assert all(len(r) == len(t.columns) for t in (sounds, net, fused) for r in t.rows)
    page = Page("t")
    demo.add_demo_section(found, page)
    text = page.render()
    assert "<audio" in text and f"{found.fused.ratio:.2f}" in text


def test_speed_up_is_of_equal_results(found, monkeypatch):
    assert 0 < found.apart < 1e-3 and found.fused.ratio > 0
    net, z = unet(fuse="none"), torch.randn(2, 1, 128)
    call = (z, torch.rand(2), None, None)
    before = net(*call).sample
    assert speed.fused(net, *call)[1] < 1e-3
    assert torch.equal(net(*call).sample, before)
    # What computes something else is seen.
    from tenfold.ernie_music import plain

    monkeypatch.setattr(plain, "fir_down2", lambda x: x[..., ::2])
    assert speed.fused(net, *call)[1] > 1e-2
    assert all("watched" not in vars(m) for m in net.modules() if isinstance(m, blocks.Fused))
