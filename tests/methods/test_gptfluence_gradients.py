# SPDX-License-Identifier: Apache-2.0
"""Scores by gradients against autograd and dattri's definitions; the trajectories that they predict (check 8)."""

import gptfluence_models as tiny
import pytest
import torch

from tenfold.gptfluence import gradient_curve, gradient_scores, last_layer_scores
from tenfold.gptfluence.gradients import GradientTracker, fit_scale, last_layer, lm_losses, scaled


@pytest.fixture(scope="module")
def made():
    model = tiny.tiny(3).eval()
    train, test = tiny.rows(5, seed=1), tiny.rows(3, seed=2)
    train["labels"][1, 6:] = -100
    return model, train, test


def flat(model, batch, row, names=None):
    """The gradient of one row's mean loss, by transformers' own loss."""
    model.zero_grad()
    model(
        input_ids=batch["input_ids"][row : row + 1], labels=batch["labels"][row : row + 1]
    ).loss.backward()
    return torch.cat(
        [p.grad.flatten() for n, p in model.named_parameters() if names is None or n in names]
    )


def products(model, train, test, names=None):
    ours, theirs = (
        [flat(model, b, i, names) for i in range(len(b["input_ids"]))] for b in (train, test)
    )
    return torch.stack(ours), torch.stack(theirs)


def test_all_parameters(made):
    model, train, test = made
    ours, theirs = products(*made)
    torch.testing.assert_close(
        gradient_scores(model, train, test), ours @ theirs.T, rtol=1e-4, atol=1e-6
    )
    cosines = (
        torch.nn.functional.normalize(ours, dim=1) @ torch.nn.functional.normalize(theirs, dim=1).T
    )
    torch.testing.assert_close(
        gradient_scores(model, train, test, cosine=True), cosines, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"no parameter of the model is trained and among \['x'\]"):
        gradient_scores(model, train, test, parameters=["x"])


def test_the_last_layer_is_exact(made):
    model, train, test = made
    ours, theirs = products(*made, names=["lm_head.weight"])
    exact = last_layer_scores(model, train, test, batch_size=2)
    torch.testing.assert_close(exact, ours @ theirs.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        gradient_scores(model, train, test, parameters=["lm_head.weight"]),
        exact,
        rtol=1e-4,
        atol=1e-6,
    )
    cosines = (
        torch.nn.functional.normalize(ours, dim=1) @ torch.nn.functional.normalize(theirs, dim=1).T
    )
    torch.testing.assert_close(
        last_layer_scores(model, train, test, cosine=True), cosines, rtol=1e-4, atol=1e-5
    )


def test_the_published_approximation_is_another_quantity(made):
    model, train, test = made
    approx = last_layer_scores(model, train, test, approx="sum", batch_size=4)
    (J, X), (K, Y) = last_layer(model, train), last_layer(model, test)
    there, others = (
        (train["labels"][:, 1:] != -100).float(),
        (test["labels"][:, 1:] != -100).float(),
    )
    sums = (J.sum(1) @ K.sum(1).T) * (
        (X * there[..., None]).sum(1) @ (Y * others[..., None]).sum(1).T
    )
    torch.testing.assert_close(approx, sums, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(approx, last_layer_scores(model, train, test), rtol=0.1)
    with pytest.raises(ValueError, match="approx must be one of sum"):
        last_layer_scores(model, train, test, approx="mean")


def test_vectorized_is_the_same():
    from gptfluence_world import World, losses

    world = World(0, train=6, tests=3)
    one = gradient_scores(world.model, world.rows, world.tests, losses)
    torch.testing.assert_close(
        gradient_scores(world.model, world.rows, world.tests, losses, vectorized=True),
        one,
        rtol=1e-4,
        atol=1e-6,
    )


def test_tracin_by_hand():
    """Sums over stored states, as dattri's TracInAttributor and captum's TracInCP add them up."""
    order, rates = torch.tensor([[0, 1], [1, 1], [2, -1]]), torch.tensor([0.5, 0.25, 0.125])
    scores = {2: torch.rand(3, 4), 3: torch.rand(3, 4)}
    first = torch.rand(4)
    made = gradient_curve(order, first, rates, scores)
    want = [first]
    want.append(want[-1] - 0.5 * (scores[2][0] + scores[2][1]) / 2)
    want.append(want[-1] - 0.25 * scores[2][1])
    want.append(want[-1] - 0.125 * scores[3][2])
    torch.testing.assert_close(made, torch.stack(want))
    summed = gradient_curve(order, first, rates, scores[3], "sum")
    torch.testing.assert_close(summed[1], first - 0.5 * (scores[3][0] + scores[3][1]))
    # Where two steps were made before, the state after four is the next.
    later = gradient_curve(order, first, rates, {1: torch.zeros(3, 4), 4: scores[2]}, start=2)
    torch.testing.assert_close(later[1], first - 0.5 * (scores[2][0] + scores[2][1]) / 2)


def test_one_step_of_sgd_is_the_first_order_of_tracin(made):
    model, train, test = made
    import copy

    network, eta = copy.deepcopy(model), 1e-3
    scores = gradient_scores(network, train, test)
    with torch.no_grad():
        before = lm_losses(network, test)
    loss = lm_losses(network, {k: v[:2] for k, v in train.items()}).mean()
    grads = torch.autograd.grad(loss, list(network.parameters()))
    with torch.no_grad():
        for p, g in zip(network.parameters(), grads):
            p -= eta * g
        after = lm_losses(network, test)
    curve = gradient_curve(torch.tensor([[0, 1]]), before, torch.tensor([eta]), scores)
    torch.testing.assert_close(curve[1] - before, after - before, rtol=0.05, atol=1e-6)


def test_scale():
    curves, factor = torch.rand(2, 5, 3), 2.5
    truth = scaled(curves, factor)
    assert (
        fit_scale(curves, truth) == pytest.approx(factor, rel=1e-5)
        and fit_scale(torch.ones(1, 3, 2), truth[:1, :3, :2]) == 0
    )


def test_a_tracker_keeps_some_states():
    model = torch.nn.Linear(1, 1)
    seen = []
    tracker = GradientTracker(lambda m: seen.append(m.training) or torch.zeros(1, 1), every=2)
    for step in range(1, 6):
        tracker.step(model, step)
    assert sorted(tracker.scores) == [2, 4] and seen == [False, False] and model.training
