# SPDX-License-Identifier: Apache-2.0
"""Evaluation: accuracy by tool with ties and missing rewards, calibration, RewardBench's forms, choices, best of n."""

import json
import math

import pytest
from themis_judges import CALL, Gives, Lengths, judgement

from tenfold.themis.benchmarks import (
    REWARDBENCH,
    Choice,
    Item,
    item_score,
    multiple_choice,
    read_choices,
    read_rewardbench,
    rewardbench,
    ties_score,
)
from tenfold.themis.calibration import calibration
from tenfold.themis.data import Candidate, Pair, read_tara
from tenfold.themis.evaluate import Accuracy, best_of_n, evaluate, judge_all
from tenfold.themis.judgement import CallRecord
from tenfold.themis.scorer import Scorer
from tenfold.themis.traces import Query, Step, Trace

NAN = math.nan


def pair(number, chosen, rejected, source="calculator", calls=0):
    """Answers whose lengths are their rewards by the judge ``Lengths``."""
    trace = Trace(tuple(Step("", "calculator", "", "") for _ in range(calls)))
    both = Candidate("x" * chosen, trace, 1), Candidate("y" * rejected, trace, -1)
    return Pair(f"p{number}", "q", None, *both, source, {"test_list": [number]})


class TestAccuracy:
    PAIRS = (
        pair(0, 3, 1),
        pair(1, 2, 2),
        pair(2, 1, 4),
        pair(3, 5, 1, "code"),
        pair(4, 6, 2, "code"),
    )

    def test_by_source(self):
        found = evaluate(Lengths(), self.PAIRS).accuracy()
        assert list(found) == ["calculator", "code", "all"]
        assert found["calculator"] == Accuracy(3, 1, 1, 0) and found["code"] == Accuracy(2, 2, 0, 0)
        assert found["all"] == Accuracy(5, 3, 1, 0)
        estimate = found["all"].estimate
        assert estimate.value == 0.6 and (estimate.low, estimate.high) == pytest.approx(
            (0.2307, 0.8824), abs=1e-4
        )

    def test_missing_is_wrong(self):
        judge = Gives({"xxx": 1.0, "y": NAN, "xx": 2.0, "yy": 1.0, "x": NAN, "yyyy": NAN})
        assert evaluate(judge, self.PAIRS[:3]).accuracy()["all"] == Accuracy(3, 1, 0, 2)
        assert Accuracy.of([1.0, -1.0, 0.0, -0.0, NAN]) == Accuracy(5, 1, 2, 1)

    def test_examples_and_batches(self):
        judge, told = Lengths(), []
        found = evaluate(judge, self.PAIRS, batch_size=4, step=told.append)
        assert told == [4, 4, 2] and [len(b) for b in judge.batches] == told
        asked = [a for batch in judge.batches for a in batch]
        assert asked == sorted(asked, key=len)  # of like length together
        assert {tuple(e["test_list"]) for e in judge.examples} == {(i,) for i in range(5)}
        assert all(e["answer"] == a for e, a in zip(judge.examples, asked))
        assert [p.chosen.reward for p in found.pairs] == [3, 2, 1, 5, 6]

    def test_kinds_of_judges(self):
        want = [2, 0, -3, 4, 4]
        with Scorer(Lengths(), max_wait=0.0) as scorer:
            for judge in (scorer, Lengths(), lambda queries: [len(q.answer) for q in queries]):
                assert [p.difference for p in evaluate(judge, self.PAIRS).pairs] == want
        assert math.isnan(judge_all(lambda queries: [None], [Query("q", "a")])[0].reward)
        with pytest.raises(TypeError, match="judge must be a scorer, a tool loop or a function"):
            evaluate(3, self.PAIRS)
        with pytest.raises(ValueError, match="the judge gave 1 judgements of 10 answers"):
            evaluate(lambda queries: [1.0], self.PAIRS)
        with pytest.raises(ValueError, match="pairs is empty"):
            evaluate(Lengths(), [])

    def test_swapped(self):
        assert evaluate(Lengths(), self.PAIRS, swap=True).swapped == 1.0
        assert evaluate(Lengths(), self.PAIRS).swapped is None

        class Position(Lengths):
            """Prefers what comes first, as a judge that leaks from row to row would."""

            def judge(self, queries, examples=None, *, deadlines=None, seed=0):
                return [judgement(float(-i)) for i in range(len(queries))]

        assert evaluate(Position(), [pair(i, 3, 3) for i in range(4)], swap=True).swapped == 0.0


class TestCalls:
    def test_what_tools_did(self):
        slow = CallRecord("calculator", "", "failed", "timeout", 0.75, True)
        judge = Gives(
            {"x": 1.0, "y": 0.0}, [CALL, slow, CallRecord("other", "", "", "unknown_tool", 0.0)]
        )
        found = evaluate(judge, [pair(0, 1, 1, calls=2)])
        calls = found.calls()
        assert list(calls) == ["calculator", "other"] and calls["calculator"].count == 4
        assert (
            calls["calculator"].status == {"ok": 2, "timeout": 2}
            and calls["calculator"].cached == 2
        )
        assert calls["calculator"].seconds == 0.5
        assert found.call_rate() == (3.0, 2.0) and found.call_agreement() == 0.0
        assert found.finishes() == {"rationale": 2}
        assert evaluate(Gives({}, [CALL]), [pair(0, 1, 1, calls=1)]).call_agreement() == 1.0

    def test_json(self):
        found = evaluate(
            Gives({"x": 1.5}, [CALL]), [pair(0, 1, 1), pair(1, 2, 2, "code")], name="tiny"
        )
        made = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert made["accuracy"]["all"]["missing"] == 2 and made["accuracy"]["code"]["value"] == 0
        assert made["pairs"][0] == {"id": "p0", "source": "calculator", "rewards": [1.5, None],
                                    "finish": ["rationale", "rationale"]}  # fmt: skip
        assert made["calibration"] is None and made["name"] == "tiny"


class TestCalibration:
    def test_by_hand(self):
        """Confidences .731 (right), .731 (wrong), .881 (right), .5 (a tie: half right); 5 bins of 0.1."""
        found = calibration([1.0, -1.0, 2.0, 0.0, NAN], bins=5)
        assert [(b.low, b.count, b.accuracy) for b in found.bins] == [
            (0.5, 1, 0.5), (pytest.approx(0.7), 2, 0.5), (pytest.approx(0.8), 1, 1.0)
        ]  # fmt: skip
        assert found.bins[1].confidence == pytest.approx(0.731059) and found.count == 4
        assert found.ece == pytest.approx((0 + 2 * 0.231059 + 0.119203) / 4, abs=1e-6)
        assert found.nll == pytest.approx((0.313262 + 1.313262 + 0.126928 + 0.693147) / 4, abs=1e-6)
        assert found.brier == pytest.approx(
            (0.268941**2 + 0.731059**2 + 0.119203**2 + 0.25) / 4, abs=1e-6
        )

    def test_nll_is_the_ranking_loss(self):
        assert calibration([1.0, -0.3]).nll == pytest.approx(0.583808, abs=1e-6)

    def test_extremes(self):
        found = calibration([1000.0, -1000.0, 1e300])
        assert found.bins[0].confidence == 1.0 and found.bins[0].count == 3
        assert found.nll == pytest.approx(1000 / 3) and found.ece == pytest.approx(1 / 3)

    def test_temperature(self):
        """Differences of +-1, three of four right: the best T makes sigmoid(1 / T) 0.75."""
        found = calibration([1.0, 1.0, 1.0, -1.0])
        assert 1 / (1 + math.exp(-1 / found.temperature)) == pytest.approx(0.75, abs=1e-6)
        assert calibration([1.0, -1.0]).temperature == math.inf
        assert calibration([1.0, 2.0]).temperature == 0.0
        assert calibration([-1.0, -2.0]).temperature == math.inf

    def test_refused(self):
        with pytest.raises(ValueError, match="differences holds no numbers"):
            calibration([NAN])
        with pytest.raises(ValueError, match="bins must be >= 1"):
            calibration([1.0], 0)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class TestRewardBench:
    @pytest.mark.parametrize(
        "scores, chosen, wrong, share",
        [
            ([2, 1], 1, 1, 1), ([1, 2], 1, 0, 0), ([1, 1], 1, 0, 0.5), ([1, NAN], 1, 0, 0), ([NAN, 1], 1, 0, 0),
            ([3, 1, 2, 0], 1, 1, 1), ([3, 3, 2, 3], 1, 0, pytest.approx(1 / 3)), ([3, 1, 4], 1, 0, 0),
            ([1, 3, 2], 2, 1, 1), ([3, 3, 2], 2, 1, 1), ([1, 3, 3], 2, 0, 0.5),
        ],
    )  # fmt: skip
    def test_items(self, scores, chosen, wrong, share):
        assert item_score(scores, chosen) == wrong and item_score(scores, chosen, "share") == share

    def test_sections(self, tmp_path):
        """Chat: 3 of 4 over two subsets; Reasoning: math-prm counts 984 against two items of code."""
        rows = [
            {"prompt": "p", "chosen": "xx", "rejected": "y", "subset": "alpacaeval-easy"},
            {"prompt": "p", "chosen": "xx", "rejected": "yy", "subset": "alpacaeval-easy"},
            {"prompt": [{"role": "user", "content": "p"}], "subset": "mt-bench-easy",
             "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "xxx"}], "rejected": "yy"},
            {"prompt": "p", "chosen": "xxx", "rejected": ["y", "yy"], "subset": "mt-bench-easy", "id": 7},
            {"prompt": "p", "chosen": "xx", "rejected": "y", "subset": "math-prm"},
            {"prompt": "p", "chosen": "x", "rejected": "yy", "subset": "hep-rust"},
            {"prompt": "p", "chosen": "x", "rejected": "yy", "subset": "hep-rust"},
            {"prompt": "p", "chosen": "xx", "rejected": "y", "subset": "mine"},
        ]  # fmt: skip
        items = read_rewardbench(write(tmp_path / "rb.jsonl", rows))
        assert items[3] == Item("7", "mt-bench-easy", "p", ("xxx", "y", "yy"), 1)
        found = rewardbench(Lengths(), items)
        assert found.subsets["alpacaeval-easy"] == 0.5 and found.counts["mt-bench-easy"] == 2
        assert found.sections == {"Chat": 0.75, "Reasoning": pytest.approx(984 / 986), "mine": 1.0}
        assert found.overall == pytest.approx((0.75 + 984 / 986 + 1) / 3) and found.ties == 1
        assert rewardbench(Lengths(), items, ties="share").sections["Chat"] == 0.875
        other = rewardbench(
            Lengths(), items, sections={"A": ("hep-rust", "mine")}, weights={"mine": 6}
        )
        assert other.sections["A"] == pytest.approx(6 / 8)
        assert sum(map(len, REWARDBENCH.values())) == 23
        (tmp_path / "list.json").write_text(json.dumps(rows))
        assert read_rewardbench(tmp_path / "list.json") == items

    def test_ties(self):
        """Margins and spreads by hand: ref 2.0; tied margin 1.5, spread 0.5, and margin -1, spread 1."""
        items = [Item(i, "Ties", "q", tuple("abc"[:n]), n - 1)
                 for i, n in (("ref:1", 2), ("tied:1", 3), ("ref:2", 2), ("tied:2", 3))]  # fmt: skip
        scores = [[3.0, 1.0], [3.0, 2.5, 1.0], [2.0, 0.0], [2.0, 1.0, 2.0]]
        hints = (math.tanh(1.5 / 0.5 - 1) + math.tanh(-1 / 1 - 1)) / 2
        assert ties_score(items, scores) == pytest.approx(
            0.3 * 0.5 + 0.3 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * hints
        )
        even = ties_score(items[:2], [[3.0, 1.0], [3.0, 3.0, 1.0]])
        assert even == pytest.approx(1.01)
        missing = ties_score(items[:2], [[3.0, NAN], [3.0, 3.0, 1.0]])
        assert missing == pytest.approx(0.3 + 0.2 - 0.01)
        with pytest.raises(ValueError, match="must be as ref:3 or tied:3, got '5'"):
            ties_score([Item("5", "Ties", "q", ("a", "b"), 1)], [[1.0, 0.0]])
        with pytest.raises(ValueError, match="needs prompts ref:N and tied:N"):
            ties_score(items[:1], scores[:1])

    @pytest.mark.parametrize(
        "row, message",
        [
            (
                {"prompt": "p", "chosen": "a"},
                r"row 1 needs rejected; it has \['chosen', 'prompt'\]",
            ),
            (
                {"prompt": 3, "chosen": "a", "rejected": "b"},
                "row 1: a prompt must be a text or a chat",
            ),
            (
                {"prompt": "p", "chosen": [], "rejected": "b"},
                "row 1: chosen must be a text, a list",
            ),
            ([1], "row 1 must be an object, got list"),
        ],
    )
    def test_bad_rows(self, tmp_path, row, message):
        path = tmp_path / "rb.jsonl"
        path.write_text(json.dumps(row) if isinstance(row, dict) else json.dumps([row]))
        with pytest.raises(ValueError, match=message):
            read_rewardbench(path)

    def test_bad_files(self, tmp_path):
        path = tmp_path / "x"
        for text, message in (
            ("", "is empty"),
            ("{}\n{", "line 2 is not JSON"),
            ("[3", "is not JSON"),
        ):
            path.write_text(text)
            with pytest.raises(ValueError, match=message):
                read_rewardbench(path)
        with pytest.raises(ValueError, match="items is empty"):
            rewardbench(Lengths(), [])
        with pytest.raises(ValueError, match="ties must be one of wrong, share"):
            rewardbench(Lengths(), [Item("1", "s", "q", ("a", "b"), 1)], ties="half")


class TestChoices:
    def test_both_forms(self, tmp_path):
        rows = [
            {"id": "t0", "question": "a?", "answer": "xxx", "label": 1, "root": 0},
            {"question": "b?", "choices": ["x", "xx", "yyy"], "label": 2},
            {"id": "t1", "question": "a?", "answer": "yy", "label": 0, "root": 0},
            {"question": "c?", "choices": ["x", "yy"], "label": "x"},
            {"question": "d?", "choices": ["x", "yyy", "zzz"], "label": [0, 1, 1]},
        ]
        found = read_choices(write(tmp_path / "c.jsonl", rows))
        assert found == [
            Choice("b?", ("x", "xx", "yyy"), frozenset({2})), Choice("c?", ("x", "yy"), frozenset({0})),
            Choice("d?", ("x", "yyy", "zzz"), frozenset({1, 2})), Choice("a?", ("xxx", "yy"), frozenset({0})),
        ]  # fmt: skip
        # c: the longer one is wrong; d: a tie at the top.
        estimate = multiple_choice(Lengths(), found)
        assert estimate.value == 0.5 and estimate.count == 4
        assert multiple_choice(Gives({"xxx": 1.0}), found[3:]).value == 0  # the other is missing

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"choices": ["a"], "label": 0}, "needs text in question"),
            ({"question": "q", "answer": "a", "label": 2}, "needs choices and label, or an answer"),
            (
                {"question": "q", "choices": ["a", "b"], "label": 2},
                "label must be the number or text",
            ),
            (
                {"question": "q", "choices": ["a", "b"], "label": True},
                "label must be the number or text",
            ),
            ({"question": "q", "choices": ["a", 3], "label": 0}, "choices must be texts"),
            ({"question": "q", "choices": ["a", "b"], "label": [1, 1]}, "has 2 right of 2"),
            ({"question": "q", "answer": "a", "label": 1}, "has 1 right of 1"),
        ],
    )
    def test_refused(self, tmp_path, row, message):
        with pytest.raises(ValueError, match=message):
            read_choices(write(tmp_path / "c.jsonl", [row]))
        with pytest.raises(ValueError, match="choices is empty"):
            multiple_choice(Lengths(), [])


class TestOutOfDomain:
    def test_pairs_without_traces(self, tmp_path):
        """TARA's Retarded-bar has none, HH-RLHF the trace without a tool."""
        side = {"answer": "x", "score": 1}
        none = {
            "actions": "Thought: Do I need to use a tool? No\nFinished.",
            "score_agent": {"explanation": "e"},
        }
        rows = [
            {"id": "bar_0", "question": "q", "pos_answer": side, "neg_answer": {"answer": "yy", "score": -1}},
            {"id": "hh_0", "question": "q", "pos_answer": {"answer": "xxx", "score": 1.0} | none,
             "neg_answer": {"answer": "y", "score": -1.0} | none},
        ]  # fmt: skip
        pairs = read_tara(write(tmp_path / "ood.json", rows), need_traces=False)
        assert evaluate(Lengths(), pairs).accuracy()["all"] == Accuracy(2, 1, 0, 0)


class TestBestOfN:
    def test_best_and_curve(self):
        found = best_of_n(Lengths(), ["p", "q"], [["a", "aaa", "aa"], ["bb", "b", "bb"]])
        assert found.best() == [("aaa", 3.0), ("bb", 2.0)] and found.best(1) == [
            ("a", 1.0),
            ("bb", 2.0),
        ]
        assert found.curve((1, 3))[3][0] == 2.5 and found.curve((1,))[1][0] == pytest.approx(11 / 6)

    def test_missing_is_never_best(self):
        found = best_of_n(Gives({"b": -3.0, "c": -2.0}), ["p"], [["a", "b", "c"]])
        assert found.scores.tolist() == [[-3, -3, -2]] and found.best() == [("c", -2.0)]
        with pytest.raises(ValueError, match=r"no answer to prompt 1 got a reward \(rationale\)"):
            best_of_n(Gives({"a": 1.0}), ["p", "q"], [["a"], ["b"]])
        with pytest.raises(
            ValueError,
            match=r"equally many for each of 1 prompts, got 2 rows of \[1\]",
        ):
            best_of_n(Lengths(), ["p"], [["a"], ["b"]])
