"""Skeleton: signatures only, being filled in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from tenfold.themis.tools.base import Observation, Tool
from tenfold.themis.tools.cache import ToolCache
from tenfold.themis.tools.rate import Rate


class Toolbox:
    """Runs tools in pools of their own. ``deadline``: a point of ``time.monotonic()`` (not a duration).

    Args:
        workers: threads per tool, or by any of its names. rates: token buckets by name.
    """

    names: frozenset[str]

    def __init__(self, tools: Iterable[Tool], *, cache: ToolCache | None = None, workers: int | Mapping[str, int] = 4,
                 rates: Mapping[str, Rate] | None = None, max_chars: int = 4000) -> None:  # fmt: skip
        raise NotImplementedError

    def run(self, name: str, arguments: str, example: Mapping[str, Any] | None = None, *,
            deadline: float | None = None) -> Observation:  # fmt: skip
        """The observation; never raises for what a model wrote."""
        raise NotImplementedError

    def submit(self, name: str, arguments: str, example: Mapping[str, Any] | None = None, *,
               deadline: float | None = None) -> Future[Observation]:  # fmt: skip
        """The same, later; done by ``deadline`` at the latest, whatever the tool does."""
        raise NotImplementedError

    def check(self, names: Iterable[str]) -> None:
        """KeyError for names that no tool has."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the workers; what waits is answered as failed."""
        raise NotImplementedError
