# SPDX-License-Identifier: Apache-2.0
"""Themis as a reward: our MA-RLHF trainer's two styles, TRL's extras, and the functions for verl and OpenRLHF."""

import asyncio
import inspect
import math

import pytest
from test_ma_rlhf_rewards import answers
from themis_judges import CALL, Crashes, Gives, Hangs, Lengths, judgement

from tenfold.integrations import themis as hosts
from tenfold.ma_rlhf.rewards import Rewards
from tenfold.themis.normalize import Normalizer
from tenfold.themis.rewards import ThemisReward, answer_in, question_of
from tenfold.themis.scorer import Scorer
from tenfold.themis.serve import Server


@pytest.fixture
def reward():
    """(a reward, its judge) of a judge."""
    ends = []

    def make(judge, scorer=None, **settings):
        ends.append(Scorer(judge, **({"max_wait": 0.0} | (scorer or {}))))
        return ThemisReward(ends[-1], **settings)

    yield make
    for scorer in ends:
        if hasattr(scorer.judge, "free"):
            scorer.judge.free.set()
        scorer.close(timeout=5)


@pytest.fixture
def served(monkeypatch):
    """Serves a judge where the environment says."""
    ends = []

    def make(judge, **settings):
        server = Server(Scorer(judge, max_wait=0.0), **settings).start()
        ends.append(server)
        monkeypatch.setenv("TENFOLD_THEMIS_URL", server.url)
        if server.token:
            monkeypatch.setenv("TENFOLD_THEMIS_TOKEN", server.token)
        return server

    yield make
    for server in ends:
        server.stop()
        server.scorer.close(timeout=5)


class TestMaRlhf:
    def test_trl_style(self, reward):
        judge = Lengths()
        made = Rewards([reward(judge)], [0.5])
        found = made(answers(test_list=[["a"], ["b"], ["c"]], context=["x", "y", "z"]))
        assert made.names == ["themis"] and found.score.tolist() == [1.5, 1.0, 2.5]
        assert judge.batches == [["yes", "no", "maybe"]]
        assert judge.examples == [{"test_list": [c]} for c in "abc"]  # the context is the query's

    def test_openrlhf_style(self, reward):
        judge = Lengths()
        made = Rewards(reward(judge).openrlhf)
        found = made(answers(labels=["a", "b", "c"]))
        assert made.names == ["themis"] and found.score.tolist() == [3, 2, 5]
        assert judge.examples == [{"label": c} for c in "abc"] and judge.batches == [
            ["yes", "no", "maybe"]
        ]
        assert (
            found.logs["rewards/themis/finish_rationale"] == 1.0
            and found.logs["rewards/themis/calls"] == 0
        )

    def test_no_reward_is_not_judged(self, reward):
        made = Rewards(reward(Gives({"yes": 1.0, "maybe": -2.0})))
        assert made(answers()).score.isnan().tolist() == [False, True, False]
        made = Rewards(reward(Gives({"yes": 1.0}), missing=-3.0))
        assert made(answers()).score.tolist() == [1, -3, -3]
        judged = Rewards(reward(Gives({"yes": 1.0})).openrlhf)(answers())
        assert judged.score.isnan().tolist() == [False, True, True]


class TestTrl:
    def test_chats_and_what_trl_hands_over(self, reward):
        """Chats, TRL's state and functions among the columns, and its logs."""
        judge, extra, metrics = Gives({"yes": 7.0, "no": 1.0}, [CALL]), {}, {}
        chats = [
            [{"role": "system", "content": "s"}, {"role": "user", "content": f"q{i}"}]
            for i in range(2)
        ]
        said = [[{"role": "assistant", "content": a}] for a in ("yes", "no")]
        found = reward(judge)(
            prompts=chats, completions=said, completion_ids=[[1], [2]], trainer_state=object(),
            environments=None, log_extra=extra.__setitem__, log_metric=metrics.__setitem__, note="text",
        )  # fmt: skip
        assert found == [5.0, 1.0]
        assert extra["themis_finish"] == ["rationale"] * 2 and len(extra["themis_trace"]) == 2
        assert metrics["themis/calls"] == 1 and metrics["themis/calls_failed"] == 0
        assert metrics["themis/new_tokens"] == 1 and metrics["themis/finish_rationale"] == 1

    def test_questions(self, reward):
        judge = Lengths()
        judge.seen = []
        own = judge.judge
        judge.judge = lambda queries, *a, **k: judge.seen.extend(queries) or own(queries, *a, **k)
        reward(judge, question="asked", context="text")(
            ["p"], ["a"], asked=["what?"], text=["c"], id=[3]
        )
        reward(judge, question=lambda p: p.removeprefix("Q: "))(["Q: why?"], ["a"])
        assert [(q.question, q.context) for q in judge.seen] == [("what?", "c"), ("why?", None)]
        assert judge.examples == [{"id": 3}, {}]

    def test_it_is_one_batch(self, reward):
        judge = Lengths()
        reward(judge, {"batch_size": 8, "max_wait": 5.0})(["q"] * 8, list("abcdefgh"))
        assert judge.batches == [list("abcdefgh")]

    def test_normalizer(self, reward):
        """Batch by batch, in the order of the responses: the same in every run."""
        made = reward(Lengths(), normalizer=Normalizer(running=True))
        found = made(["q"] * 4, ["a", "aa", "aaa", "aaaa"])
        assert found == pytest.approx([-1.3416408, -0.4472136, 0.4472136, 1.3416408], abs=1e-6)
        assert [x.reward for x in made.last] == [1, 2, 3, 4]

    def test_only_complete_traces(self, reward):
        """A reward of a trace that was cut off may be left out."""

        class Cut(Lengths):
            def judge(self, queries, examples=None, *, deadlines=None, seed=0):
                return [
                    judgement(4.0, "length" if q.answer == "cut" else "rationale") for q in queries
                ]

        assert reward(Cut())(["q", "q"], ["cut", "whole"]) == [4, 4]
        assert reward(Cut(), accept=("rationale",))(["q", "q"], ["cut", "whole"]) == [None, 4]
        with pytest.raises(ValueError, match="accept must be one of rationale, no_rationale"):
            reward(Cut(), accept=("done",))

    def test_deadline(self, reward):
        made = reward(Hangs(), deadline=0.1)
        assert made(["q", "q"], ["a", "b"]) == [None, None]
        assert made.metrics()["finish_deadline"] == 1.0

    def test_crash(self, reward):
        made = reward(Crashes(RuntimeError("broken")), {"batch_size": 3, "max_wait": 5.0})
        assert made(["q"] * 3, ["one", "bad", "three"]) == [3, None, 5]
        assert made.last[1].finish == "error"

    def test_refused(self, reward):
        made = reward(Lengths())
        with pytest.raises(
            ValueError, match="prompts and completions must be equally many, got 1 and 2"
        ):
            made(["q"], ["a", "b"])
        with pytest.raises(ValueError, match="question names the column 'asked'; there are: id"):
            reward(Lengths(), question="asked")(["p"], ["a"], id=[1])
        with pytest.raises(
            TypeError, match="a prompt must be a text or a chat with a user's message, got 3"
        ):
            made([3], ["a"])
        with pytest.raises(TypeError, match="scorer must be a Scorer or a RemoteScorer"):
            ThemisReward(Lengths())
        with pytest.raises(ValueError, match="missing must be a finite number or None, got nan"):
            reward(Lengths(), missing=math.nan)
        with pytest.raises(
            ValueError, match="queries, prompts and labels must be equally many, got 1, 1 and 2"
        ):
            made.openrlhf(["pa"], ["p"], [1, 2])


class TestTexts:
    def test_answers(self):
        assert answer_in("<s>ask: yes</s></s>", "ask: ", ("</s>", "")) == "yes"
        assert answer_in("p p yes", "p ") == "p yes"  # the first is the prompt
        assert answer_in("any", "") == "any"
        with pytest.raises(ValueError, match="does not hold its prompt"):
            answer_in("text", "other")

    def test_questions(self):
        parts = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
        assert question_of("as it is") == "as it is"
        assert (
            question_of([{"role": "user", "content": "a"}, {"role": "user", "content": parts}])
            == "what is it?"
        )
        with pytest.raises(TypeError):
            question_of([{"role": "system", "content": "a"}])


EXTRA = {"question": "how long?", "context": "c", "test_list": ["x"], "index": 3, "state": object()}


class TestHosts:
    """verl and OpenRLHF load these by name; the server is a real one. In the hosts themselves: tests/integrations."""

    def test_verl(self, served):
        judge = Lengths()
        served(judge)
        assert inspect.iscoroutinefunction(hosts.compute_score)
        found = asyncio.run(hosts.compute_score("set", "abcdefg", "truth", EXTRA, more=1))
        assert found == {
            "score": 5.0,
            "themis_finish": "rationale",
            "themis_calls": 0,
            "themis_new_tokens": 1,
        }
        assert judge.examples == [{"test_list": ["x"], "index": 3, "ground_truth": "truth"}]
        many = hosts.compute_scores(["set"] * 2, ["a", "bc"], [None, None], [EXTRA] * 2)
        assert [m["score"] for m in many] == [1, 2]

    def test_openrlhf(self, served):
        served(Lengths())
        found = hosts.reward_func(["p: abcdefg", "p: x"], ["p: ", "p: "], ["l", None])
        assert found["rewards"].tolist() == [5, 1] and found["scores"].tolist() == [7, 1]
        assert all(v.shape == (2,) for v in found["extra_logs"].values())

    def test_trl(self, served):
        served(Lengths(), token="a-token-of-twenty-ch")
        assert hosts.trl_reward(["p"], ["abc"], trainer_state=None) == [3.0]

    def test_no_reward(self, served, monkeypatch):
        served(Crashes(RuntimeError("broken")))
        extra = {"question": "q"}
        with pytest.raises(
            RuntimeError, match=r"a response got no reward \(error: RuntimeError: broken\)"
        ):
            asyncio.run(hosts.compute_score("set", "bad", None, extra))
        with pytest.raises(
            RuntimeError, match=r"response 1 got no reward \(error: RuntimeError: broken\)"
        ):
            hosts.reward_func(["pok", "pbad"], ["p", "p"])
        assert hosts.trl_reward(["p", "p"], ["ok", "bad"]) == [2.0, None]
        monkeypatch.setenv("TENFOLD_THEMIS_MISSING", "-1.5")
        assert asyncio.run(hosts.compute_score("set", "bad", None, extra))["score"] == -1.5
        assert hosts.reward_func(["pok", "pbad"], ["p", "p"])["rewards"].tolist() == [2.0, -1.5]

    def test_refused(self, monkeypatch):
        monkeypatch.delenv("TENFOLD_THEMIS_URL", raising=False)
        with pytest.raises(ValueError, match="TENFOLD_THEMIS_URL must say where"):
            hosts.trl_reward(["p"], ["a"])
        with pytest.raises(
            ValueError, match=r"extra_info needs the text `question`.*it has \['index'\]"
        ):
            asyncio.run(hosts.compute_score("set", "a", None, {"index": 1}))
        monkeypatch.setenv("TENFOLD_THEMIS_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("TENFOLD_THEMIS_DEADLINE", "soon")
        with pytest.raises(
            ValueError, match="TENFOLD_THEMIS_DEADLINE must be a number, got 'soon'"
        ):
            hosts.scorer()

    def test_one_scorer_per_process(self, served):
        served(Lengths())
        assert hosts.scorer() is hosts.scorer()
