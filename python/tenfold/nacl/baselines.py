# SPDX-License-Identifier: Apache-2.0
"""Other eviction rules behind the same interface, on the same ops: for honest comparisons."""

from __future__ import annotations

from typing import Any

from tenfold.nacl.config import BudgetPlan
from tenfold.nacl.press import NaclPress, Press


class FullPress(Press):
    """Keeps everything."""

    def plan(self, length: int) -> BudgetPlan | None:
        """Nothing to evict."""
        return None


class _BudgetPress(Press):
    """Rules that only need the number of kept tokens; no pooling unless they ask for it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**({"pool_kernel": 1} | kwargs))

    def counts(self, keep: int, length: int) -> tuple[int, int, int, int, int]:
        """(sink, recent, topk, random, proxies)."""
        raise NotImplementedError

    def plan(self, length: int) -> BudgetPlan | None:
        """The integers for a prompt of ``length`` tokens."""
        base = self.config.budget(length)
        return None if base is None else BudgetPlan(length, *self.counts(base.keep, length))


class StreamingLLMPress(_BudgetPress):
    """StreamingLLM (arXiv 2309.17453): ``sink_tokens`` (4) first tokens and the most recent ones."""

    needs_scores = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**({"sink_tokens": 4} | kwargs))

    def counts(self, keep: int, length: int) -> tuple[int, int, int, int, int]:
        """Sinks and recents only."""
        sinks = min(self.config.sink_tokens, keep)
        return sinks, keep - sinks, 0, 0, 1


class H2OPress(_BudgetPress):
    """H2O (arXiv 2306.14048): attention summed over all prompt tokens; half heavy, half recent."""

    def __init__(self, heavy_ratio: float = 0.5, recent_ratio: float = 0.5, **kwargs: Any) -> None:
        if heavy_ratio < 0 or recent_ratio < 0 or heavy_ratio + recent_ratio <= 0:
            raise ValueError("heavy_ratio and recent_ratio must be >= 0 and not both 0, got "
                             f"{heavy_ratio} and {recent_ratio}")  # fmt: skip
        super().__init__(**kwargs)
        self.recent_share = recent_ratio / (heavy_ratio + recent_ratio)

    def counts(self, keep: int, length: int) -> tuple[int, int, int, int, int]:
        """Every prompt token is a proxy."""
        recent = int(self.recent_share * keep)
        return 0, recent, keep - recent, 0, length


class TOVAPress(_BudgetPress):
    """TOVA (arXiv 2401.06104): attention of the last token, averaged over all heads of the layer."""

    share_heads = True

    def counts(self, keep: int, length: int) -> tuple[int, int, int, int, int]:
        """The last token is kept and is the only proxy."""
        return 0, 1, keep - 1, 0, 1


class SnapKVPress(_BudgetPress):
    """SnapKV (arXiv 2404.14469): an observation window at the end scores, pooled over neighbours."""

    def __init__(self, window_size: int = 64, **kwargs: Any) -> None:
        if window_size < 1:
            raise ValueError(f"window_size must be >= 1, got {window_size}")
        super().__init__(**({"pool_kernel": 5, "pool": "avg"} | kwargs))
        self.window_size = window_size

    def counts(self, keep: int, length: int) -> tuple[int, int, int, int, int]:
        """The window is kept; the rest of the budget goes to the pooled scores."""
        window = min(self.window_size, length - 1)
        recent = min(window, keep)
        return 0, recent, keep - recent, 0, window


class RandomPress(_BudgetPress):
    """Uniformly random tokens plus the last one: the floor that every rule must beat."""

    needs_scores = False

    def counts(self, keep: int, length: int) -> tuple[int, int, int, int, int]:
        """One recent token, the rest drawn."""
        return 0, 1, 0, keep - 1, 1


METHODS: dict[str, type[Press]] = {
    "full": FullPress,
    "nacl": NaclPress,
    "streaming_llm": StreamingLLMPress,
    "h2o": H2OPress,
    "tova": TOVAPress,
    "snapkv": SnapKVPress,
    "random": RandomPress,
}


def make_press(name: str, **kwargs: Any) -> Press:
    """A press by name (``METHODS``); ValueError names the known ones."""
    if name not in METHODS:
        raise ValueError(f"unknown eviction method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name](**kwargs)
