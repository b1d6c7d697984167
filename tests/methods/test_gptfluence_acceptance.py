# SPDX-License-Identifier: Apache-2.0
"""Acceptance checks of the specification (section 10; check 3, of the ops, is in tests/ops)."""

import time

import pytest
import torch
from gptfluence_world import World

from tenfold import ops
from tenfold.gptfluence import Features, RunSet, Simulator, SimulatorConfig
from tenfold.gptfluence.baselines import MeanTrajectory, SimfluenceRidge, SimfluenceTable
from tenfold.gptfluence.evaluation import evaluate
from tenfold.gptfluence.gradients import gradient_curve
from tenfold.gptfluence.recurrence import history_of, simulate
from tenfold.gptfluence.runs import Run


def run_set(order, y, names=None, train=None):
    """Runs of order [R, T, B] and y [R, T, Q], measured after every step."""
    count = train or int(order.max()) + 1
    return RunSet(
        tuple(names or map(str, range(len(order)))),
        "loss",
        "nats",
        order.to(torch.int32),
        torch.arange(order.shape[1]),
        y.float(),
        tuple(range(count)),
        tuple(range(y.shape[2])),
    )


class TestClosedForms:
    """Check 1."""

    def test_first_order(self):
        a, b, y0, steps = 0.9, 0.3, 2.0, 12
        factors = torch.tensor([a, b], dtype=torch.float64).view(2, 1, 1)
        made = simulate(factors, torch.zeros(1, steps, 1, dtype=torch.int32), torch.tensor([[y0]]),
                        SimulatorConfig(residual=False))  # fmt: skip
        k = torch.arange(steps + 1).double()
        torch.testing.assert_close(made[0, :, 0], a**k * y0 + b * (1 - a**k) / (1 - a))

    def test_fibonacci(self):
        factors = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).view(3, 1, 1)
        past = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 2, 1)
        made = ops.markov_scan(factors, torch.zeros(1, 8, 1, dtype=torch.int32), past)
        assert made.flatten().tolist() == [1, 2, 3, 5, 8, 13, 21, 34]

    def test_a_residual_of_nothing_is_constant_and_beta_is_tracin(self):
        made = torch.Generator().manual_seed(0)
        order = torch.randint(0, 7, (3, 9, 4), generator=made, dtype=torch.int32)
        first = torch.rand(3, 5, generator=made, dtype=torch.float64)
        config = SimulatorConfig()
        still = simulate(torch.zeros(2, 7, 5, dtype=torch.float64), order, first, config)
        assert torch.equal(still, first[:, None].expand(3, 10, 5))
        scores, eta = torch.randn(7, 5, generator=made, dtype=torch.float64), 0.1
        factors = torch.stack([torch.zeros_like(scores), -eta * scores / 4])
        moved = simulate(factors, order, first, config)
        rates = torch.full((9,), eta, dtype=torch.float64)
        want = torch.stack([gradient_curve(o, f, rates, scores) for o, f in zip(order, first)])
        torch.testing.assert_close(moved, want)


def test_sgd_of_one_parameter():
    """Check 2: alpha = (1 - eta)^2 gives the recorded losses of (theta - y)^2 / 2."""
    eta, theta, target, seen = 0.07, torch.tensor(3.0, dtype=torch.float64), 0.5, []
    for _ in range(40):
        seen.append((theta - target) ** 2 / 2)
        theta = theta - eta * (theta - target)
    factors = torch.tensor([(1 - eta) ** 2, 0.0], dtype=torch.float64).view(2, 1, 1)
    made = simulate(
        factors,
        torch.zeros(1, 39, 1, dtype=torch.int32),
        seen[0].view(1, 1),
        SimulatorConfig(residual=False),
    )
    torch.testing.assert_close(made[0, :, 0], torch.stack(seen), rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def small():
    """A fitted simulator on random runs, and the runs."""
    made = torch.Generator().manual_seed(3)
    order = torch.randint(0, 12, (6, 10, 3), generator=made)
    y = 2 + torch.randn(6, 10, 5, generator=made).cumsum(1) / 10
    runs = run_set(order, y, train=12)
    features = [Features(range(n), torch.randn(n, 8, generator=made), "random") for n in (12, 5)]
    simulator = Simulator(*features, epochs=30)
    simulator.fit(runs.take(range(4)))
    return simulator, runs


class TestInvariances:
    """Check 4."""

    def test_only_the_first_value_counts(self, small):
        simulator, runs = small
        y = runs.y.clone()
        y[:, 1:] += torch.randn_like(y[:, 1:])
        changed = run_set(runs.order, y, train=12)
        assert torch.equal(
            simulator.predict(runs).values[:, 1:], simulator.predict(changed).values[:, 1:]
        )

    def test_order_inside_a_batch_and_names_of_rows(self, small):
        simulator, runs = small
        want = simulator.predict(runs).values
        flipped = run_set(runs.order.flip(2), runs.y, train=12)
        torch.testing.assert_close(simulator.predict(flipped).values, want)
        to = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        table = torch.empty_like(simulator.train.table)
        table[to] = simulator.train.table
        other = simulator.with_features(train=Features(range(12), table, "random"))
        renamed = run_set(to[runs.order.long()], runs.y, train=12)
        torch.testing.assert_close(other.predict(renamed).values, want)


class TestSimfluence:
    """Check 5."""

    def test_one_hot_linear_towers_are_the_tables(self):
        made = torch.Generator().manual_seed(0)
        order = torch.randint(0, 6, (2, 9, 3), generator=made)
        runs = run_set(order, torch.rand(2, 9, 4, generator=made), train=6)
        table = torch.randn(2, 6, 4, generator=made) / 10
        simulator = Simulator(Features(range(6), torch.eye(6)), Features(range(4), torch.eye(4)),
                              projection="linear", width=4, residual=True)  # fmt: skip
        with torch.no_grad():
            simulator.network.train_tower.last.copy_(table)
            simulator.network.test_tower.last.copy_(torch.eye(4).expand(2, 4, 4))
        simfluence = SimfluenceTable()
        simfluence.factors = table
        assert torch.equal(simulator.factors(), table)
        assert torch.equal(simulator.predict(runs).values, simfluence.predict(runs))

    def test_ridge_recovers_a_table(self):
        made = torch.Generator().manual_seed(0)
        count, tests, steps = 9, 4, 30
        order = torch.randint(0, count, (6, steps, 3), generator=made)
        table = torch.randn(2, count, tests, generator=made, dtype=torch.float64) / 20
        # Values that the map explains step by step, from varied states: a plain simulation settles.
        y = 1 + torch.rand(6, steps, tests, generator=made, dtype=torch.float64)
        one = ops.markov_onestep(table, order[:, 1:].to(torch.int32), y[:, 1:], True, y0=y[:, :1])
        # Each step is a pair of its own: two measurements before and after.
        pairs = RunSet(
            tuple(map(str, range(6 * (steps - 1)))),
            "loss",
            "",
            torch.stack([torch.full((6 * (steps - 1), 3), -1), order[:, 1:].flatten(0, 1)], 1).to(
                torch.int32
            ),
            torch.arange(2),
            torch.stack([y[:, :-1].flatten(0, 1), one.flatten(0, 1)], 1),
            tuple(range(count)),
            tuple(range(tests)),
        )
        ridge = SimfluenceRidge(0)
        ridge.fit(pairs)
        torch.testing.assert_close(ridge.factors, table, rtol=0, atol=1e-8)


class TestReferencePreset:
    """Check 6."""

    def test_size_and_formula(self):
        features = [Features(range(n), torch.randn(n, 384)) for n in (5, 3)]
        simulator = Simulator(*features, SimulatorConfig.from_preset("reference"))
        assert simulator.trained_parameters == 591_360
        tower = simulator.network.train_tower
        y, batch = 1.7, [0, 3, 3]

        def project(plane, row):
            hidden = torch.relu(row @ tower.first[plane] + tower.first_bias[plane, 0])
            return hidden @ tower.last[plane] + tower.last_bias[plane, 0]

        train, test = (f.table for f in features)
        parts = [sum(project(p, train[i]) @ project(p, test[1]) for i in batch) for p in range(2)]
        made = simulator.predict([batch], torch.tensor([0.0, y, 0.0])).values[0, 1, 1]
        torch.testing.assert_close(made, (parts[0] * y + parts[1]).detach(), rtol=1e-4, atol=1e-4)

    def test_a_shared_tower_cannot_lower_a_loss_by_the_example_itself(self):
        same = Features(range(9), torch.randn(9, 16))
        simulator = Simulator(same, same, SimulatorConfig.from_preset("reference"))
        assert bool((simulator.factors().diagonal(dim1=1, dim2=2) >= 0).all())
        apart = Simulator(same, same, residual=False, seed=1)
        assert bool((apart.factors().diagonal(dim1=1, dim2=2) < 0).any())


def teacher(seed):
    """Runs that a random simulator made, and features."""
    made = torch.Generator().manual_seed(seed)
    train, test = torch.randn(48, 16, generator=made), torch.randn(24, 16, generator=made)
    W, U = (torch.randn(2, 16, 16, generator=made) / 16 for _ in range(2))
    factors = torch.bmm((train @ W), (test @ U).mT) * torch.tensor([0.02, 0.05]).view(2, 1, 1)
    order = torch.randint(0, 48, (24, 30, 4), generator=made)
    order = torch.where(torch.rand(24, 1, 1, generator=made) < 0.5, order // 2, order)
    first = 2 + torch.rand(24, 24, generator=made)
    y = simulate(factors, order[:, 1:].to(torch.int32), first, SimulatorConfig())
    return (
        run_set(order, y, train=48),
        Features(range(48), train, "teacher"),
        Features(range(24), test, "teacher"),
    )


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_teacher_and_student(seed):
    """Check 7: held-out MSE at most 0.35 of the mean trajectory's, in less than 10 seconds."""
    runs, train, test = teacher(seed)
    learnt, _, held = runs.split(0, 4)
    mean = MeanTrajectory()
    mean.fit(learnt)
    start = time.process_time()
    simulator = Simulator(train, test, epochs=2000, learning_rate=3e-3)
    simulator.fit(learnt)
    seconds = time.process_time() - start
    made, plain = evaluate(simulator.predict(held).values, held), evaluate(mean.predict(held), held)
    assert made.mse <= 0.35 * plain.mse, (made.mse, plain.mse)
    assert seconds < 10 * torch.get_num_threads()


@pytest.fixture(scope="module")
def world():
    return World(1)


class TestLiveRun:
    """Check 9 of one seed: methods in their order, and the bars."""

    def test_bars(self, world):
        constant, mean = world.plain()
        found, gradients = world.simulated(world.simulator()), world.gradients()
        assert mean.mse < constant.mse
        assert found.mse <= 0.25 * mean.mse and found.spearman >= 0.9, (found, mean)
        assert found.mse <= 0.15 * gradients["grad-dot"]["raw"].mse, gradients
        # Gradients of every step say more than those of the last state alone.
        assert gradients["tracin"]["raw"].mse < gradients["grad-dot"]["raw"].mse

    def test_tables_and_the_published_form(self, world):
        _, mean = world.plain()
        ridge, zero = (
            world.baseline(SimfluenceRidge()),
            world.baseline(SimfluenceTable(epochs=800, learning_rate=3e-3)),
        )
        assert ridge.mse < 0.25 * mean.mse and zero.mse < 0.5 * mean.mse
        shared = world.simulated(world.simulator(towers="shared", residual=False, epochs=600))
        apart = world.simulated(world.simulator(epochs=600))
        assert apart.mse < shared.mse


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_live_run_of_other_seeds(seed):
    """Check 9."""
    TestLiveRun().test_bars(World(seed))


@pytest.mark.slow
def test_live_run_with_adamw():
    """Check 9, last line."""
    world = World(1, "adamw")
    _, mean = world.plain()
    found, gradients = world.simulated(world.simulator()), world.gradients()
    assert found.mse <= 0.4 * mean.mse and found.spearman >= 0.85
    assert found.mse <= 0.25 * gradients["tracin"]["raw"].mse


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_unseen_training_examples(seed):
    """Check 10."""
    world = World(seed, unseen=True, tracked=False)
    _, mean = world.plain()
    found = world.simulated(world.simulator())
    assert found.mse <= 0.6 * mean.mse and found.spearman >= 0.8, (found, mean)


def test_speed():
    """Check 11: 5 runs of 96 steps and 200 tests in less than 50 ms on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        features = [Features(range(200), torch.randn(200, 384)) for _ in range(2)]
        simulator = Simulator(*features)
        factors = simulator.factors()
        order = torch.randint(0, 200, (5, 95, 4), dtype=torch.int32)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            simulate(factors, order, torch.rand(5, 200), simulator.config)
            times.append(time.perf_counter() - start)
        assert min(times) < 0.05
    finally:
        torch.set_num_threads(before)


def test_n_of_the_history_is_oldest_first():
    """Section 3.2: zeros before the first value, or the value itself."""
    first = torch.tensor([[5.0, 6.0]])
    assert history_of(first, 3, "zeros")[0].tolist() == [[0, 0], [0, 0], [5, 6]]
    assert history_of(first, 3, "repeat")[0].tolist() == [[5, 6]] * 3


def test_runs_are_checked():
    """A run with one measurement is none."""
    with pytest.raises(
        ValueError, match="run 'x': a trajectory needs at least 2 measurements, got 1"
    ):
        Run(
            "x",
            torch.zeros(3, 2, dtype=torch.int64),
            torch.tensor([0]),
            {"loss": torch.zeros(1, 1)},
            (0,),
            (0,),
        )
