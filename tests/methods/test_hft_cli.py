# SPDX-License-Identifier: Apache-2.0
"""``tenfold hft``: sft, dpo, continual, plan and report on a tiny checkpoint; what they refuse; tasks."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import hft_models as tiny
import pytest
import torch
from cli_calls import fails, succeeds
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tenfold import hft
from tenfold.training import tasks

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--steps", "3", "--batch-size", "2", "--sequence-length", "48", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model whose tokens are letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("hft")
    vocabulary = {chr(97 + i): i for i in range(26)} | {"<e>": 26, "<u>": 27}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<e>", unk_token="<u>"
    ).save_pretrained(folder / "base")
    tiny.tiny(2).save_pretrained(folder / "base")
    rows = [
        {"prompt": f"what is {c}", "answer": c * 3, "chosen": c, "rejected": "z"}
        for c in "abcdefgh"
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    return folder


def test_sft(place):
    found = json.loads(succeeds("hft", "sft", "--model", place / "base", "--data", place / "rows.jsonl",
                                "--out", place / "sft", *FEW, "--json"))  # fmt: skip
    base, made = (AutoModelForCausalLM.from_pretrained(place / n) for n in ("base", "sft"))
    plan = hft.select(base)
    assert found["steps"] == 3 and found["plans"][0]["digest"] == plan.digest()
    for (n, p), q in zip(base.named_parameters(), made.parameters()):
        assert torch.equal(p, q) == (n in plan.frozen)
    hft.apply_delta(base, place / "sft" / "delta.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), made.parameters()))
    assert Path(found["report"]).is_file()
    again = succeeds("hft", "report", place / "sft", "--out", place / "page")
    assert "report" in again and (place / "page" / "index.html").is_file()


def test_sft_of_text(place):
    out = succeeds("hft", "sft", "--model", place / "base", "--text", place / "text.txt", "--out",
                   place / "text", "--reselect", "steps:2", "--state-dtype", "int8", *FEW)  # fmt: skip
    assert re.search(r"loss: before \d\.\d+, after \d\.\d+", out)


def test_dpo(place):
    found = json.loads(succeeds("hft", "dpo", "--model", place / "base", "--data", place / "rows.jsonl",
                                "--out", place / "dpo", *FEW, "--json"))  # fmt: skip
    assert set(found["losses"]) == {"loss", "accuracy", "margin"}


def test_continual(place):
    command = ["hft", "continual", "--model", place / "base", "--tasks", "docstring,topic", "--methods",
               "full,hft", "--seeds", "0,1", "--train-rows", "8", "--test-rows", "4", "--out",
               place / "cl", *FEW]  # fmt: skip
    found = json.loads(succeeds(*command, "--json"))
    assert len(found["runs"]) == 4 and {r["config"]["seed"] for r in found["runs"]} == {0, 1}
    files = {p.name for p in (place / "cl").iterdir()}
    assert {"full-0.json", "hft-1.json", "index.html", "methods.png"} <= files
    out = succeeds(*command)  # nothing is trained again
    assert "half" in out and "BWT" in out
    assert "with other settings" in fails(*command, "--learning-rate", "0.5")


def test_plan(place, tmp_path):
    out = succeeds("hft", "plan", "--model", place / "base", "--out", tmp_path / "plan.json")
    assert "50.0 % of the layers' parameters" in out
    plan = hft.Plan.read(tmp_path / "plan.json")
    again = json.loads(succeeds("hft", "plan", "--model", place / "base", "--json"))
    assert again["frozen"] == list(plan.frozen)


@pytest.mark.parametrize(
    "command, extra, message",
    [
        ("sft", ["--ratio", "2"], "ratio must be in"),
        ("sft", ["--strategy", "rows"], "strategy must be one of"),
        ("sft", ["--method", "half"], "method must be one of"),
        ("sft", ["--reselect", "daily"], "reselect must be one of"),
        ("sft", ["--preset", "large"], "preset must be one of"),
        ("sft", ["--task", "poetry"], "unknown task 'poetry'"),
        ("sft", ["--device", "tpu"], "--device takes"),
        ("dpo", ["--beta", "0"], "beta must be a positive number"),
        ("continual", ["--tasks", "poetry"], "--tasks must be one of docstring"),
        ("continual", ["--methods", "half"], "--methods must be one of"),
        ("continual", ["--seeds", "a"], "--seeds takes whole numbers"),
    ],
)
def test_bad_options(place, command, extra, message):
    said = fails("hft", command, "--model", place / "base", "--out", place / "never", *FEW, *extra)
    assert message in said


def test_bad_files(place, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    options = ["--model", place / "base", "--out", place / "never", *FEW]
    assert "line 1: needs an object with prompt, answer" in fails(
        "hft", "sft", "--data", tmp_path / "rows.jsonl", *options
    )
    (tmp_path / "rows.jsonl").write_text("\n")
    assert "has no rows" in fails("hft", "dpo", "--data", tmp_path / "rows.jsonl", *options)
    assert "has no record.json" in fails("hft", "report", tmp_path)


class TestTasks:
    @pytest.mark.parametrize("name", tasks.NAMES)
    def test_pairs(self, name):
        found = tasks.pairs(name)
        assert len(found) >= 100 and len({p for p, _ in found}) == len(found)
        assert all(p and a and len(p) < 600 for p, a in found)
        order = [hashlib.sha256(p.encode()).digest() for p, _ in found]
        assert order == sorted(order)

    def test_rows(self):
        made = tasks.rows_of_pairs([("ab", "cd"), ("a" * 9, "bcdef")], tasks.byte_encoder, 8, 0)
        assert made["input_ids"][0].tolist() == [97, 98, 99, 100, 0, 0, 0, 0]
        assert made["labels"][0].tolist() == [-100, -100, 99, 100, 0, -100, -100, -100]
        assert made["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
        assert made["input_ids"][1].tolist() == [97, 97, 98, 99, 100, 101, 102, 0]

    def test_seeds_change_training_rows_only(self):
        a, b, c = (tasks.make_tasks(["topic"], tasks.byte_encoder, 64, 0, train=16, test=8, seed=s)[0]
                   for s in (0, 0, 1))  # fmt: skip
        assert torch.equal(a.train["input_ids"], b.train["input_ids"])
        assert not torch.equal(a.train["input_ids"], c.train["input_ids"])
        assert torch.equal(a.test["input_ids"], c.test["input_ids"])

    def test_accents(self):
        assert bytes(tasks.byte_encoder("Für é€")).decode() == "Fur e?"


def test_speed(place):
    from tenfold.hft import speed

    found = speed.measure(tiny.tiny(2), rows=2, length=16, steps=3)
    by = {r["method"]: r for r in found}
    assert set(by) == {"full, torch AdamW", "full", "half, torch AdamW", "half"}
    for key in ("gradient_bytes", "state_bytes", "activation_bytes"):
        assert by["half"][key] < by["full"][key]
    assert by["half"]["state_bytes"] == pytest.approx(2 * by["half"]["gradient_bytes"], rel=0.01)
    assert len(speed.table_rows(found)[0]) == len(speed.COLUMNS)


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "hft.py", "--steps", "2", "--json", tmp_path / "hft.json"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "hft.json").read_text())
    assert {r["config"]["method"] for r in found["runs"]} == {"full", "hft"}
