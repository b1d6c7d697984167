# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks say about memory, and their forward-and-backward providers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import memory, runner
from bench.case import Inputs
from bench.gradients import autograd, with_gradients
from bench.harness import Measured

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
MB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


def run(code):
    """A fresh process in which every large block is mapped for itself."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, **memory.MAPPED})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@linux
def test_peak():
    """Results and scratch, torch's or not; what was given back before is neither free nor counted."""
    out = run(
        "import numpy as np, torch\n"
        "from bench.memory import peak_memory\n"
        "def numbers(mb): return torch.zeros(mb << 18).add_(1)\n"
        "for call in (lambda: numbers(24), lambda: (numbers(16), numbers(8)),\n"
        "             lambda: (numbers(32), None)[1], lambda: [numbers(8).sum() for _ in range(5)],\n"
        "             lambda: np.ones(12 << 20, dtype=np.uint8), lambda: None):\n"
        "    call()\n"
        "    print(peak_memory(call, torch.device('cpu')) / 2**20)\n"
    )
    assert [float(x) for x in out.split()] == pytest.approx([24, 24, 32, 8, 12, 0], abs=1)


@linux
def test_of_the_providers_that_were_timed(monkeypatch):
    """selective_logprob makes nothing of the logits' size; a log-softmax does."""
    case = next(c for c in runner.cases_of("loss") if c.quick and c.op == "selective_logprob")
    whole = 4 * case.shape["n"] * case.shape["v"]
    names = {case.name: ["tenfold", "eager:log_softmax"]}
    peaks = memory.measure_peaks("loss", names, CPU)[case.name]
    assert peaks["tenfold"] < 2 * MB
    assert 0.98 * whole < peaks["eager:log_softmax"] < 1.1 * whole
    made = measure_nothing(case)
    monkeypatch.setattr(runner, "measure_peaks", lambda family, names, device: {
        name: {p: 7 for p in providers} for name, providers in names.items()})  # fmt: skip
    runner.add_peaks("loss", [case], [made], CPU)
    assert {n: p.peak_bytes for n, p in made.providers.items()} == {"tenfold": 7, "eager": None}
    runner.add_peaks("loss", [replace(case, memory=False)], [made], CPU)  # nobody asks


def measure_nothing(case):
    """A result in which only ours was timed."""
    providers = {"tenfold": Measured("tenfold", "ok", p50_s=1.0), "eager": Measured("eager", "n/a")}
    return SimpleNamespace(name=case.name, providers=providers)


def test_a_failure_is_told():
    with pytest.raises(
        RuntimeError, match=r"(?s)memory of nothing could not be measured.*unknown family"
    ):
        memory.measure_peaks("nothing", {"x": ["y"]}, CPU)


class TestGradients:
    def inputs(self):
        return Inputs(a=torch.tensor([1.0, 2.0]), b=torch.tensor([3.0, 5.0]), k=2)

    def test_under_no_grad_as_the_harness_runs(self):
        inputs = self.inputs()
        run = with_gradients(lambda i: (i.k * (i.a * i.b).sum(), i.a.max()), "a", "b")
        with torch.no_grad():
            loss, most, da, db = run(inputs)
        assert (loss, most) == (26.0, 2.0)
        assert da.tolist() == [6.0, 10.0] and db.tolist() == [2.0, 4.0]
        assert not any(x.requires_grad for x in (loss, most, da, db, inputs.a, inputs.b))

    def test_provider(self):
        made = autograd("peer:x", lambda i: i.a.square().sum(), "a", scratch=7)
        assert (made.kind, made.scratch) == ("peer", 7)
        inputs = self.inputs()
        with torch.no_grad():
            for _ in range(2):  # gradients of two calls do not add up
                assert made.build(inputs)(inputs)[1].tolist() == [2.0, 4.0]
