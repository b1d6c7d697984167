# SPDX-License-Identifier: Apache-2.0
"""``tenfold demo ma-rlhf``: its line, tables and page, a comparison with a loop, a parent that is trained once."""

import copy

import pytest
import torch
from demo_cases import check_protocol, rendered

from tenfold import ops
from tenfold.ma_rlhf import demo


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs of a few steps, and what they said."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENFOLD_HOME", str(tmp_path_factory.mktemp("home")))
        few = {
            "PARENT_STEPS": 10,
            "LAYERS": 1,
            "HEADS": 1,
            "ASKED": 4,
            "RESPONSE": 12,
            "PUBLISHED": (8, 16),
        }
        for name, value in few.items():
            patch.setattr(demo, name, value)
        patch.setattr(
            demo, "SETTINGS", demo.SETTINGS | {"steps": 2, "batch_size": 4, "max_response": 12}
        )
        for seed in (0, 1):
            told = []
            said.append((demo.run_demo(told.append, seed), told))
    return said


def test_runs(made):
    (first, told), (second, again) = made
    runs = len(demo.MACRO) * (2 + 1) + 2
    assert len(told) == 10 // demo.TELL + runs
    assert len(again) == runs  # the parent came from the cache
    assert (
        demo.PARENT_STEPS // demo.TELL + len(demo.MACRO) * (demo.SETTINGS["steps"] + 1) + 2
        == demo.STEPS
    )
    assert first.setting.split("steps")[0] == second.setting.split("steps")[0]
    assert first.asked != second.asked
    assert [r.config["seed"] for r in second.records] == [1, 1]
    line, _ = check_protocol(demo, first)
    assert line.ran == f"{first.model}, 2 × 2 rollouts of 4"


def test_the_op_and_the_loop_agree(made):
    for row in made[0][0].speed:
        assert row["gap"] < 1e-4, row
    assert made[0][0].speed[0]["rollout"] == "the next one of this run, 4 x 12"


def test_another_result_shows(monkeypatch):
    prepare = ops.ma_ppo_prepare
    seg, nseg = ops.macro_segment_fixed(torch.ones(4, 8, dtype=torch.bool), 5)
    given = (*torch.randn(3, 4, 8).unbind(), torch.randn(4), seg, nseg)
    assert demo._times("", given, 0.1, 1)["gap"] < 1e-5
    monkeypatch.setattr(ops, "ma_ppo_prepare", lambda *a: tuple(2 * t for t in prepare(*a)))
    assert demo._times("", given, 0.1, 1)["gap"] > 0.1


def test_line_tables_and_page(made):
    found = copy.deepcopy(made[0][0])
    for i, value in enumerate((0.25, 0.5, 0.625)):
        object.__setattr__(found.scores[i], "value", value)
    found.speed[0] |= {"loop": 0.02, "op": 0.0001}
    line, text = check_protocol(demo, found)
    assert line.result == "spelling score 0.25 before, 0.62 after MA-PPO, 0.50 after PPO"
    assert line.speed.ratio == pytest.approx(200) and line.speed.op == "ma_ppo_prepare"
    assert "0.625" in text and "200×" in text and "20 ms" in text
    page = rendered(demo, found)
    assert "200×" in page and "Score by step" in page
