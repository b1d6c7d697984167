# SPDX-License-Identifier: Apache-2.0
"""Runs tools for many callers at once, so that none of them can stall, crash or flood what calls it.

    submit --cache?--> answered
       +--rate--> (clock) --> queue of the tool --> one of its workers --> text, cut and made plain --> answered
                                  deadline, or timeout of the attempt: answered by the clock

Limits, per tool: ``workers`` threads, ``spare`` more while threads hang, ``queue`` calls that wait. Arguments may
have ``MAX_ARGUMENTS`` characters; an observation has ``max_chars`` at most. Tools run in this process and are
trusted code that gets untrusted text; what a tool returns is not trusted. Special tokens in it are text to the layer
that makes ids of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, InvalidStateError
from functools import partial
from types import TracebackType
from typing import Any

from tenfold.themis.tools.base import (
    MAX_ARGUMENTS,
    BadArguments,
    Observation,
    Refused,
    Status,
    Tool,
    error_text,
    plain_text,
)
from tenfold.themis.tools.cache import ToolCache
from tenfold.themis.tools.pool import Clock, Job, Pool
from tenfold.themis.tools.rate import Bucket, Rate
from tenfold.themis.trace_types import FAILURE
from tenfold.training.checks import positive

CLOSED = "the toolbox was closed"
_BACKOFF, _MAX_BACKOFF = 0.1, 2.0  # seconds before the first retry, doubled; at most


class _Call:
    """A call from when it was submitted until it is answered."""

    def __init__(
        self,
        tool: Tool,
        name: str,
        arguments: str,
        example: Mapping[str, Any],
        deadline: float | None,
        open_calls: set[_Call],
    ) -> None:
        self.tool, self.name, self.arguments, self.example = tool, name, arguments, example
        self._open_calls = open_calls
        self.deadline, self.begun = deadline, time.monotonic()
        self.future: Future[Observation] = Future()
        self.key: str | None = None
        self.tried = 0
        self.alarm: Any = None
        self.future.add_done_callback(self._done)

    def _done(self, future: Future[Observation]) -> None:
        self._open_calls.discard(self)
        if self.alarm is not None:
            self.alarm.cancel()

    def answer(
        self, status: Status, text: str = FAILURE, error: str = "", cached: bool = False
    ) -> None:
        """Answers, unless somebody did."""
        seconds = time.monotonic() - self.begun
        made = Observation(text if status == "ok" else FAILURE, status, seconds, cached, error)
        try:
            self.future.set_result(made)
        except InvalidStateError:
            return


class _Attempt(Job):
    def __init__(self, box: Toolbox, call: _Call) -> None:
        self.box, self.call, self.timeout = box, call, call.tool.timeout

    def wanted(self) -> bool:
        return not self.call.future.done()

    def work(self) -> Callable[[], None]:
        call, text = self.call, FAILURE
        status: Status = "failed"
        error, again = "", False
        try:
            given = call.tool.call(call.name, call.arguments, call.example)
            text, status = plain_text(given, self.box.max_chars), "ok"
        except BadArguments as reason:
            status, error = "bad_args", error_text(reason)
        except Refused as reason:
            status, error = "refused", error_text(reason)
        except LookupError as reason:  # a definite no
            error = error_text(reason)
        except BaseException as reason:
            error, again = error_text(reason), True
        return partial(self.box._finish, call, status, text, error, again)

    def late(self) -> None:
        self.call.answer("timeout", error=f"the tool took longer than {self.timeout:g} s")

    def refuse(self, closed: bool) -> None:
        if closed:
            self.call.answer("failed", error=CLOSED)
        else:
            self.call.answer("limited", error="the tool's queue is full, or all its calls hang")


class Toolbox:
    """Tools by their action names. Use it as a context manager, or call :meth:`close`.

    Args:
        tools: no two with the same name. cache: see :class:`ToolCache`.
        workers: threads of each tool, or by any name of a tool (others have 4). rates: by any name of a tool; a
            tool with several names has one rate.
        max_chars: of an observation. spare: threads of a tool that may hang and be replaced. queue: calls of a
            tool that may wait, for a worker or for their turn.

    Raises:
        ValueError: names twice or missing, numbers. KeyError: workers or rates of a tool that is not there.
        TypeError: no tools, no rates.
    """

    def __init__(
        self,
        tools: Iterable[Tool],
        *,
        cache: ToolCache | None = None,
        workers: int | Mapping[str, int] = 4,
        rates: Mapping[str, Rate] | None = None,
        max_chars: int = 4000,
        spare: int = 4,
        queue: int = 10_000,
    ) -> None:
        for name, value, low in (
            ("max_chars", max_chars, 16),
            ("spare", spare, 0),
            ("queue", queue, 1),
        ):
            if value < low:
                raise ValueError(f"{name} must be >= {low}, got {value}")
        self.max_chars = max_chars
        self.cache = ToolCache() if cache is None else cache  # an empty one is false
        self._clock = Clock()
        self._closed = False
        self._open: set[_Call] = set()
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            self._take(tool)
        self.names = frozenset(self._tools)
        sizes = self._by_tool("workers", {} if isinstance(workers, int) else workers)
        limits = self._by_tool("rates", rates or {})
        default = workers if isinstance(workers, int) else 4
        # By the first name of each tool.
        self._pools: dict[str, Pool] = {}
        self._buckets: dict[str, Bucket] = {}
        for first in dict.fromkeys(tool.names[0] for tool in self._tools.values()):
            size = sizes.get(first, default)
            if size < 1:
                raise ValueError(f"workers must be >= 1, got {size} of {first}")
            self._pools[first] = Pool(first, size, self._clock, spare=spare, waiting=queue)
            if first in limits:
                if not isinstance(limits[first], Rate):
                    raise TypeError(f"rates must hold a Rate of {first}, got {limits[first]!r}")
                self._buckets[first] = Bucket(limits[first], time.monotonic(), most=queue)

    def _take(self, tool: Tool) -> None:
        if not isinstance(tool, Tool):
            raise TypeError(f"tools must hold tools, got {type(tool).__name__}")
        if not tool.names or isinstance(tool.names, str):
            raise ValueError(
                f"{type(tool).__name__}.names must be a tuple of action names, got {tool.names!r}"
            )
        positive(f"{type(tool).__name__}.timeout", tool.timeout)
        for name in tool.names:
            if name in self._tools:
                raise ValueError(f"two tools have the name {name}")
            self._tools[name] = tool

    def _by_tool(self, what: str, given: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in given.items():
            if name not in self._tools:
                there = ", ".join(sorted(self._tools))
                raise KeyError(f"{what}: no tool {name!r}; there are {there}")
            first = self._tools[name].names[0]
            if first in found:
                raise ValueError(f"{what}: the tool of {name} has a value under another name")
            found[first] = value
        return found

    def check(self, names: Iterable[str]) -> None:
        """KeyError for names that no tool has."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise KeyError(
                f"no tools {', '.join(map(repr, unknown))}; there are {', '.join(sorted(self.names))}"
            )

    def threads(self) -> dict[str, tuple[int, int]]:
        """Of each tool, by its first name: (threads, threads that hang)."""
        return {first: pool.threads for first, pool in self._pools.items()}

    def run(
        self,
        name: str,
        arguments: str,
        example: Mapping[str, Any] | None = None,
        *,
        deadline: float | None = None,
    ) -> Observation:
        """The observation of one call; see :meth:`submit`."""
        return self.submit(name, arguments, example, deadline=deadline).result()

    def submit(
        self,
        name: str,
        arguments: str,
        example: Mapping[str, Any] | None = None,
        *,
        deadline: float | None = None,
    ) -> Future[Observation]:
        """Calls a tool. The future always gets an observation, and never an exception, whatever the tool does.

        Args:
            name, arguments: what a model wrote. example: what is judged, see :class:`Tool`.
            deadline: a point of ``time.monotonic()`` at which the answer is there, at the latest; None: the
                call may wait for its turn, and then has the tool's ``timeout``.

        The future's callbacks run in the toolbox's threads and must be quick.

        Raises:
            RuntimeError: the toolbox was closed.
        """
        if self._closed:
            raise RuntimeError(CLOSED)
        tool = self._tools.get(name) if isinstance(name, str) else None
        call = _Call(tool or Tool(), name, arguments, example or {}, deadline, self._open)
        if tool is None:
            call.answer("unknown_tool", error=f"no tool {str(name)[:60]!r}")
        elif not isinstance(arguments, str) or len(arguments) > MAX_ARGUMENTS:
            call.answer(
                "bad_args", error=f"arguments must be a text of up to {MAX_ARGUMENTS} characters"
            )
        elif not self._replayed(call):
            self._start(call)
        return call.future

    def _replayed(self, call: _Call) -> bool:
        """Did the cache answer, or say that nothing may?"""
        cache = self.cache
        if cache.mode == "off":
            return False
        try:
            call.key = str(call.tool.key(call.name, call.arguments, call.example))
            found = cache.get(call.name, call.key, deterministic=call.tool.deterministic)
        except Exception as error:
            call.answer("failed", error=error_text(error))
            return True
        if found is not None:
            status: Any = found[0]
            call.answer(status, found[1][: self.max_chars], cached=True)
        elif not cache.calls:
            call.answer("failed", error="not in the cache, and it is only replayed")
        return call.future.done()

    def _start(self, call: _Call) -> None:
        now = time.monotonic()
        self._open.add(call)
        if call.future.done():  # answered or cancelled while it waited for another attempt
            return call._done(call.future)
        if call.deadline is not None:
            if call.deadline <= now:
                return call.answer("timeout", error="the deadline had passed")
            if call.alarm is None:
                late = partial(call.answer, "timeout", error="the deadline passed")
                call.alarm = self._clock.at(call.deadline, late)
        bucket = self._buckets.get(call.tool.names[0])
        turn = now if bucket is None else bucket.reserve(now, call.deadline)
        add = partial(self._pools[call.tool.names[0]].add, _Attempt(self, call))
        if turn is None:
            call.answer("limited", error="the rate limit leaves no turn before the deadline")
        elif turn > now:
            self._clock.at(turn, add)
        else:
            add()

    def _finish(self, call: _Call, status: Status, text: str, error: str, again: bool) -> None:
        # A replay says what the recorded run was told, and that was no late result.
        late = call.future.done() and self.cache.mode == "record"
        if call.key is not None and not late:
            try:
                self.cache.put(call.name, call.key, call.arguments, status, text)
            except OSError as reason:  # a full disk is no reason to lose the answer
                error = error or f"not recorded: {error_text(reason)}"
        if again and call.tried < call.tool.retries and not call.future.done() and not self._closed:
            call.tried += 1
            wait = min(_MAX_BACKOFF, _BACKOFF * 2 ** (call.tried - 1))
            self._clock.at(time.monotonic() + wait, partial(self._start, call))
        else:
            call.answer(status, text, error)

    def close(self) -> None:
        """Begins nothing any more and answers what waits or runs as failed. Threads end when their calls do."""
        self._closed = True
        for pool in self._pools.values():
            pool.close()
        for call in self._open.copy():
            call.answer("failed", error=CLOSED)

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
