"""Pairs made by rules, with observations of the real tools: data without a network."""

from __future__ import annotations

from typing import Any

KINDS = ("calculator", "calendar", "weather", "multi", "code", "translator", "search", "none")


def synthetic_pairs(kind: str, count: int, seed: int = 0) -> list[Any]:
    """``count`` pairs of a kind; traces are true: observations come from the tools."""
    raise NotImplementedError
