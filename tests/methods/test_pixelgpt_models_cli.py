# SPDX-License-Identifier: Apache-2.0
"""``tenfold pixelgpt pretrain | finetune | reconstruct`` on tiny models; the demo's and the study's parts."""

import json
from pathlib import Path

import pytest
from cli_calls import fails, succeeds

from tenfold.pixelgpt.loading import load

FEW = ["--steps", "3", "--batch-size", "4", "--length", "24", "--quiet"]
TEXT = "Der schnelle braune Fuchs springt.\n\nUnd noch eine Zeile, die anders ist.\n" * 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixelgpt")
    lines = TEXT.splitlines()
    (folder / "text.txt").write_text("\n".join(f"{line} {i}" for i, line in enumerate(lines)))
    found = json.loads(
        succeeds(
            "pixelgpt",
            "pretrain",
            "--variant",
            "dualgpt",
            "--text",
            folder / "text.txt",
            "--out",
            folder / "model",
            "--vocabulary",
            "300",
            *FEW,
            "--set",
            "pair_tokens=40",
            "--json",
        )
    )
    assert found["steps"] == 3 and set(found["after"]) == {
        "step",
        "text/ntp",
        "pixel/npp",
        "pair/npp",
        "pair/ntp",
    }
    assert Path(found["report"]).is_file() and set(found["baselines"]) == {"zero", "copy", "mean"}
    assert (folder / "model" / "report" / "reconstructions.png").is_file()
    return folder


def test_model_processor_and_tokenizer_come_back(place):
    model, processor, tokenizer = load(place / "model")
    assert processor.settings.max_patches == 24 and len(tokenizer) <= 300
    assert model.config.vocab_size == len(tokenizer)


def test_goes_on_with_a_model(place):
    out = succeeds("pixelgpt", "pretrain", "--model", place / "model", "--variant", "pixelgpt", "--text",
                   place / "text.txt", "--out", place / "more", *FEW)  # fmt: skip
    assert "next patch (MSE), pixel" in out and "report:" in out


def test_finetune(place):
    found = json.loads(succeeds("pixelgpt", "finetune", "--model", place / "model", "--out", place / "tuned",
                                "--languages", "de,el", *FEW, "--eval-every", "2", "--json"))  # fmt: skip
    assert set(found["scores"]["test"]) == {"accuracy", "accuracy/de", "accuracy/el", "average"}
    out = succeeds("pixelgpt", "finetune", "--model", place / "tuned", "--out", place / "again", "--languages",
                   "de,el", "--modality", "text", *FEW)  # fmt: skip
    assert "accuracy" in out
    model, _, _ = load(place / "tuned", num_labels=2)
    assert model.config.num_labels == 2


def test_finetune_on_files(place):
    rows = "sentence\tlabel\n" + "\n".join(f"it 's number {i} .\t{i % 2}" for i in range(12)) + "\n"
    (place / "sst2").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (place / "sst2" / name).write_text(rows)
    found = json.loads(
        succeeds(
            "pixelgpt",
            "finetune",
            "--model",
            place / "model",
            "--out",
            place / "sst",
            "--task",
            "sst2",
            "--data",
            place / "sst2",
            "--test",
            place / "sst2" / "dev.tsv",
            *FEW,
            "--json",
        )
    )
    assert set(found["scores"]) == {"dev"} and 0 <= found["best"]["accuracy"] <= 1


def test_reconstruct(place):
    found = json.loads(succeeds("pixelgpt", "reconstruct", "Ein Text.", "Noch einer.", "--model", place / "model",
                                "--out", place / "pictures", "--length", "24", "--write", "3", "--json"))  # fmt: skip
    assert found["texts"] == 2 and found["npp"] > 0
    for name in ("picture", "written"):
        assert Path(found[name]).read_bytes().startswith(b"\x89PNG")
    out = succeeds("pixelgpt", "reconstruct", "--file", place / "text.txt", "--model", place / "model", "--out",
                   place / "file", "--denorm", "minmax", "--length", "24")  # fmt: skip
    assert "next patch loss of" in out


@pytest.mark.parametrize("command, text", [
    (["pretrain", "--variant", "gpt"], "variant must be one of"),
    (["pretrain", "--text", "{place}/absent.txt"], "absent.txt"),
    (["pretrain", "--size", "huge"], "size must be one of"),
    (["finetune", "--model", "{place}/absent"], "no model folder at"),
    (["finetune", "--model", "{place}/model", "--task", "poetry"], "--task must be language, domain or one of"),
    (["finetune", "--model", "{place}/model", "--task", "sst2", "--data", "{place}/absent.tsv"], "no file at"),
    (["finetune", "--model", "{place}/model", "--length", "500"], "longer than the model's"),
    (["reconstruct", "A", "--model", "{place}/model", "--denorm", "best"], "denorm must be one of"),
    (["reconstruct", "A", "--model", "{place}/text.txt"], "text.txt"),
])  # fmt: skip
def test_refused(place, command, text):
    assert text in fails(
        "pixelgpt", *(c.format(place=place) for c in command), "--out", place / "bad"
    )
