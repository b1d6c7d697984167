# SPDX-License-Identifier: Apache-2.0
"""``tenfold demo hft``: its line, tables and page, and what the optimisers it times agree on."""

import copy

import hft_models as tiny
import pytest
import torch
from demo_cases import ChatBytes, check_protocol, rendered

from tenfold.hft import demo, speed
from tenfold.training.tiny import make_model


@pytest.fixture(scope="module")
def made():
    """A run of two steps per task, and what it said."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SETTINGS", demo.SETTINGS | {"steps": 2})
        patch.setattr(demo, "TEST", 4)
        found = demo.run_demo(told.append, 5, (make_model(0, 4, 2, 16), ChatBytes()))
    return found, told


def test_a_run(made):
    found, told = made
    assert len(told) == 2 * (2 * 2 + 1) + 1
    assert 2 * (2 * demo.SETTINGS["steps"] + 1) + 1 == demo.STEPS
    assert [r.config["method"] for r in found.records] == ["full", "hft"]
    assert all(r.config["seed"] == 5 for r in found.records)
    assert [r["method"] for r in found.speed] == list(demo.TIMED)
    line, _ = check_protocol(demo, found)
    assert line.ran == "LlamaForCausalLM, German, then docstrings, 4 steps"


def test_line_tables_and_page(made):
    found = copy.deepcopy(made[0])
    for record, forgot in zip(found.records, (0.5, 0.125)):
        record.scores["log_prob"] = [[-2.0, -3.0], [-2.0 - forgot, -1.0]]
    found.text = [{"before": 2.25, "after": 2.75}, {"before": 2.25, "after": 2.5}]
    found.timed("half")["optimizer"], found.timed("half")["gap"] = 0.010, 1.5e-7
    found.timed("half, torch AdamW")["optimizer"] = 0.025
    line, text = check_protocol(demo, found)
    assert line.result == "loss of other text 2.25 before, 2.50 after half, 2.75 after full tuning"
    assert line.speed.ratio == 2.5 and line.speed.op == "MaskedAdamW"
    assert (
        "+0.125" in text
        and "ours 10.0 ms, torch's 25.0 ms" in text
        and "2.5×" in text
        and "1.5e-07" in text
    )
    for record, seconds in zip(found.records, (3.0, 2.4)):
        record.seconds = {"round-0": seconds, "round-1": seconds}
    page = rendered(demo, found)
    assert "+0.25" in page and "2.25 before, 2.75 after both tasks" in page
    assert "1.25×" in page and "half: 1.20 s, all: 1.50 s" in page
    assert "2.5×" in page and "1.5e-07" in page and "What was forgotten" in page


class TestOptimizers:
    def test_a_step_of_both_is_the_same(self):
        found = speed.measure(tiny.tiny(2), rows=2, length=16, steps=1)
        gaps = {r["method"]: r["gap"] for r in found}
        assert gaps["full, torch AdamW"] == gaps["half, torch AdamW"] == 0
        assert gaps["full"] < 0.01 * speed.RATE and gaps["half"] < 0.01 * speed.RATE

    def test_other_weights_show(self):
        made = speed.runners(tiny.tiny(2), methods=("half, torch AdamW", "half"))
        with torch.no_grad():
            next(iter(made[1].model.parameters())).view(-1)[3] += 0.5
        speed._compare(made)
        assert [r.gap for r in made] == [0, pytest.approx(0.5)]

    def test_an_unknown_method(self):
        with pytest.raises(
            ValueError, match=r"methods must be one of full, torch AdamW, full,.*got 'a third'"
        ):
            speed.measure(tiny.tiny(2), methods=("a third",))
