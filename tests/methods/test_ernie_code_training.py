# SPDX-License-Identifier: Apache-2.0
"""Training: ranks, micro-batches and a killed run are one run; patience; settings; evaluation and ranking."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import MODES

from tenfold.ernie_code import (
    CodeTrainConfig,
    PackedRows,
    build_model,
    load_model,
    train,
    train_tokenizer,
)
from tenfold.ernie_code.evaluation import evaluate, ranking, with_distractors
from tenfold.ernie_code.training import CodeRecord, Draws, held_out_loss, task_of
from tenfold.testing import processes

HERE = Path(__file__).parent
WORDS = ["file", "save", "open", "close", "print", "page", "user", "name"]
SMALL = {
    "steps": 4, "batch_size": 8, "rows_per_draw": 2, "max_inputs": 48, "max_targets": 24, "warmup_steps": 1,
    "checkpoint_every": 2, "mixed_precision": "no",
}  # fmt: skip


OPTIMIZERS = {
    "adafactor": {"optimizer": "adafactor", "learning_rate": 1e-3, "scale_parameter": True, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw"},
}  # fmt: skip


def optimizers(sharded):
    """What ranks run: Adafactor on shards is another one."""
    return list(OPTIMIZERS) if sharded else ["adamw"]


def material():
    """(tokenizer, corpora): packed rows and pairs of a made-up language, the word written backwards."""
    pairs = [
        {"source": f"{a} {b}", "target": f"{a[::-1]} {b[::-1]}", "source_language": "English",
         "target_language": "German"}
        for a in WORDS for b in WORDS
    ]  # fmt: skip
    tokenizer = train_tokenizer((p["source"] + " " + p["target"] for p in pairs), 420)
    draw = np.random.default_rng(0)
    rows = PackedRows([draw.integers(3, 250, 24) for _ in range(12)], 24)
    return tokenizer, {"text": rows, "pairs": pairs}


def run(out=None, seed=0, callback=None, **changes):
    tokenizer, corpora = material()
    model = build_model("tiny", vocab_size=len(tokenizer), d_model=32, num_layers=1, seed=1)
    settings = CodeTrainConfig.from_preset("small", **(SMALL | {"seed": seed} | changes))
    return train(model, tokenizer, corpora, settings, out=out, callback=callback), model


def losses(record):
    return [m["loss"] for m in record.curve]


def test_both_tasks_and_what_is_saved(tmp_path):
    record, model = run(tmp_path, optimizer="adafactor", learning_rate=1e-3)
    assert {k for m in record.curve for k in m} == {"loss", "sclm", "ptlm"}
    assert record.rows == {"text": 12, "pairs": 64} and sum(
        record.weights.values()
    ) == pytest.approx(1)
    found = CodeRecord.read(tmp_path / "train.json")
    assert losses(found) == losses(record) and not list((tmp_path / "training").glob("train-*"))
    again = load_model(tmp_path)
    for a, b in zip(again.parameters(), model.parameters()):
        assert torch.equal(a, b)
    assert model.config.dropout_rate == 0.0


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, optimizer):
    expected, whole = run(optimizer=optimizer, dropout=0.1)

    class Kill(Exception):
        pass

    def kill(progress):
        if progress.step == 3:
            raise Kill

    tokenizer, corpora = material()
    settings = CodeTrainConfig.from_preset("small", **SMALL, optimizer=optimizer, dropout=0.1)

    def start(callback=None, **more):
        model = build_model("tiny", vocab_size=len(tokenizer), d_model=32, num_layers=1, seed=1)
        return train(
            model, tokenizer, corpora, settings, out=tmp_path, callback=callback, **more
        ), model

    with pytest.raises(Kill):
        start(kill)
    record, model = start()
    assert losses(record) == losses(expected)
    for a, b in zip(model.parameters(), whole.parameters()):
        assert torch.equal(a, b)


def test_micro_batches_are_one_batch():
    """Check 14: label tokens count equally over draws of different lengths."""
    expected, _ = run(steps=2)
    for micro in (1, 2):
        record, _ = run(steps=2, micro_batch_size=micro)
        assert losses(record) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_one_of_them_killed_on_the_way_train_what_one_trains(tmp_path, mode):
    script = HERE / "ernie_code_ranks.py"
    killed = processes.ranks(script, tmp_path, "2", env=MODES[mode])
    assert killed.returncode and "killed" in killed.stdout, killed.stderr[-4000:]
    names = optimizers(mode == "fsdp2")
    assert list((tmp_path / names[0] / "training").glob("train-2"))
    assert not (tmp_path / names[0] / "train.json").exists()
    done = processes.ranks(script, tmp_path, env=MODES[mode])
    assert done.returncode == 0, done.stderr[-4000:]
    for name in names:
        record, model = run(steps=3, **OPTIMIZERS[name])
        found = json.loads((tmp_path / name / "train.json").read_text())
        assert [m["loss"] for m in found["curve"]] == pytest.approx(losses(record), rel=1e-4)
        for a, b in zip(load_model(tmp_path / name).parameters(), model.parameters()):
            torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3)


def test_patience_keeps_the_best_weights():
    tokenizer, corpora = material()
    model = build_model("tiny", vocab_size=len(tokenizer), d_model=32, num_layers=1, seed=1)
    settings = CodeTrainConfig.from_preset(
        "finetune-small",
        **(
            SMALL
            | {"steps": 12, "eval_every": 1, "patience": 2, "learning_rate": 3.0, "warmup_steps": 0}
        ),
    )
    rows = {"pairs": corpora["pairs"]}
    record = train(model, tokenizer, rows, settings, held_out=rows)
    assert len(record.curve) < 12 and record.best == min(record.validation, key=lambda v: v["loss"])
    found = held_out_loss(model, Draws(rows, tokenizer, settings))["loss"]
    assert found == pytest.approx(record.best["loss"], rel=1e-5)


def test_evaluation_and_ranking():
    tokenizer, corpora = material()
    model = build_model("tiny", vocab_size=len(tokenizer), d_model=32, num_layers=1, seed=1)
    rows = corpora["pairs"][:20]
    found = evaluate(model, tokenizer, rows, "repair", max_length=6)
    assert set(found.scores) == {"bleu", "exact_match", "codebleu"}
    assert found.by_pair["English-German"]["rows"] == 20 and len(found.rows[0]["output"]) >= 0
    candidates = with_distractors(rows, 8)
    assert all(c[0] == r["target"] and len(set(c)) == 8 for c, r in zip(candidates, rows))
    ranked = ranking(model, tokenizer, rows, candidates=8)
    assert ranked["all"]["rows"] == 20 and 0 <= ranked["all"]["top1"] <= ranked["all"]["mrr"] <= 1
    with pytest.raises(ValueError, match="20 different targets; 30 candidates"):
        ranking(model, tokenizer, rows, candidates=30)
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate(model, tokenizer, [], "translate")
    with pytest.raises(ValueError, match="task must be one of"):
        evaluate(model, tokenizer, rows, "sing")


def test_presets():
    paper = CodeTrainConfig()
    assert (paper.batch_size, paper.rows_per_draw, paper.steps) == (3840, 8, 100_000)
    longer = CodeTrainConfig.from_preset("l1024")
    assert (longer.batch_size, longer.rows_per_draw, longer.max_inputs) == (1920, 4, 1024)
    tuned = CodeTrainConfig.from_preset("concode")
    assert (tuned.learning_rate, tuned.epochs, tuned.patience, tuned.directions) == (
        1e-4,
        30,
        3,
        "forward",
    )
    assert json.loads(json.dumps(tuned.to_json()))["betas"] == [0.9, 0.999]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"density": 1.0}, r"density must be in \[0, 1\)"),
        ({"mean_span": 0.5}, "mean_span must be >= 1"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"batch_size": 9}, "must be a multiple of rows_per_draw"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive"),
        ({"directions": "up"}, "directions must be one of"),
        ({"decay_rate": 0.8}, "decay_rate must be in"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(ValueError, match=said):
        CodeTrainConfig.from_preset("small", **changes)


def test_bad_input():
    with pytest.warns(UserWarning, match="overflow in float16"):
        CodeTrainConfig.from_preset("small", mixed_precision="fp16")
    tokenizer, corpora = material()
    model = build_model("tiny", vocab_size=500)
    with pytest.raises(ValueError, match="resize both tables"):
        train(model, tokenizer, corpora, **SMALL)
    model = build_model("tiny", vocab_size=len(tokenizer))
    model.lm_head.weight = model.shared.weight
    with pytest.raises(RuntimeError, match="head shares its memory"):
        train(model, tokenizer, corpora, **SMALL)
    with pytest.raises(ValueError, match="rows must have source and target"):
        task_of([{"text": "x"}])
    with pytest.raises(ValueError, match="has no rows"):
        task_of([])
