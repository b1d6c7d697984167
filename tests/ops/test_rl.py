# SPDX-License-Identifier: Apache-2.0
"""The family ``rl`` against its definitions: random ragged batches with holes and poisoned padding."""

import pytest
import torch

from tenfold.ops import rl as ops
from tenfold.reference import rl as ref
from tenfold.testing import check_errors, check_op

raw = torch.ops.tenfold
SHAPES = [(1, 1), (3, 7), (4, 64), (2, 301), (0, 5), (3, 0)]
WEIGHTS = ("sum", "equal", "unit", "position", "position_early")
RATIOS = [("token", "macro"), ("joint", "macro"), ("joint", "length"), ("geo_mean", "length")]
AGGREGATIONS = ("token_mean", "seq_mean_token_mean")


class Batch:
    """Ragged rows, some with holes, one of them empty; NaN wherever nothing may be read."""

    def __init__(self, shape, device, dtype=torch.float32, holes=True, seed=0):
        made = torch.Generator().manual_seed(seed + sum(shape))
        b, r = shape
        length = torch.randint(0, r + 1, (b, 1), generator=made)
        if b > 1:
            length[0], length[1] = r, 0
        mask = torch.arange(r)[None] < length
        if holes:
            mask &= torch.rand(shape, generator=made) > 0.1
        self.mask = mask.to(device)
        self.made, self.dtype, self.device, self.shape = made, dtype, device, shape

    def rows(self, scale=1.0):
        x = torch.randn(self.shape, generator=self.made, dtype=torch.float64) * scale
        x[~self.mask.cpu()] = float("nan")
        return x.to(self.dtype).to(self.device)

    def vector(self):
        return torch.randn(self.shape[0], generator=self.made).to(self.dtype).to(self.device)

    def segments(self, n=3):
        return ops.macro_segment_fixed(self.mask, n)


def same(got, want, **limits):
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert g.dtype == w.dtype and g.shape == w.shape
        torch.testing.assert_close(g.cpu(), w.cpu(), **(limits or {"rtol": 0, "atol": 0}))


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Packed:
    """The same rows one after the other, cut at random places beyond their last valid token."""

    def __init__(self, batch):
        width = batch.shape[1]
        valid = batch.mask.cpu()
        used = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in valid]
        self.lengths = [
            int(torch.randint(n, width + 1, (), generator=batch.made)) if b % 2 else n
            for b, n in enumerate(used)
        ]
        self.cu = torch.tensor([0, *self.lengths]).cumsum(0).int().to(batch.device)

    def __call__(self, x):
        if x is None or x.dim() == 1:
            return x
        rows = [row[:n] for row, n in zip(x, self.lengths)]
        return torch.cat(rows) if rows else x.reshape(-1)


def same_packed(packed, got, padded):
    """``got`` of packed inputs is bit for bit what padded ones give."""
    same(got, tuple(map(packed, padded if isinstance(padded, tuple) else (padded,))))


@pytest.mark.parametrize("holes", ["bridge", "split"])
@pytest.mark.parametrize("shape", SHAPES)
class TestSegments:
    @pytest.mark.parametrize("n", [1, 2, 5, 1000])
    @pytest.mark.parametrize("isolated", [False, True])
    def test_fixed(self, shape, n, isolated, holes, device):
        mask = Batch(shape, device).mask
        want = ref.macro_segment_fixed(mask.cpu(), n, isolated, holes=holes)
        for m in (mask, mask.to(torch.int8), mask.long() * 3):
            same(ops.macro_segment_fixed(m, n, isolated, holes=holes), want)
        from tenfold.ops.rl.returns import check_segments

        check_segments(want[0], want[1])

    @pytest.mark.parametrize("tail", ["one_segment", "recycle"])
    @pytest.mark.parametrize("count", [0, 1, 6])
    def test_lengths(self, shape, tail, count, holes, device):
        batch = Batch(shape, device)
        lengths = torch.randint(1, 9, (shape[0], count), generator=batch.made, dtype=torch.int32)
        for isolated in (False, True):
            want = ref.macro_segment_lengths(batch.mask.cpu(), lengths, tail, isolate_last=isolated,
                                             holes=holes)  # fmt: skip
            got = ops.macro_segment_lengths(batch.mask, lengths.to(device), tail, isolate_last=isolated,
                                            holes=holes)  # fmt: skip
            same(got, want)

    @pytest.mark.parametrize(
        "mode", ["macro_prefix", "response_prefix", "token_rise", "token_rise_ref"]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_ppl(self, shape, mode, dtype, holes, device):
        batch = Batch(shape, device, dtype)
        nll = batch.rows().abs()
        want = ref.macro_segment_ppl(nll.cpu(), batch.mask.cpu(), mode, holes=holes)
        same(ops.macro_segment_ppl(nll, batch.mask, mode, holes=holes), want)

    def test_starts(self, shape, holes, device):
        batch = Batch(shape, device)
        starts = torch.rand(shape, generator=batch.made) < 0.3
        want = ref.macro_segment_starts(starts, batch.mask.cpu(), holes=holes)
        same(ops.macro_segment_starts(starts.to(device), batch.mask, holes=holes), want)
        wide = torch.cat([batch.mask, batch.mask], 1)[:, : shape[1]]  # a view with longer rows
        same(ops.macro_segment_starts(starts.to(device), wide, holes=holes), want)


@pytest.mark.parametrize("holes", ["bridge", "split"])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_segments(shape, holes, device):
    batch = Batch(shape, device)
    packed = Packed(batch)
    nll, starts = batch.rows().abs(), torch.rand(shape, generator=batch.made).to(device) < 0.3
    lengths = torch.randint(1, 9, (shape[0], 4), generator=batch.made, dtype=torch.int32).to(device)
    mask, n = batch.mask, packed(batch.mask)
    for cu in (packed.cu, packed.cu.long()):
        for module in (ops, ref):
            for name, args, rest in (
                ("fixed", (mask, 3), {"isolate_last": True}),
                ("lengths", (mask, lengths, "recycle"), {}),
                ("ppl", (nll, mask), {}),
                ("ppl", (nll, mask, "token_rise_ref"), {}),
                ("starts", (starts, mask), {}),
            ):
                op = getattr(module, f"macro_segment_{name}")
                many = [packed(x) if isinstance(x, torch.Tensor) and x is not lengths else x
                        for x in args]  # fmt: skip
                got = op(*many, **rest, holes=holes, cu_seqlens=cu)
                seg, nseg = op(*args, **rest, holes=holes)
                same(got, (packed(seg), nseg))
    assert n.dim() == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_returns(shape, device):
    batch = Batch(shape, device)
    packed = Packed(batch)
    seg, nseg = batch.segments()
    x, old, value = batch.rows(), batch.rows(0.5), batch.rows()
    score = batch.vector()
    for module in (ops, ref):
        for weight in WEIGHTS:
            got = module.macro_pool(packed(x), packed(seg), shape[1], weight, cu_seqlens=packed.cu)
            same(got, module.macro_pool(x, seg, shape[1], weight))
        args = (x, value, batch.mask)
        got = module.gae(*map(packed, args), 0.9, 0.8, score, cu_seqlens=packed.cu)
        same_packed(packed, got, module.gae(*args, 0.9, 0.8, score))
        for rest in ((), (0.1, 0.9, 0.8, 2.5, "position", "sum", "per_token", "k3", score)):
            args = (x, old, value, score, seg, nseg)
            got = module.ma_ppo_prepare(*map(packed, args), *rest, cu_seqlens=packed.cu)
            same_packed(packed, got, module.ma_ppo_prepare(*args, *rest))


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_losses(shape, agg, device):
    batch = Batch(shape, device)
    packed = Packed(batch)
    new, old, adv = batch.rows(0.3), batch.rows(0.3), batch.rows()
    seg, _ = batch.segments(2)

    def with_grad(loss, x, *args, **kwargs):
        x = x.clone().requires_grad_()
        loss, stats = loss(x, *args, agg=agg, **kwargs)
        return loss.detach(), stats, torch.autograd.grad(loss, x)[0]

    for ratio, weight in RATIOS:
        kwargs = {"ratio": ratio, "weight": weight}
        args = (new, old, adv, seg)
        want = with_grad(ops.ma_ppo_policy_loss, *args, **kwargs)
        got = with_grad(ops.ma_ppo_policy_loss, *map(packed, args), **kwargs, cu_seqlens=packed.cu)
        same(got, (*want[:2], packed(want[2])))
        defined = with_grad(ref.ma_ppo_policy_loss, *map(packed, args), **kwargs,
                            cu_seqlens=packed.cu)  # fmt: skip
        same(got, defined, rtol=2e-5, atol=1e-6)
    args = (new, old, adv, batch.mask)
    want = with_grad(ops.ma_ppo_value_loss, *args)
    got = with_grad(ops.ma_ppo_value_loss, *map(packed, args), cu_seqlens=packed.cu)
    same(got, (*want[:2], packed(want[2])))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_pool(shape, weight, device):
    for dtype, limits in ((torch.float32, CLOSE), (torch.bfloat16, CLOSE)):
        batch = Batch(shape, device, dtype)
        x, (seg, _) = batch.rows(), batch.segments()
        for index in (seg, seg.long()):
            got = ops.macro_pool(x, index, shape[1], weight)
            same(got, ref.macro_pool(x.cpu(), seg.cpu(), shape[1], weight), **limits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_gae_of_macro_actions(shape, per_token, device):
    batch = Batch(shape, device)
    _, nseg = batch.segments()
    value, reward = torch.randn(2, *shape, generator=batch.made).to(device)
    beyond = torch.arange(shape[1], device=device) >= nseg[:, None]
    value[beyond], reward[beyond] = float("nan"), float("nan")
    length = torch.randint(1, 4, shape, generator=batch.made, dtype=torch.int32).to(device)
    args = (value, reward, nseg, length if per_token else None, 0.9, 0.7)
    for bootstrap in (None, batch.vector()):
        want = ref.macro_gae(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args),
                             None if bootstrap is None else bootstrap.cpu())  # fmt: skip
        same(ops.macro_gae(*args, bootstrap), want, **CLOSE)


def test_gae_of_tokens(device):
    batch = Batch((4, 40), device)
    value, reward = batch.rows(), batch.rows()
    want = ref.gae(value.cpu(), reward.cpu(), batch.mask.cpu(), 0.95, 0.9)
    same(ops.gae(value, reward, batch.mask, 0.95, 0.9), want, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduce", ["sum", "sigma"])
@pytest.mark.parametrize("discount", ["per_macro", "per_token"])
def test_prepare(shape, reduce, discount, device):
    for sigma in WEIGHTS[1:]:
        for kl in ("k1", "k2", "k3"):
            batch = Batch(shape, device)
            args = [batch.rows(0.5) for _ in range(3)] + [batch.vector() * 5, *batch.segments()]
            rest = (0.1, 0.9, 0.8, 2.5, sigma, reduce, discount, kl)
            for bootstrap in (None, batch.vector()):
                there = None if bootstrap is None else bootstrap.cpu()
                want = ref.ma_ppo_prepare(*(a.cpu() for a in args), *rest, there)
                got = ops.ma_ppo_prepare(*args, *rest, bootstrap)
                same(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_policy_loss(shape, ratio, agg, device):
    for denom in (0.0, 77.0):
        batch = Batch(shape, device)
        new, old, adv = batch.rows(0.3), batch.rows(0.3), batch.rows()
        seg, _ = batch.segments(2)
        both = []
        for module, where in ((ops, device), (ref, "cpu")):
            x = new.to(where).clone().requires_grad_()
            loss, stats = module.ma_ppo_policy_loss(
                x, old.to(where), adv.to(where), seg.to(where), 0.2, 0.3, ratio[0], agg, denom,
                weight=ratio[1],
            )  # fmt: skip
            kept, grad = (
                torch.autograd.grad(loss * by, x, retain_graph=by == 1)[0] for by in (1, 3)
            )
            both.append((loss.detach(), stats, kept, grad))
        same(*both, rtol=2e-5, atol=1e-6)
        assert (both[0][3][~batch.mask] == 0).all()


@pytest.mark.parametrize("length", [3, 16, 17, "any"])
@pytest.mark.parametrize("ratio", RATIOS[1:])
def test_policy_loss_of_long_rows(ratio, length, device):
    batch = Batch((3, 1500), device, holes=False)
    new, old, adv = (x.nan_to_num(0.0) for x in (batch.rows(0.05), batch.rows(0.05), batch.rows()))
    if length == "any":
        starts = torch.rand(new.shape, generator=torch.Generator().manual_seed(3)) < 0.08
        seg = starts.int().cumsum(1)
        seg = (seg - seg[:, :1]).int().to(device)
    else:
        seg = (torch.arange(1500) // length).int().expand(3, -1).contiguous().to(device)
    both = []
    for module, where, dtype in ((ops, device, torch.float32), (ref, "cpu", torch.float64)):
        x, *others = (t.to(where, dtype) for t in (new, old, adv))
        x.requires_grad_()
        loss, stats = module.ma_ppo_policy_loss(
            x, *others, seg.to(where), ratio=ratio[0], weight=ratio[1]
        )
        (grad,) = torch.autograd.grad(loss, x)
        both.append((loss.detach().float(), stats, grad.float()))
    same(*both, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_loss(shape, agg, device):
    for denom in (0.0, 77.0):
        batch = Batch(shape, device)
        new, old, target = batch.rows(0.3), batch.rows(0.3), batch.rows()
        both = []
        for module, where in ((ops, device), (ref, "cpu")):
            x = new.to(where).clone().requires_grad_()
            loss, stats = module.ma_ppo_value_loss(
                x, old.to(where), target.to(where), batch.mask.to(where), 0.2, agg, denom
            )
            (grad,) = torch.autograd.grad(loss * 3, x)
            both.append((loss.detach(), stats, grad))
        same(*both, rtol=2e-5, atol=1e-6)


class TestGradients:
    """In float64, on the CPU."""

    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_pool(self, weight):
        batch = Batch((3, 9), "cpu", torch.float64)
        x, (seg, _) = batch.rows().nan_to_num(1.0).requires_grad_(), batch.segments(2)
        assert torch.autograd.gradcheck(lambda t: ops.macro_pool(t, seg, 9, weight), x)

    @pytest.mark.parametrize("ratio", RATIOS)
    @pytest.mark.parametrize("agg", AGGREGATIONS)
    def test_policy(self, ratio, agg):
        batch = Batch((3, 9), "cpu", torch.float64)
        new, old, adv = (
            x.nan_to_num(0.5) for x in (batch.rows(0.3), batch.rows(0.3), batch.rows())
        )
        seg, _ = batch.segments(2)

        def loss(x):
            return ops.ma_ppo_policy_loss(
                x, old, adv, seg, 0.2, 0.2, ratio[0], agg, weight=ratio[1]
            )[0]

        assert torch.autograd.gradcheck(loss, new.requires_grad_())

    @pytest.mark.parametrize("agg", AGGREGATIONS)
    def test_value(self, agg):
        batch = Batch((3, 9), "cpu", torch.float64)
        new, old, target = (x.nan_to_num(0.5) for x in (batch.rows(), batch.rows(), batch.rows()))
        assert torch.autograd.gradcheck(
            lambda x: ops.ma_ppo_value_loss(x, old, target, batch.mask, 0.2, agg)[0],
            new.requires_grad_(),
        )

    def test_again(self):
        """A gradient that is changed in place leaves those of later backward passes alone."""
        x, adv = torch.randn(2, 6), torch.randn(2, 6)
        seg = torch.arange(6, dtype=torch.int32).expand(2, -1).contiguous() // 2
        for loss, others in (
            (ops.ma_ppo_policy_loss, (x * 0.9, adv, seg)),
            (ops.ma_ppo_value_loss, (x * 0.9, adv, torch.ones(2, 6))),
        ):
            leaf = x.clone().requires_grad_()
            made = loss(leaf, *others)[0]
            (first,) = torch.autograd.grad(made, leaf, retain_graph=True)
            want = first.clone()
            first.mul_(5)
            (second,) = torch.autograd.grad(made, leaf, retain_graph=True)
            made.backward()
            assert torch.equal(second, want) and torch.equal(leaf.grad, want)

    def test_once(self):
        x = torch.randn(2, 3, requires_grad=True)
        for loss, last in (
            (ops.ma_ppo_policy_loss, torch.zeros(2, 3, dtype=torch.int32)),
            (ops.ma_ppo_value_loss, torch.ones(2, 3)),
        ):
            with pytest.raises(RuntimeError, match="differentiable once"):
                made = loss(x, x.detach(), x.detach(), last)[0]
                torch.autograd.grad(made, x, create_graph=True)

    def test_zero_where_clipped(self):
        new = torch.tensor([[0.5, -0.5, 0.1, 30.0, -30.0]], requires_grad=True)
        adv = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
        seg, _ = ops.macro_segment_fixed(torch.ones(1, 5, dtype=torch.bool), 1)
        loss, stats = ops.ma_ppo_policy_loss(new, torch.zeros(1, 5), adv, seg)
        loss.backward()
        assert new.grad[0, [0, 1, 3, 4]].eq(0).all() and new.grad[0, 2] != 0
        assert stats[:2].tolist() == pytest.approx([0.2, 0.2])


def test_padding_rows_and_order(device):
    """More padding, another order of rows and rows alone change nothing but rounding."""
    batch = Batch((5, 33), device)
    args = [batch.rows(0.5) for _ in range(3)] + [batch.vector(), *batch.segments()]
    whole = ops.ma_ppo_prepare(*args)
    order = torch.tensor([3, 0, 4, 2, 1], device=device)
    same(ops.ma_ppo_prepare(*(a[order] for a in args)), tuple(x[order] for x in whole))
    for b in range(5):
        one = ops.ma_ppo_prepare(*(a[b : b + 1] for a in args))
        same(one, tuple(x[b : b + 1] for x in whole))

    def wider(x):
        if x.ndim == 1:
            return x
        fill = -1 if x.dtype == torch.int32 else float("nan")
        return torch.nn.functional.pad(x, (0, 11), value=fill)

    padded = ops.ma_ppo_prepare(*map(wider, args))
    same(tuple(x[:, :33] if x.ndim == 2 else x for x in padded), whole)


def test_no_valid_token(device):
    seg = torch.full((2, 4), -1, dtype=torch.int32, device=device)
    x = torch.full((2, 4), float("nan"), device=device, requires_grad=True)
    loss, _ = ops.ma_ppo_policy_loss(x, x.detach(), x.detach(), seg)
    loss.backward()
    assert loss.item() == 0.0 and x.grad.eq(0).all()


class TestErrors:
    @pytest.mark.parametrize("ratio", ["token", "joint", "geo_mean"])
    def test_numbering(self, ratio):
        """On the CPU the kernel itself says which rows are not numbered in order."""
        x = torch.zeros(4, 20)
        good = torch.arange(20, dtype=torch.int32).div(3, rounding_mode="floor").repeat(4, 1)
        good[0, 17:] = good[2, :4] = -1
        good[2, 4:] -= 1
        loss, _ = ops.ma_ppo_policy_loss(x, x, x, good, ratio=ratio)
        assert loss == 0
        gap, masked, swapped = good.clone(), good.clone(), good.clone()
        gap[1, 12:] += 1
        masked[3, 19] = -2
        swapped[0, [2, 3]] = swapped[0, [3, 2]]
        for seg, row in ((gap, "[1]"), (masked, "[3]"), (swapped, "[0]"), (gap.long(), "[1]")):
            check_errors(ops.ma_ppo_policy_loss, raw.ma_ppo_policy_loss, (x, x, x, seg, 0.2, 0.2, ratio),
                         {"validate": True}, ValueError, "without gaps", row)  # fmt: skip
            ops.ma_ppo_policy_loss(x, x, x, seg, ratio=ratio, validate=False)

    def test_names(self, device):
        mask = torch.ones(2, 4, dtype=torch.bool, device=device)
        seg, _ = ops.macro_segment_fixed(mask, 2)
        x = torch.zeros(2, 4, device=device)
        check_errors(
            ops.macro_segment_fixed, raw.macro_segment_fixed, (mask, 0), {}, ValueError, "n must be"
        )
        check_errors(ops.macro_segment_ppl, raw.macro_segment_ppl, (x, mask, "best"), {}, ValueError,
                     "macro_prefix", "best")  # fmt: skip
        check_errors(
            ops.macro_pool, raw.macro_pool, (x, seg, 4, "mean"), {}, ValueError, "equal", "mean"
        )
        args = (x, x, x, seg, 0.2, 0.2, "both")
        check_errors(
            ops.ma_ppo_policy_loss, raw.ma_ppo_policy_loss, args, {}, ValueError, "geo_mean", "both"
        )
        args = (x, x, x, seg, 1.0)
        check_errors(ops.ma_ppo_policy_loss, raw.ma_ppo_policy_loss, args, {}, ValueError, "eps_lo")
        args = (x, x, x, mask, 0.2, "sum")
        check_errors(
            ops.ma_ppo_value_loss, raw.ma_ppo_value_loss, args, {}, ValueError, "token_mean", "sum"
        )

    @pytest.mark.parametrize(
        "wrong", [[0, 2, 2, -1], [1, 1, 2, 2], [1, 0, 0, 0], [0, 1, -1, 0], [0, -2, 1, 1]]
    )
    def test_segments(self, wrong, device):
        seg = torch.tensor([[0, 1, 1, -1], wrong], device=device)
        x = torch.zeros(2, 4, device=device)
        with pytest.raises(ValueError, match=r"rows \[1\]"):
            ops.macro_pool(x, seg, 4)
        raw.macro_pool(x, seg, 4)  # no check, and no memory but its own

    def test_wild_segments(self, device):
        """Without validation the results are some numbers; other rows are what they are alone."""
        made = torch.Generator().manual_seed(1)
        for trial in range(20):
            batch = Batch((5, 40), device, seed=trial)
            seg, nseg = batch.segments()
            seg, x = seg.long(), [batch.rows(0.3) for _ in range(3)]
            wild = torch.randint(-3, 4 if trial % 2 else 80, (40,), generator=made)
            wild[trial], x[0][2] = 1 << 40, 0.5
            seg[2], nseg[2] = wild.to(device), 99 if trial % 3 else -7
            if trial % 4 == 0:
                seg[2] = torch.arange(40, device=device)  # consecutive, beyond T
            others = torch.tensor([0, 1, 3, 4], device=device)
            for ids in (seg, seg.clamp(-9, 1 << 20).int()):
                args = [*x, batch.vector(), ids, nseg]
                whole = ops.ma_ppo_prepare(*args, validate=False)
                same(tuple(y[others] for y in whole),
                     ops.ma_ppo_prepare(*(y[others] for y in args), validate=False))  # fmt: skip
                y = x[0].clone().requires_grad_()
                pooled = ops.macro_pool(y, ids, 14, validate=False)
                same(pooled[others].detach(), ops.macro_pool(x[0][others], ids[others], 14))
                (grad,) = torch.autograd.grad(pooled.sum(), y)
                assert (grad[others][ids[others] < 0] == 0).all()
                for ratio in ("token", "joint"):
                    ops.ma_ppo_policy_loss(y, x[1], x[2], ids, ratio=ratio, validate=False)[
                        0
                    ].backward()

    def test_ranges(self, device):
        x, seg = (
            torch.zeros(1, 3, device=device),
            torch.zeros(1, 3, dtype=torch.int32, device=device),
        )
        one = torch.ones(1, device=device)
        count = torch.ones(1, dtype=torch.int32, device=device)
        for place, value, word in (
            (0, -0.1, "beta"),
            (1, 1.1, "gamma"),
            (2, -0.5, "lam"),
            (3, 0.0, "score_clip"),
        ):
            rest = [0.1, 1.0, 0.9, 2.5]
            rest[place] = value
            args = (x, x, x, one, seg, count, *rest)
            check_errors(ops.ma_ppo_prepare, raw.ma_ppo_prepare, args, {}, ValueError, word)
        args = (x, x[:, :2], x, one, seg, count)
        check_errors(ops.ma_ppo_prepare, raw.ma_ppo_prepare, args, {}, ValueError, "logp_ref")

    @pytest.mark.parametrize(
        ("cu", "word"),
        [([1, 2, 4], "begin with 0"), ([0, 3, 2, 4], "fall"), ([0, 2, 3], "end with"),
         ([[0, 4]], "[B + 1]"), ([0.0, 4.0], "int32 or int64")],
    )  # fmt: skip
    def test_offsets(self, cu, word, device):
        mask, x = torch.ones(4, dtype=torch.bool, device=device), torch.zeros(4, device=device)
        seg, cu = torch.zeros(4, dtype=torch.int32, device=device), torch.tensor(cu, device=device)
        error = TypeError if cu.is_floating_point() else ValueError
        for call in (
            lambda: ops.macro_segment_fixed(mask, 2, cu_seqlens=cu),
            lambda: ops.macro_pool(x, seg, 4, cu_seqlens=cu),
            lambda: ops.gae(x, x, mask, cu_seqlens=cu),
            lambda: ops.ma_ppo_policy_loss(x, x, x, seg, cu_seqlens=cu),
            lambda: ops.ma_ppo_value_loss(x, x, x, mask, cu_seqlens=cu),
        ):
            with pytest.raises(error, match=r"cu_seqlens") as raised:
                call()
            assert word in str(raised.value)

    def test_layouts(self, device):
        cu = torch.tensor([0, 4], dtype=torch.int32, device=device)
        for mask, kwargs in ((torch.ones(1, 4), {"cu_seqlens": cu}), (torch.ones(4), {})):
            mask = mask.bool().to(device)
            check_errors(ops.macro_segment_fixed, raw.macro_segment_fixed, (mask, 2), kwargs,
                         ValueError, "mask", "cu_seqlens")  # fmt: skip
        holes = torch.tensor([1, 1, 1, 0, 1], device=device).bool()
        cu = torch.tensor([0, 2, 5], device=device)
        with pytest.raises(ValueError, match=r"rows \[1\]"):
            ops.macro_segment_fixed(holes, 2, holes="error", cu_seqlens=cu)


def test_registration(device):
    batch = Batch((3, 9), device, holes=False)
    seg, nseg = batch.segments(2)
    x = [batch.rows().nan_to_num() for _ in range(3)]
    check_op(raw.macro_segment_fixed, (batch.mask, 2))
    check_op(raw.macro_pool, (x[0].requires_grad_(), seg, 9))
    check_op(raw.ma_ppo_prepare, (x[0].detach(), x[1], x[2], batch.vector(), seg, nseg))
    check_op(raw.ma_ppo_policy_loss, (x[0], x[1], x[2], seg))
    check_op(raw.ma_ppo_value_loss, (x[0], x[1], x[2], batch.mask))
    check_op(raw.gae, (x[0].detach(), x[1], batch.mask))
    check_op(raw.macro_gae, (x[1], x[2], nseg))
    check_op(raw.macro_segment_check, (seg, nseg, 9))
    packed = Packed(batch)
    more = {"cu_seqlens": packed.cu}
    mask, ids, flat = packed(batch.mask), packed(seg), [packed(t.detach()) for t in x]
    check_op(raw.macro_segment_starts, (mask, mask), more)
    check_op(raw.macro_segment_lengths, (mask, nseg[:, None] + 1), more)
    check_op(raw.macro_segment_ppl, (flat[0], mask), more)
    check_op(raw.macro_pool, (flat[0].requires_grad_(), ids, 9), more)
    check_op(raw.ma_ppo_policy_loss, (flat[0], flat[1], flat[2], ids), more)
    check_op(raw.ma_ppo_value_loss, (flat[0], flat[1], flat[2], mask), more)
    flat[0] = flat[0].detach()
    check_op(raw.ma_ppo_policy_loss_forward, (flat[0], flat[1], flat[2], ids), more)
    check_op(raw.ma_ppo_value_loss_forward, (flat[0], flat[1], flat[2], mask), more)
    scale = torch.rand(3, device=device, dtype=torch.float64)
    check_op(raw.ma_ppo_loss_backward, (batch.vector()[:1], flat[0], scale), more)
    check_op(raw.gae, (flat[0], flat[1], mask), more)
    check_op(raw.ma_ppo_prepare, (*flat, batch.vector(), ids, nseg), more)
    check_op(raw.macro_segment_check, (ids, nseg, 9), more)
