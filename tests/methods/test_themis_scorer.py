# SPDX-License-Identifier: Apache-2.0
"""The scorer: batches, deadlines, back-pressure, cancellation, judges that raise, lie or hang; the normalizer."""

import asyncio
import math
import threading
import time

import pytest
from themis_judges import Crashes, Gives, Hangs, Lengths, judgement, query

from tenfold.themis.normalize import Normalizer
from tenfold.themis.scorer import Scored, Scorer, ScorerFull


@pytest.fixture
def scorers():
    """Makes scorers, and closes them."""
    made = []

    def make(judge, **settings):
        made.append(Scorer(judge, **settings))
        return made[-1]

    yield make
    for scorer in made:
        if hasattr(scorer.judge, "free"):
            scorer.judge.free.set()
        scorer.close(timeout=5)


class TestBatches:
    def test_answers_are_in_order_and_have_their_examples(self, scorers):
        judge = Lengths()
        scorer = scorers(judge, batch_size=4)
        answers = ["a" * n for n in (3, 1, 4, 1, 5, 9, 2, 6)]
        found = scorer.score_many([query(a) for a in answers], [{"n": i} for i in range(8)])
        assert [f.reward for f in found] == [3, 1, 4, 1, 5, 9, 2, 6]
        assert [f.score for f in found] == [3, 1, 4, 1, 5, 5, 2, 5]  # clipped
        assert [e["n"] for e in judge.examples] == list(range(8))
        assert all(
            isinstance(f, Scored) and f.finish == "rationale" and f.seconds > 0 for f in found
        )
        assert found[0].text == "judged aaa" and found[0].ids == [1, 2, 3]

    def test_full_batches(self, scorers):
        judge = Lengths()
        scorer = scorers(judge, batch_size=4, max_wait=5.0)
        start = time.monotonic()
        scorer.score_many([query(str(i)) for i in range(8)])
        assert [len(b) for b in judge.batches] == [4, 4] and time.monotonic() - start < 2

    def test_waits_for_others_only_so_long(self, scorers):
        judge = Lengths()
        scorer = scorers(judge, batch_size=4, max_wait=0.15)
        start = time.monotonic()
        assert scorer.submit(query()).result().reward == 3
        assert 0.14 < time.monotonic() - start < 2 and judge.batches == [["yes"]]

    def test_the_earliest_deadline_is_next(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=1, deadline=None)
        first = scorer.submit(query("first"))
        judge.entered.wait()
        rest = [scorer.submit(query(a), deadline=d)
                for a, d in (("never", None), ("late", 90), ("soon", 60), ("last", None))]  # fmt: skip
        judge.free.set()
        for future in (first, *rest):
            future.result()
        assert [b[0] for b in judge.batches] == ["first", "soon", "late", "never", "last"]

    def test_the_judge_is_told_to_end_before(self, scorers):
        judge = Lengths()
        now = time.monotonic()
        scorers(judge, deadline=None).score_many([query()])
        scorers(judge, deadline=100.0, margin=2.0).score_many([query()])
        scorers(judge, deadline=100.0, margin=2.0).score_many([query()], deadline=5.0)
        assert judge.deadlines[0] is None
        assert judge.deadlines[1] - now == pytest.approx(98.0, abs=1)
        assert judge.deadlines[2] - now == pytest.approx(4.0, abs=0.9)  # a fifth of it is left

    def test_many_threads(self, scorers):
        scorer = scorers(Lengths(), batch_size=8, max_wait=0.001, workers=3)
        found = {}

        def work(k):
            found[k] = [
                f.reward for f in scorer.score_many([query("x" * (k + i)) for i in range(20)])
            ]

        threads = [threading.Thread(target=work, args=(k,)) for k in range(10)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert found == {k: [float(k + i) for i in range(20)] for k in range(10)}
        stats = scorer.stats()
        assert stats["requests"] == 200 == stats["finish"]["rationale"] and stats["pending"] == 0
        assert 1 < stats["batch_size"] <= 8 and 0 < stats["seconds_median"] <= stats["seconds_95"]


class TestDeadlines:
    def test_a_judge_that_hangs(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=2, deadline=0.2)
        start = time.monotonic()
        found = scorer.score_many([query(str(i)) for i in range(5)])
        assert 0.15 < time.monotonic() - start < 1.5
        assert [f.finish for f in found] == ["deadline"] * 5 and all(
            math.isnan(f.score) for f in found
        )
        assert [f.message for f in found[:3:2]] == [
            "the deadline passed while it was being judged", "the deadline passed while it was waiting"
        ]  # fmt: skip
        assert scorer.health() == "stalled"
        judge.free.set()
        assert (
            scorer.score_many([query("ok")], deadline=5)[0].reward == 2 and scorer.health() == "ok"
        )
        assert scorer.stats()["finish"] == {"deadline": 5, "rationale": 1}

    def test_what_is_overdue_is_not_judged(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=1, deadline=None)
        first = scorer.submit(query("first"))
        judge.entered.wait()
        assert scorer.submit(query("late"), deadline=0.05).result().finish == "deadline"
        judge.free.set()
        assert first.result().reward == 5 and scorer.score_many([query("next")])[0].reward == 4
        assert judge.batches == [["first"], ["next"]]

    def test_partial_traces_are_the_judges(self, scorers):
        class Partial(Lengths):
            def judge(self, queries, examples=None, *, deadlines=None, seed=0):
                time.sleep(max(0.0, deadlines[0] - time.monotonic()))
                return [judgement(1.5, "deadline", "so far") for _ in queries]

        (found,) = scorers(Partial(), deadline=0.5).score_many([query()])
        assert found.finish == "deadline" and found.reward == 1.5 and found.text == "so far"


class TestBackPressure:
    def test_a_full_queue(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=1, queue=2)
        first = scorer.submit(query())
        judge.entered.wait()
        rest = [scorer.submit(query(str(i)), wait=False) for i in range(2)]
        with pytest.raises(
            ScorerFull, match="the queue holds 2 of at most 2 requests; 1 more do not fit"
        ):
            scorer.submit(query("3"), wait=False)
        rest[0].cancel()
        with pytest.raises(ScorerFull, match="2 more do not fit"):
            scorer.submit_many([query("3"), query("4")], wait=False)  # all or none
        assert scorer.stats()["queued"] == 1
        judge.free.set()
        assert first.result().reward == 3 and rest[1].result().reward == 1

    def test_submit_blocks_until_there_is_room(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=1, queue=1)
        scorer.submit(query())
        judge.entered.wait()
        scorer.submit(query())
        made = []
        thread = threading.Thread(target=lambda: made.append(scorer.submit(query("third"))))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and not made
        judge.free.set()
        thread.join(5)
        assert made[0].result().reward == 5

    def test_submit_blocks_until_its_deadline(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=1, queue=1)
        scorer.submit(query())
        judge.entered.wait()
        scorer.submit(query())
        start = time.monotonic()
        found = scorer.submit(query(), deadline=0.1).result()
        assert found.finish == "deadline" and time.monotonic() - start < 1.5

    def test_coroutines_wait_outside(self, scorers):
        judge = Lengths(0.001)
        scorer = scorers(judge, batch_size=4, queue=4)

        async def all_of_them():
            return await asyncio.gather(*(scorer.score(query("x" * i)) for i in range(100)))

        found = asyncio.run(all_of_them())
        assert [f.reward for f in found] == list(range(100))
        assert scorer.stats()["outside"] == 0

    def test_close(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=1, queue=2, deadline=None)
        first = scorer.submit(query("first"))
        judge.entered.wait()
        second = scorer.submit(query("second"))
        scorer.close(drain=False, timeout=0.05)
        assert [f.result().finish for f in (first, second)] == ["error", "error"]
        assert second.result().message == "the scorer was closed" and scorer.health() == "closed"
        for act in (lambda: scorer.submit(query()), lambda: asyncio.run(scorer.score(query()))):
            with pytest.raises(RuntimeError, match="the scorer is closed"):
                act()

    def test_close_judges_what_waits(self):
        judge = Lengths(0.02)
        with Scorer(judge, batch_size=1) as scorer:
            futures = [scorer.submit(query("x" * i)) for i in range(5)]
        assert [f.result().reward for f in futures] == [0, 1, 2, 3, 4]


class TestMemory:
    def test_what_is_answered_is_let_go(self, scorers):
        """Deadlines that are far away keep no answers, behind a request that takes as long."""

        class Holds(Hangs):
            def judge(self, queries, examples=None, *, deadlines=None, seed=0):
                if queries[0].answer == "hold":
                    return super().judge(queries)
                return Lengths.judge(self, queries)

        judge = Holds()
        scorer = scorers(judge, batch_size=512, max_wait=0.0, deadline=1e6, workers=2)
        first = scorer.submit(query("hold"), deadline=1e5)
        judge.entered.wait()
        for _ in range(5):
            scorer.score_many([query()] * 512)
        assert len(scorer._waiting._due) < 2048 and not first.done()

    def test_what_a_judge_that_hangs_never_takes(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=1, queue=512, deadline=0.01)
        scorer.submit(query()).result()
        for _ in range(5):
            scorer.score_many([query()] * 512)
        assert len(scorer._waiting._heap) < 2048 and scorer.stats()["pending"] == 0


class TestCancellation:
    def test_before_it_is_judged(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=1)
        first = scorer.submit(query("first"))
        judge.entered.wait()
        second, third = scorer.submit(query("second")), scorer.submit(query("third"))
        assert second.cancel()
        judge.free.set()
        assert first.result().reward == 5 and third.result().reward == 5
        assert (
            judge.batches == [["first"], ["third"]] and scorer.stats()["finish"]["cancelled"] == 1
        )

    def test_while_it_is_judged(self, scorers):
        judge = Hangs()
        scorer = scorers(judge)
        first = scorer.submit(query())
        judge.entered.wait()
        assert first.cancel()
        judge.free.set()
        assert scorer.score_many([query()])[0].reward == 3
        assert scorer.stats()["pending"] == 0

    def test_tasks(self, scorers):
        judge = Hangs()
        scorer = scorers(judge, batch_size=1, queue=1)

        async def go():
            tasks = [asyncio.create_task(scorer.score(query(str(i)))) for i in range(4)]
            await asyncio.to_thread(judge.entered.wait)
            tasks[1].cancel()  # in the queue
            tasks[2].cancel()  # outside
            await asyncio.sleep(0.05)
            judge.free.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

        found = asyncio.run(go())
        assert [type(f) for f in found] == [
            Scored,
            asyncio.CancelledError,
            asyncio.CancelledError,
            Scored,
        ]
        assert judge.batches == [["0"], ["3"]]


class TestJudgesThatFail:
    @pytest.mark.parametrize("error", [RuntimeError("out of memory"), SystemExit(3)])
    def test_only_the_bad_row_is_an_error(self, scorers, error):
        judge = Crashes(error)
        scorer = scorers(judge, batch_size=4, max_wait=5.0)
        found = scorer.score_many([query(a) for a in ("one", "bad", "three", "four")])
        assert [f.finish for f in found] == ["rationale", "error", "rationale", "rationale"]
        assert found[1].message == f"{type(error).__name__}: {error}" and math.isnan(
            found[1].reward
        )
        assert judge.batches == [
            ["one", "bad", "three", "four"],
            ["one"],
            ["bad"],
            ["three"],
            ["four"],
        ]
        assert scorer.score_many([query("on")], deadline=5)[0].reward == 2

    def test_a_judge_that_lies(self, scorers):
        class Lies(Lengths):
            def judge(self, queries, examples=None, *, deadlines=None, seed=0):
                super().judge(queries, examples, deadlines=deadlines)
                return {"few": [], "wrong": [1.5], "inf": [judgement(math.inf)]}[queries[0].answer]

        scorer = scorers(Lies(), batch_size=1)
        found = scorer.score_many([query(a) for a in ("few", "wrong", "inf")])
        assert [f.finish for f in found] == ["error"] * 3 and all(
            math.isnan(f.score) for f in found
        )
        assert [f.message for f in found] == [
            "ValueError: the judge gave 0 judgements of 1 answers",
            "TypeError: the judge gave a float, not a Judgement", "the judge's reward is inf",
        ]  # fmt: skip

    def test_no_reward_is_no_error(self, scorers):
        """A model without value head judges without a reward."""
        (found,) = scorers(Gives({})).score_many([query()])
        assert found.finish == "rationale" and math.isnan(found.reward) and math.isnan(found.score)

    def test_a_log_that_raises(self, scorers):
        seen = []

        def log(asked, found):
            seen.append((asked.answer, found.reward))
            raise OSError("disk full")

        assert scorers(Lengths(), log=log).score_many([query()])[0].reward == 3
        assert seen == [("yes", 3.0)]


class TestSettings:
    @pytest.mark.parametrize(
        "settings, error, message",
        [
            ({"judge": 3}, TypeError, r"judge must have a method judge\(.*\); got int"),
            ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
            ({"queue": 1.5}, ValueError, "queue must be an integer >= 1, got 1.5"),
            ({"workers": True}, ValueError, "workers must be an integer >= 1, got True"),
            ({"max_wait": -1}, ValueError, "max_wait must be a number >= 0, got -1"),
            ({"deadline": 0}, ValueError, "deadline must be a positive number, got 0"),
            ({"margin": math.nan}, ValueError, "margin must be a number >= 0, got nan"),
        ],
    )
    def test_refused(self, settings, error, message):
        with pytest.raises(error, match=message):
            Scorer(**({"judge": Lengths()} | settings))

    def test_bad_requests(self, scorers):
        scorer = scorers(Lengths())
        with pytest.raises(TypeError, match="query must be a Query"):
            scorer.submit("text")
        with pytest.raises(ValueError, match="examples must be as many as queries, 1; got 2"):
            scorer.score_many([query()], [None, None])
        with pytest.raises(ValueError, match="deadline must be a positive number, got -1"):
            scorer.submit(query(), deadline=-1)
        assert scorer.stats()["requests"] == 0


class TestNormalizer:
    def test_clip(self):
        assert Normalizer()([-25.0, -5.0, 0.5, 38.8, math.inf]) == [-5, -5, 0.5, 5, 5]
        assert Normalizer(None)([38.8]) == [38.8]
        assert math.isnan(Normalizer()([math.nan])[0])

    def test_running(self):
        """1, 2, 3, 4: mean 2.5, variance 1.25, whether at once or in parts."""
        made = Normalizer(running=True)
        found = made([1.0, 2.0, 3.0, 4.0])
        assert found == pytest.approx([-1.3416408, -0.4472136, 0.4472136, 1.3416408], abs=1e-6)
        parts = Normalizer(running=True)
        for part in ([1.0], [2.0, 3.0], [], [math.nan, math.inf], [4.0]):
            parts.update(part)
        assert (parts.mean, parts.variance) == pytest.approx((2.5, 1.25)) and parts.count == 4
        assert parts.scale(100.0) == 5.0 and parts.count == 4

    def test_begins_and_goes_on(self):
        made = Normalizer(running=True)
        assert made.scale(2.0) == 2.0 and made([3.0]) == [0.0]  # one value: variance 1
        made([1.0, 9.0])
        again = Normalizer(running=True)
        again.load_state_dict(made.state_dict())
        assert again([7.0, -2.0]) == made([7.0, -2.0])

    @pytest.mark.parametrize("settings, name", [({"clip": 0}, "clip"), ({"eps": -1.0}, "eps")])
    def test_refused(self, settings, name):
        with pytest.raises(ValueError, match=f"{name} must be a positive number"):
            Normalizer(**settings)
