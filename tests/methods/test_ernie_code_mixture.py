# SPDX-License-Identifier: Apache-2.0
"""Shares of corpora, draws by (seed, step), and every row once per epoch."""

import numpy as np
import pytest

from tenfold.ernie_code.mixture import (
    Mixture,
    MixtureBatchSampler,
    MixtureDataset,
    grouped_weights,
    mixture_weights,
)

SIZES = {"a": 900, "b": 100, "c": 7}


def test_weights_of_the_spec():
    assert mixture_weights([0.9, 0.1], 1.0).tolist() == pytest.approx([0.9, 0.1])
    assert mixture_weights([5, 1, 90], 0.0).tolist() == pytest.approx([1 / 3] * 3)
    assert mixture_weights([0.9, 0.1]).round(3).tolist() == [0.659, 0.341]
    assert mixture_weights([900, 100], 0.3).tolist() == pytest.approx(mixture_weights([0.9, 0.1]).tolist())  # fmt: skip
    assert mixture_weights([3, 0, 3], 0.0).tolist() == [0.5, 0.0, 0.5]
    for counts in ([], [0, 0], [-1, 2], [float("nan"), 1]):
        with pytest.raises(ValueError, match="counts must be numbers >= 0"):
            mixture_weights(counts)
    with pytest.raises(ValueError, match="alpha must be a number >= 0, got -1"):
        mixture_weights([1], -1)


def test_groups():
    made = grouped_weights(
        {"a": 9, "b": 1, "ab": 5}, {"a": "sclm", "b": "sclm", "ab": "ptlm"}, {"sclm": 3, "ptlm": 1}
    )
    q = mixture_weights([9, 1])
    assert list(made.values()) == pytest.approx([0.75 * q[0], 0.75 * q[1], 0.25])
    with pytest.raises(ValueError, match="group of 'b' has no share"):
        grouped_weights({"b": 1}, {"b": "x"}, {"y": 1})
    for share in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="shares must be numbers >= 0"):
            grouped_weights({"b": 1}, {"b": "x"}, {"x": share, "y": 1})


def test_a_draw_is_a_function_of_seed_and_step():
    def draws(steps, seed=3):
        mixture = Mixture(SIZES, 5, seed=seed)
        return {s: (d := mixture.draw(s)).corpus + str(d.rows.tolist()) for s in steps}

    forward = draws(range(300))
    steps = np.random.default_rng(0).permutation(300).tolist()
    assert draws(steps) == forward
    assert draws([299]) == {299: forward[299]}
    assert draws(range(300), seed=4) != forward
    far = draws([20_000, 4095, 4096, 8191])
    assert draws([8191, 4096, 20_000, 4095]) == far


def test_every_row_once_per_epoch_and_the_shares_are_kept():
    mixture = Mixture(SIZES, 10, seed=0)
    read: dict[str, list[int]] = {name: [] for name in SIZES}
    for step in range(3000):
        draw = mixture.draw(step)
        assert draw.corpus == mixture.corpus(step) and draw.rows.shape == (10,)
        read[draw.corpus] += draw.rows.tolist()
    for name, size in SIZES.items():
        rows = np.array(read[name])
        epochs = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        assert len(epochs) > 3 and all(sorted(e.tolist()) == list(range(size)) for e in epochs)
        assert not np.array_equal(epochs[0], epochs[1])
    q = np.array(list(mixture.weights.values()))
    counts = np.array([len(r) / 10 for r in read.values()])
    # Chi-square with 2 degrees of freedom: 13.8 is exceeded once in a thousand times.
    assert ((counts - 3000 * q) ** 2 / (3000 * q)).sum() < 13.8


def test_state():
    mixture = Mixture(SIZES, 4)
    state = mixture.state_dict(17)
    assert Mixture(SIZES, 4).load_state_dict(state) == 17
    other_sizes = {**SIZES, "c": 8}
    for other in (
        Mixture(SIZES, 5), Mixture(other_sizes, 4), Mixture(SIZES, 4, seed=1), Mixture(SIZES, 4, alpha=1)
    ):  # fmt: skip
        with pytest.raises(ValueError, match="state is of a mixture with other"):
            other.load_state_dict(state)


def test_weights_given():
    mixture = Mixture(SIZES, 2, weights={"b": 2, "c": 0})
    assert mixture.weights == {"a": 0, "b": 1, "c": 0}
    assert {mixture.corpus(s) for s in range(200)} == {"b"}
    # Ten tenths are less than 1 in float64; what is missing is not that of a corpus without weight.
    tenths = {str(i): 1.0 for i in range(10)}
    rounded = Mixture({**dict.fromkeys(tenths, 1), "none": 1}, 1, weights=tenths)
    assert np.cumsum(list(rounded.weights.values()))[-1] < 1
    assert rounded._bounds[-2:].tolist() == [1, 1] and rounded._bounds[-3] < 1
    must = "weights must be"
    for weights, said in (({"x": 1}, "no corpus 'x'"), ({"a": -1}, must), ({}, must)):
        with pytest.raises(ValueError, match=said):
            Mixture(SIZES, 2, weights=weights)
    with pytest.raises(ValueError, match="corpus 'z' has no rows"):
        Mixture({"a": 1, "z": 0}, 2, weights={"a": 1, "z": 1})
    with pytest.raises(ValueError, match="weights must be"):
        Mixture({}, 2)
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        Mixture(SIZES, 0)
    with pytest.raises(ValueError, match="step must be >= 0"):
        mixture.draw(-1)


def test_dataset_and_sampler():
    data = MixtureDataset({"a": [{"x": i} for i in range(5)], "b": [{"x": -1}]})
    assert len(data) == 6 and data.sizes == {"a": 5, "b": 1}
    mixture = Mixture(data.sizes, 4, seed=2)
    draw = mixture.draw(1)
    batch = data.batch(draw)
    assert [e["row"] for e in batch] == [0, 1, 2, 3] and {e["step"] for e in batch} == {1}
    assert [e["x"] for e in batch] == [data.corpora[draw.corpus][i]["x"] for i in draw.rows]
    assert data.batch(draw, 1, 3) == batch[1:3]
    halves = [list(MixtureBatchSampler(mixture, 3, rank=r, world_size=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == list(MixtureBatchSampler(mixture, 3))
    assert len(MixtureBatchSampler(mixture, 3, start=2)) == 1
    with pytest.raises(ValueError, match="batch_size 4 cannot be divided among 3"):
        MixtureBatchSampler(mixture, 3, world_size=3)
    with pytest.raises(ValueError, match="rank must be in"):
        MixtureBatchSampler(mixture, 3, rank=2, world_size=2)
