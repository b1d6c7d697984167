# SPDX-License-Identifier: Apache-2.0
"""``tenfold demo dha``: its line, tables and page, and both ways to read the cache of a converted model."""

import copy

import pytest
import torch
from demo_cases import FAST, ChatBytes, check_protocol, rendered
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold.dha import demo
from tenfold.dha.record import ConversionRecord


def grouped(**changes):
    """A byte-level model with SmolLM2's 9 query and 3 KV heads."""
    torch.manual_seed(0)
    settings = {"vocab_size": 256, "hidden_size": 72, "intermediate_size": 64, "num_hidden_layers": 3,
                "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 4096,
                "bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | changes  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@pytest.fixture(scope="module")
def made():
    """A run of a few steps, and what it said."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        few = {
            "search_steps": 2,
            "fusion_steps": 3,
            "recovery_steps": 2,
            "collapse_mse": 10.0,
            "sequence_length": 32,
        }
        patch.setattr(demo, "SETTINGS", demo.SETTINGS | few)
        patch.setattr(demo, "CONTEXT", 96)
        patch.setattr(demo, "LENGTH", 32)
        found = demo.run_demo(told.append, 3, (grouped(), ChatBytes()))
    return found, told


def test_a_run(made):
    found, told = made
    assert len(told) == 2 + 3 + 2 + 3
    assert (
        sum(demo.SETTINGS[f"{s}_steps"] for s in ("search", "fusion", "recovery")) + 3 == demo.STEPS
    )
    kept = sum(found.record.key_heads) + sum(found.record.value_heads)
    assert [r["heads"] for r in found.rows] == [
        18,
        kept,
        6,
    ] and 6 < kept <= found.record.budget_heads
    assert found.rows[0]["model"] == "parent (GQA 9:3)" and found.model == "LlamaForCausalLM"
    assert found.config["seed"] == 3 and len(found.record.curves["fusion-1"]) == 3
    losses = found.record.losses
    assert [r["loss"] for r in found.rows[:2]] == [losses["parent"], losses["final"]]
    check_protocol(demo, found)


def test_both_ways_to_read_a_cache_agree(made):
    found = made[0].decoding
    assert (found.context, found.layers) == (96, 3)
    assert found.gap < 1e-5 and found.speed.ratio > 0 and found.speed.op == "dha_decode"


def test_a_wrong_result_shows(monkeypatch):
    from tenfold import ops

    decode, rows = ops.dha_decode, torch.arange(40)[None]
    from tenfold.dha import convert

    model = convert(
        grouped(), budget=0.25, method="gqa_mean", sizes=(1,), gqa="group", recovery_steps=0
    )
    monkeypatch.setattr(ops, "dha_decode", lambda *a: (1.5 * decode(*a)[0], None))
    assert demo.measure_decoding(model, rows).gap > 1e-3


def test_line_tables_and_page():
    rows = [{"model": n, "heads": h, "bytes_per_token": 256 * h, "loss": x, "ms_per_token": 9.0, "text": "Paris."}
            for n, h, x in (("parent", 180, 3.25), ("DHA", 135, 3.5), ("mean", 60, 9.0))]  # fmt: skip
    record = ConversionRecord(
        {"budget": 0.25, "method": "dha"}, 2, 9, 64, [2, 3], [3, 1], cka=[torch.eye(3)] * 4
    )
    record.curves = {
        "search-1": [{"loss": 3.0}] * 2,
        "fusion-1": [{"loss": 4.0, "mse": 0.1, "lambda": 1.0}] * 3,
    }
    found = demo.Demo(rows, record, demo.Decoding(FAST, 2048, 30, 3e-7), "Some-Model", "a setting")
    line, text = check_protocol(demo, found)
    assert line.ran == "Some-Model, 5 steps on Python's docs"
    assert line.result == "135 of 180 key and value heads; loss 3.25 before, 3.50 after"
    assert line.speed == FAST
    assert "all 30 layers, 2,048 tokens" in text and "12.3×" in text and "3.0e-07" in text
    page = rendered(demo, found)
    assert (
        "Key and value heads kept in every layer." in page and "12.3×" in page and "3.0e-07" in page
    )
    other = copy.deepcopy(found)
    other.rows[1] |= {"heads": 90, "loss": 4.125}
    assert (
        demo.headline(other).result == "90 of 180 key and value heads; loss 3.25 before, 4.12 after"
    )
