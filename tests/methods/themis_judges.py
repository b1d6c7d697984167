# SPDX-License-Identifier: Apache-2.0
"""Judges without a model, which tests of the scorer, the endpoint and the rewards share."""

import math
import threading
import time

from tenfold.themis.judgement import CallRecord, Judgement
from tenfold.themis.traces import Query, Step, Trace


def judgement(reward, finish="rationale", text="", calls=(), **more):
    trace = Trace(
        tuple(Step("", c.tool, c.arguments, c.observation) for c in calls), None, text or None
    )
    return Judgement(reward, [1, 2, 3], text, trace, tuple(calls), finish, 2, 1, **more)


def query(answer="yes", question="really?"):
    return Query(question, answer)


class Lengths:
    """The reward is the answer's length; remembers its batches. ``seconds``: that a batch takes."""

    def __init__(self, seconds=0.0):
        self.seconds, self.batches, self.examples, self.deadlines = seconds, [], [], []

    def judge(self, queries, examples=None, *, deadlines=None, seed=0):
        self.batches.append([q.answer for q in queries])
        self.examples += list(examples or [])
        self.deadlines += list(deadlines or [])
        if self.seconds:
            time.sleep(self.seconds)
        return [judgement(float(len(q.answer)), text=f"judged {q.answer}") for q in queries]


class Crashes(Lengths):
    """Raises where a batch holds the answer ``bad``."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def judge(self, queries, examples=None, *, deadlines=None, seed=0):
        found = super().judge(queries, examples, deadlines=deadlines)
        if any(q.answer == "bad" for q in queries):
            raise self.error
        return found


class Hangs(Lengths):
    """Does not come back until ``free`` is set."""

    def __init__(self):
        super().__init__()
        self.free, self.entered = threading.Event(), threading.Event()

    def judge(self, queries, examples=None, *, deadlines=None, seed=0):
        self.entered.set()
        self.free.wait()
        return super().judge(queries, examples, deadlines=deadlines)


class Gives:
    """Gives the judgements it is told, by answer; others are NaN."""

    def __init__(self, rewards, calls=()):
        self.rewards, self.calls = rewards, calls

    def judge(self, queries, examples=None, *, deadlines=None, seed=0):
        return [judgement(self.rewards.get(q.answer, math.nan), calls=self.calls) for q in queries]


CALL = CallRecord("calculator", "<<1+1=2>>2", "right", "ok", 0.25)
