# SPDX-License-Identifier: Apache-2.0
"""last_token_reward and pairwise_logsigmoid: values, gradients, what padding may hold, Themis's printed numbers."""

import pytest
import torch
from moe_cases import agree, every_isa, rand

from tenfold import ops, reference
from tenfold.testing import DTYPES, check_errors, check_op, layout, on

raw = torch.ops.tenfold
NAN = float("nan")


def sequences(rows, length, dim, dtype=torch.float32, side="right"):
    """hidden, mask; padding is NaN."""
    made = torch.Generator().manual_seed(rows + length + dim)
    size = torch.randint(1, length + 1, (rows, 1), generator=made)
    at = torch.arange(length)[None]
    mask = at < size if side == "right" else at >= length - size
    if side == "holes":
        mask &= torch.rand(rows, length, generator=made) > 0.3
        mask[:, length // 2] = True
    hidden = rand(rows, length, dim, dtype=dtype)
    hidden[~mask] = NAN
    return hidden, mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize(
    "shape", [(0, 5, 4, 0), (1, 1, 1, 0), (24, 9, 33, 0), (3, 9, 1030, 8), (16, 5, 64, 1)]
)
def test_values_and_gradients(shape, pool, dtype, device):
    rows, length, dim, classes = shape
    for i, side in enumerate(("left", "right", "holes")):
        hidden, mask = sequences(rows, length, dim, dtype, side)
        w = rand(*((classes, dim) if classes else (dim,)), dtype=DTYPES[i] if dim == 33 else dtype)
        agree("last_token_reward", [hidden, mask, w, pool], device, wrt=(0, 2))


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_padding_and_other_rows_change_nothing(pool, device):
    """Bit for bit: either side, any width, a batch of 1 or 8 (acceptance check 5)."""
    hidden, mask = on(device, sequences(8, 21, 40, torch.bfloat16))
    w = rand(2, 40).to(device)
    want = ops.last_token_reward(hidden, mask, w, pool)
    assert want.isfinite().all()
    for left, right in ((0, 24), (24, 0), (3, 5)):
        wide = torch.nn.functional.pad(hidden, (0, 0, left, right), value=NAN)
        there = torch.nn.functional.pad(mask.long(), (left, right))
        assert torch.equal(ops.last_token_reward(wide, there, w, pool), want)
    for i in range(8):
        one = ops.last_token_reward(hidden[i : i + 1], mask[i : i + 1], w, pool)
        assert torch.equal(one, want[i : i + 1])
    for kind in ("sliced", "transposed", "misaligned"):
        assert torch.equal(ops.last_token_reward(layout(hidden, kind), mask, w, pool), want)
    leaf = hidden.clone().requires_grad_()
    ops.last_token_reward(leaf, mask, w, pool).sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[~mask].any()
    read = leaf.grad.ne(0).any(-1)
    assert torch.equal(read, mask) if pool == "mean" else read.sum() == 8


def test_hidden_is_not_kept(device):
    hidden, mask = on(device, sequences(2, 5, 8))
    hidden.requires_grad_()
    reward = ops.last_token_reward(hidden, mask, rand(8).to(device))
    assert all(x.numel() <= 16 for x in reward.grad_fn.saved_tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [1, 7, 16, 33, 3000])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_pair_loss(pairs, center, dtype, device):
    pos, neg, margin = (rand(pairs, dtype=dtype, seed=i, scale=9.0 / (i + 1)) for i in range(3))
    for m in (None, margin):
        agree("pairwise_logsigmoid", [pos, neg, m, center], device, wrt=(0, 1))


def test_printed_numbers(device):
    """Acceptance checks 1 and 6."""
    pos = torch.tensor([3.0, -0.3], device=device, requires_grad=True)
    neg = torch.tensor([2.0, 0.0], device=device, requires_grad=True)
    loss, delta = ops.pairwise_logsigmoid(pos, neg)
    torch.testing.assert_close(loss.item(), 0.583808, atol=1e-6, rtol=0)
    torch.testing.assert_close(delta.cpu(), torch.tensor([1.0, -0.3]))
    loss.backward()
    want = torch.tensor([-0.268941 / 2, -0.574443 / 2])
    torch.testing.assert_close(pos.grad.cpu(), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(neg.grad.cpu(), -want, atol=1e-6, rtol=0)
    for i, each in enumerate((0.313262, 0.854355)):
        one = ops.pairwise_logsigmoid(pos[i : i + 1].detach(), neg[i : i + 1].detach())[0]
        torch.testing.assert_close(one.item(), each, atol=1e-6, rtol=0)
    pos, neg = pos.detach(), neg.detach()
    assert torch.equal(ops.pairwise_logsigmoid(neg, pos)[1], -delta)
    moved = ops.pairwise_logsigmoid(pos + 8, neg + 8)[0]
    torch.testing.assert_close(moved, loss.detach())
    assert ops.pairwise_logsigmoid(pos + 8, neg + 8, None, 0.1)[0] > loss + 1


def test_far_apart_and_special_values(device):
    inf = float("inf")
    pos = torch.tensor([200.0, -200.0, 12.0, inf, -inf, NAN, 20.0], device=device)
    neg = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0], device=device)
    for isa in every_isa(device):
        with isa:
            each = [ops.pairwise_logsigmoid(p[None], n[None])[0].item() for p, n in zip(pos, neg)]
        want = torch.nn.functional.softplus(neg.double() - pos.double()).cpu()
        torch.testing.assert_close(
            torch.tensor(each).double(), want, rtol=2e-6, atol=1e-38, equal_nan=True
        )


def test_gradcheck():
    hidden, mask = sequences(3, 4, 5, torch.float64, "holes")
    hidden = hidden.nan_to_num(1.0).requires_grad_()
    w = rand(2, 5).double().requires_grad_()
    for pool in ("last", "mean"):
        assert torch.autograd.gradcheck(
            lambda h, w, pool=pool: reference.last_token_reward(h, mask, w, pool), (hidden, w)
        )
    pos, neg = (rand(6, seed=i).double().requires_grad_() for i in range(2))
    margin = rand(6, seed=3).double()
    assert torch.autograd.gradcheck(
        lambda p, n: reference.pairwise_logsigmoid(p, n, margin, 0.3), (pos, neg)
    )


def test_errors(device):
    hidden, mask = on(device, sequences(3, 4, 8))
    w = rand(8).to(device)
    both = (ops.last_token_reward, raw.last_token_reward)
    check_errors(*both, (hidden[0], mask, w), {}, ValueError, "hidden", "[N, S, H]")
    check_errors(*both, (hidden.double(), mask, w), {}, TypeError, "hidden", "float64")
    check_errors(*both, (hidden[..., :0], mask, w[:0]), {}, ValueError, "hidden", "H > 0")
    check_errors(*both, (hidden, mask[:2], w), {}, ValueError, "mask", "[3, 4]")
    check_errors(*both, (hidden, mask, w[1:]), {}, ValueError, "w_v", "[C, 8]", "[7]")
    check_errors(*both, (hidden, mask, w.int()), {}, TypeError, "w_v", "int32")
    check_errors(*both, (hidden, mask, w, "first"), {}, ValueError, "pool", "last or mean", "first")
    if device.type == "cpu":
        wrong = mask.clone()
        wrong[1] = False
        check_errors(*both, (hidden, wrong, w), {}, ValueError, "mask[1]", "no real token")
        check_errors(*both, (hidden[:, :0], mask[:, :0], w), {}, ValueError, "mask[0]")
    both = (ops.pairwise_logsigmoid, raw.pairwise_logsigmoid)
    r = rand(6).to(device)
    check_errors(*both, (r[:3], r[3:5]), {}, ValueError, "r_neg", "[3]", "[2]", "odd number")
    check_errors(*both, (r[:0], r[:0]), {}, ValueError, "r_pos", "at least one pair")
    check_errors(*both, (r, r.bfloat16()), {}, ValueError, "r_neg", "float32", "bfloat16")
    check_errors(*both, (r.long(), r.long()), {}, TypeError, "r_pos", "int64")
    check_errors(*both, (r[None], r[None]), {}, ValueError, "r_pos", "[B]")
    check_errors(*both, (r, r, r[1:]), {}, ValueError, "margin", "[6]", "[5]")
    check_errors(*both, (r, r, r.long()), {}, TypeError, "margin", "int64")
    check_errors(*both, (r, r, None, -0.1), {}, ValueError, "center", "-0.1")
    check_errors(*both, (r, r, None, NAN), {}, ValueError, "center", "nan")


def test_registration(device):
    hidden, mask = on(device, sequences(3, 4, 20))
    w = rand(20).to(device)
    check_op(
        raw.last_token_reward, (hidden.nan_to_num().requires_grad_(), mask, w.requires_grad_())
    )
    r = rand(6).to(device)
    check_op(
        raw.pairwise_logsigmoid,
        (r.clone().requires_grad_(), r[:6].flip(0).requires_grad_(), r, 0.1),
    )
