# SPDX-License-Identifier: Apache-2.0
"""Load and affinity of experts: by hand, as plots, as a part of a page."""

import math

import pytest
import torch
import upit_mixtures as tiny

from tenfold.report import Page
from tenfold.upit import affinity, expert_load
from tenfold.upit.measure import specialisation
from tenfold.upit.mixture import mixture_layers
from tenfold.upit.report import (
    add_experts,
    affinity_plot,
    balance_plot,
    load_plot,
    specialisation_plot,
)


def test_load_by_hand():
    model, rows = (
        tiny.mixtral(4, 2),
        {"input_ids": tiny.rows(), "attention_mask": torch.ones(8, 12, dtype=torch.int64)},
    )
    rows["attention_mask"][3:, 6:] = 0
    want = []
    seen = []
    hooks = [
        layer.router.register_forward_hook(lambda m, i, o: seen.append(o[2]))
        for layer in mixture_layers(model)
    ]
    model(**rows)
    for hook in hooks:
        hook.remove()
    on = rows["attention_mask"].flatten().bool()
    for index in seen:
        counts = torch.bincount(index[on].flatten(), minlength=4).double()
        want.append(counts / counts.sum())
    got = expert_load(model, rows, batch_size=3)
    torch.testing.assert_close(got, torch.stack(want))
    both = affinity(model, {"a": rows, "b": tiny.rows(seed=2)})
    assert both.shape == (tiny.LAYERS, 2, 4) and torch.equal(both[:, 0], got)


def test_specialisation():
    """1 if every family has its own expert, 0 if all choose alike."""
    own, alike = (
        torch.eye(3, dtype=torch.float64)[None],
        torch.full((1, 3, 3), 1 / 3, dtype=torch.float64),
    )
    assert (
        specialisation(own).item() == pytest.approx(1.0)
        and abs(specialisation(alike).item()) < 1e-12
    )
    half = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.float64)
    mean = (0.75, 0.25)
    want = (
        (0.5 * math.log(0.5 / mean[0]) + 0.5 * math.log(0.5 / mean[1]) + math.log(1 / mean[0]))
        / 2
        / math.log(2)
    )
    assert specialisation(half).item() == pytest.approx(want)


def test_plots_and_page(tmp_path):
    model = tiny.mixtral(4, 2)
    families = {"code": tiny.rows(4, seed=1), "prose": tiny.rows(4, seed=2)}
    load, shares = expert_load(model, families["code"]), affinity(model, families)
    page = Page("experts")
    drawn = add_experts(page, load, shares, list(families))
    assert [name for name, _ in drawn] == ["load", "affinity", "affinity-best"]
    assert all(png.startswith(b"\x89PNG") for _, png in drawn)
    text = page.write(tmp_path / "page.html").read_text()
    assert text.count("data:image/png") == 3 and "busiest expert" in text
    assert len(load_plot(load.tolist()).axes[0].texts) == tiny.LAYERS * 4
    labels = [
        t.get_text() for t in affinity_plot(shares, list(families), 1).axes[0].get_yticklabels()
    ]
    assert labels == ["code", "prose"]
    assert len(specialisation_plot({"upit": shares, "vanilla": shares}).axes[0].lines) == 2
    assert balance_plot({"a": [{"balance": 1.2}, {"balance": 1.1}]}).axes[0].lines[
        0
    ].get_ydata().tolist() == [1.2, 1.1]
    with pytest.raises(ValueError, match="1 names for 2 families"):
        affinity_plot(shares, ["code"])


def test_dense_models_have_no_load():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no mixture layers"):
        expert_load(tiny.dense(), tiny.rows())
    with pytest.raises(ValueError, match="at least one name"):
        affinity(tiny.mixtral(), {})
