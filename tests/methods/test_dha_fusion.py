# SPDX-License-Identifier: Apache-2.0
"""The fusion operator, its margin and penalty, alignment, grouping with budgets: checks 7-10 of the spec."""

import itertools
import math

import dha_models as tiny
import pytest
import torch

from tenfold import ops
from tenfold.dha import grouping
from tenfold.dha.align import align
from tenfold.dha.config import DhaConfig
from tenfold.dha.fusion import (
    FusionModel,
    attention_layers,
    fuse_states,
    margin,
    mean_mse,
    operator_distances,
    projections,
    start_omega,
    working_copy,
)

IDS = tiny.rows(2)


def groups_of(n, heads, seed):
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
    return order.view(n, -1)


def fused(model, n=2, coefficients="full", gqa="expand"):
    working = working_copy(model, gqa)
    for c, p in enumerate(projections(working)):
        p.set_groups(groups_of(n, p.base_heads, c), coefficients)
    return working


class TestStart:
    """Check 7: omega = identity gives the parent's logits."""

    @pytest.mark.parametrize("coefficients", ["full", "scalar", "tied"])
    @pytest.mark.parametrize("kv_heads, gqa, n", [(8, "expand", 2), (4, "expand", 2), (4, "group", 2),
                                                  (8, "expand", 8), (8, "expand", 1)])  # fmt: skip
    @pytest.mark.parametrize("bias", [False, True])
    def test_logits_are_the_parents(self, coefficients, kv_heads, gqa, n, bias):
        model = tiny.make(kv_heads=kv_heads, bias=bias)
        want = tiny.logits(model, IDS)
        got = tiny.logits(fused(model, n, coefficients, gqa), IDS)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    def test_the_parent_is_left_alone(self):
        model = tiny.make(kv_heads=4)
        before = {n: p.clone() for n, p in model.state_dict().items()}
        working = fused(model)
        for p in working.parameters():
            p.data.add_(1)
        assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
        assert model.config.num_key_value_heads == 4

    def test_copies_start_with_the_same_operator(self):
        omega = start_omega(torch.tensor([[0, 1, 2, 5]]), torch.tensor([7, 7, 7, 8, 8, 8]))
        third = 1 / 3
        want = torch.tensor([[third] * 3 + [0]] * 3 + [[0, 0, 0, 1]])
        torch.testing.assert_close(omega[0], want)

    def test_start_of_a_changed_operator_differs(self):
        model = tiny.make()
        working = fused(model)
        next(projections(working)).omega.data[0, 0, 0] += 0.3
        assert float((tiny.logits(working, IDS) - tiny.logits(model, IDS)).abs().max()) > 1e-3


def test_weight_space_is_state_space_before_rope():
    """Check 7: the same heads whether weights or states are mixed; biases mix along."""
    model = tiny.make(bias=True)
    working = fused(model)
    for c, p in enumerate(projections(working)):
        p.omega.data += 0.2 * torch.randn(p.omega.shape, generator=torch.Generator().manual_seed(c))
        x = torch.randn(2, 5, p.weight.shape[1])
        heads = (
            torch.nn.functional.linear(x, p.weight, p.bias).unflatten(-1, (8, -1)).transpose(1, 2)
        )
        want = fuse_states(heads, p.full_omega(), p.groups)
        got = p(x).unflatten(-1, (8, -1)).transpose(1, 2)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class TestAfterRope:
    @staticmethod
    def rotate(x):
        angle = torch.arange(x.shape[2])[:, None] * 100.0 ** -torch.linspace(0, 1, x.shape[3] // 2)
        angle = torch.cat([angle, angle], -1)
        half = x.shape[3] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angle.cos() + turned * angle.sin()

    def test_equal_with_tied_operators(self):
        keys, groups = torch.randn(2, 4, 6, 8), torch.tensor([[0, 2], [3, 1]])
        half = torch.randn(2, 2, 2, 4)
        omega = torch.cat([half, half], -1)
        after = fuse_states(self.rotate(keys), omega, groups, after_rope=True)
        before = self.rotate(fuse_states(keys, omega, groups))
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)

    def test_untied_operators_differ_and_are_refused(self):
        keys, groups = torch.randn(2, 4, 6, 8), torch.tensor([[0, 2], [3, 1]])
        omega = torch.randn(2, 2, 2, 8)
        wrong = fuse_states(self.rotate(keys), omega, groups)
        assert float((wrong - self.rotate(fuse_states(keys, omega, groups))).abs().max()) > 0.1
        with pytest.raises(ValueError, match=r"equal for the dimensions i and i \+ d/2"):
            fuse_states(self.rotate(keys), omega, groups, after_rope=True)


class TestMargin:
    """Check 9."""

    def test_values(self):
        t = [margin(s, 1000, 0.995, 0.8) for s in range(1000)]
        assert t[0] == 1 and t[800] == 0 and t[999] == 0
        assert all(a >= b for a, b in itertools.pairwise(t))
        assert t[400] == pytest.approx(0.995**400 * 0.5)

    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_the_hinge_is_inactive_at_the_start(self, n):
        module = FusionModel(fused(tiny.make(), n), 1.0, "per_group", penalised=True)
        loss, lm, penalty, mse = module({"input_ids": IDS, "labels": IDS}, 1.0)
        assert float(penalty) == 0 and float(loss.detach()) == float(lm)
        assert float(mse) == pytest.approx(2 / (8 // n))


class TestPenalty:
    def test_per_group_and_summed(self):
        working = fused(tiny.make(), 2)
        mses = torch.cat([ops.fusion_mse(p.full_omega()) for p in projections(working)]).detach()
        for kind, want in (
            ("per_group", (mses - 0.3).clamp(min=0).sum()),
            ("summed", mses.sum() - 0.3),
        ):
            module = FusionModel(working, 2.0, kind, penalised=True)
            loss, lm, penalty, _ = module({"input_ids": IDS, "labels": IDS}, 0.3)
            assert float(penalty) == pytest.approx(float(want))
            assert float(loss.detach() - lm) == pytest.approx(2 * float(want), rel=1e-4)

    def test_lambda_ascends_and_operators_descend(self):
        working = fused(tiny.make(), 2)
        module = FusionModel(working, 1.0, "per_group", penalised=True)
        loss, _, penalty, _ = module({"input_ids": IDS, "labels": IDS}, 0.0)
        loss.backward()
        # dL/dlambda is the penalty; AdamW's group for it maximises.
        assert float(module.multiplier.grad) == pytest.approx(float(penalty))
        assert all(float(p.omega.grad.abs().max()) > 0 for p in projections(working))

    def test_lambda_is_clamped_and_nan_stops(self):
        module = FusionModel(fused(tiny.make()), 1.0, "per_group", penalised=True)
        module.multiplier.data.fill_(-0.5)
        module.clamp_multiplier()
        assert float(module.multiplier) == 0
        module.multiplier.data.fill_(math.nan)
        with pytest.raises(RuntimeError, match="multiplier became nan: training stopped"):
            module.clamp_multiplier()


class TestCollapse:
    """Check 10."""

    @pytest.mark.parametrize("kv_heads, gqa", [(8, "expand"), (4, "group")])
    def test_equal_rows_lose_nothing(self, kv_heads, gqa):
        working = fused(tiny.make(kv_heads=kv_heads, bias=True), 2, gqa=gqa)
        for c, p in enumerate(projections(working)):
            row = torch.randn(2, 1, *p.omega.shape[2:], generator=torch.Generator().manual_seed(c))
            p.omega.data.copy_(row.expand_as(p.omega) * 0.5)
        assert mean_mse(working) < 1e-12
        want = tiny.logits(working, IDS)
        for p in projections(working):
            p.collapse()
            assert p.base_heads == 2 and p.query_map.shape == (8,)
        torch.testing.assert_close(tiny.logits(working, IDS), want, atol=1e-5, rtol=1e-5)

    def test_uniform_operators_are_mean_pooling(self):
        model = tiny.make()
        working = working_copy(model)
        for p in projections(working):
            p.set_groups(torch.arange(8).view(4, 2))
            p.omega.data.fill_(0.5)
            p.collapse()
        for mine, parent in zip(attention_layers(working), attention_layers(model)):
            for name in ("k_proj", "v_proj"):
                want = getattr(parent, name).weight.view(4, 2, 8, -1).mean(1).flatten(0, 1)
                torch.testing.assert_close(getattr(mine, name).weight, want)
            assert mine.k_proj.query_map.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_distances_are_those_of_the_formula():
    omega = torch.randn(1, 5, 5, 3)
    got = operator_distances(omega)
    for a in range(5):
        for b in range(5):
            want = sum(((omega[0, a, j] - omega[0, b, j]) ** 2).mean() for j in range(5)) / 5
            assert float(got[a, b]) == pytest.approx(float(want), rel=1e-5, abs=1e-7)


class TestAlignment:
    @pytest.mark.parametrize("kv_heads, gqa", [(8, "expand"), (4, "group"), (2, "expand")])
    def test_the_function_is_unchanged(self, kv_heads, gqa):
        model = tiny.make(kv_heads=kv_heads, bias=True)
        working = working_copy(model, gqa)
        parts = list(projections(working))
        groups = [groups_of(2, p.base_heads, c) for c, p in enumerate(parts)]
        align(working.model.layers, groups, [p.query_map for p in parts])
        torch.testing.assert_close(tiny.logits(working, IDS), tiny.logits(model, IDS),
                                   atol=1e-5, rtol=1e-5)  # fmt: skip
        moved = (
            parts[0].weight - fused(model, gqa=gqa).model.layers[0].self_attn.k_proj.weight
        ).abs()
        assert float(moved.max()) > 1e-3

    def test_hidden_copies_are_found(self):
        """Heads that are one head in other bases (which RoPE allows) become that head."""
        model = tiny.make(layers=1)
        attention = attention_layers(model)[0]
        key = attention.k_proj.weight.data.view(8, 8, -1)
        value = attention.v_proj.weight.data.view(8, 8, -1)
        for h in range(1, 8):
            angle = torch.rand(4, 1) * 6
            x, y = key[0, :4], key[0, 4:]
            key[h] = torch.cat(
                [x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()]
            )
            value[h] = torch.linalg.qr(torch.randn(8, 8))[0] @ value[0]
        want = tiny.logits(model, IDS)
        working = working_copy(model)
        parts = list(projections(working))
        groups = [torch.arange(8).view(2, 4)] * 2
        align(working.model.layers, groups, [p.query_map for p in parts])
        for p in parts:
            p.set_groups(groups[0])
            p.omega.data.fill_(0.25)
            p.collapse()
        torch.testing.assert_close(tiny.logits(working, IDS), want, atol=1e-4, rtol=1e-4)

    def test_every_group_agrees_better(self):
        working = working_copy(tiny.make())
        parts = list(projections(working))
        groups = [groups_of(2, 8, c) for c in range(len(parts))]

        def spread():
            return [float(sum((h - h.mean(0)).square().sum() for h in p.weight.data.view(8, 8, -1)[g]))
                    for p, g in zip(parts, groups)]  # fmt: skip

        before = spread()
        align(working.model.layers, groups, [p.query_map for p in parts])
        assert all(a < b for a, b in zip(spread(), before))


class TestPlans:
    @staticmethod
    def distances(components=6, heads=8, seed=0):
        made = torch.rand(components, heads, heads, generator=torch.Generator().manual_seed(seed))
        made = made + made.transpose(1, 2)
        made.diagonal(dim1=1, dim2=2).zero_()
        return list(made)

    @pytest.mark.parametrize("allocation", ["dp", "greedy", "uniform", "loss_weighted"])
    @pytest.mark.parametrize("budget", [0.125, 0.25, 0.4, 0.5, 0.77, 1.0])
    @pytest.mark.parametrize("extra", [{}, {"nested": True}, {"tp_size": 2}, {"sizes": (1, 2, 8)},
                                       {"grouping": "contiguous"}])  # fmt: skip
    def test_budgets_and_groups(self, allocation, budget, extra):
        config = DhaConfig(budget=budget, allocation=allocation, **extra)
        if extra.get("tp_size") and budget == 0.125:
            with pytest.raises(ValueError, match=r"budget must be in \[0.25, 1\]"):
                grouping.make_plan(self.distances(), 8, config)
            return
        plan = grouping.make_plan(self.distances(), 8, config)
        assert sum(plan.heads) <= int(budget * 3 * 16)
        if budget == 1.0:
            assert plan.heads == [8] * 6
        if allocation == "uniform":
            assert len(set(plan.heads)) == 1
        for groups in plan.groups:
            assert sorted(groups.flatten().tolist()) == list(range(8))
            if extra.get("tp_size"):
                assert all(len({h // 4 for h in g.tolist()}) == 1 for g in groups)
            if extra.get("grouping"):
                assert groups.tolist() == torch.arange(8).view(len(groups), -1).tolist()
        for keys, values in zip(plan.groups[::2], plan.groups[1::2]):
            if extra.get("nested"):
                fine, coarse = sorted((keys, values), key=lambda g: -len(g))
                assert all(any(set(f) <= set(c) for c in coarse.tolist()) for f in fine.tolist())

    def test_heads_go_where_sharing_costs(self):
        """Component 0 loses nothing by sharing, component 3 everything."""
        distances = [torch.full((8, 8), 0.1) for _ in range(4)]
        distances[0], distances[3] = torch.zeros(8, 8), torch.full((8, 8), 10.0)
        for d in distances:
            d.fill_diagonal_(0)
        for allocation in ("dp", "greedy", "loss_weighted"):
            # The greedy rule gives every component 4 first, so it needs more than half.
            config = DhaConfig(budget=0.7, allocation=allocation)
            heads = grouping.make_plan(distances, 8, config).heads
            assert heads[3] == 8 and heads[0] == min(heads), allocation

    def test_planted_groups_are_found_inside_the_cost_table(self):
        of = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
        dist = (of[:, None] != of).float()
        plan = grouping.make_plan([dist, dist], 8, DhaConfig(budget=0.5))
        assert [sorted(g.tolist()) for g in plan.groups[0]] == [[0, 4], [1, 5], [2, 6], [3, 7]]
        assert plan.costs[0][plan.sizes[0].index(4)] == 0

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"budget": 0.1}, r"budget 0.1 is 4 of 48 .* at least 6 .*\[0.125, 1\]"),
            (
                {"sizes": (3,)},
                r"sizes must divide the 8 heads .*\[3\] do not; possible are \[1, 2, 4, 8\]",
            ),
            ({"sizes": (4,), "budget": 0.25}, r"at least 24 are needed.*\[0.5, 1\]"),
            ({"min_heads": 4, "budget": 0.25}, r"budget must be in \[0.5, 1\]"),
            ({"tp_size": 3}, r"tp_size must divide .*possible are \[1, 2, 4, 8\]"),
        ],
    )
    def test_what_cannot_be_met(self, changes, message):
        with pytest.raises(ValueError, match=message):
            grouping.make_plan(self.distances(), 8, DhaConfig(**changes))

    def test_uniform_needs_a_common_head_count(self):
        sizes = [[3, 9], [2, 8]]
        message = r"none in common: \[\(2, 8\), \(3, 9\)\]; use allocation dp"
        with pytest.raises(ValueError, match=message):
            grouping.head_budget(DhaConfig(budget=1.0, allocation="uniform"), 1, 9, sizes)
        assert grouping.head_budget(DhaConfig(budget=1.0), 1, 9, sizes) == 17

    def test_maps_compose(self):
        base_map = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])  # GQA with four heads
        got = grouping.maps(torch.tensor([[0, 2], [1, 3]]), base_map)
        assert got.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
