# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy and linear_logprob: how they compute, beside what (test_loss_linear_values.py)."""

import pytest
import torch
import torch.nn.functional as F

from tenfold.ops import loss as ops
from tenfold.reference import loss as ref
from tenfold.testing import (
    DTYPES,
    assert_close_to_ref,
    check_errors,
    check_op,
    peak_growth,
    threads,
)

raw = torch.ops.tenfold
# Rows and vocabulary so that the CPU kernel keeps all logits in grad_weight, in memory of its own, of
# all or some chunks of rows, or none.
PATHS = [(300, 640, 700), (300, 40, 700), (1100, 40, 3000), (1500, 16, 49152), (200, 8, 300000)]


def problem(rows, dim, vocab, dtype=torch.float32, device="cpu", skipped=True):
    made = torch.Generator().manual_seed(rows + dim + vocab)
    hidden = torch.randn(rows, dim, generator=made).to(dtype)
    weight = (torch.randn(vocab, dim, generator=made) * 0.3).to(dtype)
    target = torch.randint(0, vocab, (rows,), generator=made)
    if skipped:
        target[1::3] = -100
        hidden[1::3] = float("nan")
    return hidden.to(device), weight.to(device), target.to(device)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@pytest.mark.parametrize("shape", PATHS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_all_ways_agree(shape, dtype):
    hidden, weight, target = problem(*shape, dtype)
    loss, lse, *both = raw.linear_cross_entropy_grads(hidden, weight, target, True, True)
    plain = raw.linear_cross_entropy(hidden, weight, target)
    assert torch.equal(loss, plain[0]) and torch.equal(lse, plain[1])
    one = torch.tensor(1.0)
    again = raw.linear_cross_entropy_backward(one, None, hidden, weight, target, lse, True, True)
    for wanted in ((True, False), (False, True)):
        *_, h, w = raw.linear_cross_entropy_grads(hidden, weight, target, *wanted)
        for got, want, is_wanted in zip((h, w), both, wanted):
            assert torch.equal(got, want) if is_wanted else got.shape == (0,)
    for a, b in zip(both, again):
        assert torch.equal(a, b)
    assert not both[0][1::3].any() and both[0][0].any()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_many_chunks_against_the_definition(dtype):
    hidden, weight, target = (x for x in problem(1100, 40, 3000, dtype))
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    got = ops.linear_cross_entropy(*inputs, target)[0]
    want = ref.linear_cross_entropy(*exact, target)[0]
    assert_close_to_ref(got.detach(), want.detach())
    # Plain PyTorch cannot skip a row that holds NaN.
    plain = [x.nan_to_num(0.0).clone().requires_grad_() for x in (hidden, weight)]
    simple = F.cross_entropy((plain[0] @ plain[1].t()).float(), target)
    for g, w, s in zip(gradients(got, *inputs), gradients(want, *exact), gradients(simple, *plain)):
        assert g.dtype == dtype
        assert_close_to_ref(g, w, s)


def test_what_is_left_of_one():
    """Targets of probability near 1, whose gradient is a small difference: rounded once, as what it is."""
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 16, generator=made).bfloat16()
    target = torch.arange(40)
    hidden = F.normalize(weight.float()).mul_(14).bfloat16()
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = ops.linear_cross_entropy(*inputs, target)[0]
    want = ref.linear_cross_entropy(*exact, target)[0]
    for g, w in zip(gradients(got, *inputs), gradients(want, *exact)):
        assert (g - w).norm() < 2**-7 * w.norm()


@pytest.mark.parametrize("shape", [(130, 33, 1000), (600, 40, 3000), (600, 40, 16000)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_threads(shape, dtype):
    args = problem(*shape, dtype)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(raw.linear_cross_entropy_grads(*args, True, True))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_rows_alone_and_in_any_order(device):
    hidden, weight, target = problem(40, 24, 333, device=device)
    loss, lse = ops.linear_cross_entropy(hidden, weight, target, reduction="none")
    for i in (0, 1, 39):
        one = ops.linear_cross_entropy(
            hidden[i : i + 1], weight, target[i : i + 1], reduction="none"
        )
        torch.testing.assert_close(one[0], loss[i : i + 1])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    turned = ops.linear_cross_entropy(hidden[order], weight, target[order], reduction="none")
    assert torch.equal(turned[0], loss[order]) and torch.equal(turned[1], lse[order])


def test_no_logits_in_memory():
    setup = """
        import torch
        from tenfold import ops
        vocab, rows = 200000, 512
        hidden = torch.randn(rows, 16, requires_grad=True)
        weight = torch.randn(vocab, 16, requires_grad=True)
        target = torch.randint(0, vocab, (rows,))
        small = torch.randn(100, 16, requires_grad=True)
        ops.linear_cross_entropy(hidden, small, target % 100)[0].backward()
    """
    logits, gradient = 200000 * 512 * 4, 200000 * 16 * 4
    bare = peak_growth(
        setup, "with torch.no_grad(): ops.linear_cross_entropy(hidden, weight, target)"
    )
    assert bare < 16 << 20
    each = "ops.linear_cross_entropy(hidden, weight, target, reduction='none')[0].sum().backward()"
    assert peak_growth(setup, each) < gradient + (24 << 20)
    # The workspace of a mean is bounded, and its gradient of weight is not copied.
    whole = peak_growth(
        setup, "(ops.linear_cross_entropy(hidden, weight, target)[0] / 2).backward()"
    )
    assert whole < gradient + (128 << 20) + (24 << 20) < logits / 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scaled_and_repeated_backward(reduction, device):
    hidden, weight, target = problem(20, 12, 50, device=device, skipped=False)
    hidden.requires_grad_(), weight.requires_grad_()
    loss, lse = ops.linear_cross_entropy(hidden, weight, target, reduction=reduction)
    first = gradients(loss, hidden, weight)
    for by in (1.0, 0.25):
        for a, b in zip(first, gradients(by * loss, hidden, weight)):
            torch.testing.assert_close(by * a, b)
    # Gradients that have been given away belong to who has them.
    kept = [x.clone() for x in first]
    gradients(3 * loss, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(first, kept))
    want = gradients(
        ref.linear_cross_entropy(hidden, weight, target)[1].square().sum(), hidden, weight
    )
    of_lse = gradients(lse.square().sum(), hidden, weight)
    both = gradients(
        ops.linear_cross_entropy(hidden, weight, target, reduction=reduction)[0] * 2
        + ops.linear_cross_entropy(hidden, weight, target)[1].square().sum(), hidden, weight)  # fmt: skip
    for a, b, c, d in zip(want, of_lse, both, first):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a + 2 * d)


def test_loss_and_lse_of_one_call(device):
    hidden, weight, target = problem(20, 12, 50, device=device, skipped=False)
    hidden.requires_grad_(), weight.requires_grad_()
    parts = [
        f(hidden, weight, target) for f in (ops.linear_cross_entropy, ref.linear_cross_entropy)
    ]
    got, want = (gradients(3 * loss + lse.sin().sum(), hidden, weight) for loss, lse in parts)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen(reduction, device):
    hidden, weight, target = problem(20, 12, 50, device=device, skipped=False)
    full = [x.clone().requires_grad_() for x in (hidden, weight)]
    want = gradients(ops.linear_cross_entropy(*full, target, reduction=reduction)[0].sum(), *full)
    for i in range(2):
        inputs = [x.clone() for x in (hidden, weight)]
        inputs[i].requires_grad_()
        ops.linear_cross_entropy(*inputs, target, reduction=reduction)[0].sum().backward()
        assert torch.equal(inputs[i].grad, want[i]) and inputs[1 - i].grad is None


def test_no_second_derivative(device):
    hidden, weight, target = problem(5, 4, 7, device=device, skipped=False)
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        torch.autograd.grad(
            ops.linear_cross_entropy(hidden, weight, target)[0], hidden, create_graph=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_dimensions(dtype, device):
    hidden, weight, target = problem(12, 20, 33, dtype, device)
    want = ops.linear_cross_entropy(hidden, weight, target, reduction="none")
    folded = ops.linear_cross_entropy(
        hidden.view(3, 4, 20), weight, target.view(3, 4).int(), reduction="none"
    )
    for w, f in zip(want, folded):
        assert f.shape == (3, 4) and torch.equal(w, f.view(-1))
    wide = torch.nn.functional.pad(hidden, (3, 5))[:, 3:23]
    for h in (wide, hidden.t().contiguous().t(), hidden.repeat_interleave(2, 0)[::2]):
        for w in (
            weight,
            torch.nn.functional.pad(weight, (1, 2))[:, 1:21],
            weight.t().contiguous().t(),
        ):
            got = ops.linear_cross_entropy(h, w, target, reduction="none")
            assert all(torch.equal(a, b) for a, b in zip(got, want))
    alone = ops.linear_cross_entropy(hidden[0], weight, target[0])
    torch.testing.assert_close(alone[0], want[0][0])


def test_nothing_counts(device):
    for rows in (0, 4):
        hidden, weight, target = problem(rows, 6, 9, device=device, skipped=False)
        target = torch.full_like(target, -100)
        hidden = torch.full_like(hidden, float("nan")).requires_grad_()
        weight.requires_grad_()
        for reduction in ("mean", "sum", "none"):
            loss, lse = ops.linear_cross_entropy(hidden, weight, target, reduction=reduction)
            assert not loss.any() and not lse.any()
            assert all(not g.any() for g in gradients(loss.sum(), hidden, weight))
        logp, entropy = ops.linear_logprob(hidden, weight, target)
        assert not logp.any() and not entropy.any()
        assert all(not g.any() for g in gradients((logp + entropy).sum(), hidden, weight))


def test_autocast(device):
    hidden, weight, target = problem(20, 12, 50, device=device, skipped=False)
    weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        loss, _ = ops.linear_cross_entropy(hidden, weight, target)
    want = ops.linear_cross_entropy(hidden.bfloat16(), weight.detach().bfloat16(), target)[0]
    assert torch.equal(loss, want)
    (g,) = gradients(loss, weight)
    assert g.dtype == torch.float32 and g.any()


def test_training_step(device):
    """The loss of a small model falls as it does with plain PyTorch."""
    losses = []
    for fused in (False, True):
        torch.manual_seed(0)
        hidden, target = torch.randn(64, 16).to(device), torch.randint(0, 40, (64,)).to(device)
        weight = (torch.randn(40, 16) * 0.1).to(device).requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for _ in range(20):
            loss = (ops.linear_cross_entropy(hidden, weight, target)[0] if fused
                    else F.cross_entropy(hidden @ weight.t(), target))  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    assert losses[1] < 1.5


def test_errors(device):
    hidden, weight, target = problem(3, 7, 9, device=device, skipped=False)
    both = (ops.linear_cross_entropy, raw.linear_cross_entropy)
    bad = [((hidden, weight[:, :5], target), {}, ValueError, "weight"),
           ((hidden, weight[:0], target), {}, ValueError, "weight"),
           ((hidden[:, :0], weight[:, :0], target), {}, ValueError, "hidden"),
           ((hidden, weight, target[:2]), {}, ValueError, "target"),
           ((hidden, weight, target.float()), {}, TypeError, "target"),
           ((hidden.int(), weight, target), {}, TypeError, "hidden"),
           ((hidden, weight.bfloat16(), target), {}, ValueError, "weight"),
           ((hidden, weight, target), {"reduction": "max"}, ValueError, "reduction"),
           ((hidden, weight, target), {"softcap": -1.0}, ValueError, "softcap"),
           ((hidden, weight, target), {"z_loss": -1.0}, ValueError, "z_loss"),
           ((hidden, weight, target), {"temperature": 0.0}, ValueError, "temperature"),
           ((hidden, weight, target), {"row_weight": torch.ones(2, device=device)}, ValueError,
            "row_weight")]  # fmt: skip
    for args, options, error, word in bad:
        check_errors(*both, args, options, error, word)
    check_errors(
        ops.linear_logprob, raw.linear_logprob, (hidden, weight, target[:2]), {}, ValueError, "ids"
    )
    check_errors(ops.linear_logprob, raw.linear_logprob, (hidden, weight, target, 0.0), {}, ValueError,
                 "temperature")  # fmt: skip
    with pytest.raises(ValueError, match="target must be"):
        ops.linear_cross_entropy(hidden.view(1, 3, 7), weight, target.view(3, 1))


@pytest.mark.parametrize("wrong", [9, -1, 2**40])
def test_target_out_of_range(wrong):
    hidden, weight, target = problem(3, 7, 9, skipped=False)
    target[1] = wrong
    both = (ops.linear_cross_entropy, raw.linear_cross_entropy)
    check_errors(*both, (hidden, weight, target), {}, IndexError, "target[1]", str(wrong))
    ops.linear_cross_entropy(hidden, weight, target, ignore_index=wrong)
    ops.linear_cross_entropy(hidden, weight, target, row_weight=torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_registration(reduction, device):
    hidden, weight, target = problem(6, 8, 11, device=device)
    args = (hidden.nan_to_num(0.0).requires_grad_(), weight.requires_grad_(), target)
    options = {"row_weight": torch.rand(6, device=device), "softcap": 3.0, "z_loss": 0.1,
               "temperature": 0.7}  # fmt: skip
    check_op(raw.linear_cross_entropy, args, {"reduction": reduction, **options})


def test_registration_of_the_others(device):
    hidden, weight, target = problem(6, 8, 11, device=device)
    hidden = hidden.nan_to_num(0.0)
    check_op(
        raw.linear_logprob,
        (hidden.clone().requires_grad_(), weight.clone().requires_grad_(), target),
    )
    logp, lse, entropy = raw.linear_logprob(hidden, weight, target)
    check_op(raw.linear_logprob_backward,
             (logp, None, lse, hidden, weight, target, lse, entropy, True, True, 1.0))  # fmt: skip
    if hidden.is_cpu:
        check_op(raw.linear_cross_entropy_grads, (hidden, weight, target, True, False))
    check_op(raw.linear_cross_entropy_backward,
             (lse[0], lse, hidden, weight, target, lse, False, True))  # fmt: skip
