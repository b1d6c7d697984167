# SPDX-License-Identifier: Apache-2.0
"""Threads that run one tool's calls and may hang, and a clock that does not wait for them.

A thread cannot be ended from outside. So a worker whose call takes longer than it may is given up: the call is
answered, the worker counts as hung, and another takes its place while a pool has fewer than ``workers + spare``
threads. A hung worker whose call returns after all works on. Where all hang, calls are not begun: nothing
waits for them, and the number of threads stays bounded. All are daemons: a process can end.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

# Idle threads end after so many seconds, so that a toolbox that nobody closed leaves none.
IDLE_SECONDS = 10.0
_log = logging.getLogger("tenfold.themis.tools")


class Alarm:
    """Something to do at a time; :meth:`cancel` makes it nothing and lets go of what it holds."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Nothing will be done."""
        self.action = None


class Clock:
    """Does things at their times in one thread, which exists while something is to be done. They must be quick."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Alarm]] = []
        self._numbers = itertools.count()
        self._running = False

    def at(self, when: float, action: Callable[[], None]) -> Alarm:
        """Calls ``action()`` at that time of ``time.monotonic()``."""
        alarm = Alarm(action)
        with self._changed:
            heapq.heappush(self._heap, (when, next(self._numbers), alarm))
            if len(self._heap) > 1000 and not len(self._heap) & (len(self._heap) - 1):
                # Cancelled ones need not stay until their time; looked for at sizes that double.
                self._heap = [entry for entry in self._heap if entry[2].action is not None]
                heapq.heapify(self._heap)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="tools-clock", daemon=True).start()
            if self._heap[0][2] is alarm:  # else the thread wakes early enough
                self._changed.notify()
        return alarm

    def _run(self) -> None:
        while True:
            with self._changed:
                wait = self._heap[0][0] - time.monotonic() if self._heap else IDLE_SECONDS
                if wait > 0:
                    if not self._changed.wait(wait) and not self._heap:
                        self._running = False
                        return
                    continue
                action = heapq.heappop(self._heap)[2].action
            if action is not None:
                try:
                    action()
                except BaseException:
                    _log.exception("an action of the clock raised")


class Job:
    """One attempt: either refused, or worked at, and then perhaps late. All but :meth:`work` must be quick."""

    timeout: float

    def wanted(self) -> bool:
        """Is there still somebody who waits for it?"""
        return True

    def work(self) -> Callable[[], None]:
        """Runs the tool, and may hang; returns what is to be done with the result, in time or not. Never raises."""
        raise NotImplementedError

    def late(self) -> None:
        """It took longer than ``timeout``."""

    def refuse(self, closed: bool) -> None:
        """It was never begun: the pool is full, hangs, or is closed."""


class _Worker:
    def __init__(self) -> None:
        self.job: Job | None = None
        self.hung = False


class Pool:
    """Runs jobs on at most ``workers`` threads that do not hang.

    Args:
        spare: hung threads that are replaced. waiting: jobs that may wait.
    """

    def __init__(self, name: str, workers: int, clock: Clock, *, spare: int, waiting: int) -> None:
        self.name, self.workers, self.spare, self.waiting = name, workers, spare, waiting
        self._clock = clock
        self._changed = threading.Condition()  # its lock guards everything here
        self._queue: deque[Job] = deque()
        self._live = self._hung = self._idle = 0
        self._closed = False

    @property
    def threads(self) -> tuple[int, int]:
        """(threads that work or wait for work, threads that hang)."""
        with self._changed:
            return self._live, self._hung

    def add(self, job: Job) -> None:
        """Runs the job, or refuses it at once."""
        with self._changed:
            taken = not self._closed and len(self._queue) < self.waiting and self._staffed()
            if taken:
                self._queue.append(job)
                self._changed.notify()
        if not taken:
            job.refuse(self._closed)

    def _staffed(self) -> bool:
        """Starts a worker if one is wanted and may be; is there any?"""
        may = self._live < self.workers and self._live + self._hung < self.workers + self.spare
        if may and self._idle <= len(self._queue):
            threading.Thread(target=self._run, name=f"tool-{self.name}", daemon=True).start()
            self._live += 1
        return self._live > 0

    def _next(self, worker: _Worker) -> Job | None:
        """The next job, or None: this thread is not needed any more."""
        with self._changed:
            while True:
                if self._closed:
                    break
                if self._queue:
                    worker.job = self._queue.popleft()
                    return worker.job
                self._idle += 1
                told = self._changed.wait(IDLE_SECONDS)
                self._idle -= 1
                if not told and not self._queue:
                    break
            self._live -= 1
            return None

    def _run(self) -> None:
        worker = _Worker()
        while (job := self._next(worker)) is not None:
            alarm = None
            finish: Callable[[], None] | None = None
            if job.wanted():
                alarm = self._clock.at(
                    time.monotonic() + job.timeout, partial(self._give_up, worker, job)
                )
                finish = job.work()
                alarm.cancel()
            with self._changed:
                worker.job = None
                leave = False
                if worker.hung:
                    worker.hung = False
                    self._hung -= 1
                    leave = self._live >= self.workers or self._closed
                    self._live += not leave
            if finish is not None:
                finish()
            if leave:
                return
            del job, finish

    def _give_up(self, worker: _Worker, job: Job) -> None:
        stranded: list[Job] = []
        with self._changed:
            if worker.job is not job:
                return
            worker.hung = True
            self._live -= 1
            self._hung += 1
            if self._queue and not self._staffed():
                stranded = list(self._queue)
                self._queue.clear()
        job.late()
        for other in stranded:
            other.refuse(False)

    def close(self) -> None:
        """No job is begun any more."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
