"""Skeleton: signatures only, being filled in."""

from __future__ import annotations

import os


class ToolCache:
    """Results by (tool, key), JSON lines. ``mode``: off, record, replay (never calls a tool), both."""

    def __init__(self, path: str | os.PathLike[str] | None = None, mode: str = "off") -> None:
        raise NotImplementedError
