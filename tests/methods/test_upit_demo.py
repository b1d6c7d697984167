# SPDX-License-Identifier: Apache-2.0
"""``tenfold demo upit``: its line, tables and page, experts against transformers', a parent that is trained once."""

import copy

import pytest
import torch
import upit_mixtures as mixtures
from demo_cases import FAST, check_protocol, rendered

from tenfold.upit import demo
from tenfold.upit.study import BASE, METHODS, TUNED, Comparison


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The folder of a random mixture."""
    folder = tmp_path_factory.mktemp("mixture")
    mixtures.mixtral().save_pretrained(folder)
    return folder


def batch():
    ids = mixtures.rows(6, 20)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_experts_agree(mixture):
    found = demo.measure_experts(mixture, batch())
    assert (found.layers, found.tokens) == (mixtures.LAYERS, 120)
    assert found.gap < 1e-5 and found.speed.ratio > 0 and found.speed.op == "moe_swiglu_mlp"
    assert found.speed.against.startswith("transformers' experts (")
    assert "tenfold" not in found.speed.against


def test_other_experts_show(mixture, monkeypatch):
    calls = demo._expert_calls

    def changed(model, rows):
        made = calls(model, rows)
        with torch.no_grad():
            made[1][0].down_proj[0] *= 2
        return made

    monkeypatch.setattr(demo, "_expert_calls", changed)
    assert demo.measure_experts(mixture, batch()).gap > 1e-2


def test_the_parent_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    for name, value in {"PARENT_STEPS": 10, "DEPTH": 1, "HEADS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    told = []
    first = demo._cached_parent(told.append)
    assert len(told) == 10 // demo.TELL
    again = demo._cached_parent(lambda text: pytest.fail("it was trained again"))
    plain = demo.parent(10, 1, 1)
    for model in (again, plain):
        for a, b in zip(first.state_dict().values(), model.state_dict().values()):
            assert torch.equal(a, b)


def test_steps():
    """8 of the parent that are told, 2 + 3 epochs of 40, 4 routers of 8, and the experts' times."""
    assert demo.STEPS == 8 + 5 * 40 + 4 * 8 + 1


def test_line_tables_and_page():
    losses = {n: dict.fromkeys((*demo.NAMES, "mean"), x) for n, x in (
        (BASE, 4.0), (TUNED, 1.5), (METHODS["dense"], 1.25), (METHODS["vanilla"], 1.2), (METHODS["upit"], 1.125)
    )}  # fmt: skip
    share = [[0.25] * 4] * 2
    names = [METHODS["vanilla"], METHODS["upit"]]
    child = {"number": 4, "parents": [1, 2], "alpha": 0.5, "similarity": None}
    comparison = Comparison(
        list(demo.NAMES), losses, {n: [[0.25] * 4] * 2 for n in names}, {n: [[[0.25] * 4] * 4] * 2 for n in names},
        stages={"expand": {"children": [child]}, "seeds": {"families": share}},
    )  # fmt: skip
    found = demo.Demo(comparison, demo.Experts(FAST, 2048, 4, 4e-7), "a model", "a setting")
    line, text = check_protocol(demo, found)
    assert line.ran == "a model, 4 experts, 4 families"
    assert line.result == "loss 1.125; dense tuned on 1.250, vanilla upcycling 1.200"
    assert line.speed == FAST
    assert (
        "all 4 layers, 2,048 tokens" in text
        and "12.3×" in text
        and "4.0e-07" in text
        and "1.125" in text
    )
    page = rendered(demo, found)
    assert "12.3×" in page and "4.0e-07" in page and "UpIT&#x27;s experts" in page
    other = copy.deepcopy(found)
    other.found.losses[METHODS["upit"]]["mean"] = 1.0625
    assert demo.headline(other).result.startswith("loss 1.062; dense")
