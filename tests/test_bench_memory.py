"""What the benchmarks say about memory, and their forward-and-backward providers."""

import os

import pytest
import torch

from bench.case import Case, Inputs, provider
from bench.gradients import autograd, with_gradients
from bench.harness import Options, measure
from bench.memory import peak_memory
from bench.timing import Limits

CPU = torch.device("cpu")
MB = 1 << 20
CEILINGS = {"copy": {"value": 10.0}}
SQUARE = torch.ones(512, 512)


def numbers(mb):
    return torch.zeros(mb * MB // 4).add_(1)


@pytest.mark.parametrize(
    "call, mb", [(lambda: numbers(8), 8), (lambda: (numbers(8), numbers(4)), 12),
                 (lambda: (numbers(16), None)[1], 16),
                 (lambda: [numbers(4).sum() for _ in range(5)], 4),
                 (lambda: torch.matmul(SQUARE, SQUARE.T) @ SQUARE, 2), (lambda: None, 0)],
    ids=["result", "results", "scratch", "one after the other", "inside", "nothing"],
)  # fmt: skip
def test_peak(call, mb, capfd):
    assert peak_memory(call, CPU) / MB == pytest.approx(mb, abs=1e-3)
    assert capfd.readouterr() == ("", "")


def test_peak_of_a_call_that_raises(capfd):
    with pytest.raises(RuntimeError, match="shape"):
        peak_memory(lambda: numbers(1).view(3, 5), CPU)
    os.write(2, b"here again")
    assert capfd.readouterr().err.endswith("here again")


def test_a_case_says_what_each_provider_allocates():
    def wasteful(i):
        return (i.x + 1 - 1) * 2

    case = Case(
        op="double", shape={"n": 8 * MB}, dtype=torch.float32,
        inputs=lambda s, dtype, device: Inputs(x=torch.arange(s["n"], dtype=dtype)),
        bytes=lambda s, size: 2 * size * s["n"],
        providers=[provider("tenfold", lambda i: i.x * 2), provider("eager", wasteful),
                   provider("eager:wrong", lambda i: i.x)],
        reference=lambda i: i.x * 2, warm=True, memory=True,
    )  # fmt: skip
    limits = Limits(seconds=0.01, min_samples=3, max_samples=3, min_sample_seconds=0)
    found = measure(case, Options(limits=limits), CEILINGS).providers
    assert found["tenfold"].peak_bytes / MB == pytest.approx(32, abs=1e-3)
    assert found["eager"].peak_bytes / MB == pytest.approx(64, abs=1e-3)
    assert found["eager:wrong"].peak_bytes is None  # it was not timed, either


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
