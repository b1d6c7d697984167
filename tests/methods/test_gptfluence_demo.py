# SPDX-License-Identifier: Apache-2.0
"""GPTfluence's demo on runs that are made up: its line, tables and page, what its speed-up compares, its parent."""

import dataclasses

import pytest
import torch

from tenfold import ops
from tenfold.gptfluence import demo, speed, study
from tenfold.gptfluence.features import Features
from tenfold.gptfluence.runs import RunSet
from tenfold.gptfluence.simulator import Simulator
from tenfold.report import Page, Speedup

RUNS, STEPS, EXAMPLES, TESTS = 3, 6, 8, 5


@pytest.fixture(scope="module")
def runs():
    made = torch.Generator().manual_seed(0)
    return RunSet(
        tuple(f"{i:03d}" for i in range(RUNS)),
        "loss",
        "nats",
        torch.randint(-1, EXAMPLES, (RUNS, STEPS + 1, 2), generator=made, dtype=torch.int32),
        torch.arange(STEPS + 1),
        3 - 0.2 * torch.rand(RUNS, STEPS + 1, TESTS, generator=made).cumsum(1),
        tuple(range(EXAMPLES)),
        tuple(range(TESTS)),
    )


@pytest.fixture(scope="module")
def simulator(runs):
    made = torch.Generator().manual_seed(1)
    features = (Features(range(n), torch.randn(n, 4, generator=made)) for n in (EXAMPLES, TESTS))
    one = Simulator(*features, epochs=3, validate_every=1)
    one.fit(runs)
    return one


@pytest.fixture
def found(runs, simulator):
    """As if the demo had found it."""
    contestants = {"default": simulator, "mean": study.baselines.MeanTrajectory()}
    contestants["mean"].fit(runs, None)
    moved = torch.randn(2, TESTS, generator=torch.Generator().manual_seed(2))
    curve = runs.y[0].tolist()
    predicted = {n: study.predicted(one, runs) for n, one in contestants.items()}
    return demo.Demo(
        study.judged(contestants, runs),
        predicted | {n: predicted["mean"] for n in ("ridge", "similarity")},
        {
            "agreement": study.agreement(moved, moved * 2),
            "curves": [{"removed": [i], "simulated": curve, "real": curve} for i in range(2)],
            "full": curve,
            "simulated": moved.tolist(),
            "real": (moved * 2).tolist(),
        },
        [(-0.5, "german", "ein Satz"), (0.25, "topic", "x" * 200)],
        "What is asked?",
        "what was run",
        runs,
        parameters=115_000,
        recorded=RUNS,
        speed=Speedup("markov_scan", "a loop", 7.7),
        apart=1e-6,
    )


def test_headline_is_what_was_found(found):
    line = demo.headline(found)
    ours, mean = (found.found[n]["mse"] for n in ("default", "mean"))
    assert (
        line.result == f"unseen runs: MSE {ours:.3f}, mean run {mean:.3f}; left-out examples r 1.00"
    )
    assert line.ran == "115k byte Llama, fine-tuned 3 times" and line.speed.ratio == 7.7
    other = dataclasses.replace(
        found,
        found={"default": {"mse": 0.125}, "mean": {"mse": 0.5}},
        removed={"agreement": {"pearson": -0.5}},
    )
    assert (
        demo.headline(other).result
        == "unseen runs: MSE 0.125, mean run 0.500; left-out examples r -0.50"
    )


def test_tables_and_page(found):
    methods, examples, scan = demo.tables(found)
    assert [r[0] for r in methods.rows] == ["GPTfluence", "mean training run"]
    assert examples.prose and examples.rows[1] == ["+0.2500", "topic", "x" * 87 + "..."]
    assert scan.rows == [["3 runs", "markov_scan", "a loop", "7.7", "1.0e-06"]]
    assert all(len(r) == len(t.columns) for t in (methods, examples, scan) for r in t.rows)
    page = Page("t")
    demo.add_demo_section(found, page)
    text = page.render()
    assert text.index("what was run") < text.index("all-steps MSE") and "1.0e-06" in text


def test_speed_up_is_of_equal_results(runs, simulator, monkeypatch):
    timed, apart = speed.simulation(simulator, runs)
    assert timed.ratio > 0 and apart < 1e-5
    monkeypatch.setattr(
        speed, "scan_loop", lambda factors, order, y0, *rest: y0.expand(-1, STEPS, -1)
    )
    assert speed.simulation(simulator, runs)[1] > 1e-3


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loop_is_the_scan(order, residual, reduction):
    made = torch.Generator().manual_seed(order)
    factors = 0.3 * torch.randn(order + 1, EXAMPLES, TESTS, generator=made)
    batches = torch.randint(-1, EXAMPLES, (RUNS, STEPS, 3), generator=made)
    batches[0, 2] = -1  # a step without examples
    y0 = torch.randn(RUNS, order, TESTS, generator=made)
    torch.testing.assert_close(
        speed.scan_loop(factors, batches, y0, residual, reduction),
        ops.markov_scan(factors, batches, y0, residual, reduction=reduction),
    )


def test_parent_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "PARENT_STEPS", 1)
    monkeypatch.setattr(study.tiny, "byte_stream", lambda: torch.arange(4096) % 256)
    first = demo.parent()
    monkeypatch.setattr(study, "train_parent", None)
    again = demo.parent()
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)
