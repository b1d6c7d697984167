# SPDX-License-Identifier: Apache-2.0
"""TARA's layout read and written, and what is wrong with a line; pairs made by rules."""

import json

import pytest
import themis_cases as cases

from tenfold.themis.data import Candidate, Pair, Pairs, parse_actions, read_tara, write_tara
from tenfold.themis.traces import NO_TOOL, Step, Trace

CALL = {"Thought": "t", "Action": "calculator", "Action Input": "<<1=1>>1", "Observation": "right"}
TEXT = (
    "Thought: a\nAction: x.y\nAction Input: 1, 2\nObservation: o1\n"
    "Thought: \nb\n\nAction: z\nAction Input: 3\nObservation: o2\nlast: 2"
)


def side(score, answer="", **changes):
    made = {"answer": f"answer {score}{answer}", "score": score, "actions": CALL,
            "score_agent": {"explanation": " because \n", "score": str(score)}}  # fmt: skip
    return made | changes


def row(**changes):
    return {
        "id": "calculator_test_0",
        "question": "q?",
        "pos_answer": side(1),
        "neg_answer": side(-1.0),
    } | changes


def read(*rows, **options):
    return read_tara([json.dumps(r) for r in rows], **options)


class TestRead:
    def test_one_call(self):
        (pair,) = read(row(test_list=["assert 1"], context="c"))
        trace = Trace((Step("t", "calculator", "<<1=1>>1", "right"),), None, "because")
        good, bad = (Candidate(f"answer {s}", trace, float(s)) for s in (1, -1.0))
        tests = {"test_list": ["assert 1"]}
        assert pair == Pair("calculator_test_0", "q?", "c", good, bad, "calculator", tests)
        assert pair.example("a") == {"id": "calculator_test_0", "question": "q?", "answer": "a", "context": "c",
                                     "test_list": ["assert 1"]}  # fmt: skip
        assert [q.answer for q, _ in pair.rows()] == ["answer 1", "answer -1.0"]
        assert (
            "context" not in read(row())[0].example("a")
            and read(row(context=None))[0].context is None
        )

    def test_texts_of_calls(self):
        assert parse_actions(TEXT) == (
            (Step("a", "x.y", "1, 2", "o1"), Step("b", "z", "3", "o2\nlast: 2")),
            None,
        )
        assert parse_actions("Thought: Do I need to use a tool? No\nFinished.") == ((), NO_TOOL)
        steps, closing = parse_actions(
            TEXT + "\nThought: \nI know.\nDo I need to use a tool? No\nFinished.\n\n"
        )
        assert len(steps) == 2 and closing == "I know.\nDo I need to use a tool? No"
        assert parse_actions("Thought: a\n\nThought: b\nFinished") == ((), "a\n\nThought: b")
        assert parse_actions("Thought: \nAction: \nAction Input:\nObservation:")[0] == (
            Step("", "", "", ""),
        )

    def test_sources(self):
        named = lambda name, **c: read(row(id=name, **c))[0].source  # noqa: E731
        want = {"calculator": "calculator", "code": "code", "mlqa": "translator", "calendar": "calendar",
                "weather": "weather", "wikisearch": "search", "webgpt": "google", "multi_tools": "multi"}  # fmt: skip
        assert {n: named(f"{n}_test_3") for n in want} == want
        assert named("x", source="mine") == "mine" and named("x") == "calculator"
        days = side(1, actions=CALL | {"Action": "Calendar.week_day"})
        assert (
            named("x", pos_answer=days, neg_answer=side(0, actions=days["actions"])) == "calendar"
        )
        both = side(1, actions=TEXT)
        assert named("x", pos_answer=both, neg_answer=side(0, actions=TEXT)) == "multi"
        none = "Thought: No\nFinished."
        assert (
            named("x", pos_answer=side(1, actions=none), neg_answer=side(0, actions=none)) == "none"
        )

    def test_files(self, tmp_path):
        path = tmp_path / "tara.json"
        path.write_text("\n" + json.dumps(row()) + "\n\n" + json.dumps(row(id="b")) + "\n")
        found = read_tara(path)
        assert (
            isinstance(found, Pairs)
            and [p.id for p in found] == ["calculator_test_0", "b"]
            and not found.skipped
        )
        assert read_tara(str(path)) == found
        with pytest.raises(FileNotFoundError):
            read_tara(tmp_path / "none")

    def test_without_traces(self):
        bare = row(pos_answer={"answer": "a", "score": 1}, neg_answer={"answer": "b", "score": -1})
        with pytest.raises(ValueError, match="pos_answer: the key 'actions' is missing"):
            read(bare)
        (pair,) = read(bare, need_traces=False)
        assert pair.chosen.trace == Trace() and pair.source == "calculator"

    def test_ties(self):
        tie = row(neg_answer=side(1, "x"))
        with pytest.raises(
            ValueError, match=r"score 1\.0 must be above the other's 1\.0 \(allow_ties=True"
        ):
            read(tie)
        assert len(read(tie, allow_ties=True)) == 1
        with pytest.raises(ValueError, match=r"score -1\.0 must be above the other's 1\.0$"):
            read(row(pos_answer=side(-1.0), neg_answer=side(1)), allow_ties=True)
        assert read(row(pos_answer=side("0.5")))[0].chosen.score == 0.5


def call(**changes):
    return row(
        pos_answer=side(1, actions={k: v for k, v in (CALL | changes).items() if v != "gone"})
    )


def acts(actions):
    return row(pos_answer=side(1, actions=actions))


QUESTION = r"example 'calculator_test_0': text is needed in question; there is \[3\]"
BAD = {
    "not_json": ("{", "json", "line 2: not JSON"),
    "list": ([], "malformed", "line 2: an example must be an object, got list"),
    "question": (row(question=3), "malformed", QUESTION),
    "context": (row(context=["c"]), "malformed", "text is needed in context"),
    "no_answer": (row(neg_answer=None), "malformed", "neg_answer must be an object, got NoneType"),
    "answer": (row(pos_answer=side(1) | {"answer": None}), "malformed", "'answer' must be text, got None"),
    "score": (row(pos_answer=side(1) | {"score": "much"}), "malformed", "'score' must be a number, got 'much'"),
    "nan": (row(pos_answer=side(1) | {"score": float("nan")}), "malformed", "'score' must be a number, got nan"),
    "missing": (call(Action="gone"), "malformed", "pos_answer: a call needs text in 'Action'; it has"),
    "no_observation": (call(Observation="gone"), "malformed", "a call needs text in 'Observation'"),
    "number": (call(**{"Action Input": 3}), "malformed", "a call needs text in 'Action Input'"),
    "kind": (acts(3), "malformed", "actions must be a call, a text or a list of calls, got int"),
    "order": (acts("Thought: a\nObservation: b\nAction: c"), "malformed", "`Observation` after `Thought`"),
    "first": (acts("Action: c"), "malformed", "`Action` after nothing"),
    "empty": (acts(""), "malformed", "actions must begin with `Thought:`, got ''"),
    "before": (acts("Hm.\nThought: a\nFinished."), "malformed", "must begin with `Thought:`"),
    "after": (acts("Thought: a\nFinished.\nmore"), "malformed", "text after `Finished`"),
    "half": (acts("Thought: a\nAction: b\nAction Input: c"), "malformed", "last call is not complete"),
    "no_input": (acts("Thought: a\nAction: b\nThought: c\nFinished."), "malformed", "`Thought` after `Action`"),
    "rationale": (row(pos_answer=side(1, score_agent={"explanation": 3})), "malformed", "must be text, got 3"),
    "steps": (acts([CALL] * 4), "max_steps", "pos_answer: 4 calls, at most 3 are allowed"),
    "middle": (acts([CALL | {"Observation": None}, CALL]), "malformed", "only the last call may be without"),
    "end": (acts([{"Finished": True}]), "malformed", "the finishing thought must be text"),
    "item": (acts(["x"]), "malformed", "a call must be an object, got str"),
    "scores": (row(pos_answer=side(-2)), "scores", r"score -2\.0 must be above the other's -1\.0"),
    "answers": (row(neg_answer=side(0) | {"answer": "answer 1"}), "answers", "the two answers are equal"),
}  # fmt: skip


class TestBad:
    @pytest.mark.parametrize("name", list(BAD))
    def test_raised_and_counted(self, name):
        bad, reason, error = BAD[name]
        lines = [json.dumps(row(id="fine")), bad if isinstance(bad, str) else json.dumps(bad)]
        with pytest.raises(ValueError, match=error) as caught:
            read_tara(lines)
        assert "line 2" in str(caught.value)
        if isinstance(bad, dict):
            assert "example 'calculator_test_0'" in str(caught.value)
        found = read_tara(lines, on_bad="skip")
        assert [p.id for p in found] == ["fine"] and found.skipped == {reason: 1}

    def test_settings(self):
        with pytest.raises(ValueError, match="on_bad must be one of raise, skip, got 'x'"):
            read(row(), on_bad="x")
        with pytest.raises(ValueError, match="max_steps must be >= 0, got -1"):
            read(row(), max_steps=-1)
        assert (
            read(row(pos_answer=side(1, actions=[CALL] * 4)), max_steps=4)[0].chosen.trace.steps
            == (Step(*CALL.values()),) * 4
        )


class TestWrite:
    def test_comes_back(self, tmp_path):
        """Any trace, in the form that says it: a call, a text, or a list of calls."""
        clean = lambda t: Trace(t.steps, t.closing, t.rationale and t.rationale.strip())  # noqa: E731
        pairs = [
            cases.pair(f"p{i}", trace=clean(t), context="c" if i % 2 else None)
            for i, t in enumerate(cases.traces(3))
        ]
        two = Candidate("b", Trace(parse_actions(TEXT)[0], None, "r"), 0.5)
        tests = {"test_list": ["assert f(1) == 2"]}
        pairs += [
            cases.pair("n", trace=Trace((), NO_TOOL, "r")),
            Pair("e", "q", None, Candidate("a", cases.TRACE, 2.0), two, "multi", tests),
        ]
        write_tara(pairs, tmp_path / "x.jsonl")
        assert read_tara(tmp_path / "x.jsonl") == pairs
        lines = (tmp_path / "x.jsonl").read_text("utf-8").split("\n")[:-1]
        forms = {type(json.loads(line)["pos_answer"]["actions"]) for line in lines}
        assert forms == {dict, str, list}
        last = json.loads(lines[-1])
        assert isinstance(last["pos_answer"]["actions"], dict)
        assert isinstance(last["neg_answer"]["actions"], str) and last["test_list"] == [
            "assert f(1) == 2"
        ]

    def test_keys_of_the_layout(self, tmp_path):
        good, bad = (Candidate(a, cases.TRACE, s) for a, s in (("a", 2.0), ("b", 0.5)))
        pair = Pair("e", "q", None, good, bad, "", {"question": "x"})
        with pytest.raises(
            ValueError, match=r"example 'e': extra must not have the keys \['question'\]"
        ):
            write_tara([cases.pair(), pair], tmp_path / "x.jsonl")
        assert not (tmp_path / "x.jsonl").exists()
