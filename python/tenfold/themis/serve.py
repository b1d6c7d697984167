# SPDX-License-Identifier: Apache-2.0
"""A scorer over HTTP: JSON requests, on this machine unless it is told otherwise.

    POST /score   {"question", "answer"[, "context"][, "example"][, "deadline"][, "trace": false]} -> the judgement
                  {"items": [{"question", "answer", ...}, ...], ...}                              -> {"results": [...]}
                  {"query": [...], "prompts": [...], "labels": [...]}, OpenRLHF's remote reward model,
                                                             -> {"rewards": [...], "scores": [...], "extra_logs": {...}}
    GET  /health  {"status": "ok"}; 503 if the judge is stuck
    GET  /stats   counts and times

With a token, all but /health need ``Authorization: Bearer TOKEN`` (or the token as the password of basic
authentication, which clients make of ``http://any:TOKEN@host``). Without one the server listens on this machine only,
and answers only requests that were addressed to it (no names that a web page had resolved here).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import logging
import math
import signal
import threading
from dataclasses import dataclass, field
from typing import Any

from tenfold.themis import wire
from tenfold.themis.protocol import Asked, parse_score
from tenfold.themis.scorer import Scored, Scorer, ScorerFull
from tenfold.themis.wire import HttpError, HttpRequest
from tenfold.training.checks import positive

_log = logging.getLogger(__name__)
TOKEN_LENGTH = 16


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body: bytes of a request. batch: answers in it. text: characters of a question, answer or context.
        connections: at a time. read_seconds: in which a request has to arrive, and a client to read its answer; a
            quiet connection ends then.
        deadline: largest number of seconds that a request may give itself.
    """

    body: int = 1 << 20
    batch: int = 256
    text: int = 200_000
    connections: int = 1024
    read_seconds: float = 30.0
    deadline: float = 600.0

    def __post_init__(self) -> None:
        for name in ("body", "batch", "text", "connections"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        positive("read_seconds", self.read_seconds)
        positive("deadline", self.deadline)


def is_loopback(host: str) -> bool:
    """Is it a name or address of this machine alone?"""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower() == "localhost"


def checked_access(host: str, token: str | None, missing: float | None = None) -> None:
    """ValueError where a server may not be reached so; see :class:`Server`."""
    if token is None and not is_loopback(host):
        raise ValueError(
            f"host {host!r} can be reached from other machines: give a token, or listen on 127.0.0.1"
        )
    if token is not None and (len(token) < TOKEN_LENGTH or not token.isascii()):
        raise ValueError(f"token must have at least {TOKEN_LENGTH} ASCII characters")
    if missing is not None and not math.isfinite(missing):
        raise ValueError(f"missing must be a finite number or None, got {missing}")


class _Stream(asyncio.StreamReaderProtocol):
    """Knows when the client has gone, while nobody reads."""

    def __init__(self, reader: asyncio.StreamReader, handler: Any) -> None:
        super().__init__(reader, handler)
        self.gone = asyncio.Event()

    def eof_received(self) -> bool | None:
        self.gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        super().connection_lost(exc)


@dataclass
class Server:
    """Answers requests with a scorer, in a thread of its own.

    Args:
        scorer: that answers. host, port: where it listens; port 0: any free one. token: that requests need.
        limits: of requests. missing: reward in OpenRLHF's form for answers that have none; None: such a request is
            answered 503, which makes that client ask again.

    Use it as a context manager, or ``start()`` and ``stop()``; the scorer stays open.

    Raises:
        ValueError: another host than this machine without a token, a token that is too short, ``missing``.
        OSError (from ``start``): the port is taken.
    """

    scorer: Scorer
    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    limits: Limits = field(default_factory=Limits)
    missing: float | None = None

    def __post_init__(self) -> None:
        checked_access(self.host, self.token, self.missing)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it can be reached."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def run(self, ready: Any = lambda: None) -> None:
        """Serves until :meth:`stop`, which drops what is being answered. ``ready``: called once it listens."""
        loop = self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()

        def connection() -> _Stream:
            reader = asyncio.StreamReader(limit=wire.HEAD, loop=loop)
            return _Stream(reader, self._accept)

        server = await loop.create_server(connection, self.host, self.port)
        self.port = server.sockets[0].getsockname()[1]
        ready()
        try:
            await self._end.wait()
        finally:
            server.close()
            for task in list(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def start(self) -> Server:
        """Listens when it returns."""
        listens = threading.Event()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                asyncio.run(self.run(listens.set))
            except BaseException as error:
                failed.append(error)
            listens.set()

        self._thread = threading.Thread(target=work, name="themis-http", daemon=True)
        self._thread.start()
        listens.wait()
        if failed:
            raise failed[0]
        return self

    def stop(self) -> None:
        """Ends :meth:`run`. From any thread."""
        if self._loop is not None and self._end is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._end.set)
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) > self.limits.connections:
                busy = {"error": f"more than {self.limits.connections} connections"}
                writer.write(wire.response(503, busy, headers={"Retry-After": "1"}))
            else:
                await self._talk(reader, writer)
            await self._sent(writer)
        except ConnectionError:
            pass
        except TimeoutError:  # nobody reads: what is not sent yet would keep the connection open
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gone = writer.transport.get_protocol().gone  # type: ignore[attr-defined]
        keep = True
        while keep:
            request = None
            try:
                request = await wire.read_request(
                    reader, writer, self.limits.body, self.limits.read_seconds
                )
                if request is None:
                    return
                status, payload, more = *await self._answer(request, gone), {}
                keep = request.keep
            except HttpError as error:
                status, payload, more = error.status, {"error": error.text}, error.headers
                keep = not error.fatal and request is not None and request.keep
            except _Gone:
                return
            except Exception:
                _log.exception("a request failed")
                status, payload, more, keep = 500, {"error": "internal error"}, {}, False
            writer.write(wire.response(status, payload, keep=keep, headers=more))
            await self._sent(writer)

    async def _sent(self, writer: asyncio.StreamWriter) -> None:
        """Waits until most is sent; TimeoutError if the client takes too long to read it."""
        async with asyncio.timeout(self.limits.read_seconds):
            await writer.drain()

    async def _answer(self, request: HttpRequest, gone: asyncio.Event) -> tuple[int, Any]:
        paths = {"/health": "GET", "/stats": "GET", "/score": "POST"}
        method = paths.get(request.path)
        self._check_host(request)
        if request.path == "/health" and request.method == "GET":
            status = self.scorer.health()
            return (200 if status == "ok" else 503), {"status": status}
        self._check_token(request)
        if method is None:
            raise HttpError(
                404, f"there is no {request.path[:100]!r}; there are: {', '.join(paths)}"
            )
        if request.method != method:
            raise HttpError(405, f"{request.path} takes {method}", {"Allow": method})
        if request.path == "/stats":
            return 200, self.scorer.stats()
        asked = parse_score(request.json(), self.limits)
        return 200, asked.reply(await self._score(asked, gone), self.missing)

    def _check_host(self, request: HttpRequest) -> None:
        name = request.headers.get("host", "")
        host = name.rpartition(":")[0] if name.rpartition(":")[2].isdigit() else name
        if self.token is None and not is_loopback(host):
            raise HttpError(
                403,
                f"this server has no token and answers only as localhost, not as {host[:100]!r}",
            )

    def _check_token(self, request: HttpRequest) -> None:
        if self.token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
            except binascii.Error:
                given = ""
        # The time of the comparison does not depend on how much of the token is right.
        right = hmac.compare_digest(given.encode("latin-1", "replace"), self.token.encode())
        if not right or kind.lower() not in ("bearer", "basic"):
            raise HttpError(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    async def _score(self, asked: Asked, gone: asyncio.Event) -> list[Scored]:
        if len(asked.queries) > self.scorer.queue:
            raise HttpError(413, f"at most {self.scorer.queue} answers fit into the queue")
        try:
            futures = self.scorer.submit_many(
                asked.queries, asked.examples, asked.deadline, wait=False
            )
        except ScorerFull as error:
            raise HttpError(503, str(error), {"Retry-After": "1"}) from None
        except RuntimeError as error:
            raise HttpError(503, str(error)) from None
        found = asyncio.gather(*map(asyncio.wrap_future, futures))
        left = asyncio.ensure_future(gone.wait())
        first: set[asyncio.Future[Any]] = {found, left}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                raise _Gone
            return list(found.result())
        finally:
            left.cancel()
            found.cancel()  # does nothing to what is done, and takes the other requests back


class _Gone(Exception):
    """The client closed the connection before it had its answer."""


def serve(
    scorer: Scorer, host: str = "127.0.0.1", port: int = 8760, token: str | None = None,
    limits: Limits | None = None, missing: float | None = None, ready: Any = lambda server: None,
) -> None:  # fmt: skip
    """Serves until the process gets SIGINT or SIGTERM. Arguments and errors as of :class:`Server`.

    ``ready``: called with the server once it listens.
    """
    server = Server(scorer, host, port, token, limits or Limits(), missing)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        await server.run(lambda: ready(server))

    asyncio.run(run())
