# SPDX-License-Identifier: Apache-2.0
"""Metrics against scipy and formulas; readers of GLUE's and XNLI's layouts; published settings; packaged text."""

import json

import numpy as np
import pytest
from scipy import stats

from tenfold.pixelgpt import recipes, tasks, texts
from tenfold.pixelgpt.tasks import TASKS, Example, detokenized, read_examples
from tenfold.pixelgpt.tokens import encode_rows, train_tokenizer
from tenfold.training.metrics import METRICS, accuracy, f1, matthews, spearman


def test_metrics():
    draw = np.random.default_rng(0)
    p, g = draw.integers(0, 2, 200), draw.integers(0, 2, 200)
    assert accuracy(p, g) == np.mean(p == g)
    tp, fp, fn, tn = (((p == a) & (g == b)).sum() for a, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert f1(p, g) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    over = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert matthews(p, g) == pytest.approx((tp * tn - fp * fn) / over)
    a, b = draw.integers(0, 9, 100), draw.normal(size=100)
    assert spearman(b, a) == pytest.approx(stats.spearmanr(b, a).statistic)
    assert matthews([1, 1], [0, 1]) == 0 and spearman([1, 1], [0, 1]) == 0 and f1([0], [0]) == 0
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    for metric in METRICS.values():
        with pytest.raises(ValueError, match="same length"):
            metric([1], [1, 2])


FILES = {
    "cola": ("gj04\t1\t\tThey drank the pub dry .\nrhl\t0\t*\tMe saw him .\n",
             [Example("They drank the pub dry .", None, 1), Example("Me saw him .", None, 0)]),
    "mnli": ("index\tsentence1\tsentence2\tgold_label\n0\tA b\tC d\tneutral\n1\tA\tB\t-\n",
             [Example("A b", "C d", 1)]),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\tSay \"this\tand that\n",
             [Example('Say "this', "and that", 1)]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n",
            [Example("Why?", "How?", 0)]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\tA\tB\tnot_entailment\n", [Example("A", "B", 1)]),
    "stsb": ("index\tsentence1\tsentence2\tscore\n0\tA\tB\t3.75\n", [Example("A", "B", 3.75)]),
    "xnli": ("language\tgold_label\tsentence1\tsentence2\nde\tcontradictory\tA\tB\nur\tneutral\tC\tD\n",
             [Example("A", "B", 2, "de"), Example("C", "D", 1, "ur")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_tsv(name, tmp_path):
    text, want = FILES[name]
    (tmp_path / "dev.tsv").write_text(text, encoding="utf-8")
    assert read_examples(tmp_path / "dev.tsv", TASKS[name]) == want
    assert read_examples(tmp_path, TASKS[name], split="validation") == want


def test_jsonl_and_languages(tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [
        {"premise": "A", "hypothesis": "B", "label": i % 3, "language": c}
        for i, c in enumerate(("de", "sw", "de"))
    ]
    file.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "label": -1}])), encoding="utf-8")
    found = read_examples(file, TASKS["xnli"], languages=["de"])
    assert [(e.label, e.language) for e in found] == [(0, "de"), (2, "de")]
    assert len(read_examples(tmp_path, TASKS["xnli"])) == 3
    with pytest.raises(ValueError, match="has no example of xnli"):
        read_examples(file, TASKS["xnli"], languages=["fr"])


@pytest.mark.parametrize("text, message", [
    ("sentence\tlabel\nA\t2\n", r"line 2: a label of sst2 is one of negative, positive or its number, got '2'"),
    ("sentence\tlabel\nA\n", r"line 2: 1 columns, the header has 2"),
    ("words\tlabel\nA\t1\n", r"no column sentence; there are: words, label"),
])  # fmt: skip
def test_bad_rows(text, message, tmp_path):
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "x.tsv", TASKS["sst2"])


def test_missing_files_and_hub(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_examples(tmp_path / "absent.tsv", TASKS["sst2"])
    with pytest.raises(FileNotFoundError, match=r"train as \.tsv or \.jsonl"):
        read_examples(tmp_path, TASKS["sst2"])
    (tmp_path / "x.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        read_examples(tmp_path / "x.jsonl", TASKS["sst2"])
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        read_examples("hub", TASKS["sst2"])


def test_hub_names_are_asked_for(monkeypatch):
    import sys
    import types

    asked = []

    def load_dataset(name, part, split):
        asked.append((name, part, split))
        return [{"premise": "A", "hypothesis": "B", "label": 1}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: True)
    assert read_examples("hub", TASKS["mnli"], split="validation") == [Example("A", "B", 1)]
    found = read_examples("hub", TASKS["xnli"], languages=["de", "sw"])
    assert [e.language for e in found] == ["de", "sw"]
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched"), ("facebook/xnli", "de", "train"),
                     ("facebook/xnli", "sw", "train")]  # fmt: skip


@pytest.mark.parametrize("text, want", [
    ("it 's a charming and often affecting journey . ", "it's a charming and often affecting journey."),
    ("they do n't know , do they ?", "they don't know, do they?"),
    ("( a ) `` quoted '' $ 5", '(a) "quoted" $5'),
    ("plain", "plain"),
])  # fmt: skip
def test_detokenized(text, want):
    assert detokenized(text) == want


def test_published_settings():
    from tenfold.pixelgpt.train_config import FineTuneConfig

    made = recipes.recipe("mrpc", "dualgpt", "pixel")
    assert made == {"warmup_steps": 10, "eval_every": 50, "length": 768, "modality": "pixel", "batch_size": 64,
                    "learning_rate": 5e-5, "steps": 250}  # fmt: skip
    assert recipes.recipe("mnli", "textgpt", "text")["learning_rate"] == 3e-5
    assert recipes.recipe("xnli", "pixelgpt", "pixel")["length"] == 256
    assert len(recipes.grid("mnli", "pair")) == 16 and len(recipes.grid("rte", "pair")) == 20
    for task in TASKS:
        for variant, modality in (("textgpt", "text"), ("pixelgpt", "pixel"), ("dualgpt", "pair")):
            FineTuneConfig(**recipes.recipe(task, variant, modality))
    with pytest.raises(ValueError, match="variant/modality must be one of"):
        recipes.recipe("mnli", "textgpt", "pixel")


def test_packaged_text():
    found = texts.documents(("en", "de", "el"), 10)
    assert {d.language for d in found} == {"en", "de", "el"} and len(found) == 30
    assert found == texts.documents(("en", "de", "el"), 10)
    train, held = texts.split_documents(found)
    assert len(held) == 3 and not {d.text for d in held} & {d.text for d in train}
    assert all(
        "%(" not in line and "<" not in line
        for d in found
        for line in d.lines
        if d.language != "en"
    )
    spec, some, test = texts.language_task(("de", "ar"), train=20, test=10)
    assert spec.labels == ("de", "ar") and len(some) == 40 and len(test) == 20
    assert {e.label for e in some} == {0, 1} and not {e.text for e in some} & {e.text for e in test}
    spec, some, test = texts.domain_task(("de", "ka"), train=30, test=10)
    assert {e.label for e in test} <= {0, 1, 2} and {e.language for e in test} == {"de", "ka"}
    with pytest.raises(ValueError, match="too few"):
        texts.language_task(("de",), test=100_000)


def test_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    made = train_tokenizer(["ein Text und noch ein Text"] * 20, 300)
    assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2) and len(
        made
    ) <= 300
    text = "Ünïcode \u10d0\u10d1 und ein Text"
    (row,) = encode_rows(made, [text], None, 100, end=True)
    assert row[0] == 1 and row[-1] == 2 and made.decode(row[1:-1]) == text
    (pair,) = encode_rows(made, ["a"], ["b"], 100)
    assert pair == [
        1,
        *made("a", add_special_tokens=False)["input_ids"],
        1,
        *made("b", add_special_tokens=False)["input_ids"],
    ]
    assert len(encode_rows(made, [text], None, 5, end=True)[0]) == 5
    made.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == made(text)["input_ids"]
    with pytest.raises(ValueError, match="at least 259 ids"):
        train_tokenizer(["a"], 258)


def test_documents_of_the_hub(monkeypatch):
    import sys
    import types

    from tenfold.pixelgpt.small import hub_documents

    asked = []

    def load_dataset(name, part, **options):
        asked.append((name, part, options))
        return iter([{"text": f"one {i}\n\ntwo {i}"} for i in range(9)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: True)
    found = hub_documents("some/name:part", limit=3)
    assert [d.lines for d in found] == [(f"one {i}", f"two {i}") for i in range(3)]
    assert asked == [("some/name", "part", {"split": "train", "streaming": True})]
    with pytest.raises(ValueError, match="no texts in column 'body'; there are: text"):
        hub_documents("some/name", column="body")
