# SPDX-License-Identifier: Apache-2.0
"""MaskedAdamW: torch's AdamW where nothing is masked, and what masks, narrow states and switches add."""

import copy
import gc
import pickle
import re
import warnings
import weakref

import hft_models as tiny
import pytest
import torch
from torch import nn

from tenfold import hft, ops
from tenfold.optim import MaskedAdamW, check_optimizer, switch_optimizer
from tenfold.testing.plugin import cuda_only

# torch's fused AdamW rounds otherwise in the last numel % 8 elements, which it takes one by one: exact
# comparisons have none.
SHAPES = [(5, 8), (8,), (2, 3, 8), (33, 64), (0, 4)]
ODD = [(5, 7), (3,), (), (2, 3, 5), (33, 65)]


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=made).to(dtype)) for s in shapes]


def steps(optimizer, params, n=20, first=0, nan=False):
    for i in range(first, first + n):
        made = torch.Generator().manual_seed(100 + i)
        for p in params:
            p.grad = torch.randn(p.shape, generator=made).to(p.dtype)
            if nan:
                p.grad[...] = float("nan")
        optimizer.step()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class TestAsTorch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "settings",
        [{}, {"weight_decay": 0.0}, {"weight_decay": 0.3, "eps": 1e-6, "betas": (0.8, 0.95)},
         {"maximize": True}, {"amsgrad": True}, {"lr": torch.tensor(3e-3)}],
    )  # fmt: skip
    def test_bit_by_bit(self, dtype, settings):
        settings = {"lr": 1e-2} | settings
        ours, theirs = parameters(dtype), parameters(dtype)
        for params, kind, fused in ((ours, MaskedAdamW, None), (theirs, torch.optim.AdamW, True)):
            groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
            steps(kind(groups, fused=fused, **settings), params, 50)
        assert equal(ours, theirs)

    @pytest.mark.parametrize("form", [{"foreach": False}, {"fused": True}])
    def test_close_in_any_shape(self, form):
        ours, theirs = parameters(shapes=ODD), parameters(shapes=ODD)
        steps(MaskedAdamW(ours, lr=1e-2), ours, 50)
        steps(torch.optim.AdamW(theirs, lr=1e-2, **form), theirs, 50)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("into", ["ours", "torch"])
    def test_state_dicts_go_both_ways(self, into):
        a, b = parameters(), parameters()
        first, second = (torch.optim.AdamW(a, lr=1e-2, fused=True), MaskedAdamW(b, lr=1e-2))
        steps(first, a, 5)
        steps(second, b, 5)
        if into == "ours":
            second = MaskedAdamW(b, lr=1.0)
            second.load_state_dict(first.state_dict())
        else:
            given = second.dense_state_dict()
            first = torch.optim.AdamW(a, lr=1.0, fused=True)
            first.load_state_dict(copy.deepcopy(given))
            first.param_groups[0]["fused"] = True  # a loaded group is the saved one
        steps(first, a, 5, 5)
        steps(second, b, 5, 5)
        assert equal(a, b) and second.param_groups[0]["lr"] == 1e-2

    def test_round_trip(self):
        a, b = parameters(), parameters()
        whole = MaskedAdamW(a, lr=1e-2)
        steps(whole, a, 10)
        half = MaskedAdamW(b, lr=1e-2)
        steps(half, b, 5)
        again = MaskedAdamW(b, lr=5.0)
        saved = half.state_dict()
        again.load_state_dict(saved)
        steps(again, b, 5, 5)
        assert equal(a, b)
        # What was saved is not what is trained on.
        assert all(int(s["step"]) == 5 for s in saved["state"].values())

    def test_copies(self):
        params = parameters(shapes=[(6, 8)])
        first = MaskedAdamW(
            params, lr=1e-2, masks=[row_mask(6)], mask_kind="row", max_grad_norm=1.0
        )
        steps(first, params, 2)
        for second in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
            mine = second.param_groups[0]["params"]
            assert equal(mine, params) and mine[0] is not params[0]
            steps(second, mine, 2, 2)
            assert second.state[mine[0]]["exp_avg"].numel() == 16
        steps(first, params, 2, 2)
        assert equal(mine, params)

    def test_states_of_a_plain_run_with_python_steps(self):
        a, b = parameters(), parameters()
        first = torch.optim.AdamW(a, lr=1e-2, foreach=False)
        steps(first, a, 3)
        saved = first.state_dict()
        for s in saved["state"].values():
            s["step"] = float(s["step"])
        second = MaskedAdamW(b, lr=1e-2)
        second.load_state_dict(saved)
        assert all(
            s["step"].dtype == torch.float32 and int(s["step"]) == 3 for s in second.state.values()
        )

    def test_closures_schedulers_and_groups(self):
        (p,) = parameters(shapes=[(4,)])
        (q,) = parameters(shapes=[(3, 3)])
        optimizer = MaskedAdamW([("p", p)], lr=0.1)
        optimizer.add_param_group({"params": [("q", q)], "lr": 0.2, "weight_decay": 0.0})
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))

        def closure():
            optimizer.zero_grad()
            loss = p.square().sum() + q.square().sum()
            loss.backward()
            return loss

        losses = []
        for _ in range(3):
            losses.append(float(optimizer.step(closure).detach()))
            schedule.step()
        assert losses == sorted(losses, reverse=True)
        assert [g["lr"] for g in optimizer.param_groups] == [0.1 / 4, 0.2 / 4]
        assert optimizer.param_groups[1]["param_names"] == ["q"]

    def test_groups_and_states_replaced_between_steps(self):
        p = torch.nn.Parameter(torch.ones(40))
        optimizer = MaskedAdamW([p], lr=0.1)
        p.grad = torch.ones(40)
        optimizer.step()
        before = p.detach().clone()
        optimizer.param_groups[0] = optimizer.param_groups[0] | {"lr": 0.0}
        optimizer.step()
        assert torch.equal(p, before) and float(optimizer.state[p]["step"]) == 2
        optimizer.state.clear()
        optimizer.step()
        assert float(optimizer.state[p]["step"]) == 1

    @pytest.mark.parametrize(
        "change",
        [
            "fewer",
            "strides",
            "group",
            "bounds",
            "states",
            "swapped",
            "copied",
            "foreign",
            "added",
            "storage",
        ],
    )
    def test_changes_between_steps(self, change):
        """A step goes on from the last one's lists; what changes in between is seen as by torch."""
        made = {}
        # torch's fused step takes gradients in storage order, whatever their strides.
        for kind, fused in ((MaskedAdamW, None), (torch.optim.AdamW, change != "strides")):
            params = parameters(shapes=[(2, 8), (4, 8), (4, 8)])
            groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]
            optimizer = kind(groups, lr=0.1, weight_decay=0.1, fused=fused)
            steps(optimizer, params, 3)
            if change == "group":
                optimizer.param_groups[0] = optimizer.param_groups[0] | {"lr": 0.01}
            elif change == "bounds":
                first, second = (g["params"] for g in optimizer.param_groups)
                first.append(second.pop(0))
            elif change == "swapped":
                a, b, c = optimizer.state.values()
                optimizer.state.clear()
                optimizer.state.update({params[0]: a, params[2]: b, params[1]: c})
            elif change == "states":
                del optimizer.state[params[1]]
            elif change == "copied":
                optimizer.state[params[1]] = copy.deepcopy(optimizer.state[params[1]])
                optimizer.state[params[1]]["exp_avg"].zero_()
            elif change == "foreign":
                optimizer.state["seen"] = 3
            elif change == "added":
                params += parameters(shapes=[(8,)])
                optimizer.add_param_group({"params": params[3:], "lr": 0.3})
            elif change == "storage":
                params[0].data = params[0].detach().clone()
            for i in range(3):
                for p in params:
                    p.grad = p.detach() * 0.5 + i
                if change == "fewer" and i != 1:
                    params[1].grad = None
                if change == "strides" and i != 1:
                    params[0].grad = params[0].grad.t().contiguous().t()
                optimizer.step()
            made[kind] = [*params, *(s["exp_avg"] for s in optimizer.state.values()
                                     if isinstance(s, dict))]  # fmt: skip
        if change != "strides":
            assert equal(*made.values())
        torch.testing.assert_close(*made.values(), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("masked", [False, True])
    def test_gradients_do_not_outlive_a_step(self, masked):
        params = parameters()
        masks = [p > 0 for p in params] if masked else None
        optimizer = MaskedAdamW(params, masks=masks)
        steps(optimizer, params, 2)
        gone = [weakref.ref(p.grad) for p in params]
        optimizer.zero_grad()
        assert not any(r() is not None for r in gone)

    def test_a_missing_gradient_is_skipped(self):
        a, b = parameters(shapes=[(3,), (4,)])
        optimizer = MaskedAdamW([a, b], lr=0.1)
        a.grad = torch.ones(3)
        optimizer.step()
        assert b not in optimizer.state and int(optimizer.state[a]["step"]) == 1

    def test_other_strides(self):
        a, b = (
            nn.Parameter(torch.randn(2, 8, 4, 5).to(memory_format=torch.channels_last))
            for _ in "ab"
        )
        b.data.copy_(a.data)
        for p, kind in ((a, MaskedAdamW), (b, torch.optim.AdamW)):
            optimizer = kind([p], lr=0.1, foreach=False)
            p.grad = torch.ones(2, 8, 4, 5).cumsum(-1)  # contiguous
            optimizer.step()
            assert optimizer.state[p]["exp_avg"].stride() == p.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    def test_gradscaler(self):
        """Its contract: scale and found_inf come as attributes; nothing is divided beforehand."""
        (p,) = parameters(shapes=[(8,)])
        (q,) = parameters(shapes=[(8,)])
        optimizer, plain = MaskedAdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1, fused=True)
        assert optimizer._step_supports_amp_scaling
        for x, o in ((p, optimizer), (q, plain)):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for value in (1.0, float("inf"), 2.0):
                scaler.scale(torch.ones(()))
                x.grad = torch.full((8,), value) * scaler.get_scale()
                scaler.step(o)
                scaler.update()
            assert scaler.get_scale() == 512.0
        assert (
            torch.equal(p, q)
            and int(optimizer.state[p]["step"]) == int(plain.state[q]["step"]) == 2
        )


class TestErrors:
    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"lr": -1.0}, "Invalid learning rate: -1.0"),
            ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
            ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
            ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
            ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
            ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
            ({"state_dtype": "fp8"}, "state_dtype must be one of param, fp32, bf16, int8"),
            ({"mask_scope": "none"}, "mask_scope must be one of all, param_only"),
            ({"amsgrad": True, "state_dtype": "int8"}, "amsgrad needs states in a float dtype"),
            ({"max_grad_norm": 0.0}, "max_grad_norm must be a positive number"),
            ({"differentiable": True}, "not differentiable"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            MaskedAdamW(parameters(), **settings)

    @pytest.mark.parametrize(
        "masks, kind, message",
        [
            ([None], "element", "1 entries for 2 parameters"),
            (
                [torch.ones(4).bool(), None],
                "row",
                r"must have 5 bits for a parameter \[5, 7\], got \[4\]",
            ),
            ([torch.ones(7, 5).bool(), None], "element", r"35 bits.*got \[7, 5\]"),
            (
                [torch.zeros(2, dtype=torch.uint8), None],
                "element",
                r"must be \[5\].*\[5, 7\], got \[2\]",
            ),
            ([None, torch.ones(3).bool()], "row", "needs a parameter of 2 or more dimensions"),
            ([torch.ones(5), None], "row", "must be bool, or packed uint8, got torch.float32"),
            (
                [torch.ones(5).bool(), None],
                "rows",
                "mask_kind must be one of none, row, col, block, element",
            ),
            (
                [torch.ones(5, device="meta").bool(), None],
                "row",
                "is on meta, the parameter on cpu",
            ),
            ({}, "block", None),
        ],
    )
    def test_masks(self, masks, kind, message):
        params = parameters(shapes=[(5, 7), (3,)])
        if message is None:
            with pytest.raises(ValueError, match="keys are the parameters"):
                MaskedAdamW(params, masks={nn.Parameter(torch.ones(3)): torch.ones(3).bool()})
            with pytest.raises(ValueError, match="block_size must be a power of two >= 32, got 48"):
                MaskedAdamW(
                    params, masks=[torch.ones(1).bool(), None], mask_kind=kind, block_size=48
                )
            return
        with pytest.raises(ValueError, match=message):
            MaskedAdamW(params, masks=masks, mask_kind=kind)

    def test_gradients(self):
        a, b = parameters(shapes=[(3,), (4,)])
        optimizer = MaskedAdamW([a, b], lr=0.1)
        for settled in (False, True):
            a.grad = torch.ones(3).to_sparse()
            with pytest.raises(RuntimeError, match="sparse"):
                optimizer.step()
            a.grad = None if settled else torch.ones(3)
            optimizer.step()

    def test_stochastic_rounding_is_for_bf16(self):
        with pytest.warns(UserWarning, match="does nothing for float32"):
            MaskedAdamW(parameters(), stochastic_rounding=True)
        with pytest.raises(ValueError, match="bf16 parameters, got float16"):
            MaskedAdamW(parameters(torch.float16), stochastic_rounding=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            MaskedAdamW(parameters(torch.bfloat16), stochastic_rounding=True)

    def test_states_that_do_not_fit(self):
        a, b = parameters(shapes=[(3,)]), parameters(shapes=[(5,)])
        first = MaskedAdamW(a)
        steps(first, a, 1)
        saved = first.state_dict()
        saved["state"][0]["exp_avg"] = torch.zeros(9)
        with pytest.raises(ValueError, match="states of 9 elements fit neither"):
            MaskedAdamW(b).load_state_dict(saved)


def row_mask(rows):
    return torch.arange(rows) % 3 == 0


KINDS = {
    "row": lambda p: row_mask(p.shape[0]),
    "col": lambda p: row_mask(p.shape[-1]),
    "element": lambda p: torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) < 0.5,
    "block": lambda p: row_mask(-(-p.numel() // 32)),
}


class TestMasks:
    @staticmethod
    def bits(kind, p, mask):
        n = p.numel()
        if kind == "row":
            return mask[:, None].expand(p.shape)
        if kind == "col":
            return mask.expand(p.shape)
        return mask if kind == "element" else mask.repeat_interleave(32)[:n].view(p.shape)

    @pytest.mark.parametrize("compact", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_trained_part_is_adamw_on_it(self, kind, compact):
        (p,), (q,) = parameters(shapes=[(33, 65)]), parameters(shapes=[(33, 65)])
        mask = KINDS[kind](p)
        bits = self.bits(kind, p, mask)
        cut = int(bits.sum()) // 8 * 8  # see SHAPES
        start = p.detach().clone()
        part = nn.Parameter(q.detach()[bits].clone())
        optimizer = MaskedAdamW(
            [p], lr=1e-2, masks=[mask], mask_kind=kind, block_size=32, compact=compact
        )
        plain = torch.optim.AdamW([part], lr=1e-2, fused=True)
        for i in range(10):
            made = torch.Generator().manual_seed(i)
            grad = torch.randn(p.shape, generator=made)
            p.grad, part.grad = grad.masked_fill(~bits, float("nan")), grad[bits].clone()
            optimizer.step()
            plain.step()
        assert torch.equal(p[bits][:cut], part[:cut]) and torch.equal(p[~bits], start[~bits])
        torch.testing.assert_close(p[bits], part, rtol=1e-6, atol=1e-6)
        held = optimizer.state[p]["exp_avg"].numel()
        assert held == (int(bits.sum()) if compact else p.numel())
        dense = optimizer.dense_state_dict()["state"][0]
        torch.testing.assert_close(
            dense["exp_avg"][bits], plain.state[part]["exp_avg"], rtol=1e-6, atol=1e-8
        )
        assert dense["exp_avg_sq"].shape == p.shape and not dense["exp_avg_sq"][~bits].any()

    def test_each_its_own_kind(self):
        a, b, c = parameters(shapes=[(6, 8), (6, 8), (2, 6, 8)])
        before = [x.detach().clone() for x in (a, b, c)]
        masks = {a: (row_mask(6), "row"), c: (row_mask(12), "row")}
        optimizer = MaskedAdamW([a, b, c], lr=0.1, masks=masks, max_grad_norm=1.0)
        steps(optimizer, [a, b, c], 2)
        assert torch.equal(a[~row_mask(6)], before[0][~row_mask(6)])
        moved = (c != before[2]).view(12, 8)
        assert torch.equal(moved.all(1), row_mask(12)) and torch.equal(moved.any(1), row_mask(12))
        assert (b != before[1]).all()

    def test_packed_masks(self):
        (p,), (q,) = parameters(shapes=[(9, 9)]), parameters(shapes=[(9, 9)])
        mask = torch.rand(9, 9) < 0.5
        for x, m in ((p, mask), (q, ops.pack_mask(mask))):
            steps(MaskedAdamW([x], masks=[m]), [x], 3)
        assert torch.equal(p, q)

    def test_moments_alone(self):
        """``param_only``: m and v of frozen elements go on."""
        (p,), (q,) = parameters(shapes=[(40,)]), parameters(shapes=[(40,)])
        start, mask = p.detach().clone(), torch.arange(40) % 2 == 0
        optimizer = MaskedAdamW([p], masks=[mask], mask_scope="param_only")
        plain = torch.optim.AdamW([q], fused=True)
        steps(optimizer, [p], 5)
        steps(plain, [q], 5)
        assert torch.equal(p[~mask], start[~mask]) and torch.equal(p[mask], q[mask])
        assert torch.equal(optimizer.state[p]["exp_avg"], plain.state[q]["exp_avg"])

    def test_frozen_is_frozen(self):
        """Check 2: weight decay, momentum, maximize and NaN gradients do not move it."""
        (p,) = parameters(shapes=[(33, 65)])
        for maximize in (False, True):
            optimizer = MaskedAdamW([p], lr=0.1, weight_decay=0.5, maximize=maximize,
                                    masks=[torch.zeros(33).bool()], mask_kind="row")  # fmt: skip
            before = p.detach().clone()
            steps(optimizer, [p], 3, nan=True)
            assert torch.equal(p, before) and optimizer.state[p]["exp_avg"].numel() == 0

    def test_clipping_counts_what_trains(self):
        (p,), (q,) = parameters(shapes=[(6, 8)]), parameters(shapes=[(6, 8)])
        mask = row_mask(6)
        optimizer = MaskedAdamW([p], lr=0.1, masks=[mask], mask_kind="row", max_grad_norm=0.5)
        plain = MaskedAdamW([q], lr=0.1, masks=[mask], mask_kind="row")
        grad = torch.randn(6, 8)
        p.grad, q.grad = grad.clone(), grad.clone()
        q.grad[~mask] = 0
        norm = torch.nn.utils.clip_grad_norm_([q], 0.5)
        optimizer.step()
        plain.step()
        torch.testing.assert_close(optimizer.last_grad_norm, norm)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert torch.equal(p.grad, grad)  # gradients are not written


class TestStates:
    @pytest.mark.parametrize("choice, dtype", [("param", torch.bfloat16), ("fp32", torch.float32),
                                               ("bf16", torch.bfloat16)])  # fmt: skip
    def test_dtypes(self, choice, dtype):
        params = parameters(torch.bfloat16)
        optimizer = MaskedAdamW(params, state_dtype=choice)
        steps(optimizer, params, 2)
        assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {dtype}
        again = MaskedAdamW(params, state_dtype=choice)
        again.load_state_dict(optimizer.state_dict())  # torch would make them bf16
        for a, b in zip(optimizer.state.values(), again.state.values()):
            assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) and b["exp_avg_sq"].dtype == dtype

    def test_eight_bits(self):
        big, small = parameters(shapes=[(70, 70), (60,)])
        optimizer = MaskedAdamW([big, small], lr=1e-2, state_dtype="int8", weight_decay=0.0)
        target = torch.randn(70, 70)
        for _ in range(100):
            big.grad, small.grad = big.detach() - target, small.detach().clone()
            optimizer.step()
        state = optimizer.state[big]
        assert state["exp_avg"].dtype == torch.uint8 and state["absmax1"].shape == (20,)
        assert optimizer.state[small]["exp_avg"].dtype == torch.float32
        assert (big.detach() - target).abs().mean() < 0.6 * target.abs().mean() * 2
        again = MaskedAdamW([big, small], state_dtype="int8")
        again.load_state_dict(optimizer.state_dict())
        assert torch.equal(again.state[big]["exp_avg"], state["exp_avg"])
        # To float states and back: every code is exact.
        floats = MaskedAdamW([big, small], state_dtype="fp32")
        floats.load_state_dict(optimizer.state_dict())
        assert floats.state[big]["exp_avg"].shape == big.shape
        again.load_state_dict(floats.state_dict())
        back = again.dense_state_dict()["state"][0]["exp_avg"]
        torch.testing.assert_close(back, floats.state[big]["exp_avg"], rtol=1e-6, atol=1e-12)

    def test_stochastic_rounding_is_reproducible(self):
        runs = []
        for seed in (0, 0, 1):
            params = parameters(torch.bfloat16)
            steps(
                MaskedAdamW(
                    params, lr=1e-4, state_dtype="fp32", stochastic_rounding=True, seed=seed
                ),
                params,
                5,
            )
            runs.append(params)
        assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])

    def test_small_steps_survive_stochastic_rounding(self):
        p, q = (nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16)) for _ in "pq")
        a = MaskedAdamW([p], lr=1e-4, weight_decay=0, state_dtype="fp32", stochastic_rounding=True)
        b = MaskedAdamW([q], lr=1e-4, weight_decay=0, state_dtype="fp32")
        for _ in range(10):
            p.grad = q.grad = torch.ones_like(p)
            a.step()
            b.step()
        assert (q == 1).all() and abs(float(p.detach().float().mean()) - (1 - 1e-3)) < 1e-4


class TestPlans:
    def model_and(self, kind=MaskedAdamW, **settings):
        model = tiny.tiny(2)
        return model, kind(model.parameters(), lr=1e-2, **settings)

    def go(self, model, optimizer, n=2):
        ids = tiny.rows(4)
        for _ in range(n):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def test_built_before_the_plan(self):
        model, optimizer = self.model_and()
        plan = hft.apply(model)
        with pytest.raises(RuntimeError, match="optimizer does not match the active Plan"):
            self.go(model, optimizer)
        optimizer.zero_grad()
        optimizer.switch(plan)
        self.go(model, optimizer)
        trained = {id(p) for n, p in model.named_parameters() if n in plan.trained}
        assert {id(p) for p in optimizer.state} == trained

    def test_frozen_under_a_live_optimizer(self):
        model = tiny.tiny(2)
        hft.apply(model)
        optimizer = MaskedAdamW(model.parameters())
        self.go(model, optimizer)
        model.model.norm.weight.requires_grad_(False)
        with pytest.raises(RuntimeError, match="does not match"):
            self.go(model, optimizer)

    def test_the_same_plan_again_is_fine(self):
        model = tiny.tiny(2)
        hft.apply(model, seed=1)
        optimizer = MaskedAdamW(model.parameters())
        hft.apply(model, seed=1)
        self.go(model, optimizer)

    def test_two_optimizers_share_a_plan(self):
        model = tiny.tiny(2)
        hft.apply(model)
        named = [p for p in model.parameters() if p.requires_grad]
        for part in ([p for p in named if p.ndim > 1], [p for p in named if p.ndim < 2]):
            self.go(model, MaskedAdamW(part))

    @pytest.mark.parametrize("states", ["drop", "keep", "hand_over"])
    def test_switch(self, states):
        model = tiny.tiny(3)
        first = hft.apply(model, round=0)
        optimizer = MaskedAdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        self.go(model, optimizer)
        before = {
            n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state
        }
        second = hft.apply(model, round=1)
        freed = optimizer.switch(second, states)
        held = {n for n, p in model.named_parameters() if p in optimizer.state}
        both = set(first.trained) & set(second.trained)
        assert held == {"drop": set(), "keep": set(first.trained), "hand_over": both}[states]
        bytes_of = lambda names: sum(t.nbytes for n in names for t in before[n].values())  # noqa: E731
        assert freed == bytes_of(set(before) - held)
        schedule.step()
        self.go(model, optimizer)
        assert optimizer.param_groups[0]["lr"] == 5e-3
        for n, p in model.named_parameters():
            want = 4 if n in both and states != "drop" else 2
            if n in second.trained:
                assert int(optimizer.state[p]["step"]) == want
        with pytest.raises(RuntimeError, match="apply the Plan to the model before"):
            optimizer.switch(first)
        with pytest.raises(ValueError, match="states must be one of"):
            optimizer.switch(second, "forget")

    def test_an_optimizer_of_one_half_takes_the_other(self):
        model = tiny.tiny(3)
        plan = hft.apply(model, round=0)
        optimizer = MaskedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.go(model, optimizer)
        plan = hft.apply(model, round=1)
        optimizer.switch(plan)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.go(model, optimizer)
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (n not in plan.trained), n

    def test_a_group_that_is_missing(self):
        model = tiny.tiny(3)
        hft.apply(model, round=0)
        optimizer = MaskedAdamW([p for p in model.parameters() if p.requires_grad and p.ndim == 2])
        with pytest.raises(RuntimeError, match="no parameter group holds tensors of 1 dimensions"):
            optimizer.switch(hft.apply(model, round=1))

    def test_masks_of_the_plan_are_taken(self):
        model = tiny.tiny(2)
        plan = hft.apply(model, strategy="element")
        optimizer = MaskedAdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.go(model, optimizer)
        masks = plan.masks(model)
        for n, p in model.named_parameters():
            if p in masks:
                bits = ops.unpack_mask(masks[p][0], p.numel()).view(p.shape)
                assert torch.equal(p[~bits], before[n][~bits]) and (p != before[n])[bits].any()
                assert optimizer.state[p]["exp_avg"].numel() == p.numel() // 2
        optimizer.switch(hft.apply(model, strategy="element", round=1), "hand_over")
        self.go(model, optimizer)

    def test_memory_is_freed(self):
        """Real bytes: the largest live tensors after a switch are those of one half."""
        model = tiny.tiny(3)
        optimizer = MaskedAdamW(model.parameters())
        optimizer.switch(hft.apply(model, round=0))
        self.go(model, optimizer)

        def live():
            gc.collect()
            seen = {t.untyped_storage().data_ptr(): t.nbytes for s in optimizer.state.values()
                    for t in s.values()}  # fmt: skip
            return sum(seen.values())

        sizes = []
        for r in range(1, 5):
            plan = hft.apply(model, round=r)
            optimizer.switch(plan)
            assert live() == 0
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
            self.go(model, optimizer)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            sizes.append(live() / trained)
        assert max(sizes) < 8.5  # two float32 states, and a step counter per tensor

    def test_any_optimizer_can_be_switched(self):
        model, optimizer = self.model_and(torch.optim.AdamW, weight_decay=0.5)
        self.go(model, optimizer)
        hft.apply(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        assert switch_optimizer(optimizer, "hand_over") > 0
        check_optimizer(optimizer, model)
        self.go(model, optimizer)
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (not p.requires_grad)

    def test_check_optimizer(self):
        model = tiny.tiny(2)
        hft.apply(model, round=0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        hft.apply(model, round=1)
        with pytest.raises(
            RuntimeError, match=r"does not match the active Plan: .* are in no parameter group"
        ):
            check_optimizer(optimizer, model)
        frozen = next(p for p in model.parameters() if not p.requires_grad)
        frozen.grad = torch.ones_like(frozen)
        whole = torch.optim.AdamW(model.parameters())
        with pytest.raises(RuntimeError, match="frozen tensors have gradients"):
            check_optimizer(whole, model)

    def test_a_plan_leaves_no_trace_in_a_saved_model(self, tmp_path):
        model = tiny.tiny(1)
        hft.apply(model)
        torch.save(model, tmp_path / "m.pt")
        again = torch.load(tmp_path / "m.pt", weights_only=False)
        assert hft.current_plan(again) is None and hft.current_plan(copy.deepcopy(model)) is None


@cuda_only
class TestCuda:
    @pytest.mark.parametrize("settings", [{}, {"state_dtype": "int8"}, {"max_grad_norm": 0.5}])
    @pytest.mark.parametrize("offload", [False, True])
    def test_as_on_the_cpu(self, device, offload, settings):
        """Also with states on the CPU (``offload``)."""
        shapes = [(70, 64), (8,)]
        here = parameters(shapes=shapes)
        there = [nn.Parameter(p.detach().cuda()) for p in here]
        masks = [row_mask(70), None]
        a = MaskedAdamW(here, lr=1e-2, masks=masks, mask_kind="row", **settings)
        b = MaskedAdamW(there, lr=1e-2, masks=[row_mask(70).cuda(), None], mask_kind="row",
                        offload=offload, **settings)  # fmt: skip
        for i in range(5):
            made = torch.Generator().manual_seed(i)
            for p, q in zip(here, there):
                p.grad = torch.randn(p.shape, generator=made)
                q.grad = p.grad.cuda()
            a.step()
            b.step()
        for p, q in zip(here, there):
            torch.testing.assert_close(q.cpu(), p, rtol=1e-6, atol=1e-6)
        places = {s["exp_avg"].device.type for s in b.state.values()}
        assert places == {"cpu" if offload else "cuda"}
