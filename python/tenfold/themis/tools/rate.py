"""Skeleton: signatures only, being filled in."""

from __future__ import annotations


class Rate:
    """At most ``calls`` in any burst, refilled evenly over ``seconds``."""

    def __init__(self, calls: int, seconds: float) -> None:
        raise NotImplementedError
