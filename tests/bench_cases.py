# SPDX-License-Identifier: Apache-2.0
"""What the tests of the benchmark kit share: a case, its limits, and a record as a run makes it."""

import functools
from pathlib import Path

import torch

from bench import results
from bench.case import (
    Case,
    Inputs,
    provider,
)
from bench.harness import Options, measure
from bench.timing import Limits

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LIMITS = Limits(seconds=0.01, min_samples=3, max_samples=6, min_sample_seconds=0)
OPTIONS = Options(limits=LIMITS)
CEILINGS = {
    "copy": {"value": 10.0, "unit": "GB/s", "source": "test"},
    "fma_fp32": {"value": 100.0, "unit": "GFLOP/s", "source": "test", "torch_matmul": 80.0},
}


def make_inputs(shape, dtype, device):
    return Inputs(x=torch.arange(shape["n"], dtype=dtype, device=device), factor=2)


def double(i):
    return i.x * i.factor


def case(*providers, **changes):
    """``y = 2 x``, with ``providers`` beside ours."""
    kinds = [p.kind for p in providers]
    ours = [] if "tenfold" in kinds else [provider("tenfold", double)]
    settings = {
        "op": "double", "shape": {"n": 1000}, "dtype": torch.float32, "inputs": make_inputs,
        "bytes": lambda s, size: 2 * size * s["n"], "providers": [*ours, *providers],
        "reference": double,
    }  # fmt: skip
    return Case(**(settings | changes))


class Log:
    """Providers that note each call."""

    def __init__(self):
        self.calls = []

    def provider(self, name, function=double, **extra):
        def noted(i):
            self.calls.append(name)
            return function(i)

        return provider(name, noted, **extra)


def a_record(family="kv_eviction", **changes):
    """A record as a run makes it."""
    made = case(
        provider("eager", lambda i: i.x + i.x), provider("copy_", lambda i: i.x.clone(), "bound")
    )
    found = [measure(made, OPTIONS, CEILINGS)]
    record = results.make_record(family, found, CEILINGS, results.environment(CPU),
                                 results.source_state("kv_eviction"), OPTIONS)  # fmt: skip
    return record | changes


@functools.cache
def the_record():
    return a_record()
