# SPDX-License-Identifier: Apache-2.0
"""Recorded runs: what a recorder writes, what it refuses, and the published layout."""

import json

import gptfluence_models as tiny
import pytest
import torch

from tenfold.gptfluence import (
    FunctionMetric,
    LossMetric,
    Recorder,
    RunSet,
    UnknownId,
    read_reference,
    read_run,
)
from tenfold.gptfluence.reference_format import read_samples
from tenfold.gptfluence.runs import Run, check_disjoint


def counter(name="count"):
    """A metric that grows by one with each step of its caller."""
    seen = {"at": 0}
    return seen, FunctionMetric(
        name,
        lambda model, tests: torch.tensor([float(seen["at"] * 10 + t) for t in tests]),
        "0-100",
    )


def drive(folder, steps, model=None, begin=0, finish=True, **options):
    """A plain loop: batch t has the examples a<t> and b<t mod 2>."""
    model = model or torch.nn.Linear(2, 2)
    seen, metric = counter()
    recorder = Recorder(folder, ["x", "y", "z"], [metric], **options)
    with recorder:
        seen["at"] = begin
        recorder.begin(model, begin)
        for t in range(begin, steps):
            seen["at"] = t + 1
            recorder.step(model, [f"a{t}", f"b{t % 2}"])
        if finish:
            recorder.finish(model)
    return recorder


def test_every_step(tmp_path):
    drive(tmp_path / "r", 4)
    run = read_run(tmp_path / "r")
    assert run.order.tolist() == [
        [-1, -1],
        [0, 1],
        [2, 3],
        [4, 1],
        [5, 3],
    ] and run.steps.tolist() == [0, 1, 2, 3, 4]
    assert run.train_ids == ("a0", "b0", "a1", "b1", "a2", "a3") and run.scale("count") == "0-100"
    assert run.values["count"].tolist() == [[10 * s + q for q in range(3)] for s in range(5)]


@pytest.mark.parametrize(
    "initial, steps, want",
    [(True, 7, [0, 3, 6, 7]), (True, 6, [0, 3, 6]), (False, 8, [0, 3, 6, 7])],
)
def test_intervals(tmp_path, initial, steps, want):
    drive(tmp_path / "r", steps, every=3, initial=initial)
    run = read_run(tmp_path / "r")
    assert run.steps.tolist() == want and len(run.order) == steps + initial
    assert run.values["count"][:, 0].tolist() == [10 * (s + (not initial)) for s in want]


def test_subsets(tmp_path):
    drive(tmp_path / "r", 5, subset=1)
    values = read_run(tmp_path / "r").values["count"]
    assert values.isfinite().sum(1).tolist() == [3, 1, 1, 1, 1, 3]
    # Others at each: not always the same one.
    assert len({int(row.isfinite().nonzero()[0]) for row in values[1:-1]}) > 1
    with pytest.raises(
        ValueError, match=r"run 'r': count of test '\w' is nan at step 1; missing=\"mask\""
    ):
        RunSet.of([read_run(tmp_path / "r")])
    assert RunSet.of([read_run(tmp_path / "r")], missing="mask").y.isnan().sum() == 8


def test_a_killed_recorder_goes_on(tmp_path):
    drive(tmp_path / "whole", 9, every=2)
    # Killed after step 7, its checkpoint is of step 4.
    drive(tmp_path / "part", 7, every=2, finish=False)
    drive(tmp_path / "part", 9, begin=4, every=2)
    whole, part = read_run(tmp_path / "whole"), read_run(tmp_path / "part")
    assert torch.equal(whole.order, part.order) and torch.equal(whole.steps, part.steps)
    assert (
        torch.equal(whole.values["count"], part.values["count"])
        and whole.train_ids == part.train_ids
    )


def test_tensors_without_their_json_do_not_count(tmp_path):
    drive(tmp_path / "r", 3, finish=False)
    state = json.loads((tmp_path / "r" / "curves.json").read_text())
    state |= {"batches": 3, "points": 2}
    (tmp_path / "r" / "curves.json").write_text(json.dumps(state))
    run = read_run(tmp_path / "r")
    assert len(run.order) == 3 and run.steps.tolist() == [0, 1]


def test_what_recorders_refuse(tmp_path):
    drive(tmp_path / "r", 3)
    with pytest.raises(ValueError, match="holds a finished run"):
        drive(tmp_path / "r", 3)
    with pytest.raises(ValueError, match="belongs to another run"):
        drive(tmp_path / "r", 3, every=2)
    with pytest.raises(ValueError, match="has 3 recorded steps, fewer than the 5 to go on from"):
        drive(tmp_path / "r", 9, begin=5)
    with pytest.raises(ValueError, match="two metrics are named 'count'"):
        Recorder(tmp_path / "n", [0], [counter()[1], counter()[1]])
    with pytest.raises(ValueError, match="needs tests and metrics"):
        Recorder(tmp_path / "n", [], [counter()[1]])
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        Recorder(tmp_path / "n", [0], [counter()[1]], every=0)
    with pytest.raises(ValueError, match="call begin before"):
        Recorder(tmp_path / "n", [0], [counter()[1]]).step(torch.nn.Linear(1, 1), [0])
    bad = FunctionMetric("m", lambda model, tests: torch.zeros(len(tests) + 1))
    with pytest.raises(ValueError, match=r"the metric 'm' must give \[1\], got shape \[2\]"):
        Recorder(tmp_path / "m", [0], [bad]).begin(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"ids are integers or strings, got 1\.5"):
        recorder = Recorder(tmp_path / "k", [0], [counter()[1]], initial=False)
        recorder.begin(torch.nn.Linear(1, 1))
        recorder.step(torch.nn.Linear(1, 1), [1.5])
    with pytest.raises(ValueError, match="is no recorded run"):
        read_run(tmp_path / "none")


class TestLossMetric:
    def test_is_the_mean_over_target_tokens(self):
        model, given = tiny.tiny().eval(), tiny.rows(5)
        given["labels"][2, :7] = -100
        made = LossMetric(given, batch_size=2)(model, [4, 2, 0])["loss"]
        with torch.no_grad():
            want = [
                float(model(given["input_ids"][i : i + 1], labels=given["labels"][i : i + 1]).loss)
                for i in (4, 2, 0)
            ]
        torch.testing.assert_close(made, torch.tensor(want))

    def test_rows_of_any_length(self):
        whole = tiny.rows(3)
        lists = [
            {
                "input_ids": whole["input_ids"][i, : 5 + i].tolist(),
                "labels": whole["labels"][i, : 5 + i].tolist(),
            }
            for i in range(3)
        ]
        model = tiny.tiny().eval()
        single = torch.cat([LossMetric([row])(model, [0])["loss"] for row in lists])
        torch.testing.assert_close(LossMetric(lists)(model, [0, 1, 2])["loss"], single)

    def test_refuses_a_test_without_a_target(self):
        given = tiny.rows(2)
        given["labels"][1, 1:] = -100
        with pytest.raises(ValueError, match="test number 1 has no target token"):
            LossMetric(given)


def test_measuring_changes_nothing(tmp_path):
    model = tiny.tiny(dropout=0.1)
    model.model.layers[0].eval()
    noise = FunctionMetric("noise", lambda m, tests: torch.rand(len(tests)))
    recorder = Recorder(tmp_path / "r", range(4), [LossMetric(tiny.rows(4)), noise])
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    recorder.begin(model)
    assert torch.equal(torch.rand(3), want)
    assert model.training and model.lm_head.training and not model.model.layers[0].training
    assert all(p.grad is None for p in model.parameters())


def run(
    name="r",
    order=((0, 1), (1, 0)),
    y=((1.0, 2.0), (3.0, 4.0)),
    steps=None,
    tests=(0, 1),
    scale="nats",
    metric="loss",
    ids=(0, 1),
):
    values = torch.tensor(y)
    return Run(
        name,
        order,
        torch.arange(len(values)) if steps is None else torch.tensor(steps),
        {metric: values},
        ids,
        tests,
        {metric: scale},
    )


BAD = [
    (lambda: run(order=[[0.5, 1.0]]), TypeError, "run 'r': order must hold integers, got 0.5"),
    (
        lambda: run(order=torch.zeros(2, 2)),
        TypeError,
        "run 'r': order must hold integers, got torch.float32",
    ),
    (
        lambda: run(order=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        r"order must be \[T, B\] or \[R, T, B\], got shape \[2\]",
    ),
    (lambda: run(order=[[0, -2], [1, 0]]), ValueError, "order must be >= -1 .* got -2"),
    (lambda: run(order=[[0, 7], [1, 0]]), ValueError, "order has example 7, train_ids only 2"),
    (
        lambda: run(steps=[0]),
        ValueError,
        "run 'r': a trajectory needs at least 2 measurements, got 1",
    ),
    (lambda: run(steps=[1, 1]), ValueError, "run 'r': steps must increase, but 1 is followed by 1"),
    (
        lambda: run(steps=[0, 5]),
        ValueError,
        "run 'r': steps 0 to 5 are not all of the curriculum's 2 steps",
    ),
    (
        lambda: run(tests=(0, 1, 2)),
        ValueError,
        r"run 'r': loss must be \[S, Q\] = \[2, 3\], got shape \[2, 2\]",
    ),
    (lambda: run(ids=(0, 0)), ValueError, "run 'r': train_ids: the id 0 comes twice"),
    (lambda: RunSet.of([]), ValueError, "there are no runs"),
    (lambda: RunSet.of([run(), run()]), ValueError, "two runs are named 'r'"),
    (
        lambda: RunSet.of([run("a"), run("b", scale="bits")]),
        ValueError,
        "loss is on the scale 'bits' in run 'b' and on 'nats' in run 'a'",
    ),
    (
        lambda: RunSet.of([run("a"), run("b", metric="bleu")]),
        ValueError,
        "run 'b' has no metric 'loss'; it has: bleu",
    ),
    (
        lambda: RunSet.of([run("a"), run("b", tests=(0, 9))]),
        ValueError,
        "run 'b' has other tests than run 'a'",
    ),
    (
        lambda: RunSet.of([run("a"), run("b", order=[[0, 1]] * 3, y=[[1.0, 1.0]] * 3)]),
        ValueError,
        "run 'a' was measured after 2 steps",
    ),
    (
        lambda: RunSet.of([run("a"), run("b", order=[[0, 1]] * 3)]),
        ValueError,
        r"runs have \[2, 3\] steps; pass pad=True",
    ),
    (
        lambda: RunSet.of([run(y=[[1.0, torch.inf], [1.0, 1.0]])]),
        ValueError,
        "run 'r': loss of test 1 is inf at step 0",
    ),
    (
        lambda: RunSet.of([run()], train_ids=[0, 5]),
        UnknownId,
        "training examples: no row for the id 1",
    ),
    (
        lambda: RunSet.of([run()], missing="zero"),
        ValueError,
        "missing must be one of raise, mask, got 'zero'",
    ),
    (lambda: RunSet.of([run()], pad=True), ValueError, 'padded only with missing="mask"'),
    (
        lambda: RunSet.of([run()]).split(1, 1),
        ValueError,
        "1 runs cannot give 1 for validation, 1 for tests and any to fit",
    ),
    (
        lambda: check_disjoint(RunSet.of([run()]), RunSet.of([run("again")]), "validation"),
        ValueError,
        "training and validation runs overlap: r = again",
    ),
]


@pytest.mark.parametrize("make, kind, words", BAD, ids=[w[:40] for _, _, w in BAD])
def test_bad_runs(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_unknown_ids_are_key_errors():
    assert issubclass(UnknownId, KeyError) and str(UnknownId("no row for 3")) == "no row for 3"


def test_runs_of_different_lengths_are_padded():
    long = run("b", order=[[0, 1], [1, 1], [0, 0]], y=[[1.0, 1.0]] * 3)
    made = RunSet.of([run("a"), long], missing="mask", pad=True)
    assert (
        made.order[0].tolist() == [[0, 1], [1, 0], [-1, -1]]
        and made.y[0, 2].isnan().all()
        and len(made.steps) == 3
    )


def test_ids_of_runs_are_joined():
    first = run("a", ids=("p", "q"))
    second = run("b", order=[[0, 1], [1, 2]], ids=("q", "r", "p"))
    made = RunSet.of([first, second])
    assert made.train_ids == ("p", "q", "r") and made.order[1].tolist() == [[1, 2], [2, 0]]


class TestBlocksAndPairs:
    """Section 3.5: p = ((i - 1) // K) K, c = p + K or the last."""

    def made(self, every=3, length=8):
        steps = sorted({*range(0, length, every), length - 1})
        order = torch.arange(length * 2).view(1, length, 2)
        y = torch.rand(1, len(steps), 2)
        return RunSet(
            ("r",),
            "loss",
            "",
            order.to(torch.int32),
            torch.tensor(steps),
            y,
            tuple(range(16)),
            (0, 1),
        )

    def test_pairs(self):
        runs = self.made()
        batches, block = runs.pairs()
        for i in range(1, 8):
            p = (i - 1) // 3 * 3
            c = min(p + 3, 7)
            at = int(block[i - 1])
            assert (int(runs.steps[at]), int(runs.steps[at + 1])) == (p, c)
            assert torch.equal(batches[0, i - 1], runs.order[0, i])

    def test_blocks(self):
        made = self.made().blocks()
        assert made[0].tolist() == [
            [2, 3, 4, 5, 6, 7],
            [8, 9, 10, 11, 12, 13],
            [14, 15, -1, -1, -1, -1],
        ]
        assert torch.equal(self.made(1).blocks(), self.made(1).order[:, 1:])


def write_published(folder, order, values, steps=None, key="loss", first=1):
    folder.mkdir(parents=True)
    steps = steps or list(range(first, first + len(order)))
    (folder / "train_samples_id.json").write_text(
        "".join(
            json.dumps({"step": first + t, "samples_id": b}) + "\n" for t, b in enumerate(order)
        )
    )
    lines = [
        {"id": q, "loss_trajectory": [{"step": s, "loss": v} for s, v in zip(steps, row)]}
        for q, row in values.items()
    ]
    (folder / f"all_{key}_trajectory.out").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    return folder


class TestPublishedLayout:
    def test_is_read(self, tmp_path):
        folder = write_published(
            tmp_path / "1", [[7, 3], [3, 9], [7]], {200: [1.0, 1.5, 1.5], 201: [2.0, 2.5, 2.25]}
        )
        made = read_reference(folder)
        assert (
            made.train_ids == (7, 3, 9)
            and made.test_ids == (200, 201)
            and made.scale("loss") == "nats"
        )
        assert made.order.tolist() == [[0, 1], [1, 2], [0, -1]] and made.steps.tolist() == [0, 1, 2]
        assert made.values["loss"][:, 1].tolist() == [2.0, 2.5, 2.25]

    def test_with_gaps_and_before_the_first_step(self, tmp_path):
        folder = write_published(tmp_path / "1", [[7], [3], [9]], {0: [1.0, 0.5]}, steps=[0, 3])
        made = read_reference(folder)
        assert made.order.tolist() == [[-1], [0], [1], [2]] and made.steps.tolist() == [0, 3]
        bleu = write_published(tmp_path / "2", [[7], [3]], {0: [40.0, 41.0]}, key="bleu")
        assert read_reference(bleu, "bleu").scale("bleu") == "0-100"

    @pytest.mark.parametrize("values, steps, words", [
        ({5: [1.0]}, [1], "run 'bad', test 5: the trajectory needs 2 steps, has 1"),
        ({5: [1.0, 1.0]}, [2, 2], "run 'bad', test 5: the trajectory steps must increase, but 2 does not"),
        ({5: [1.0, 1.0]}, [1, 9], "run 'bad', test 5: measured at step 9, which the curriculum does not have"),
        ({5: [1.0, 1.0], 6: [1.0]}, [1, 2], "run 'bad', test 6: the trajectory needs 2 steps"),
    ])  # fmt: skip
    def test_bad(self, tmp_path, values, steps, words):
        folder = write_published(tmp_path / "bad", [[1], [2]], values, steps=steps)
        with pytest.raises(ValueError, match=words):
            read_reference(folder)

    def test_samples(self, tmp_path):
        file = tmp_path / "s.jsonl"
        file.write_text(
            '{"id": 3, "input": "Q: x A: y", "context": "Q: x A: "}\n\n'
            '{"id": "k", "prompt": "a", "answer": "b", "group": "g"}\n'
        )
        made = read_samples(file)
        assert (
            made[3] == {"prompt": "Q: x A: ", "answer": "y", "text": "Q: x A: y"}
            and made["k"]["group"] == "g"
        )
        for text, words in (
            ('{"id": 1}', "line 1: needs 'prompt'"),
            ("[1]", "line 1: no JSON object"),
            ("", "has no examples"),
            ('{"id": 1, "prompt": "", "answer": ""}\n' * 2, "line 2: the id 1 comes twice"),
            ('{"input": "ab", "context": "x"}', "input does not begin with context"),
        ):
            file.write_text(text)
            with pytest.raises(ValueError, match=words):
                read_samples(file)


class TestGeneration:
    def made(self, **options):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        from tenfold.gptfluence import GenerationMetric

        made = Tokenizer(
            models.WordLevel(
                {chr(97 + i): i for i in range(26)} | {"<e>": 26, "<u>": 27}, unk_token="<u>"
            )
        )
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", unk_token="<u>")
        return GenerationMetric(
            tokenizer,
            ["abc", "z"],
            ["x y z", "the cat sat on the mat"],
            max_new_tokens=6,
            **options,
        )

    def test_scores_are_those_of_the_packages(self, monkeypatch):
        from sacrebleu import sentence_bleu

        metric = self.made()
        monkeypatch.setattr(
            metric,
            "generate",
            lambda model, tests: ["the cat sat on a mat" if t else "x y z" for t in tests],
        )
        found = metric(None, [1, 0])
        want = sentence_bleu("the cat sat on a mat", ["the cat sat on the mat"]).score
        assert found["bleu"].tolist() == pytest.approx(
            [want, sentence_bleu("x y z", ["x y z"]).score]
        )
        assert found["rougeL"].tolist() == pytest.approx([10 / 12, 1.0]) and metric.scales == {
            "bleu": "0-100",
            "rougeL": "0-1",
        }

    def test_texts_are_drawn_alike_and_alone(self):
        model, metric = tiny.tiny().eval(), self.made(batch_size=1)
        one = metric.generate(model, [0, 1])
        torch.rand(3)
        assert one == metric.generate(model, [0, 1]) and metric.generate(model, [1]) == one[1:]
        greedy = self.made(temperature=0).generate(model, [0])
        with torch.no_grad():
            ids = torch.tensor([[0, 1, 2]])
            want = int(model(ids).logits[0, -1].argmax())
        assert greedy[0][:1] in (chr(97 + want) if want < 26 else "", "")

    def test_refusals(self, monkeypatch):
        import importlib.util

        from tenfold.gptfluence import GenerationMetric

        with pytest.raises(ValueError, match="there are 1 prompts and 2 references"):
            GenerationMetric(None, ["a"], ["b", "c"])
        with pytest.raises(ValueError, match="measures must be one of bleu, rougeL, got 'meteor'"):
            GenerationMetric(None, ["a"], ["b"], ["meteor"])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ModuleNotFoundError,
            match=r"bleu needs sacrebleu; install it with `pip install 'tenfold\[gptfluence\]'`",
        ):
            GenerationMetric(None, ["a"], ["b"])
