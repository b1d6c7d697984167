# SPDX-License-Identifier: Apache-2.0
"""``google_serper``: a web search by serper.dev's HTTP interface. The one tool that needs a network; off by default."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from tenfold.themis.tools.base import BadArguments, Refused, Tool
from tenfold.training.checks import positive

URL = "https://google.serper.dev/search"
KEY_VARIABLE = "SERPER_API_KEY"
RESULTS = 10
_MAX_BYTES = 1 << 20
_MAX_QUERY = 500


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to wherever it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _text(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""


def answer_of(found: Mapping[str, Any], results: int = RESULTS) -> str:
    """The answer box if there is one, else the knowledge graph and the results' snippets, joined by spaces.

    What is not of the expected type is passed over. LookupError: nothing is left.
    """
    box = found.get("answerBox")
    if isinstance(box, Mapping):
        for name in ("answer", "snippet"):
            if text := _text(box.get(name)):
                return text
        marked = box.get("snippetHighlighted")
        if isinstance(marked, list) and (text := " ".join(filter(None, map(_text, marked)))):
            return text
    parts = []
    graph = found.get("knowledgeGraph")
    if isinstance(graph, Mapping):
        title = _text(graph.get("title"))
        if kind := _text(graph.get("type")):
            parts.append(f"{title}: {kind}.")
        parts.append(_text(graph.get("description")))
        parts += _attributes(graph, f"{title} ")
    organic = found.get("organic")
    for item in organic[:results] if isinstance(organic, list) else ():
        if isinstance(item, Mapping):
            parts.append(_text(item.get("snippet")))
            parts += _attributes(item, "")
    if text := " ".join(filter(None, parts)):
        return text
    raise LookupError("the search found nothing")


def _attributes(item: Mapping[str, Any], before: str) -> list[str]:
    found = item.get("attributes")
    pairs = found.items() if isinstance(found, Mapping) else ()
    return [f"{before}{_text(name)}: {_text(value)}." for name, value in pairs if _text(value)]


class GoogleSerper(Tool):
    """Searches the web.

    Args:
        key: of the service; default the environment's ``SERPER_API_KEY``, read at each call and never kept.
            Without one, calls are refused. results: snippets asked for. timeout: seconds, of the whole attempt.
        url: of another service with the same interface.
    """

    names = ("google_serper",)
    deterministic = False
    retries = 2

    def __init__(
        self,
        key: str | None = None,
        *,
        results: int = RESULTS,
        timeout: float = 10.0,
        url: str = URL,
    ) -> None:
        positive("timeout", timeout)
        if not 1 <= results <= 100:
            raise ValueError(f"results must be in [1, 100], got {results}")
        if not url.startswith(("https://", "http://")):
            raise ValueError(f"url must begin with https:// or http://, got {url!r}")
        self._key, self.results, self.timeout, self.url = key, results, timeout, url
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __repr__(self) -> str:
        return f"GoogleSerper(results={self.results}, url={self.url!r})"  # not the key

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """What the search says. OSError, LookupError: it failed, or found nothing."""
        query = " ".join(arguments.split())
        if not query or len(query) > _MAX_QUERY:
            raise BadArguments(
                f"google_serper takes a query of 1 to {_MAX_QUERY} characters, got {len(query)}"
            )
        key = self._key or os.environ.get(KEY_VARIABLE)
        if not key:
            raise Refused(f"no key for the web search: set {KEY_VARIABLE}")
        if not (key.isascii() and key.isprintable()):  # http.client would say which, and show it
            raise Refused("the key for the web search has characters that no key has")
        body = json.dumps({"q": query, "num": self.results}).encode()
        headers = {"X-API-KEY": key, "Content-Type": "application/json"}
        asked = urllib.request.Request(self.url, body, headers, method="POST")
        limit = 0.8 * self.timeout  # so that it ends before it is given up
        late = time.monotonic() + limit
        data = b""
        try:
            with self._opener.open(asked, timeout=limit) as reply:
                while len(data) <= _MAX_BYTES and (part := reply.read1(1 << 16)):
                    data += part
                    if time.monotonic() > late:
                        raise OSError("the web search takes too long to answer")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise Refused(f"the web search refused the key: HTTP {error.code}") from None
            raise OSError(f"the web search answered HTTP {error.code}") from None
        if len(data) > _MAX_BYTES:
            raise OSError(f"the web search answered with more than {_MAX_BYTES} bytes")
        found = json.loads(data)
        if not isinstance(found, Mapping):
            raise OSError("the web search answered with no object")
        return answer_of(found, self.results)

    def key(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """The query without superfluous white space."""
        return " ".join(arguments.split())
