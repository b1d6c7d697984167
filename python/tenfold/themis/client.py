# SPDX-License-Identifier: Apache-2.0
"""A scorer on another machine or in another process, by ``tenfold themis serve``."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any
from urllib.parse import unquote, urlsplit

from tenfold.themis.record import read_judgement
from tenfold.themis.traces import Query
from tenfold.themis.waiting import Example, Scored
from tenfold.training.checks import positive

_AGAIN = (408, 429, 502, 503, 504)


class RemoteError(RuntimeError):
    """The server cannot be reached, or refused a request."""


class RemoteScorer:
    """Asks a server for what a :class:`~tenfold.themis.scorer.Scorer` would answer.

    What the server refuses for now (a full queue) or does not answer is asked again, until the deadline.

    Args:
        url: as ``http://127.0.0.1:8760``; ``http://any:TOKEN@host:port`` has the token in it, too.
        token: of the server. deadline: seconds in which an answer has to be here.
        batch: answers per request. connections: requests at the same time. trace: ask for traces, too.

    Raises:
        ValueError: url, settings.
    """

    def __init__(
        self, url: str, token: str | None = None, *, deadline: float = 60.0, batch: int = 32, connections: int = 16,
        trace: bool = True,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"url must be as http://host:port, got {parts.scheme}://{parts.hostname or ''}"
            )
        positive("deadline", deadline)
        if batch < 1 or connections < 1:
            raise ValueError(f"batch and connections must be >= 1, got {batch} and {connections}")
        self._kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._host, self._port = parts.hostname, parts.port
        self._path = (parts.path.rstrip("/") or "") if parts.path.rstrip("/").endswith("/score") else (
            parts.path.rstrip("/") + "/score")  # fmt: skip
        token = token or (unquote(parts.password) if parts.password else None)
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self.deadline, self.batch, self.trace = deadline, batch, trace
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="themis-client")

    def submit(
        self, query: Query, example: Example | None = None, deadline: float | None = None
    ) -> Future[Scored]:
        """A future of one answer."""
        end = self._end(deadline)
        return self._pool.submit(lambda: self._ask([query], [example], end)[0])

    async def score(
        self, query: Query, example: Example | None = None, deadline: float | None = None
    ) -> Scored:
        """One answer. Errors as of :meth:`score_many`."""
        return await asyncio.wrap_future(self.submit(query, example, deadline))

    def score_many(
        self, queries: Sequence[Query], examples: Sequence[Example | None] | None = None,
        deadline: float | None = None,
    ) -> list[Scored]:  # fmt: skip
        """Answers in the order of the queries.

        Raises:
            RemoteError: no answer by the deadline, or a request that the server will not take.
        """
        given = [None] * len(queries) if examples is None else list(examples)
        if len(given) != len(queries):
            raise ValueError(
                f"examples must be as many as queries, {len(queries)}; got {len(given)}"
            )
        end = self._end(deadline)
        parts = [
            self._pool.submit(self._ask, queries[i : i + self.batch], given[i : i + self.batch], end)
            for i in range(0, len(queries), self.batch)
        ]  # fmt: skip
        return [found for part in parts for found in part.result()]

    def _end(self, deadline: float | None) -> float:
        """When the answer has to be here; time that is spent waiting for a free connection counts."""
        if deadline is not None:
            positive("deadline", deadline)
        return time.monotonic() + (self.deadline if deadline is None else deadline)

    def _ask(
        self, queries: Sequence[Query], examples: Sequence[Example | None], end: float
    ) -> list[Scored]:
        items = [
            {k: v for k, v in (asdict(q) | {"example": e}).items() if v is not None}
            for q, e in zip(queries, examples)
        ]
        wait, said = 0.05, "no answer"
        while (left := end - time.monotonic()) > 0:
            text = json.dumps({"items": items, "deadline": left, "trace": self.trace}, default=str)
            body = text.encode()
            try:
                status, found = self._post(body, left)
            except (OSError, http.client.HTTPException) as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    return self._judgements(found, len(queries))
                said = f"{status}: {found.get('error', '')}"
                if status not in _AGAIN:
                    raise RemoteError(f"the server refused a request with {said}")
            time.sleep(min(wait * random.uniform(0.5, 1.0), max(0.0, end - time.monotonic())))
            wait = min(2 * wait, 2.0)
        raise RemoteError(f"no answer of {self._host} by the deadline; the last attempt: {said}")

    def _judgements(self, found: dict[str, Any], count: int) -> list[Scored]:
        made = found.get("results")
        if not isinstance(made, list) or len(made) != count:
            raise RemoteError(
                f"{self._host} gave no results of {count} answers; is it a server of Themis?"
            )
        try:
            return [read_judgement(j) for j in made]
        except ValueError as error:
            raise RemoteError(f"{self._host}: {error}; is it a server of Themis?") from None

    def _post(self, body: bytes, seconds: float) -> tuple[int, dict[str, Any]]:
        # A little longer than the deadline: the server's answer at it says why.
        connection = self._kind(self._host, self._port, timeout=seconds + min(1.0, 0.2 * seconds))
        try:
            connection.request("POST", self._path, body, self._headers)
            answer = connection.getresponse()
            text = answer.read()
            try:
                found = json.loads(text)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise http.client.HTTPException(f"{answer.status} without a JSON object")
            return answer.status, found
        finally:
            connection.close()

    def health(self) -> str:
        """What ``GET /health`` says; ``"unreachable"``."""
        connection = self._kind(self._host, self._port, timeout=5.0)
        try:
            connection.request("GET", self._path.removesuffix("/score") + "/health")
            return str(json.loads(connection.getresponse().read()).get("status"))
        except (OSError, http.client.HTTPException, ValueError):
            return "unreachable"
        finally:
            connection.close()

    def close(self) -> None:
        """Ends its threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> RemoteScorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
