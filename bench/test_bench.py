# SPDX-License-Identifier: Apache-2.0
"""Every case of every family under pytest-benchmark."""

from __future__ import annotations

import itertools

import pytest

from bench.harness import measure
from bench.runner import FAMILIES, cases_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    chosen = [(f, c) for f in FAMILIES for c in cases_of(f) if full or c.quick]
    metafunc.parametrize("family, case", chosen, ids=[f"{f}/{c.name}" for f, c in chosen])


def test_case(family, case, options, ceilings, benchmark):
    result = measure(case, options, ceilings)
    wrong = {n: p.note for n, p in result.providers.items() if p.status in ("disagrees", "error")}
    assert result.tenfold.status == "ok", wrong
    benchmark.group = f"{family} {result.op}"
    benchmark.extra_info |= {"ratios": result.ratios, "share": result.tenfold.share,
                             "gb_s": result.tenfold.gb_s, "gflop_s": result.tenfold.gflop_s,
                             "ceilings": {k: v["value"] for k, v in ceilings.items()}}  # fmt: skip
    # The harness has timed the providers against each other; pytest-benchmark reports our samples.
    samples = itertools.cycle(result.tenfold.samples)
    clock = itertools.accumulate(itertools.chain([0.0], samples))
    replay = iter(clock)
    benchmark._timer = lambda: next(replay)
    benchmark.pedantic(lambda: None, rounds=max(1, len(result.tenfold.samples) // 2))
