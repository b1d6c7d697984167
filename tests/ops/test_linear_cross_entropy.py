# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy and linear_logprob against their definitions, judged in float64."""

import functools
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from linear_loss_cases import FACES, NAMES, OPTIONS, compare, problem, step

import tenfold
from tenfold import ops, reference
from tenfold.testing import DTYPES, assert_same_pattern, forced_isa, on, poisoned_memory

SHAPES = [  # rows, H, V: none, one, primes, around multiples of 16, 48 and 256, past what a tile or a task holds
    (0, 7, 5), (1, 33, 257), (17, 31, 47), (15, 48, 49), (16, 16, 16), (47, 15, 1003), (49, 257, 65),
    (97, 127, 97), (255, 47, 255), (257, 255, 33), (3, 21, 40009), (2100, 9, 191), (300, 64, 769),
]  # fmt: skip


def grid():
    """All shapes x options, each pair in one dtype."""
    for (i, shape), (j, name) in itertools.product(enumerate(SHAPES), enumerate(OPTIONS)):
        yield shape, name, DTYPES[(i + j) % len(DTYPES)]


@pytest.mark.parametrize(("shape", "name", "dtype"), grid())
def test_matches_the_definition(shape, name, dtype, device):
    compare(shape, dtype, device, **OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logprob_matches_the_definition(shape, dtype, device):
    compare(shape, dtype, device, "logprob", temperature=0.8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize("face", FACES)
def test_gradient_of_one_result(face, only, dtype, device):
    """Loss, lse (also under softcap and temperature), logp and entropy on their own."""
    ups = (True, None) if only == 0 else (None, True)
    compare((50, 33, 203), dtype, device, face, ups)
    if face == "cross_entropy":
        compare((50, 33, 203), dtype, device, face, ups, **OPTIONS["everything"])
    else:
        compare((50, 33, 203), dtype, device, face, ups, temperature=1.6)


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_meets_the_rule(isa, dtype):
    cpu = torch.device("cpu")
    with forced_isa(isa):
        for shape in ((49, 47, 101), (17, 257, 49), (33, 16, 255)):
            compare(shape, dtype, cpu, **OPTIONS["everything"])
            compare(shape, dtype, cpu)
            compare(shape, dtype, cpu, "logprob")


# The same draws every time: a search for the worst finds, in one run of many, a sample where plain PyTorch was lucky.
# (Not by hypothesis, which also draws numbers that it finds in the modules that happen to be loaded.)
@pytest.mark.parametrize("draw", range(40))
def test_odd_shapes(draw, device):
    of = random.Random(draw)
    n, h, v, seed = of.randint(0, 70), of.randint(1, 70), of.randint(4, 140), of.randint(0, 99)
    dtype, face, name = of.choice(DTYPES), of.choice(sorted(FACES)), of.choice(sorted(OPTIONS))
    options = OPTIONS[name] if face == "cross_entropy" else {"temperature": 0.5 + seed / 50}
    samples = (
        max(4, 300 // (n * h), 100 // n) if n else 1
    )  # numbers enough, and rows: each has its own rounding
    compare((n, h, v), dtype, device, face, seed=seed, samples=samples, **options)


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
def test_probabilities_below_the_normal_numbers(isa):
    """They count as 0 in the kernel, which else takes 25 times as long; elsewhere such numbers stay what they are."""
    made = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 33, generator=made), 6 * torch.randn(3000, 33, generator=made)
    target = torch.randint(0, 3000, (40,), generator=made)
    p = torch.softmax(hidden @ weight.T, 1)
    assert ((p > 0) & (p < 2.0**-126)).any()
    found = []
    with forced_isa(isa):
        for face, dtype in ((ops.linear_cross_entropy, torch.float32),
                            (reference.linear_cross_entropy, torch.float64)):  # fmt: skip
            leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight)]
            face(*leaves, target)[0].mean().backward()
            found.append([x.grad for x in leaves])
        for got, want in zip(*found):
            torch.testing.assert_close(
                got.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max())
            )
    tiny = torch.full((1 << 20,), 2.0**-130)
    assert (tiny * 0.5 == 2.0**-131).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("face", FACES)
def test_one_row_of_one_feature_and_two_classes(face, dtype, device):
    compare((1, 1, 2), dtype, device, face, samples=200)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("face", FACES)
def test_one_class(face, dtype, device):
    """Loss, entropy and all gradients are rounding errors of lse."""
    hidden, weight, target, _ = on(device, problem((20, 33, 1), dtype))
    options = {"reduction": "none"} if face == "cross_entropy" else {}
    _, lse = ops.linear_cross_entropy(hidden, weight, target)
    want = torch.where(target == 0, (hidden.nan_to_num() @ weight.t())[:, 0], 0.0).float()
    torch.testing.assert_close(lse, want, rtol=torch.finfo(dtype).eps, atol=1e-5)
    first, second, dh, dw = step(
        FACES[face][0], hidden, weight, target, torch.ones(2, 20), **options
    )
    bound = 8 * torch.finfo(torch.float32).eps * float(lse.abs().max())
    if face == "cross_entropy":  # d lse = 1
        torch.testing.assert_close(second, lse)
        counts = (target == 0)[:, None]
        torch.testing.assert_close(
            dh, torch.where(counts, weight, 0.0), rtol=0.0, atol=bound * float(weight.abs().max())
        )
    else:
        assert float(second.abs().max()) <= bound and float(dh.abs().max()) <= bound * float(
            weight.abs().max()
        )
        assert float(dw.abs().max()) <= 20 * bound * float(hidden.nan_to_num().abs().max())
    assert float(first.abs().max()) <= bound


# -- against PyTorch's own and each other ------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch_cross_entropy(reduction, device):
    hidden, weight, target, _ = problem((130, 64, 1003), torch.float32, poison=False)
    assert (target == -100).any()
    up = torch.ones(()) if reduction != "none" else torch.linspace(-1, 1, 130)

    def plain(hidden, weight, target):
        x = hidden @ weight.t()
        return F.cross_entropy(x, target, reduction=reduction), x.logsumexp(-1)

    want = step(plain, hidden, weight, target, (up, None))
    got = step(ops.linear_cross_entropy, *on(device, (hidden, weight, target)),
               on(device, (up, None)), reduction=reduction)  # fmt: skip
    for i in (0, 2, 3):
        torch.testing.assert_close(got[i].cpu(), want[i], atol=1e-5, rtol=1e-5)
    lse = torch.where(target == -100, 0.0, want[1])
    torch.testing.assert_close(got[1].cpu(), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprob_equals_selective_logprob_of_logits(temperature, device):
    hidden, weight, ids, _ = on(device, problem((60, 48, 1003), torch.float32, poison=False))
    ups = [x.to(device) for x in torch.randn(2, 60)]
    ups[1] = torch.where(
        ids == -100, 0.0, ups[1]
    )  # selective_logprob has an entropy for those rows too

    def of_logits(hidden, weight, ids, temperature):
        logp, _, entropy = ops.selective_logprob(hidden @ weight.t(), ids, temperature)
        return logp, torch.where(ids == -100, 0.0, entropy)

    want = step(of_logits, hidden, weight, ids, ups, temperature=temperature)
    got = step(ops.linear_logprob, hidden, weight, ids, ups, temperature=temperature)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_logprob_is_minus_the_loss(device):
    hidden, weight, ids, _ = on(device, problem((60, 48, 301), torch.bfloat16))
    up = torch.randn(60).to(device)
    loss, _, *want = step(ops.linear_cross_entropy, hidden, weight, ids, (up, None), reduction="none",
                          temperature=0.9)  # fmt: skip
    logp, _, *got = step(ops.linear_logprob, hidden, weight, ids, (-up, None), temperature=0.9)
    torch.testing.assert_close(logp, -loss, atol=1e-6, rtol=1e-6)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_gradcheck_of_the_definitions():
    hidden, weight, target, row_weight = problem(
        (5, 3, 4), torch.float64, weighted=True, poison=False
    )
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for options in ({}, {"reduction": "sum", "softcap": 1.5, "z_loss": 0.2, "temperature": 0.7},
                    {"reduction": "none", "row_weight": row_weight, "z_loss": 0.1}):  # fmt: skip
        op = functools.partial(reference.linear_cross_entropy, target=target, **options)
        assert torch.autograd.gradcheck(op, leaves)
    op = functools.partial(reference.linear_logprob, ids=target, temperature=0.7)
    assert torch.autograd.gradcheck(op, leaves)


def test_every_class_is_found_where_it_stands(device):
    """One row per class: a target on the edge of a tile is not missed or counted twice."""
    hidden, weight, _, _ = problem((777, 24, 777), torch.float32)
    target = torch.arange(777)
    loss, lse = ops.linear_cross_entropy(
        *on(device, (hidden.nan_to_num(), weight, target)), reduction="none"
    )
    want = (hidden.nan_to_num() * weight).sum(-1)
    torch.testing.assert_close((lse - loss).cpu(), want, atol=1e-5, rtol=1e-5)


# -- rows that do not count --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_rows_are_not_read(dtype, device):
    """The other rows' results are bit for bit those of a batch in which the skipped rows hold numbers."""
    hidden, weight, target, row_weight = on(device, problem((90, 40, 203), dtype, weighted=True))
    skipped = (target == -100) | (row_weight == 0)
    assert skipped.sum() > 20 and hidden[skipped].isnan().all()
    filled = hidden.masked_fill(skipped[:, None], 3.0)
    for reduction in ("mean", "sum", "none"):
        up = torch.ones(target.shape if reduction == "none" else ()).to(device)
        both = [step(ops.linear_cross_entropy, x, weight, target, (up, row_weight + 1), row_weight=row_weight,
                     z_loss=0.1, reduction=reduction) for x in (hidden, filled)]  # fmt: skip
        for a, b in zip(*both):
            assert torch.equal(a, b) and a.isfinite().all()
        assert not both[0][1][skipped].any() and not both[0][2][skipped].any()
        if reduction == "none":
            assert not both[0][0][skipped].any()
    both = [step(ops.linear_logprob, x, weight, target, (row_weight + 1, row_weight + 1))
            for x in (hidden.masked_fill((target != -100)[:, None], 1.0), filled)]  # fmt: skip
    assert not any(x[target == -100].any() for x in both[0][:3]) and both[0][3].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_counts(reduction, dtype, device):
    """All ignored, all of weight 0, or no rows: loss 0 and zero gradients, whatever hidden holds."""
    hidden = torch.full((6, 20), math.nan, dtype=dtype, device=device)
    weight = torch.ones(50, 20, dtype=dtype, device=device)
    ignored = torch.full((6,), -100, device=device)
    for x, target, w in ((hidden, ignored, None), (hidden, ignored * 0, torch.zeros(6, device=device)),
                         (hidden[:0], ignored[:0], None)):  # fmt: skip
        up = torch.ones(target.shape if reduction == "none" else (), device=device)
        with poisoned_memory():
            got = step(ops.linear_cross_entropy, x, weight, target, (up, torch.ones(len(x))),
                       row_weight=w, reduction=reduction, z_loss=0.5)  # fmt: skip
        assert got[0].shape == up.shape and got[1].shape == target.shape
        assert not any(y.any() for y in got)  # NaN counts as true


def test_logprob_of_ids_outside(device):
    hidden, weight, _, _ = on(device, problem((6, 9, 30), torch.float32, poison=False))
    ids = torch.tensor([-1, 30, -100, 2**31 + 3, 29, 0], device=device)
    hidden[:4] = math.nan
    logp, entropy, dh, dw = step(
        ops.linear_logprob, hidden, weight, ids, (torch.ones(6), torch.ones(6))
    )
    assert not logp[:4].any() and not entropy[:4].any() and not dh[:4].any()
    inside = step(ops.linear_logprob, hidden[4:], weight, ids[4:], (torch.ones(2), torch.ones(2)))
    for a, b in zip((logp[4:], entropy[4:], dh[4:], dw), inside):
        torch.testing.assert_close(a, b)


def test_mean_is_over_the_weights_of_the_rows_that_count(device):
    hidden, weight, target, row_weight = on(
        device, problem((40, 16, 30), torch.float32, weighted=True)
    )
    each, _ = ops.linear_cross_entropy(
        hidden, weight, target, row_weight=row_weight, reduction="none"
    )
    mean, _ = ops.linear_cross_entropy(hidden, weight, target, row_weight=row_weight)
    counts = target != -100
    torch.testing.assert_close(mean, each.sum() / row_weight[counts].sum())
    each, _ = ops.linear_cross_entropy(
        hidden[counts].nan_to_num(), weight, target[counts], reduction="none"
    )
    mean, _ = ops.linear_cross_entropy(hidden.nan_to_num(), weight, target)
    torch.testing.assert_close(mean, each.sum() / counts.sum())
    signed = torch.where(torch.arange(40, device=device) % 2 == 0, row_weight, -row_weight)
    got, _ = ops.linear_cross_entropy(hidden, weight, target, row_weight=signed, reduction="sum")
    want, _ = reference.linear_cross_entropy(
        hidden, weight, target, row_weight=signed, reduction="sum"
    )
    torch.testing.assert_close(got, want)


# -- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 30.0, 1000.0])
def test_magnitudes(scale, dtype, device):
    """Logits of 0, near 0, and far past where exp overflows."""
    compare((33, 40, 203), dtype, device, scale=scale)
    compare((33, 40, 203), dtype, device, scale=scale, softcap=30.0, reduction="none", z_loss=1e-4)
    # The definition's own entropy loses far more to cancellation here: bounded by what rounding of lse must cost.
    compare((33, 40, 203), dtype, device, "logprob", scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"z_loss": 0.1, "reduction": "none"}])
def test_nan_and_infinity_go_where_the_definition_sends_them(options, bad, dtype, device):
    """One in a row of hidden; or in a row of the weight, the target of no, or of every row."""
    hidden, weight, target, _ = problem((20, 17, 60), dtype)
    target[target == 30] = 31
    for where, at, aim in (("hidden", 3, None), ("weight", 30, None), ("weight", 30, 30)):
        tensors = {"hidden": hidden.clone(), "weight": weight.clone(), "target": target.clone()}
        tensors[where][at, 5] = bad
        if aim is not None:
            tensors["target"][target >= 0] = aim
        up = torch.ones(target.shape if options.get("reduction") == "none" else ())
        args = (*tensors.values(), (up, None))
        got = step(ops.linear_cross_entropy, *on(device, args), **options)
        for name, a, b in zip(NAMES, got, step(reference.linear_cross_entropy, *args, **options)):
            assert_same_pattern(a.cpu(), b, f"{name}, {bad} in {where}, target {aim}")
    if not options:
        tensors = (hidden.index_fill(0, torch.tensor([3]), bad), weight, target)
        ups = (torch.ones(20), torch.ones(20))
        got = step(ops.linear_logprob, *on(device, (*tensors, ups)))
        for name, a, b in zip(NAMES, got, step(reference.linear_logprob, *tensors, ups)):
            assert_same_pattern(a.cpu(), b, f"{name} of linear_logprob, {bad} in hidden")


def test_closed_classes(device):
    """Logits of -inf, as of a padded vocabulary: no part in lse, and zero gradients, as if they were not there."""
    hidden = torch.tensor([[1.0, 0.3, -0.2]] * 9, device=device)
    open_, made = [0, 2, 63, 64], torch.Generator().manual_seed(0)
    weight = torch.randn(66, 3, generator=made).to(device)
    closed = torch.ones(66, dtype=torch.bool, device=device)
    closed[open_] = False
    shut = weight.clone()
    shut[closed, 0] = -math.inf
    target = torch.tensor([0, 2, 3, 0, 1, 2, -100, 0, 3], device=device)
    at = torch.tensor(open_, device=device)[target.clamp_min(0)].masked_fill(target < 0, -100)
    for face, (op, definition, _) in FACES.items():
        options = {"reduction": "none"} if face == "cross_entropy" else {}
        ups = torch.randn(2, 9, generator=made).to(device)
        got = step(op, hidden, shut, at, ups, **options)
        want = step(definition, hidden, weight[open_], target, ups, **options)
        for a, b in zip(
            (*got[:2], got[2][:, 1:], got[3][open_]), (*want[:2], want[2][:, 1:], want[3])
        ):
            torch.testing.assert_close(a, b)
        assert not got[3][closed].any()


def test_loss_scale_reaches_small_gradients(device):
    """fp16 with a scaled loss: gradients of a mean over many rows would vanish if they were rounded before."""
    up = torch.tensor(65536.0)
    compare((2001, 16, 50), torch.float16, device, ups=(up, None))
    compare((2001, 16, 50), torch.float16, device, ups=(up, None), reduction="sum", temperature=3e4)


def test_sums_over_rows_stay_in_fp32(device):
    """5000 equal rows: sums in bfloat16 would stop at 256 times a row."""
    hidden, weight = (
        torch.full((n, 8), x, dtype=torch.bfloat16, device=device)
        for n, x in ((5000, 1.0), (2, 0.0))
    )
    target = torch.zeros(5000, dtype=torch.int64, device=device)
    loss, _, _, dw = step(
        ops.linear_cross_entropy, hidden, weight, target, (torch.ones(()), None), reduction="sum"
    )
    want = torch.tensor([[-2500.0], [2500.0]], device=device).bfloat16().expand(2, 8)
    assert torch.equal(dw, want)
    torch.testing.assert_close(loss.cpu(), torch.tensor(5000 * math.log(2)), rtol=1e-6, atol=0)
