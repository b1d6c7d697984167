# SPDX-License-Identifier: Apache-2.0
"""As much of HTTP/1.1 as a JSON endpoint needs, on asyncio's streams; every size and every wait has a limit.

Bodies have a Content-Length; other encodings are refused. Connections stay open unless the client says otherwise.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass
from typing import Any

HEAD = 16_384  # bytes of request line and headers
_SINGLE = ("authorization", "content-length", "content-type", "host", "transfer-encoding")
REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 411: "Length Required", 413: "Content Too Large",
    415: "Unsupported Media Type", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 503: "Service Unavailable",
}  # fmt: skip


class HttpError(Exception):
    """A request that is answered with an error.

    ``status``: of HTTP; ``text``: for the client; ``headers``: more of them.
    ``fatal``: the connection ends, since where the next request begins is not known.
    """

    def __init__(
        self, status: int, text: str, headers: dict[str, str] | None = None, fatal: bool = False
    ) -> None:
        super().__init__(text)
        self.status, self.text, self.headers, self.fatal = status, text, headers or {}, fatal


@dataclass(frozen=True)
class HttpRequest:
    """A request: names of headers in lower case; ``keep``: the client wants to send more."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    keep: bool

    def json(self) -> dict[str, Any]:
        """The body as a JSON object. HttpError 415 or 400 if it is none."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Also keeps web pages of others from sending requests here: browsers ask first, and get no answer.
            raise HttpError(415, "the content type must be application/json")
        try:
            found = json.loads(self.body, parse_constant=_no_constant)
        except RecursionError:
            raise HttpError(400, "the body is nested too deeply") from None
        except ValueError as error:
            raise HttpError(400, f"the body is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise HttpError(400, f"the body must be a JSON object, got {type(found).__name__}")
        return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def dumps(value: Any) -> bytes:
    """JSON; numbers that are none become null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "replace"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def response(
    status: int, payload: Any, *, keep: bool = False, headers: dict[str, str] | None = None
) -> bytes:
    """A whole response with a JSON body."""
    body = dumps(payload)
    lines = {
        "Content-Type": "application/json", "Content-Length": str(len(body)),
        "Connection": "keep-alive" if keep else "close", "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    } | (headers or {})  # fmt: skip
    head = f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\n"
    head += "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    return head.encode("latin-1") + b"\r\n" + body


async def read_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int, seconds: float
) -> HttpRequest | None:
    """The next request of a connection, None at its end.

    Args:
        limit: bytes of a body. seconds: in which a request has to arrive.

    Raises:
        HttpError: what the client sent is too large, too slow, or no HTTP.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _read(reader, writer, limit)
    except TimeoutError:
        raise HttpError(408, f"no whole request came within {seconds:g} s", fatal=True) from None
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


async def _read(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int
) -> HttpRequest | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise HttpError(431, f"the headers have more than {HEAD} bytes", fatal=True) from None
    first, *rest = head[:-4].decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0") or not parts[1].startswith("/"):
        raise HttpError(400, "the first line is no request of HTTP/1", fatal=True)
    headers = _headers(rest)
    length = _length(headers, limit)
    if length and headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
    body = await reader.readexactly(length) if length else b""
    wish = headers.get("connection", "").lower()
    keep = wish != "close" if parts[2] == "HTTP/1.1" else wish == "keep-alive"
    return HttpRequest(parts[0], parts[1].partition("?")[0], headers, body, keep)


def _headers(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        key = name.lower()
        # Which of two lengths or hosts is meant is what request smuggling plays with.
        if not colon or not name or name != name.strip() or (key in found and key in _SINGLE):
            raise HttpError(400, f"a header is malformed or repeated: {name[:64]!r}", fatal=True)
        found[key] = f"{found[key]}, {value.strip()}" if key in found else value.strip()
    return found


def _length(headers: dict[str, str], limit: int) -> int:
    if "transfer-encoding" in headers:
        raise HttpError(501, "bodies need a Content-Length, not a Transfer-Encoding", fatal=True)
    text = headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit()) or len(text) > 12:
        raise HttpError(400, "Content-Length is no number", fatal=True)
    if int(text) > limit:
        raise HttpError(413, f"the body has {text} bytes, at most {limit} are read", fatal=True)
    return int(text)
