# SPDX-License-Identifier: Apache-2.0
"""``tenfold ernie-code``: all verbs on a tiny model, what they refuse; pages and tables of a study."""

import html
import json
from pathlib import Path

import pytest
from cli_calls import fails, succeeds

from tenfold.ernie_code import CodeTrainConfig, demo, report, speed, study
from tenfold.report import Page

PAIRS = [
    {"source": f"{verb} the {thing}", "target": f"def {verb}_{thing}(x):\n    return x"}
    for verb in ("open", "close", "print", "save") for thing in ("file", "page", "name", "user")
]  # fmt: skip
TRAIN = ["--steps", "2", "--batch-size", "4", "--rows-per-draw", "2", "--set", "max_inputs=64", "--set",
         "max_targets=64", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a vocabulary and a model that has seen them."""
    folder = tmp_path_factory.mktemp("ernie_code")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    (folder / "text.txt").write_text("Open the file, and close the page. " * 30)
    (folder / "code.py").write_text("\n\n".join(p["target"] for p in PAIRS))
    texts = ["--text", f"English={folder / 'text.txt'}", "--text", f"Python={folder / 'code.py'}"]
    succeeds("ernie-code", "tokenizer", *texts, "--vocab-size", "420", "--out", folder / "words")
    succeeds(
        "ernie-code", "pretrain", *texts, "--pairs", folder / "pairs.jsonl", "--pair-share", "0.5", "--tokenizer",
        folder / "words", "--out", folder / "model", *TRAIN,
    )  # fmt: skip
    return folder


def test_tokenizer(place):
    found = json.loads(
        succeeds("ernie-code", "tokenizer", "--text", f"English={place / 'text.txt'}", "--vocab-size", "400",
                 "--out", place / "other", "--json")
    )  # fmt: skip
    assert found["sentinels"] == 100 and found["ids"] <= 400 and found["languages"] == ["English"]
    assert "LANGUAGE=FILE" in fails("ernie-code", "tokenizer", "--text", "nothing")
    assert "vocab_size must be at least" in fails(
        "ernie-code", "tokenizer", "--text", f"English={place / 'text.txt'}", "--vocab-size", "9"
    )


def test_pretrain(place):
    record = json.loads((place / "model" / "train.json").read_text())
    assert record["rows"]["English-Python"] == 16 and len(record["curve"]) == 2
    assert (place / "model" / "report" / "index.html").is_file()
    more = json.loads(
        succeeds("ernie-code", "pretrain", "--model", place / "model", "--pairs", place / "pairs.jsonl", "--out",
                 place / "more", *TRAIN, "--json")
    )  # fmt: skip
    assert more["steps"] == 2 and list(more["rows"]) == ["English-Python"]
    said = fails("ernie-code", "pretrain", "--languages", "xx", "--out", place / "x", *TRAIN)
    assert "no catalogues for 'xx'" in said


def test_finetune_generate_eval(place):
    common = ["--data", place / "pairs.jsonl", "--model", place / "model"]
    tuned = json.loads(
        succeeds("ernie-code", "finetune", *common, "--test", place / "pairs.jsonl", "--out", place / "tuned", *TRAIN,
                 "--json")
    )  # fmt: skip
    assert tuned["validation"][-1]["step"] == 2
    made = json.loads(
        succeeds("ernie-code", "generate", "open the file", f"@{place / 'text.txt'}", "--model", place / "tuned",
                 "--max-length", "6", "--json")
    )  # fmt: skip
    assert len(made) == 2 and made[0]["source"] == "open the file"
    found = json.loads(
        succeeds("ernie-code", "eval", *common, "--task", "text-to-code", "--limit", "12", "--candidates", "8",
                 "--max-length", "6", "--out", place / "eval", "--json")
    )  # fmt: skip
    assert set(found["scores"]) == {"mconala_bleu", "exact_match", "codebleu"}
    assert found["ranking"]["English-Python"]["rows"] == 12 and Path(found["report"]).is_file()
    said = succeeds("ernie-code", "eval", *common, "--turned", "--task", "summarise", "--limit", "4",
                    "--max-length", "4", "--out", place / "eval2", "--quiet")  # fmt: skip
    assert "summarise: 4 rows" in said
    assert "task must be one of" in fails("ernie-code", "eval", *common, "--task", "sing")
    assert fails("ernie-code", "generate", "x", "--model", place / "nothing")


def test_study_and_demo_pages(tmp_path):
    """The study's parts at the size of a toy: tables and pages of its result."""
    config = study.StudyConfig(
        languages=("de", "fr"), vocab_size=600, max_chars=30, code_chars=250, text_tokens=24, candidates=4,
        neighbours=(1,), ranked=8, generated=2, packages=("email", "logging"),
        model={"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8},
    )  # fmt: skip
    settings = CodeTrainConfig.from_preset(
        "small", steps=2, batch_size=4, rows_per_draw=2, max_inputs=192, max_targets=192
    )
    data = study.material(config)
    made = study.run(config, settings, out=tmp_path, data=data)
    found = json.loads(json.dumps(made.to_json(1)))
    again = study.run(config, settings, out=tmp_path)
    assert again.to_json(1)["variants"]["SCLM"]["rankings"] == found["variants"]["SCLM"]["rankings"]
    pairs = [n for n in found["sizes"] if "-" in n]
    assert all("English" in n for n in pairs) and len(pairs) == 4
    rows = report.ranking_rows(found)
    assert rows[-1][2] == "25.00 %" and {r[1] for r in rows[:-1]} == set(study.VARIANTS)
    times = speed.compare(study.model_config("tiny", vocab_size=300, dropout_rate=0.0), 2, 12, 8, 1)
    assert times["loss"]["stock"] == pytest.approx(times["loss"]["tenfold"], rel=1e-4)
    page = Page("test")
    own = demo.timed(made, data, repeats=1)
    assert own["loss"]["stock"] == pytest.approx(own["loss"]["tenfold"], rel=1e-4)
    result = demo.Demo(made, own)
    demo.add_demo_section(result, page)
    text = page.write(tmp_path / "index.html").read_text()
    assert "X to Y (never seen)" in text and text.count("<img") == 2
    shown = made.variants[demo.PAIRS].generated["zero-shot"].rows
    assert "beam search" not in text and all(html.escape(r["source"]) in text for r in shown)
    ranked, samples, step = demo.tables(result)
    assert ranked.rows == rows and ranked.title == "Which of 4 is the translation?"
    assert len(samples.rows) == 2 and [r[0] for r in step.rows] == ["time", "loss"]
    line = demo.headline(result)
    with_pairs, without = demo.held_out(result)
    assert line.result == f"to English {with_pairs:.2f} nats a token; {without:.2f} without pairs"
    assert "3 languages" in line.ran and line.speed.ratio == own["seconds"]["ratio"]
    made.variants["SCLM"].record.validation[-1][demo.HELD] = 12.345
    assert demo.headline(result).result.endswith("12.35 without pairs")
