# SPDX-License-Identifier: Apache-2.0
"""Themis' objective: the numbers of its specification, gradients, padding, parts of batches, ranks."""

import math
from types import SimpleNamespace

import pytest
import themis_cases as cases
import torch
import torch.nn.functional as F

from tenfold.themis.collate import collate
from tenfold.themis.objective import Normaliser, component_weights, joint_loss, rewards
from tenfold.themis.tokens import byte_tokenizer
from tenfold.themis.traces import (
    ANSWER,
    EOS,
    IGNORE,
    OBSERVATION,
    RATIONALE,
    TOOL,
    Query,
    Trace,
    TraceFormat,
)

FORM = TraceFormat(byte_tokenizer(), max_length=None)
H, V = 16, 261


def settings(**changes):
    base = {
        "alpha": 1.0,
        "rm_coef": 1.0,
        "lm_reduce": "token_mean",
        "center": 0.0,
        "pooling": "last",
    }
    return SimpleNamespace(**(base | changes))


def lm_weights(cls, beta=1.0, omega=1.0):
    table = torch.tensor([0.0, 1.0, 1.0, beta, omega, 1.0])
    return table[torch.tensor(cls)]


def given(rewards_wanted=(1.0, 0.0), beta=1.0, omega=1.0):
    """A batch whose rewards are given, and whose targets have p = .5 (tool), .25 (observation), .75 (rationale).

    Hidden states are logits: the LM head is the identity on the first two columns, the value head the third.
    """
    cls = [[IGNORE, TOOL, OBSERVATION, RATIONALE]] * len(rewards_wanted)
    rows = len(cls)
    hidden = torch.zeros(rows, 4, 3)
    for t, p in enumerate((0.5, 0.25, 0.75)):
        hidden[:, t, 0] = math.log(p / (1 - p))
    hidden[:, 3, 2] = torch.tensor(rewards_wanted)
    head = torch.zeros(2, 3)
    head[0, 0] = 1
    mask = torch.ones(rows, 4, dtype=torch.bool)
    batch = {
        "ids": torch.zeros(rows, 4, dtype=torch.int64), "mask": mask, "cls": torch.tensor(cls, dtype=torch.int8),
        "weights": lm_weights(cls, beta, omega), "position_ids": torch.arange(4).expand(rows, 4),
        "is_pos": torch.arange(rows) < rows // 2,
    }  # fmt: skip
    return hidden, batch, head, torch.tensor([0.0, 0.0, 1.0])


class TestNumbers:
    def test_pairs(self):
        """Check 1."""
        hidden, batch, head, value = given((1.5, 0.2, 0.5, 0.5))
        hidden.requires_grad_()
        made = joint_loss(hidden, batch, head, value, settings(alpha=0.0))
        assert made.delta.tolist() == pytest.approx([1.0, -0.3])
        assert F.softplus(-made.delta).tolist() == pytest.approx([0.313262, 0.854355], abs=1e-6)
        assert (
            made.rm.item() == pytest.approx(0.583808, abs=1e-6)
            and made.loss.item() == made.rm.item()
        )
        made.loss.backward()
        want = [-0.268941 / 2, -0.574443 / 2, 0.268941 / 2, 0.574443 / 2]
        assert hidden.grad[:, 3, 2].tolist() == pytest.approx(want, abs=1e-6)
        assert int(made.correct) == 1 and made.metrics()["accuracy"] == 0.5

    @pytest.mark.parametrize("change, beta, want", [
        ({}, 1.0, 0.789041), ({}, 0.0, 0.490415), ({"lm_reduce": "component_sum"}, 1.0, 2.367124),
    ])  # fmt: skip
    def test_language_model(self, change, beta, want):
        """Check 2."""
        made = joint_loss(*given(beta=beta), settings(**change))
        assert made.lm.item() == pytest.approx(want, abs=1e-6)

    def test_totals(self):
        """Check 2: with the rewards of check 1 the reference preset gives 1.080945, the default 1.372849."""
        case = given((1.5, 0.2, 0.5, 0.5))
        assert float(joint_loss(*case, settings(rm_coef=0.5)).loss) == pytest.approx(
            1.080945, abs=1e-6
        )
        assert float(joint_loss(*case, settings()).loss) == pytest.approx(1.372849, abs=1e-6)

    def test_parts(self):
        made = joint_loss(*given(), settings()).metrics()
        assert made["loss/tool"] == pytest.approx(math.log(2), abs=1e-6)
        assert made["loss/observation"] == pytest.approx(math.log(4), abs=1e-6)
        assert made["loss/rationale"] == pytest.approx(-math.log(0.75), abs=1e-6)
        assert "loss/eos" not in made and made["margin"] == pytest.approx(1.0)
        assert "loss/observation" not in joint_loss(*given(beta=0.0), settings()).metrics()

    def test_swap_and_shift(self):
        """Check 6."""

        def loss(values, **change):
            return joint_loss(*given(values), settings(alpha=0.0, **change))

        a, b = loss((1.5, 0.2, 0.5, 0.9)), loss((0.5, 0.9, 1.5, 0.2))
        assert torch.equal(a.delta, -b.delta)
        shifted = loss((4.5, 3.2, 3.5, 3.9))
        assert float(shifted.rm) == pytest.approx(float(a.rm), abs=1e-6)
        centred = [
            float(loss(v, center=0.1).rm) for v in ((1.5, 0.2, 0.5, 0.9), (4.5, 3.2, 3.5, 3.9))
        ]
        assert (
            centred[0]
            == pytest.approx(float(a.rm) + 0.1 * (4.0 + 1.21) / 2, abs=1e-6)
            != centred[1]
        )


def model(seed=0, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=made).to(dtype)  # noqa: E731
    return {"table": draw(V, H), "place": draw(512, H), "head": draw(V, H) / 4, "value": draw(1, H)}


def hidden_of(batch, weights):
    """A stand-in for a trunk: hidden states that depend on token and position in the row; padding is NaN."""
    made = weights["table"][batch["ids"]] + weights["place"][batch["position_ids"]]
    return torch.where(batch["mask"][..., None], made, torch.nan)


def run(pairs, config, weights=None, normaliser=None, **options):
    """The loss, and its gradients by weight."""
    weights = weights or model()
    leaves = {k: v.clone().requires_grad_() for k, v in weights.items()}
    batch = collate(pairs, FORM, **options)
    made = joint_loss(
        hidden_of(batch, leaves),
        batch,
        leaves["head"],
        leaves["value"],
        config,
        normaliser=normaliser,
    )
    made.loss.backward()
    return made, {k: v.grad for k, v in leaves.items() if v.grad is not None}


def plain_loss(pairs, config, weights, beta=1.0, omega=1.0):
    """The same from the formula of the specification, row by row, in float64."""
    batch = collate(pairs, FORM, beta=beta, omega=omega)
    w = {k: v.double() for k, v in weights.items()}
    total = count = parts = 0.0
    scores = []
    for i, mask in enumerate(batch["mask"]):
        ids, cls = batch["ids"][i][mask], batch["cls"][i][mask].tolist()
        hidden = w["table"][ids] + w["place"][: len(ids)]
        scores.append((hidden[-1] if config.pooling == "last" else hidden.mean(0)) @ w["value"][0])
        nll = F.cross_entropy(hidden[:-1] @ w["head"].T, ids[1:], reduction="none").tolist()
        weight = {
            IGNORE: 0,
            ANSWER: float(i < len(pairs)),
            TOOL: 1,
            OBSERVATION: beta,
            RATIONALE: omega,
            EOS: 1,
        }
        total += sum(weight[c] * n for c, n in zip(cls[1:], nll))
        count += sum(weight[c] for c in cls[1:])
        # Components: names of runs; the work token opens the rationale.
        names, run_, last = [], 0, None
        for t in range(1, len(cls)):
            kind = RATIONALE if int(ids[t]) == FORM.ids.work else cls[t]
            run_ += kind != last
            last = kind
            names.append(run_)
        for name in set(names):
            members = [t for t, n in enumerate(names) if n == name]
            parts += sum(weight[cls[t + 1]] * nll[t] for t in members) / len(members)
    half = len(pairs)
    delta = torch.stack(scores[:half]) - torch.stack(scores[half:])
    lm = total / count if config.lm_reduce == "token_mean" else parts / (2 * half)
    return config.rm_coef * float(F.softplus(-delta).mean()) + config.alpha * lm


class TestAgainstFormula:
    @pytest.mark.parametrize("reduce", ["token_mean", "component_sum"])
    @pytest.mark.parametrize("pooling", ["last", "mean"])
    def test_formula(self, reduce, pooling):
        config = settings(lm_reduce=reduce, pooling=pooling, rm_coef=0.7, alpha=1.3)
        pairs = cases.some_pairs()
        for beta, omega in ((1.0, 1.0), (0.0, 0.5)):
            made, _ = run(pairs, config, beta=beta, omega=omega)
            assert made.loss.item() == pytest.approx(
                plain_loss(pairs, config, model(), beta, omega), rel=1e-5
            )

    @pytest.mark.parametrize("reduce", ["token_mean", "component_sum"])
    @pytest.mark.parametrize("pooling", ["last", "mean"])
    def test_padding_and_packing(self, reduce, pooling):
        """Check 5: either side, any width, packed: the same rewards, loss, gradients; NaN in padding stays there."""
        config = settings(lm_reduce=reduce, pooling=pooling)
        pairs = cases.some_pairs()
        usual, grads = run(pairs, config)
        assert math.isfinite(usual.loss.item())
        for options in ({"padding_side": "left"}, {"packed": True}, {"multiple_of": 128}, {"multiple_of": 1},
                        {"padding_side": "left", "multiple_of": 128}):  # fmt: skip
            other, others = run(pairs, config, **options)
            torch.testing.assert_close(other.rewards, usual.rewards, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(other.loss, usual.loss, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(other.nll_sum, usual.nll_sum, atol=1e-3, rtol=1e-5)
            assert torch.equal(other.nll_count, usual.nll_count)
            for name, grad in grads.items():
                torch.testing.assert_close(others[name], grad, atol=1e-5, rtol=1e-4)
        # A batch of one equals its rows in a batch of many.
        for i, pair in enumerate(pairs):
            alone, _ = run([pair], config)
            torch.testing.assert_close(
                alone.rewards, usual.rewards[i :: len(pairs)], atol=1e-5, rtol=1e-5
            )

    def test_without_trace_it_is_a_bradley_terry_model(self):
        """Check 3: TRL's and OpenRLHF's -logsigmoid(chosen - rejected).mean() on the same scores, bit for bit."""
        weights = {k: v.clone().requires_grad_() for k, v in model().items()}
        batch = collate(cases.some_pairs(), FORM, inputs="plain")
        made = joint_loss(
            hidden_of(batch, weights), batch, None, weights["value"], settings(alpha=0.0)
        )
        made.loss.backward()
        ours = {k: v.grad for k, v in weights.items()}
        weights = {k: v.detach().clone().requires_grad_() for k, v in weights.items()}
        hidden = hidden_of(batch, weights)
        last = hidden[torch.arange(10), batch["mask"].sum(1) - 1]
        scores = (last @ weights["value"].T).squeeze(1)
        loss = -F.logsigmoid(scores[:5] - scores[5:]).mean()
        loss.backward()
        torch.testing.assert_close(made.loss, loss, atol=1e-6, rtol=1e-6)
        for name, leaf in weights.items():
            if leaf.grad is None:
                assert name == "head" and ours[name] is None
            else:
                torch.testing.assert_close(ours[name], leaf.grad, atol=1e-6, rtol=1e-5)


class TestGradientOfLogits:
    """Check 4, through an LM head that is the identity: the hidden states are the logits."""

    def grad(self, **options):
        batch = collate([cases.pair()], FORM, **options)
        logits = torch.randn(
            *batch["ids"].shape, V, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        joint_loss(logits, batch, torch.eye(V), torch.zeros(V), settings()).lm.backward()
        # The logits at column t predict the token of column t + 1.
        return batch, logits.grad.roll(1, 1).abs().amax(-1)

    def test_observation(self):
        batch, grad = self.grad(beta=0.0)
        hidden = batch["cls"] == OBSERVATION
        assert (
            hidden.sum() == 2 * len(" Observation: Both are right.\n") and (grad[hidden] == 0).all()
        )
        assert (grad[batch["ids"] == FORM.ids.observation] > 0).all()
        others = (batch["cls"] >= TOOL) & ~hidden
        assert (grad[others] > 0).all()
        batch, grad = self.grad(beta=0.5)
        assert (grad[batch["cls"] == OBSERVATION] > 0).all()

    def test_rationale(self):
        batch, grad = self.grad(omega=0.0)
        hidden = batch["cls"] == RATIONALE
        assert hidden.sum() == 2 * len(" Work: The tool agrees.") and (grad[hidden] == 0).all()
        assert (grad[batch["ids"] == FORM.ids.work] > 0).all() and (
            grad[batch["cls"] == EOS] > 0
        ).all()

    def test_answers(self):
        batch, grad = self.grad()
        answer = batch["cls"] == ANSWER
        assert (grad[0][answer[0]] > 0).all() and answer[0].sum() == len(" It is 4.\n")
        assert (grad[1][answer[1]] == 0).all() and (grad[batch["cls"] == IGNORE] == 0).all()
        _, grad = self.grad(lm_on_positive=False)
        assert (grad[answer] == 0).all()


class TestParts:
    """Loss and gradients of a step do not depend on how it is divided into micro-batches or among ranks."""

    @pytest.mark.parametrize("reduce", ["token_mean", "component_sum"])
    @pytest.mark.parametrize("cuts", [(1, 4), (2, 2, 1), (5,)])
    def test_accumulation(self, reduce, cuts):
        config = settings(lm_reduce=reduce, center=0.1, rm_coef=0.5)
        pairs = cases.some_pairs()
        whole, grads = run(pairs, config, omega=0.5)
        parts = [pairs[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(len(cuts))]
        over = Normaliser(0.0, 0.0)
        for part in parts:
            over += Normaliser.of(collate(part, FORM, omega=0.5), config)
        made = [run(part, config, omega=0.5, normaliser=over) for part in parts]
        torch.testing.assert_close(sum(m.loss for m, _ in made), whole.loss, atol=1e-5, rtol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(sum(g[name] for _, g in made), grad, atol=1e-5, rtol=1e-4)
        if len(cuts) > 1:  # the mean of the parts' own means is something else
            alone = sum(run(part, config, omega=0.5)[0].lm.item() for part in parts) / len(cuts)
            assert abs(alone - whole.lm.item()) > 1e-3

    def test_normaliser(self):
        batch = collate([cases.pair()], FORM, beta=0.5, omega=0.0)
        want = sum(
            {TOOL: 1.0, OBSERVATION: 0.5, EOS: 1.0}.get(c, 0.0)
            for c in batch["cls"].flatten().tolist()
        )
        answer = int((batch["cls"][0] == ANSWER).sum())
        assert Normaliser.of(batch, settings()) == Normaliser(want + answer, 1.0)
        assert Normaliser.of(batch, settings(lm_reduce="component_sum")) == Normaliser(2.0, 1.0)


class TestEdges:
    def test_nothing_predicts_a_first_token(self):
        """Not the last token of the row before, either, whatever its weight."""
        hidden, batch, head, value = given((1.0, 0.5, 0.0, 0.2))
        want = joint_loss(hidden, batch, head, value, settings())
        weights = batch["weights"].clone()
        weights[:, 0] = 5.0
        changed = batch | {"weights": weights}
        assert torch.equal(joint_loss(hidden, changed, head, value, settings()).lm, want.lm)
        assert Normaliser.of(changed, settings()) == Normaliser.of(batch, settings())
        assert weights[0, 0] == 5.0  # the caller's batch stays as it is

    def test_nothing_to_learn_from(self):
        trace = Trace((), None, None)
        batch = collate([cases.pair(trace=trace)], FORM, lm_on_positive=False)
        batch["weights"].zero_()
        weights = {k: v.requires_grad_() for k, v in model().items()}
        made = joint_loss(
            hidden_of(batch, weights),
            batch,
            weights["head"],
            weights["value"],
            settings(rm_coef=0.0),
        )
        assert made.lm.item() == 0.0 and made.loss.item() == 0.0
        made.loss.backward()
        assert not weights["head"].grad.any()

    def test_empty_trace(self):
        form_row = FORM.assemble(Query("q", "a"), Trace())
        assert FORM.decode(form_row.ids).endswith("### ASSISTANT:\n</s>")
        made, _ = run([cases.pair(trace=Trace())], settings())
        assert math.isfinite(made.loss.item())

    def test_bfloat16(self):
        batch = collate(cases.some_pairs(), FORM)
        weights = model(dtype=torch.bfloat16)
        hidden = hidden_of(batch, weights)
        made = joint_loss(hidden, batch, weights["head"], weights["value"], settings())
        assert made.loss.dtype == torch.float32 and made.rewards.dtype == torch.float32
        same = {k: v.float() for k, v in weights.items()}
        want = joint_loss(hidden.float(), batch, same["head"], same["value"], settings())
        torch.testing.assert_close(made.loss, want.loss, atol=2e-2, rtol=2e-2)

    def test_components_by_hand(self):
        pair = cases.pair(trace=Trace((cases.STEP, cases.STEP), None, "r"))
        batch = collate([pair], FORM)
        weights = component_weights(batch)
        for row in range(2):
            per = [float(weights[row][batch["cls"][row] == c].sum()) for c in range(6)]
            work = 1 / len("W Work: r")  # the work token's own part of the rationale's component
            want = [0, 1 - row, 2 + work, 2, 1 - work, 1]
            assert per == pytest.approx(want, abs=1e-5)

    def test_bad_input(self):
        batch = collate([cases.pair()], FORM)
        weights = model()
        hidden = hidden_of(batch, weights)
        call = lambda h=hidden, b=batch, head=weights["head"], **c: joint_loss(  # noqa: E731
            h, b, head, weights["value"], settings(**c))  # fmt: skip
        with pytest.raises(ValueError, match="as many preferred as rejected rows, got 1 rows"):
            call(b=batch | {"is_pos": batch["is_pos"][:1]})
        with pytest.raises(ValueError, match="as many preferred as rejected rows, got 0 rows"):
            call(b=batch | {"is_pos": batch["is_pos"][:0]})
        with pytest.raises(
            ValueError, match=r"hidden must be \[2, .*'H'\] as the batch's ids, got \[1"
        ):
            call(h=hidden[:1])
        with pytest.raises(ValueError, match=r"lm_head is needed where alpha is 1\.0"):
            call(head=None)
        with pytest.raises(
            ValueError, match="lm_reduce must be one of token_mean, component_sum, got 'x'"
        ):
            call(lm_reduce="x")
        with pytest.raises(ValueError, match="real token"):
            rewards(hidden, batch | {"mask": torch.zeros_like(batch["mask"])}, weights["value"])
