# SPDX-License-Identifier: Apache-2.0
"""Rewards by request: many callers, one judge, batches, deadlines, and an answer to every request.

    callers --submit/score--> queue (bounded, earliest deadline first) --batch--> judge (ToolLoop)
                                  |                                                  |
                                  +-- deadline past: finish "deadline" <-- clock     +-- raised: rows one by one,
                                                                                         then finish "error"

Threads: ``workers`` that call the judge, and a clock that answers what is overdue, also while the judge is busy or
hangs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from tenfold.themis.judgement import Judgement
from tenfold.themis.normalize import Normalizer
from tenfold.themis.traces import Query
from tenfold.themis.waiting import Example, Request, Scored, ScorerFull, Waiting
from tenfold.training.checks import not_negative, positive

__all__ = ["Scored", "Scorer", "ScorerFull"]

_log = logging.getLogger(__name__)


def _is_loop(judge: Any) -> bool:
    # A loop has been imported already if the judge is one.
    module = sys.modules.get("tenfold.themis.loop")
    return module is not None and isinstance(judge, module.ToolLoop)


class Scorer:
    """Collects requests into batches for a judge.

    A tool loop is handed the next requests as soon as it has places for them, and each answer is given when it is
    there; other judges get a batch after the other.

    Args:
        judge: a :class:`~tenfold.themis.loop.ToolLoop`, or what has its ``judge(queries, examples, *, deadlines)``.
        batch_size: requests that are judged at a time; a tool loop's own may be smaller.
        max_wait: seconds that a request waits for others to fill a batch, but at most a tenth of its deadline.
        deadline: seconds in which a request is answered unless it says otherwise; None: as long as it takes.
        margin: seconds before its deadline at which the judge is told to end, so that it can still score the trace
            as it stands; of short deadlines a fifth.
        queue: requests that may wait; those that are being judged do not count.
        workers: batches that are judged at the same time; more than one needs a judge that several threads may
            call.
        normalizer: makes ``score`` of ``reward``; default: clipped to +-5. A running one depends on the order in
            which batches come.
        log: called with every (query, answer), by the thread that answers; what it raises is logged and ignored.

    Use it as a context manager, or :meth:`close` it.

    Raises:
        TypeError, ValueError: a judge or a setting that does not fit.
    """

    def __init__(
        self, judge: Any, *, batch_size: int = 16, max_wait: float = 0.01, deadline: float | None = 60.0,
        margin: float = 1.0, queue: int = 1024, workers: int = 1, normalizer: Normalizer | None = None,
        log: Callable[[Query, Scored], None] | None = None,
    ) -> None:  # fmt: skip
        if not callable(getattr(judge, "judge", None)):
            raise TypeError(
                f"judge must have a method judge(queries, examples, *, deadlines); got {type(judge).__name__}"
            )
        for name, value in {"batch_size": batch_size, "queue": queue, "workers": workers}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        not_negative("max_wait", max_wait)
        not_negative("margin", margin)
        if deadline is not None:
            positive("deadline", deadline)
        self.judge, self.batch_size, self.max_wait = judge, batch_size, max_wait
        self.deadline, self.margin, self.queue = deadline, margin, queue
        self.normalizer = normalizer or Normalizer()
        self._streams = _is_loop(judge)
        self._waiting = Waiting(queue, log)
        self._busy: dict[int, float] = {}  # worker -> last deadline of its batch
        self._batches = self._judged = 0
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"themis-judge-{i}", daemon=True)
            for i in range(workers)
        ]
        clock = threading.Thread(target=self._waiting.clock, name="themis-clock", daemon=True)
        for thread in (clock, *self._threads):
            thread.start()

    def submit(
        self, query: Query, example: Example | None = None, deadline: float | None = None, *,
        wait: bool = True,
    ) -> Future[Scored]:  # fmt: skip
        """A future of the answer; cancelling it takes the request back. From any thread.

        Args:
            query: what is judged. example: what tools may read beside their arguments (``test_list`` and such).
            deadline: seconds from now, None: the scorer's.
            wait: for room in the queue, at most until the deadline; without it a full queue is an error at once.

        Raises:
            ScorerFull: no room, and ``wait=False``. RuntimeError: closed. TypeError, ValueError: query, deadline.
        """
        return self.submit_many([query], [example], deadline, wait=wait)[0]

    def submit_many(
        self, queries: Sequence[Query], examples: Sequence[Example | None] | None = None,
        deadline: float | None = None, *, wait: bool = True,
    ) -> list[Future[Scored]]:  # fmt: skip
        """:meth:`submit` of several; with ``wait=False`` there is room for all of them, or none is taken."""
        requests = self._requests(queries, examples, deadline)
        self._waiting.put(requests, wait)
        return [r.future for r in requests]

    async def score(
        self, query: Query, example: Example | None = None, deadline: float | None = None
    ) -> Scored:
        """The answer to one request. While the queue is full, the request waits outside, in order.

        Cancelling the task takes the request back. Arguments and errors as of :meth:`submit`.
        """
        (request,) = self._requests([query], [example], deadline)
        self._waiting.put_outside(request)
        return await asyncio.wrap_future(request.future)

    def score_many(
        self, queries: Sequence[Query], examples: Sequence[Example | None] | None = None,
        deadline: float | None = None,
    ) -> list[Scored]:  # fmt: skip
        """The answers to several requests, in their order. Errors as of :meth:`submit`."""
        return [f.result() for f in self.submit_many(queries, examples, deadline)]

    def _requests(
        self, queries: Sequence[Query], examples: Sequence[Example | None] | None,
        deadline: float | None,
    ) -> list[Request]:  # fmt: skip
        wrong = next((q for q in queries if not isinstance(q, Query)), None)
        if wrong is not None:
            raise TypeError(f"query must be a Query(question, answer), got {type(wrong).__name__}")
        given = [None] * len(queries) if examples is None else list(examples)
        if len(given) != len(queries):
            raise ValueError(
                f"examples must be as many as queries, {len(queries)}; got {len(given)}"
            )
        if deadline is not None:
            positive("deadline", deadline)
        seconds = self.deadline if deadline is None else deadline
        now = time.monotonic()
        due = math.inf if seconds is None else now + seconds
        return [Request(q, e, due, now) for q, e in zip(queries, given)]

    def _work(self, worker: int) -> None:
        while (batch := self._waiting.take(self.batch_size, self.max_wait)) is not None:
            held: dict[Request, None] = {}  # in their order
            self._hold(worker, held, batch)
            try:
                if self._streams:
                    self._stream(worker, held, batch)
                else:
                    self._deliver(batch, self._call(batch))
                left = [r for r in held if r.state != "answered"]
                if left:
                    raise ValueError(f"the judge forgot {len(left)} answers")
            except BaseException as error:  # whatever it was, these requests must be answered
                self._one_by_one([r for r in held if r.state != "answered"], error)
            with self._waiting.changed:
                del self._busy[worker]

    def _hold(self, worker: int, held: dict[Request, None], taken: list[Request]) -> None:
        """Notes what a judge has from now on."""
        if taken:
            with self._waiting.changed:
                for request in [r for r in held if r.state == "answered"]:
                    del held[request]
                held.update(dict.fromkeys(taken))
                self._busy[worker] = max(self._busy.get(worker, 0.0), *(r.due for r in taken))
                self._batches += 1
                self._judged += len(taken)

    def _stream(self, worker: int, held: dict[Request, None], batch: list[Request]) -> None:
        from tenfold.themis.streaming import stream

        def rows(taken: list[Request]) -> list[tuple[Request, float]]:
            return [
                (r, math.inf if end is None else end) for r, end in zip(taken, self._ends(taken))
            ]

        def take(room: int) -> list[tuple[Request, float]]:
            taken = self._waiting.take_now(room)
            self._hold(worker, held, taken)
            return rows(taken)

        def deliver(request: Request, judgement: Judgement) -> None:
            self._deliver([request], [judgement])
            held.pop(request, None)

        stream(self.judge, rows(batch), take, deliver)

    def _one_by_one(self, left: list[Request], error: BaseException) -> None:
        _log.warning("the judge failed on %d requests, now one by one: %r", len(left), error)
        for request in left:
            if request.state == "answered":
                continue
            try:
                self._deliver([request], self._call([request]))
            except BaseException as reason:
                self._waiting.miss(request, "error", f"{type(reason).__name__}: {reason}")

    def _ends(self, batch: list[Request]) -> list[float | None]:
        """When the judge has to end, so that it can still score what it has by the deadline."""
        now = time.monotonic()
        return [None if r.due == math.inf else r.due - min(self.margin, 0.2 * max(r.due - now, 0.0))
                for r in batch]  # fmt: skip

    def _call(self, batch: list[Request]) -> list[Judgement]:
        queries, examples = [r.query for r in batch], [r.example for r in batch]
        found = list(self.judge.judge(queries, examples, deadlines=self._ends(batch)))
        if len(found) != len(batch):
            raise ValueError(f"the judge gave {len(found)} judgements of {len(batch)} answers")
        wrong = next((j for j in found if not isinstance(j, Judgement)), None)
        if wrong is not None:
            raise TypeError(f"the judge gave a {type(wrong).__name__}, not a Judgement")
        return found

    def _deliver(self, batch: list[Request], found: list[Judgement]) -> None:
        scores = self.normalizer([j.reward for j in found])
        now = time.monotonic()
        for request, judgement, score in zip(batch, found, scores):
            # NaN is none: of a model without value head, or of a trace that was not begun in time.
            if math.isinf(judgement.reward):
                message = f"the judge's reward is {judgement.reward}"
                self._waiting.miss(request, "error", message)
            else:
                self._waiting.answer(request, Scored.of(judgement, score, now - request.born))

    def health(self) -> str:
        """``"ok"``; ``"stalled"``: every worker is at a batch whose last deadline is past; ``"closed"``."""
        with self._waiting.changed:
            if self._waiting.closed:
                return "closed"
            late = sum(time.monotonic() > last for last in self._busy.values())
            return "stalled" if late == len(self._threads) else "ok"

    def stats(self) -> dict[str, Any]:
        """Counts of requests and of answers by finish reason, sizes of queue and batches, seconds to an answer."""
        waiting = self._waiting
        with waiting.changed:
            seconds = sorted(waiting.seconds)
            finish = {k: v for k, v in waiting.counts.items() if k != "requests"}
            total, answered = waiting.counts["requests"], sum(finish.values())
            return {
                "requests": total, "pending": total - answered, "queued": waiting.queued,
                "outside": waiting.outside(), "finish": finish, "batches": self._batches,
                "batch_size": self._judged / self._batches if self._batches else 0.0,
                "seconds_median": seconds[len(seconds) // 2] if seconds else None,
                "seconds_95": seconds[int(0.95 * len(seconds))] if seconds else None,
            }  # fmt: skip

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, and ends when the judge has; a second call does no harm.

        Args:
            drain: judge what waits; else it is answered with finish reason ``"error"``.
            timeout: seconds to wait for the judge; what it still has then is answered so, too.
        """
        self._waiting.close()
        if not drain:
            self._waiting.give_up(running=False)
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(None if end is None else max(0.0, end - time.monotonic()))
        self._waiting.give_up(running=True)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
