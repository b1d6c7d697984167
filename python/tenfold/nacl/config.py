# SPDX-License-Identifier: Apache-2.0
"""NACL's settings and the integers that follow from them for a prompt length (paper sections 3-4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

MAX_PROXY = 1024  # of the presets; the default uses far fewer


@dataclass(frozen=True)
class BudgetPlan:
    """How many tokens of one sequence are kept, and by which rule. All counts are tokens."""

    length: int
    n_sink: int
    n_recent: int
    n_topk: int
    n_random: int
    num_proxies: int

    @property
    def keep(self) -> int:
        """Tokens kept per (layer, KV head)."""
        return self.n_sink + self.n_recent + self.n_topk + self.n_random

    @property
    def counts(self) -> list[int]:
        """(sink, recent, topk, random), the row of the ops' ``counts``."""
        return [self.n_sink, self.n_recent, self.n_topk, self.n_random]


def _share(ratio: float, whole: int) -> int:
    """``floor(ratio * whole)`` of the decimal meant: 0.29 * 100 is 29, not 28 as in binary floats."""
    return math.floor(ratio * whole + 1e-9)


def _in_range(name: str, value: float, low: float, high: float, brackets: str = "[]") -> None:
    above = value > low if brackets[0] == "(" else value >= low
    below = value < high if brackets[1] == ")" else value <= high
    if not (above and below):
        raise ValueError(f"{name} must be in {brackets[0]}{low}, {high}{brackets[1]}, got {value}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class NaclConfig:
    """All settings of NACL; the defaults are the ones measured best in ``docs/methods/nacl.md``.

    Ratios ``protect_ratio``, ``random_ratio`` and ``topk_ratio`` are shares of the kept budget, and
    ``proxy_ratio`` is a share of the prompt length, except in ``preset="repo"``, where all are shares
    of the prompt length, as in the published code.

    Attributes:
        compression_ratio: share of the cache evicted, [0, 1). keep_tokens: absolute budget instead.
        protect_ratio: share of the budget protected at both ends; sink_tokens: how many of those at
            the start (at most half).
        random_ratio: share of the budget drawn at random (RE); the rest goes to top scores (PTE).
        proxy_ratio, max_proxy: proxy queries as a share of the prompt, and their cap.
        proxy_span: explicit proxies, tokens [start, stop) of the prompt (negative: from its end).
        causal: proxies see only earlier keys (False: the published code's choice).
        reduce: over the query heads of a KV head. protect: ``"ends"``, or ``"proxies"`` keeps all.
        re_temperature, re_logits: the random draw. pool_kernel, pool: score pooling.
        min_length: shorter prompts are left alone. rerotate: keys move to positions 0..C-1.
        decode_interval: re-evict every m generated tokens (None: never).
        chunked: more prompt chunks follow, evict at the first single-token step or ``finish``.
        progressive: evict after every chunk. evict_on_append: evict again after a new turn.
        head_budget: ``"uniform"``, or ``"adaptive"``: KV heads of a layer share H * C tokens by score,
            with at least ``head_floor`` of C each; the cache is then ragged.
        seed: of the random draw.
    """

    compression_ratio: float = 0.5
    keep_tokens: int | None = None
    protect_ratio: float = 0.10
    sink_tokens: int = 64
    random_ratio: float = 0.0
    proxy_ratio: float = 0.10
    max_proxy: int = 32
    proxy_span: tuple[int, int] | None = None
    causal: bool = True
    reduce: str = "mean"
    protect: str = "ends"
    re_temperature: float = 1.0
    re_logits: str = "score"
    pool_kernel: int = 15
    pool: str = "max"
    min_length: int = 256
    rerotate: bool = False
    decode_interval: int | None = None
    chunked: bool = False
    progressive: bool = False
    evict_on_append: bool = False
    head_budget: str = "uniform"
    head_floor: float = 0.2
    seed: int = 0
    preset: str = "default"

    def __post_init__(self) -> None:
        _in_range("compression_ratio", self.compression_ratio, 0, 1, "[)")
        for name in ("keep_tokens", "sink_tokens", "max_proxy", "pool_kernel", "min_length",
                     "decode_interval", "seed"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise ValueError(f"keep_tokens must be >= 1, got {self.keep_tokens}")
        for name in ("protect_ratio", "random_ratio", "proxy_ratio", "head_floor"):
            _in_range(name, getattr(self, name), 0, 1)
        for name in ("sink_tokens", "min_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.max_proxy < 1:
            raise ValueError(f"max_proxy must be >= 1, got {self.max_proxy}")
        if self.protect_ratio + self.random_ratio > 1:
            raise ValueError(
                "protect_ratio + random_ratio must be <= 1 (shares of the budget), got "
                f"{self.protect_ratio} + {self.random_ratio}"
            )
        if not self.re_temperature > 0 or not math.isfinite(self.re_temperature):
            raise ValueError(f"re_temperature must be a positive number, got {self.re_temperature}")
        if self.pool_kernel < 1 or self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel must be an odd number >= 1, got {self.pool_kernel}")
        if self.decode_interval is not None and self.decode_interval < 1:
            raise ValueError(f"decode_interval must be >= 1, got {self.decode_interval}")
        if self.rerotate and self.head_budget == "adaptive":
            raise ValueError("rerotate needs head_budget='uniform': heads of one layer would need "
                             "different positions for the same query")  # fmt: skip
        again = [
            n for n in ("decode_interval", "progressive", "evict_on_append") if getattr(self, n)
        ]
        if again and self.head_budget == "adaptive":
            raise ValueError(
                f"{again[0]} needs head_budget='uniform': 'adaptive' evicts a cache once"
            )
        _one_of("reduce", self.reduce, ("mean", "sum", "max"))
        _one_of("protect", self.protect, ("ends", "proxies"))
        _one_of("re_logits", self.re_logits, ("score", "log_score"))
        _one_of("pool", self.pool, ("max", "avg"))
        _one_of("head_budget", self.head_budget, ("uniform", "adaptive"))
        _one_of("preset", self.preset, ("default", "repo", "paper_20"))

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> NaclConfig:
        """``"default"``; ``"paper_20"`` (Table 4's 20 % row); ``"repo"`` (the published code)."""
        _one_of("preset", name, ("default", "repo", "paper_20"))
        base: dict[str, Any] = {"preset": name}
        if name == "paper_20":
            base |= {"compression_ratio": 0.8, "random_ratio": 0.60, "proxy_ratio": 0.20,
                     "max_proxy": MAX_PROXY, "pool_kernel": 1}  # fmt: skip
        if name == "repo":
            base |= {"compression_ratio": 0.8, "protect_ratio": 0.01, "sink_tokens": 256,
                     "random_ratio": 0.07, "proxy_ratio": 0.01, "causal": False,
                     "min_length": 2048, "max_proxy": MAX_PROXY, "pool_kernel": 1}  # fmt: skip
        return cls(**(base | changes))

    def with_changes(self, **changes: Any) -> NaclConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def _span(self, length: int) -> tuple[int, int] | None:
        if self.proxy_span is None:
            return None
        start, stop = (x + length if x < 0 else x for x in self.proxy_span)
        if self.proxy_span[1] == 0 and self.proxy_span[0] < 0:
            stop = length
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"proxy_span must be a non-empty range inside the prompt of {length} tokens, got "
                f"{self.proxy_span}"
            )
        return start, stop

    def proxies(self, length: int, num_proxies: int) -> tuple[int, int]:
        """Range of proxy tokens in a prompt: the explicit span, else the last ``num_proxies``."""
        return self._span(length) or (length - num_proxies, length)

    def budget(self, length: int) -> BudgetPlan | None:
        """The integers for a prompt of ``length`` tokens; None where nothing is to be evicted.

        Raises ValueError if the pieces do not fit the budget, printing all integers.
        """
        if length <= self.min_length:
            return None
        if self.preset == "repo":
            return self._repo_budget(length)
        keep = self.keep_tokens or _share(1 - self.compression_ratio, length)
        keep = max(1, min(length, keep))
        if keep >= length:
            return None
        span = self._span(length)
        num_proxies = min(max(_share(self.proxy_ratio, length), 1), length, self.max_proxy)
        if span is not None:
            num_proxies = span[1] - span[0]
        protected = min(keep, max(1, _share(self.protect_ratio, keep)))
        sinks = min(self.sink_tokens, protected // 2)
        recent = protected - sinks
        if self.protect == "proxies":
            recent = num_proxies
        n_random = min(_share(self.random_ratio, keep), keep - sinks - recent)
        n_topk = keep - sinks - recent - n_random
        plan = BudgetPlan(length, sinks, recent, n_topk, max(n_random, 0), num_proxies)
        if min(n_random, n_topk) < 0:
            raise ValueError(
                f"the budget of {keep} tokens cannot hold {sinks} sinks and {recent} protected "
                f"proxies: n_sink={sinks}, n_recent={recent}, n_topk={n_topk}, "
                f"n_random={n_random}, num_proxies={num_proxies}, length={length}"
            )
        return plan

    def _repo_budget(self, length: int) -> BudgetPlan:
        """The published code's arithmetic (truncation), refusing what it gets wrong."""
        num_proxies = int(self.proxy_ratio * length)
        recent = int(self.protect_ratio * length) - self.sink_tokens
        budget = 1 - self.compression_ratio
        n_topk = int((budget - self.protect_ratio - self.random_ratio) * length + 1e-9)
        n_random = int(self.random_ratio * length)
        plan = BudgetPlan(length, self.sink_tokens, recent, n_topk, n_random, num_proxies)
        if recent < 1 or num_proxies < 1 or n_topk < 0 or plan.keep >= length:
            raise ValueError(
                f"preset 'repo' cannot serve a prompt of {length} tokens: "
                f"n_sink={self.sink_tokens}, n_recent={recent}, n_topk={n_topk}, "
                f"n_random={n_random}, num_proxies={num_proxies}, keep={plan.keep}; it needs "
                "n_recent >= 1 (length >= (sink_tokens + 1) / protect_ratio) and keep < length"
            )
        return plan
