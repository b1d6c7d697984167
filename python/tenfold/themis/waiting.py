# SPDX-License-Identifier: Apache-2.0
"""Requests on their way through the scorer: a bounded queue, a clock, and exactly one answer to each.

A request is waiting (outside the queue, because it is full), queued, running (a judge has it) or answered. It is
answered by whoever comes first: the judge, the clock at its deadline, or its caller, who cancels it.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, fields
from typing import Any

from tenfold.themis.judgement import Judgement
from tenfold.themis.traces import Query, Trace

Example = Mapping[str, Any]
CLOSED = "the scorer was closed"
_log = logging.getLogger("tenfold.themis.scorer")
_PARTS = tuple(f.name for f in fields(Judgement))


class ScorerFull(RuntimeError):
    """The queue has no room; what was submitted is not in it."""


@dataclass(frozen=True)
class Scored(Judgement):
    """A judgement as the scorer answers it.

    Attributes:
        score: the reward as the scorer's normalizer puts it, NaN where there is no reward.
        seconds: from the request to the answer.
    """

    score: float = math.nan
    seconds: float = 0.0

    @classmethod
    def of(cls, judgement: Judgement, score: float, seconds: float = 0.0) -> Scored:
        """A judgement with its score."""
        parts = {name: getattr(judgement, name) for name in _PARTS}
        return cls(**parts, score=score, seconds=seconds)

    @classmethod
    def missing(cls, finish: str, message: str, seconds: float = 0.0) -> Scored:
        """An answer without a reward: NaN, no trace."""
        return cls(math.nan, [], "", Trace(), (), finish, 0, 0, message, seconds=seconds)


class Request:
    """One request. ``born``, ``due``: times of ``time.monotonic()``; ``future``: of its answer."""

    __slots__ = ("born", "due", "example", "future", "query", "state")

    def __init__(self, query: Query, example: Example | None, due: float, born: float) -> None:
        self.query, self.example, self.due, self.born = query, example, due, born
        self.future: Future[Scored] = Future()
        self.state = "waiting"


_Entry = tuple[float, int, Request]


def _push(heap: list[_Entry], entry: _Entry) -> None:
    """Adds to a heap; what has its answer need not stay until its time, with that: looked for at sizes that double."""
    heapq.heappush(heap, entry)
    if len(heap) >= 1024 and not len(heap) & (len(heap) - 1):
        heap[:] = [e for e in heap if e[2].state != "answered"]
        heapq.heapify(heap)


class Waiting:
    """All requests that have no answer yet; earliest deadline first.

    Args:
        limit: requests in the queue. on_answer: called with (query, answer), by the thread that answers.
    """

    def __init__(self, limit: int, on_answer: Callable[[Query, Scored], None] | None) -> None:
        self.limit, self.closed, self.queued = limit, False, 0
        self.counts: Counter[str] = Counter()
        self.seconds: deque[float] = deque(maxlen=1000)
        self.changed = threading.Condition()  # its lock guards everything here
        self._on_answer = on_answer
        self._live: set[Request] = set()
        self._heap: list[_Entry] = []
        self._due: list[_Entry] = []
        self._outside: deque[Request] = deque()
        self._number = itertools.count()

    def put(self, requests: Sequence[Request], wait: bool) -> None:
        """Takes requests in: blocks while there is no room, or takes all or none.

        Raises ScorerFull (only without ``wait``); RuntimeError if closed.
        """
        with self.changed:
            self._check_open()
            if not wait and self.queued + len(requests) > self.limit:
                raise ScorerFull(
                    f"the queue holds {self.queued} of at most {self.limit} requests; {len(requests)} more do not fit"
                )
            for request in requests:
                self._watch(request)
                while self.queued >= self.limit and request.state == "waiting" and not self.closed:
                    self.changed.wait()
                if request.state == "waiting" and not self.closed:
                    self._enqueue(request)
        for request in requests:
            if self.closed and request.state == "waiting":
                self.miss(request, "error", CLOSED)

    def put_outside(self, request: Request) -> None:
        """Takes a request in without blocking; it waits outside the queue, in order, while that is full."""
        with self.changed:
            self._check_open()
            self._watch(request)
            if self.queued < self.limit and not self._outside:
                self._enqueue(request)
            else:
                self._outside.append(request)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the scorer is closed")

    def _watch(self, request: Request) -> None:
        self.counts["requests"] += 1
        self._live.add(request)
        request.future.add_done_callback(lambda future: self._when_done(request))
        if request.due < math.inf:
            _push(self._due, (request.due, next(self._number), request))
            self.changed.notify_all()

    def _enqueue(self, request: Request) -> None:
        request.state = "queued"
        self.queued += 1
        _push(self._heap, (request.due, next(self._number), request))
        self.changed.notify_all()

    def _move(self, request: Request, state: str) -> None:
        """A request leaves the queue, others may enter. With the lock."""
        if request.state == "queued":
            self.queued -= 1
        request.state = state
        if state == "answered":
            self._live.discard(request)
        while self._outside and self.queued < self.limit:
            first = self._outside.popleft()
            if first.state == "waiting":
                self._enqueue(first)
        self.changed.notify_all()

    def _when_done(self, request: Request) -> None:
        if request.future.cancelled():
            with self.changed:
                if request.state != "answered":
                    self.counts["cancelled"] += 1
                    self._move(request, "answered")

    def take(self, size: int, max_wait: float) -> list[Request] | None:
        """Up to ``size`` requests, once so many wait or one has for ``max_wait`` seconds; None: closed and empty."""
        with self.changed:
            while True:
                while self._heap and self._heap[0][2].state != "queued":
                    heapq.heappop(self._heap)
                if self._heap:
                    first = self._heap[0][2]
                    # Never long enough to miss a deadline for it.
                    wait = min(max_wait, 0.1 * (first.due - first.born))
                    left = first.born + wait - time.monotonic()
                    if self.queued < size and left > 0 and not self.closed:
                        self.changed.wait(left)
                    elif batch := self._pop(size):
                        return batch
                elif self.closed:
                    return None
                else:
                    self.changed.wait()

    def take_now(self, size: int) -> list[Request]:
        """Up to ``size`` requests that wait now."""
        with self.changed:
            return self._pop(size)

    def _pop(self, size: int) -> list[Request]:
        batch: list[Request] = []
        now = time.monotonic()
        while self._heap and len(batch) < size:
            request = heapq.heappop(self._heap)[2]
            if request.state == "queued" and request.due > now:  # what is overdue is the clock's
                self._move(request, "running")
                batch.append(request)
        return batch

    def answer(self, request: Request, found: Scored) -> None:
        """Answers a request, if nobody has."""
        with self.changed:
            if request.state == "answered":
                return
            self._move(request, "answered")
            self.counts[found.finish] += 1
            self.seconds.append(found.seconds)
        try:
            request.future.set_result(found)
        except InvalidStateError:  # cancelled at this very moment
            return
        if self._on_answer is not None:
            try:
                self._on_answer(request.query, found)
            except Exception:
                _log.exception("the scorer's log function failed")

    def miss(self, request: Request, finish: str, message: str) -> None:
        """Answers a request without a reward."""
        self.answer(request, Scored.missing(finish, message, time.monotonic() - request.born))

    def clock(self) -> None:
        """Answers what is overdue, until everything is answered and the scorer closed. A thread's work."""
        while True:
            late = []
            with self.changed:
                now = time.monotonic()
                while self._due and (self._due[0][0] <= now or self._due[0][2].state == "answered"):
                    late.append(heapq.heappop(self._due)[2])
                if not late:
                    if self.closed and not self._live:
                        return
                    self.changed.wait(self._due[0][0] - now if self._due else None)
            for request in late:
                where = "being judged" if request.state == "running" else "waiting"
                self.miss(request, "deadline", f"the deadline passed while it was {where}")

    def close(self) -> None:
        """Takes nothing more in."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def give_up(self, running: bool) -> None:
        """Answers what is left with finish reason ``"error"``; what a judge has, only if ``running``."""
        with self.changed:
            left = [r for r in self._live if running or r.state != "running"]
        for request in left:
            self.miss(request, "error", CLOSED)

    def outside(self) -> int:
        """Requests that wait for room in the queue."""
        return sum(r.state == "waiting" for r in self._outside)
