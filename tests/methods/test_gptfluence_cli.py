# SPDX-License-Identifier: Apache-2.0
"""``tenfold gptfluence``: all verbs on a tiny model; what they refuse; recordings that go on."""

import json
from pathlib import Path

import gptfluence_models as tiny
import pytest
import torch
from cli_calls import fails, succeeds
from transformers import PreTrainedTokenizerFast

from tenfold.gptfluence import (
    RecordConfig,
    Simulator,
    evaluate,
    make_curricula,
    read_run,
    record_runs,
)
from tenfold.gptfluence.inputs import read_recorded

FEW = [
    "--preset",
    "small",
    "--runs",
    "5",
    "--examples",
    "6",
    "--epochs",
    "2",
    "--batch-size",
    "3",
    "--length",
    "16",
]
FIT = ["--encoder", "bag", "--epochs", "40", "--validation", "1", "--test", "1", "--quiet"]


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model whose tokens are letters, texts, a recording and a simulator."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("gptfluence")
    made = Tokenizer(
        models.WordLevel(
            {chr(97 + i): i for i in range(26)} | {"<e>": 26, "<u>": 27}, unk_token="<u>"
        )
    )
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<e>", unk_token="<u>"
    ).save_pretrained(folder / "base")
    tiny.tiny(2).save_pretrained(folder / "base")
    words = ["abc", "bcd", "cde", "def", "efg", "fgh", "ghi", "hij"]
    lines(
        folder / "train.jsonl",
        [
            {"id": f"e{i}", "prompt": w, "answer": w[::-1], "group": str(i % 2)}
            for i, w in enumerate(words)
        ],
    )
    lines(
        folder / "tests.jsonl",
        [{"id": i, "input": w + w[0], "context": w} for i, w in enumerate(words[:4])],
    )
    record(folder, folder / "data")
    succeeds("gptfluence", "fit", folder / "data", "--out", folder / "sim", *FIT)
    return folder


def record(folder, out, *more):
    return succeeds("gptfluence", "record", "--model", folder / "base", "--data", folder / "train.jsonl", "--tests",
                    folder / "tests.jsonl", "--out", out, *FEW, "--quiet", *more)  # fmt: skip


def test_record(place):
    found = json.loads(record(place, place / "data", "--json"))
    assert len(found["runs"]) == 5
    data = read_recorded(place / "data")
    assert (
        data.runs.y.shape == (5, 5, 4)
        and data.tests[3]["answer"] == "d"
        and data.train["e2"]["group"] == "0"
    )
    run = read_run(place / "data" / "runs" / "003")
    config = RecordConfig.from_json(run.about["config"])
    want = make_curricula(config, ["0", "1"] * 4)[3].order
    assert [[run.train_ids[i] for i in b] for b in run.order[1:].tolist()] == [
        [f"e{i}" for i in b] for b in want.tolist()
    ]
    # Recorded again, nothing is; and more may be added, but not of other settings.
    before = (place / "data" / "runs" / "000" / "curves.safetensors").stat().st_mtime_ns
    record(place, place / "data", "--runs", "6")
    assert (place / "data" / "runs" / "000" / "curves.safetensors").stat().st_mtime_ns == before
    assert (place / "data" / "runs" / "005").is_dir()
    said = fails("gptfluence", "record", "--model", place / "base", "--data", place / "train.jsonl", "--tests",
                 place / "tests.jsonl", "--out", place / "data", *FEW, "--seed", "9", "--quiet")  # fmt: skip
    assert "has a run of other settings" in said
    (place / "data" / "runs" / "005").rename(place / "sixth")


def test_fit(place):
    found = json.loads(succeeds("gptfluence", "fit", place / "data", "--out", place / "other", *FIT, "--json",
                                "--set", "towers=shared", "--order", "2"))  # fmt: skip
    simulator = Simulator.load(place / "other")
    assert (
        simulator.config.order == 2
        and simulator.config.towers == "shared"
        and found["runs"] == ["000", "001", "002", "003"]
    )
    runs = read_recorded(place / "data").runs.take([4])
    assert found["test"]["mse"] == pytest.approx(evaluate(simulator.predict(runs).values, runs).mse)


def test_predict(place):
    run = place / "data" / "runs" / "004"
    simulator, kept = Simulator.load(place / "sim"), read_recorded(place / "data").runs.take([4])
    want = simulator.predict(kept).values[0]
    found = json.loads(succeeds("gptfluence", "predict", place / "sim", "--run", run, "--json"))
    made = torch.tensor([t["trajectory"] for t in found["tests"]]).T
    torch.testing.assert_close(made, want)
    batches = [{"samples_id": [kept.train_ids[i] for i in b]} for b in kept.order[0, 1:].tolist()]
    first = {str(t): float(v) for t, v in zip(kept.test_ids, kept.y[0, 0])}
    (place / "first.json").write_text(json.dumps(first))
    by_file = ["--curriculum", lines(place / "c.jsonl", batches), "--first", place / "first.json"]
    succeeds("gptfluence", "predict", place / "sim", *by_file, "--out", place / "p.jsonl")
    rows = [json.loads(line)["trajectory"] for line in (place / "p.jsonl").read_text().splitlines()]
    torch.testing.assert_close(torch.tensor(rows).T, want)
    gone = json.loads(
        succeeds(
            "gptfluence",
            "predict",
            place / "sim",
            *by_file,
            "--without",
            batches[0]["samples_id"][0],
            "--json",
        )
    )
    assert gone["tests"][0]["trajectory"] != found["tests"][0]["trajectory"]


def test_attribute(place):
    found = json.loads(
        succeeds(
            "gptfluence",
            "attribute",
            place / "sim",
            "--test",
            "1,3",
            "--out",
            place / "a.jsonl",
            "--json",
        )
    )
    scores = [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()]
    simulator = Simulator.load(place / "sim")
    want = simulator.attribute(test=[1, 3])
    torch.testing.assert_close(torch.tensor([list(s["scores"].values()) for s in scores]), want)
    assert found["ends"][0]["id"] == simulator.train.ids[int(want.mean(1).argmin())]
    run = place / "data" / "runs" / "004"
    many = json.loads(
        succeeds(
            "gptfluence",
            "attribute",
            place / "sim",
            "--kind",
            "counterfactual",
            "--run",
            run,
            "--json",
        )
    )
    assert len(many["scores"]) == len(simulator.train.ids) and set(
        many["scores"][0]["scores"]
    ) == set("0123")
    assert "itself" in succeeds("gptfluence", "attribute", place / "sim", "--self")


def test_evaluate_and_plot(place):
    found = json.loads(
        succeeds(
            "gptfluence",
            "evaluate",
            place / "data",
            "--simulator",
            f"ours={place / 'sim'}",
            "--validation",
            "1",
            "--test",
            "1",
            "--out",
            place / "e",
            "--json",
        )
    )
    assert list(found["methods"]) == ["ours", "constant", "mean", "ridge", "similarity"] and found[
        "runs"
    ] == ["004"]
    assert json.loads((place / "e" / "evaluation.json").read_text()) == found["methods"]
    assert Path(found["report"]).is_file() and (place / "e" / "curves-004.png").is_file()
    said = fails(
        "gptfluence",
        "evaluate",
        place / "data",
        "--simulator",
        place / "sim",
        "--validation",
        "1",
        "--test",
        "2",
    )
    assert "was fitted to run '003', which it is to be tested on" in said
    drawn = json.loads(
        succeeds(
            "gptfluence",
            "plot",
            place / "data",
            "--simulator",
            place / "sim",
            "--runs",
            "2",
            "--out",
            place / "p",
            "--json",
        )
    )
    assert drawn["fitted"] == {str(place / "sim"): ["003"]} and Path(drawn["report"]).is_file()


BAD = [
    (["fit", "NOWHERE"], "has no recorded runs"),
    (["fit", "data", "--encoder", "bag", "--metric", "bleu"], "has no metric 'bleu'; it has: loss"),
    (
        ["fit", "data", "--encoder", "bag", "--test", "9"],
        "cannot give 2 for validation, 9 for tests",
    ),
    (
        ["fit", "data", "--encoder", "bag", "--set", "order=0", "--test", "1"],
        "order must be >= 1, got 0",
    ),
    (["fit", "data", "--published"], "has no runs in the published layout"),
    (["predict", "sim"], "give --run, or --curriculum with --first"),
    (["predict", "data", "--run", "data/runs/000"], "has no simulator"),
    (["predict", "sim", "--run", "sim"], "is no recorded run"),
    (["predict", "sim", "--curriculum", "c.jsonl"], "--curriculum needs --first"),
    (
        ["predict", "sim", "--run", "data/runs/000", "--without", "nobody"],
        "there is no example or test 'nobody'",
    ),
    (["attribute", "sim", "--test", "99"], "there is no example or test '99'"),
    (
        ["attribute", "sim", "--kind", "gamma"],
        "kind must be one of alpha, beta, delta, counterfactual",
    ),
    (["attribute", "sim", "--kind", "counterfactual"], "give --run"),
    (
        ["evaluate", "data", "--methods", "magic", "--test", "1"],
        "--methods must be one of constant, mean",
    ),
    (
        [
            "record",
            "--data",
            "train.jsonl",
            "--tests",
            "tests.jsonl",
            "--out",
            "x",
            "--model",
            "base",
            "--examples",
            "99",
            "--quiet",
        ],
        "a run takes 99 examples, there are only 8",
    ),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(a[:3]) for a, _ in BAD])
def test_refusals(place, arguments, words, monkeypatch):
    monkeypatch.chdir(place)
    assert words in fails("gptfluence", *arguments)


def test_the_published_layout(place, tmp_path):
    data = read_recorded(place / "data")
    for run in map(read_run, sorted((place / "data" / "runs").glob("*"))):
        folder = tmp_path / "published" / run.name
        folder.mkdir(parents=True)
        batches = [[run.train_ids[i] for i in b] for b in run.order[1:].tolist()]
        lines(
            folder / "train_samples_id.json",
            [{"step": t + 1, "samples_id": b} for t, b in enumerate(batches)],
        )
        lines(
            folder / "all_loss_trajectory.out",
            [
                {
                    "id": q,
                    "loss_trajectory": [
                        {"step": s, "loss": float(v)}
                        for s, v in enumerate(run.values["loss"][:, q])
                    ],
                }
                for q in range(4)
            ],
        )
    out = succeeds(
        "gptfluence",
        "fit",
        tmp_path / "published",
        "--published",
        "--train-texts",
        place / "train.jsonl",
        "--test-texts",
        place / "tests.jsonl",
        "--out",
        tmp_path / "s",
        *FIT,
    )
    one, two = Simulator.load(tmp_path / "s"), Simulator.load(place / "sim")
    assert "runs that it never saw" in out or "simulator:" in out
    ids = list(data.train)
    torch.testing.assert_close(
        one.factors(train=ids[:2]), two.factors(train=ids[:2]), atol=1e-4, rtol=1e-3
    )


def test_a_killed_recording_goes_on_exactly(tmp_path):
    """Our own loop: killed in the middle of a run, it has the same bits in the end."""
    model, rows, tests = tiny.tiny(3), tiny.rows(12), tiny.rows(3, seed=5)
    config = RecordConfig.from_preset("small", runs=2, examples=8, epochs=2.0, batch_size=4, learning_rate=1e-2,
                                      checkpoint_every=2, every=2)  # fmt: skip
    whole = record_runs(model, rows, tests, tmp_path / "whole", config)

    def watch(run):
        def killed(network, step):
            if run == 1 and step == 3:
                raise KeyboardInterrupt

        return killed

    with pytest.raises(KeyboardInterrupt):
        record_runs(model, rows, tests, tmp_path / "part", config, watch=watch)
    part = record_runs(model, rows, tests, tmp_path / "part", config)
    for a, b in zip(map(read_run, whole), map(read_run, part)):
        assert (
            torch.equal(a.order, b.order)
            and torch.equal(a.values["loss"], b.values["loss"])
            and a.train_ids == b.train_ids
        )
    assert not list((tmp_path / "part").glob("*/work/run-*"))


def test_removed_examples_leave_empty_places(tmp_path):
    """A run without some examples: its other examples count no more, empty steps are not made."""
    from tenfold.gptfluence.metrics import LossMetric
    from tenfold.gptfluence.recorder import Recorder
    from tenfold.gptfluence.recording import record_run

    rows, tests = tiny.rows(6), tiny.rows(3, seed=5)
    config = RecordConfig.from_preset(
        "small", runs=1, examples=6, epochs=1.0, batch_size=2, learning_rate=1e-2
    )
    curriculum = make_curricula(config, 6)[0]
    first, second = curriculum.order[0].tolist(), curriculum.order[1].tolist()
    bare = curriculum.without([*first, second[0]])
    assert bare.steps == [1, 2] and bare.order[1].tolist() == [-1, second[1]]
    model = tiny.tiny(3)
    record_run(
        model, rows, range(6), bare, Recorder(tmp_path / "r", range(3), [LossMetric(tests)]), config
    )
    run = read_run(tmp_path / "r")
    assert [[run.train_ids[i] for i in b if i >= 0] for b in run.order.tolist()] == [
        [],
        second[1:],
        curriculum.order[2].tolist(),
    ]
