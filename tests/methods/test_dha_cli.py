# SPDX-License-Identifier: Apache-2.0
"""``tenfold dha``: a checkpoint folder through convert, recover, generate and report; what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import dha_models as tiny
import pytest
import torch
import typer
from cli_calls import fails, succeeds
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["--search-steps", "2", "--fusion-steps", "3", "--recovery-steps", "2", "--batch-size", "2",
         "--sequence-length", "16", "--force"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny parent, its tokenizer (a byte each) and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("dha")
    vocabulary = {chr(97 + i): i for i in range(26)} | {"<e>": 26, "<u>": 27}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<e>", unk_token="<u>"
    ).save_pretrained(folder / "parent")
    tiny.make(kv_heads=4).save_pretrained(folder / "parent")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    return folder


@pytest.fixture(scope="module")
def converted(place):
    out = succeeds("dha", "convert", "--model", place / "parent", "--text", place / "text.txt",
                   "--out", place / "small", "--budget", "0.25", *STEPS, "--json")  # fmt: skip
    return json.loads(out)


def test_convert(place, converted):
    folder = place / "small"
    assert converted["model"] == str(folder) and converted["ratio"] <= 0.25
    assert sum(converted["key_heads"] + converted["value_heads"]) == converted["ratio"] * 32
    heads = sum(converted["key_heads"] + converted["value_heads"])
    assert converted["kv_bytes_per_token_16bit"] == heads * 8 * 2
    assert set(converted["losses"]) == {"parent", "collapsed", "final"}
    assert Path(converted["report"]).is_file() and (folder / "conversion.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.key_heads == converted["key_heads"]
    assert type(model).__name__ == "DhaLlamaForCausalLM"


def test_convert_again_goes_on_where_it_was(place, converted):
    again = succeeds("dha", "convert", "--model", place / "parent", "--text", place / "text.txt",
                     "--out", place / "small", "--budget", "0.25", *STEPS, "--quiet")  # fmt: skip
    assert "recovery" in again and f"final {converted['losses']['final']:.3f}" in again
    assert "belongs to another run (budget 0.25 there, 0.5 here)" in fails(
        "dha", "convert", "--model", place / "parent", "--text", place / "text.txt",
        "--out", place / "small", "--budget", "0.5", *STEPS, "--quiet",
    )  # fmt: skip


def test_generate(place, converted):
    found = json.loads(succeeds("dha", "generate", place / "small", "--prompt", "thequick", "--raw",
                                "--max-new-tokens", "5", "--json"))  # fmt: skip
    assert found["prompt_tokens"] == 8 and 1 <= found["new_tokens"] <= 5
    heads = sum(converted["key_heads"] + converted["value_heads"])
    assert found["bytes_per_token"] == heads * 8 * 4  # check 13, measured on the cache's tensors
    text = succeeds("dha", "generate", place / "small", "--prompt", "thequick", "--raw",
                    "--max-new-tokens", "5", "--quiet")  # fmt: skip
    assert text == found["text"] + "\n"


def test_recover(place, converted):
    found = json.loads(succeeds(
        "dha", "recover", place / "small", "--teacher", place / "parent", "--text", place / "text.txt",
        "--out", place / "more", "--steps", "12", "--sequence-length", "16", "--batch-size", "4",
        "--learning-rate", "0.003", "--json",
    ))  # fmt: skip
    assert found["steps"] == 12 and found["loss"]["after"] < found["loss"]["before"]
    before, after = (AutoModelForCausalLM.from_pretrained(place / n) for n in ("small", "more"))
    assert before.config.key_head_map == after.config.key_head_map
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_report(place, converted, tmp_path):
    found = json.loads(succeeds("dha", "report", place / "small", place / "small" / "conversion.json",
                                "--out", tmp_path, "--json"))  # fmt: skip
    assert found["report"] == str(tmp_path / "index.html") and len(found["conversions"]) == 2
    assert (tmp_path / "1-heads.png").is_file() and (tmp_path / "2-heads.png").is_file()


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--budget", "0"], "budget must be in"),
        (["--budget", "0.1"], r"budget must be in \[0.125, 1\]"),
        (["--method", "gqa"], "method must be one of"),
        (["--preset", "large"], "preset must be one of"),
        (["--tp-size", "3"], "tp_size must divide"),
        (["--nested", "--progressive"], "nested cannot be combined"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--device", "tpu"], "--device takes"),
        (["--mixed-precision", "fp8"], "mixed_precision must be one of"),
    ],
)
def test_bad_options(place, extra, message):
    said = fails("dha", "convert", "--model", place / "parent", "--text", place / "text.txt",
                 "--out", place / "never", *STEPS, *extra)  # fmt: skip
    assert re.search(message, said) and not (place / "never" / "config.json").exists()


def test_heads_that_have_not_fused_end_in_one_sentence_and_can_go_on(place, tmp_path):
    options = ["dha", "convert", "--model", place / "parent", "--text", place / "text.txt", "--out",
               tmp_path / "out", *STEPS[:-1], "--micro-batch-size", "1", "--quiet"]  # fmt: skip
    assert "--force" not in options
    said = fails(*options)
    assert "have not fused" in said and "(--force)" in said
    assert not (tmp_path / "out" / "config.json").exists()
    # As it says: the same folder goes on.
    assert "recovery" in succeeds(*options, "--force")


def test_a_loss_that_is_not_a_number_ends_in_one_sentence(place, tmp_path):
    options = ["dha", "convert", "--model", place / "parent", "--text", place / "text.txt", "--out",
               tmp_path / "out", *STEPS, "--learning-rate", "1e30", "--quiet"]  # fmt: skip
    assert "search-1: the operators are no numbers" in fails(*options)
    assert "search-1: the loss became nan at step 3" in fails(
        *options, "--search-steps", "3", "--work-dir", tmp_path
    )


def test_a_bug_is_not_hidden(monkeypatch):
    """Only the expected failures become a sentence."""
    from tenfold.cli.common import friendly

    def bug():
        raise RuntimeError("a bug")

    def missing():
        raise ImportError("cannot import name")

    with pytest.raises(RuntimeError, match="a bug"):
        friendly(bug)()
    with pytest.raises(typer.Exit):
        friendly(missing)()


def test_every_rank_has_its_own_gpu(monkeypatch):
    from tenfold.cli.common import rank_device as _device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _device("cuda") == "cuda" and _device("cuda:2") == "cuda:2"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert _device("cuda") == "cuda:3" and _device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="only 4 GPUs"):
        _device("cuda")


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "dha.py", "--search", "1", "--steps", "2", "--recovery",
         "1", "--force", "--json", tmp_path / "r" / "dha.json"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "r" / "dha.json").read_text())
    assert sum(found["key_heads"] + found["value_heads"]) <= 0.25 * 2 * 30 * 9
    parent, small = (a["bytes_per_token"] for a in found["answers"][:2])
    assert small < parent and "converted" in done.stdout


def test_other_errors(place, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    assert "do not fill a row" in fails("dha", "convert", "--model", place / "parent", "--text",
                                        tmp_path / "short.txt", "--out", tmp_path / "o", *STEPS)  # fmt: skip
    assert "no model folder" in fails("dha", "generate", "./nowhere", "--prompt", "a")
    assert "the text is empty" in fails("dha", "generate", place / "parent", "--prompt", " ")
    assert "has no conversion.json" in fails("dha", "report", tmp_path)
