# SPDX-License-Identifier: Apache-2.0
"""Plans in force: frozen means frozen, check 7, the penalty, deltas, Half-Reset."""

import copy
import pickle

import hft_models as tiny
import pytest
import torch
from torch import nn

from tenfold import hft
from tenfold.hft.plan import Part, Plan
from tenfold.optim import MaskedAdamW


def train(model, optimizer, n=3, ids=None):
    ids = tiny.rows(4) if ids is None else ids
    for _ in range(n):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


class Point(nn.Module):
    """One vector per name; the loss is half the squared distance to a target."""

    def __init__(self):
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.a, self.b = (nn.Parameter(torch.randn(6, generator=made)) for _ in "ab")
        self.target = {n: torch.randn(6, generator=made) for n in "ab"}

    def loss(self):
        return sum(0.5 * (p - self.target[n]).square().sum() for n, p in self.named_parameters())

    def plan(self, **partial):
        trained = tuple(n for n in "a" if n not in partial)
        return Plan(trained, ("b",), partial, architecture="Point")


def descend(model, optimizer, penalty=None, steps=700):
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.97 ** max(0, i - 400)
        optimizer.zero_grad()
        model.loss().backward()
        if penalty:
            penalty.add_gradients()
        optimizer.step()


class TestClosedForm:
    """Check 7."""

    def test_frozen_stays_and_trained_arrives(self):
        model = Point()
        start = weights(model)
        hft.apply(model, model.plan())
        descend(model, MaskedAdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95)))
        torch.testing.assert_close(model.a.detach(), model.target["a"], atol=1e-4, rtol=0)
        assert torch.equal(model.b, start["b"])

    def test_parts(self):
        model = Point()
        start = weights(model)
        hft.apply(model, model.plan(a=Part("element", ((0, 6, 2),))))
        descend(model, MaskedAdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95)))
        torch.testing.assert_close(model.a.detach()[::2], model.target["a"][::2], atol=1e-4, rtol=0)
        assert torch.equal(model.a[1::2], start["a"][1::2]) and torch.equal(model.b, start["b"])

    @pytest.mark.parametrize("weight", [0.0, 0.1, 1.0, 1e4])
    def test_soft_freeze(self, weight):
        model = Point()
        start, plan = weights(model)["b"], model.plan()
        hft.apply(model, plan)
        penalty = hft.SoftFreeze(model, plan, weight)
        descend(
            model,
            MaskedAdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95), masks={}),
            penalty,
        )
        want = (model.target["b"] + 2 * weight * start) / (1 + 2 * weight)
        torch.testing.assert_close(model.b.detach(), want, atol=2e-3, rtol=0)
        torch.testing.assert_close(model.a.detach(), model.target["a"], atol=1e-3, rtol=0)
        if weight == 1e4:
            torch.testing.assert_close(model.b.detach(), start, atol=2e-3, rtol=0)

    def test_the_penalty_as_a_loss_has_that_gradient(self):
        model = Point()
        plan = model.plan(a=Part("element", ((0, 3, 1),)))
        penalty = hft.SoftFreeze(model, plan, 0.7)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(6))
        penalty.penalty().backward()
        by_loss = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        penalty.add_gradients()
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.grad, by_loss[n])
        assert not by_loss["a"][:3].any() and by_loss["a"][3:].all()
        with pytest.raises(ValueError, match="soft_freeze must be a number >= 0, got -1"):
            hft.SoftFreeze(model, plan, -1)


class TestApply:
    def test_one_line(self):
        model = tiny.tiny(4)
        plan = hft.apply(model, ratio=0.5, seed=0)
        needs = {n for n, p in model.named_parameters() if p.requires_grad}
        assert needs == set(plan.trained) and hft.current_plan(model) is plan
        hft.release(model)
        assert all(p.requires_grad for p in model.parameters()) and hft.current_plan(model) is None

    def test_no_gradient_is_computed(self):
        model = tiny.tiny(2)
        plan = hft.apply(model)
        ids = tiny.rows(2)
        model(input_ids=ids, labels=ids).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(plan.trained)

    @pytest.mark.parametrize("kind", [MaskedAdamW, torch.optim.AdamW])
    def test_weight_decay_and_left_over_gradients(self, kind):
        """The two traps: weight decay on zero gradients, and a gradient from before the freeze."""
        model = tiny.tiny(2)
        ids = tiny.rows(4)
        model(input_ids=ids, labels=ids).loss.backward()
        plan = hft.apply(model)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
        before = weights(model)
        train(model, optimizer)
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (n in plan.frozen), n

    def test_momentum_of_an_earlier_round(self):
        model = tiny.tiny(2)
        plan = hft.apply(model, round=0)
        optimizer = MaskedAdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        for r in range(1, 4):
            train(model, optimizer)
            plan = hft.apply(model, round=r)
            optimizer.switch(plan, "keep")
            before = weights(model)
            train(model, optimizer)
            for n, p in model.named_parameters():
                assert torch.equal(p, before[n]) == (n in plan.frozen), n

    def test_what_the_owner_froze_stays_frozen(self):
        model = tiny.tiny(2)
        model.model.embed_tokens.weight.requires_grad_(False)
        for r in range(2):
            hft.apply(model, round=r)
            assert not model.model.embed_tokens.weight.requires_grad
        hft.release(model)
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
            "model.embed_tokens.weight"
        ]
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="owner froze"):
            hft.apply(model)

    def test_a_wrapped_model(self):
        class DistributedDataParallel(nn.Module):
            pass

        with pytest.raises(
            RuntimeError, match=r"DistributedDataParallel fixed when it wrapped.*wrap it again"
        ):
            hft.apply(DistributedDataParallel(), Plan((), ()))

    def test_a_plan_or_a_draw(self):
        with pytest.raises(TypeError, match="not both"):
            hft.apply(tiny.tiny(1), Plan((), ()), ratio=0.5)

    def test_fused_rows_end_to_end(self):
        from transformers import Phi3Config, Phi3ForCausalLM

        torch.manual_seed(0)
        model = Phi3ForCausalLM(Phi3Config(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        ))  # fmt: skip
        plan = next(p for p in (hft.select(model, r) for r in range(9)) if len(p.partial) > 2)
        hft.apply(model, plan)
        before = weights(model)
        ids = tiny.rows(4)
        model(input_ids=ids, labels=ids).loss.backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if n in plan.partial}
        ordinary = pickle.loads(pickle.dumps(model))
        copied = copy.deepcopy(model)
        for other in (ordinary, copied):
            other.zero_grad()
            other(input_ids=ids, labels=ids).loss.backward()
            for n, p in other.named_parameters():
                if n in want:
                    rows = want[n].any(1)
                    torch.testing.assert_close(p.grad[rows], want[n][rows])
                    assert (other is ordinary) == bool(p.grad[~rows].any())  # not computed
        model.zero_grad()
        train(model, MaskedAdamW(model.parameters(), lr=0.1, weight_decay=0.1))
        for n, p in model.named_parameters():
            if n in plan.partial:
                rows = torch.zeros(len(p), dtype=torch.bool)
                for r in plan.partial[n].ranges:
                    rows[r[0] : r[1] : r[2]] = True
                assert torch.equal((p == before[n]).all(1), ~rows) and (p != before[n])[rows].any()


@pytest.fixture
def tuned():
    base = tiny.tiny(3)
    snapshot = hft.snapshot(base)
    plan = hft.apply(base, seed=4)
    train(base, MaskedAdamW(base.parameters(), lr=0.1))
    return base, snapshot, plan


class TestDelta:
    def test_only_what_changed(self, tuned, tmp_path):
        model, base, plan = tuned
        found = hft.save_delta(model, base, tmp_path / "d.safetensors", plan)
        assert found["tensors"] == len(plan.trained)
        total = sum(t.nbytes for t in base.values())
        assert found["bytes"] < 0.75 * total
        fresh = tiny.tiny(3)
        undo = hft.apply_delta(fresh, tmp_path / "d.safetensors")
        for a, b in zip(fresh.parameters(), model.parameters()):
            assert torch.equal(a, b)
        hft.restore(fresh, undo)
        assert all(torch.equal(p, base[n]) for n, p in fresh.named_parameters())

    def test_rows(self, tmp_path):
        model = tiny.tiny(1, vocab=200)
        base = hft.snapshot(model)
        with torch.no_grad():
            model.lm_head.weight[[3, 150]] += 1
            model.model.embed_tokens.weight[7, 2] = float("nan")
        found = hft.save_delta(model, base, tmp_path / "d.safetensors")
        assert (found["tensors"], found["rows"]) == (2, 2) and found["bytes"] < 300
        fresh = tiny.tiny(1, vocab=200)
        undo = hft.apply_delta(fresh, tmp_path / "d.safetensors")
        torch.testing.assert_close(dict(fresh.named_parameters()), dict(model.named_parameters()),
                                   rtol=0, atol=0, equal_nan=True)  # fmt: skip
        hft.restore(fresh, undo)
        assert all(torch.equal(p, base[n]) for n, p in fresh.named_parameters())

    def test_another_base(self, tuned, tmp_path):
        model, base, _ = tuned
        hft.save_delta(model, base, tmp_path / "d.safetensors")
        with pytest.raises(ValueError, match="belongs to another base model"):
            hft.apply_delta(tiny.tiny(3, seed=1), tmp_path / "d.safetensors")
        with pytest.raises(KeyError, match="the base model has no tensor"):
            hft.save_delta(tiny.tiny(4), base, tmp_path / "e.safetensors")
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="is no delta"):
            hft.apply_delta(model, tmp_path / "other.safetensors")

    def test_half_reset(self, tuned):
        model, base, _ = tuned
        plan = hft.select(model, 9)
        made = hft.half_reset(model, base, plan)
        for n, p in model.named_parameters():
            assert torch.equal(made[n], base[n] if n in plan.frozen else p)
        parts = hft.select(model, strategy="element")
        made = hft.half_reset(model, base, parts)
        masks = parts.masks(model)
        from tenfold import ops

        for n, p in model.named_parameters():
            bits = torch.ones(p.shape).bool()
            if p in masks:
                bits = ops.unpack_mask(masks[p][0], p.numel()).view(p.shape)
            assert torch.equal(made[n], torch.where(bits, p, base[n]))
        with pytest.raises(KeyError, match="another model"):
            hft.half_reset(tiny.tiny(1), base, plan)

    def test_average(self, tuned):
        model, base, _ = tuned
        made = hft.average([model, base], [0.25, 0.75])
        for n, p in model.named_parameters():
            torch.testing.assert_close(made[n], 0.25 * p.detach() + 0.75 * base[n])
        with pytest.raises(ValueError, match="1 weights for 2 models"):
            hft.average([model, base], [1.0])
