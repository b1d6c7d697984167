# SPDX-License-Identifier: Apache-2.0
"""``load_balance_loss`` and ``router_seed_loss`` against their definitions, and the numbers of UpIT's specification."""

import math

import pytest
import torch
from moe_cases import agree, every_isa, rand

from tenfold import ops, reference
from tenfold.testing import DTYPES, check_deterministic, check_errors, check_op

raw = torch.ops.tenfold
INF, NAN = float("inf"), float("nan")


def mask_of(tokens, seed=0):
    return torch.rand(tokens, generator=torch.Generator().manual_seed(seed + tokens)) > 0.3


@pytest.mark.parametrize("norm", ["slots", "tokens"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 4), (1, 1), (7, 3), (33, 8), (130, 64), (2100, 5), (18, 300)]
)
def test_load_balance(shape, dtype, norm, device):
    tokens, n = shape
    logits, counts = rand(tokens, n, dtype=dtype, scale=2.0), torch.arange(n) + 1
    for mask in (None, mask_of(tokens)):
        agree("load_balance_loss", [logits, counts, mask, 1, norm], device, wrt=(0,))


class TestBalanceNumbers:
    """Acceptance check 6."""

    @pytest.mark.parametrize("norm, want", [("slots", 1.0), ("tokens", 2.0)])
    def test_a_uniform_router(self, norm, want, device):
        counts = torch.full((8,), 16, device=device)
        loss = ops.load_balance_loss(torch.zeros(64, 8, device=device), counts, None, 2, norm)
        assert float(loss) == pytest.approx(want, abs=1e-6)

    def test_all_mass_on_one_expert(self, device):
        logits = torch.zeros(50, 8, device=device)
        logits[:, 3] = 60.0
        index = ops.moe_gate(logits, 2)[1]
        counts = ops.moe_sort(index, 8)[2]
        assert float(ops.load_balance_loss(logits, counts, None, 2)) == pytest.approx(4.0, abs=1e-6)

    def test_padding_does_not_change_it(self, device):
        logits, mask = rand(60, 8).to(device), mask_of(60).to(device)

        def loss(x, mask):
            index = ops.moe_gate(x, 2)[1]
            if mask is not None:
                index = index.masked_fill(~mask[:, None], 8)
            counts = ops.moe_sort(index, 8, allow_sentinel=True)[2]
            return ops.load_balance_loss(x, counts, mask, 2)

        want = loss(logits[mask], None)
        for value in (0.0, 7.0, NAN):
            padded = logits.masked_fill(~mask[:, None], value)
            torch.testing.assert_close(loss(padded, mask), want)

    def test_the_written_out_gradient(self, device):
        logits = rand(40, 6).to(device).requires_grad_()
        counts = ops.moe_sort(ops.moe_gate(logits, 2)[1], 6)[2]
        (got,) = torch.autograd.grad(0.01 * ops.load_balance_loss(logits, counts, None, 2), logits)
        p, f = logits.detach().softmax(-1), counts / 80
        want = 0.01 * 6 / 40 * p * (f - (p * f).sum(-1, keepdim=True))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_balance_without_a_token(device):
    logits = rand(5, 3).to(device).requires_grad_()
    counts, mask = torch.zeros(3, dtype=torch.int32, device=device), torch.zeros(5, device=device)
    loss = ops.load_balance_loss(logits, counts, mask, 1)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_balance_with_masked_experts_and_nan(device):
    logits = rand(20, 5)
    logits[:, 2] = -INF
    counts = torch.tensor([8, 8, 0, 12, 12])
    agree("load_balance_loss", [logits, counts, None, 2], device, wrt=(0,))
    logits[3, 0] = NAN
    assert ops.load_balance_loss(logits.to(device), counts.to(device), None, 2).isnan()


def test_masks_strides_and_leading_dimensions(device):
    logits, counts, mask = (
        rand(24, 6).to(device),
        torch.arange(6, device=device),
        mask_of(24).to(device),
    )
    want = ops.load_balance_loss(logits, counts, mask, 2)
    for m in (
        mask.to(torch.uint8),
        mask.float(),
        mask.long() * 3,
        mask[:, None].expand(24, 2)[:, 0],
    ):
        assert torch.equal(ops.load_balance_loss(logits, counts.int(), m, 2), want)
    folded = ops.load_balance_loss(logits.view(2, 12, 6), counts, mask.view(2, 12), 2)
    wide = torch.nn.functional.pad(logits, (3, 1))[:, 3:9]
    assert torch.equal(folded, want)
    assert torch.equal(ops.load_balance_loss(wide, counts, mask, 2), want)


SEEDS = [(0, 4), (1, 1), (7, 5), (33, 16), (70, 100), (140, 67)]


@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", SEEDS)
def test_router_seed(shape, dtypes, device):
    tokens, dim = shape
    h, r = rand(tokens, dim, dtype=dtypes[0]), rand(dim, dtype=dtypes[1], seed=1, scale=dim**-0.5)
    target = torch.rand(tokens, generator=torch.Generator().manual_seed(3))
    for mask, t in ((None, None), (mask_of(tokens), None), (mask_of(tokens), (target > 0.5).float()),
                    (None, target)):  # fmt: skip
        agree("router_seed_loss", [h, r, mask, t], device, wrt=(0, 1))


def test_layers_are_a_mean(device):
    h, r, mask = rand(3, 20, 8).to(device), rand(3, 8, seed=1).to(device), mask_of(20).to(device)
    agree("router_seed_loss", [h.cpu(), r.cpu(), mask.cpu()], device, wrt=(0, 1))
    want = ops.router_seed_loss(h, r, mask)
    each = torch.stack([ops.router_seed_loss(h[i], r[i], mask) for i in range(3)])
    torch.testing.assert_close(want, each.mean())
    folded = ops.router_seed_loss(h.view(3, 4, 5, 8), r, mask.view(4, 5))
    strided = ops.router_seed_loss(h.transpose(0, 1).contiguous().transpose(0, 1), r, mask)
    assert torch.equal(folded, want) and torch.equal(strided, want)


class TestSeedNumbers:
    """Acceptance check 10."""

    def test_at_zero(self, device):
        h, r = rand(50, 12).to(device), torch.zeros(12, device=device, requires_grad=True)
        loss = ops.router_seed_loss(h, r)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
        torch.testing.assert_close(r.grad, -0.5 * h.mean(0), rtol=1e-6, atol=1e-7)

    def train(self, domains, device, dim=16, steps=200):
        """Vectors of equally many steps, each over its own domain."""
        vectors = []
        for i, h in enumerate(domains):
            r = (rand(dim, seed=i) * 0.02).to(device).requires_grad_()
            for _ in range(steps):
                (grad,) = torch.autograd.grad(ops.router_seed_loss(h.to(device), r), r)
                r = (r - 0.5 * grad).detach().requires_grad_()
            vectors.append(r.detach())
        return torch.stack(vectors)

    def domain(self, axis, tokens, dim=16, seed=0):
        return rand(tokens, dim, seed=seed + axis) + 3.0 * torch.eye(dim)[axis]

    def share(self, w, axis, device):
        _, _, index = ops.moe_gate_linear(self.domain(axis, 500, seed=50).to(device), w, 1)
        return float((index == axis).float().mean())

    def test_separable_domains(self, device):
        w = self.train([self.domain(0, 200), self.domain(1, 200)], device)
        assert all(self.share(w, axis, device) >= 0.9 for axis in range(2))

    def test_unequal_buckets(self, device):
        w = self.train([self.domain(0, 400), self.domain(1, 20)], device)
        shares = [self.share(w, axis, device) for axis in range(2)]
        assert min(shares) >= 0.5  # no expert is starved


def test_long_logits_do_not_overflow(device):
    h = torch.tensor([[1e5], [-1e5], [INF], [3e38]], device=device)
    r = torch.ones(1, device=device, requires_grad=True)
    mask = torch.tensor([1, 0, 0, 0], device=device)
    for at, t, want in ((0, 1.0, 0.0), (0, 0.0, 1e5), (1, 1.0, 1e5), (2, 1.0, 0.0), (3, 1.0, 0.0)):
        target = torch.full((4,), t, device=device)
        assert ops.router_seed_loss(h, r, mask.roll(at), target).item() == want


def test_rows_that_do_not_count_are_never_read(device):
    h, r, mask = rand(40, 9).to(device), rand(9).to(device), mask_of(40).to(device)
    results = []
    for value in (0.0, NAN):
        inputs = [h.masked_fill(~mask[:, None], value).requires_grad_(), r.clone().requires_grad_()]
        loss = ops.router_seed_loss(*inputs, mask)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert (results[0][1][~mask] == 0).all()
    none = torch.zeros(40, dtype=torch.bool, device=device)
    loss = ops.router_seed_loss(inputs[0], inputs[1], none)
    assert loss.item() == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


def test_frozen_expert_or_vector(device):
    h, r = rand(20, 9).to(device), rand(9).to(device)
    both = [h.clone().requires_grad_(), r.clone().requires_grad_()]
    full = torch.autograd.grad(ops.router_seed_loss(*both), both)
    for i in range(2):
        one = [x.clone().requires_grad_(i == j) for j, x in enumerate((h, r))]
        ops.router_seed_loss(*one).backward()
        assert torch.equal(one[i].grad, full[i]) and one[1 - i].grad is None
    loss = ops.router_seed_loss(*both)
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    torch.testing.assert_close(both[1].grad, 4 * full[1])


def test_scaled_losses(device):
    logits, counts = rand(30, 4).to(device).requires_grad_(), torch.arange(4, device=device)
    (one,) = torch.autograd.grad(ops.load_balance_loss(logits, counts, None, 2), logits)
    (two,) = torch.autograd.grad(2 * ops.load_balance_loss(logits, counts, None, 2), logits)
    assert torch.equal(2 * one, two)


def test_gradcheck():
    """Of the definitions, in float64."""
    x, h, r = (rand(*s).double().requires_grad_() for s in ((7, 3), (7, 5), (5,)))
    counts, mask = torch.tensor([3, 0, 7]), mask_of(7)
    assert torch.autograd.gradcheck(lambda x: reference.load_balance_loss(x, counts, mask, 2), x)
    assert torch.autograd.gradcheck(lambda h, r: reference.router_seed_loss(h, r, mask), (h, r))


def test_threads_do_not_matter():
    logits, counts, mask = rand(5000, 8), torch.arange(8), mask_of(5000)
    check_deterministic(raw.load_balance_loss, (logits, counts, mask, 2, "slots"))
    check_deterministic(raw.load_balance_loss_backward,
                        (torch.tensor(2.0), logits, counts, mask, 2, "slots"))  # fmt: skip
    check_deterministic(raw.router_seed_loss_grads,
                        (rand(2, 700, 300), rand(2, 300), mask[:700], None, True))  # fmt: skip


def test_errors(device):
    logits, counts = rand(5, 4).to(device), torch.ones(4, dtype=torch.int32, device=device)
    balance = (ops.load_balance_loss, raw.load_balance_loss)
    mask = torch.ones(5, dtype=torch.bool, device=device)
    check_errors(*balance, (logits, counts, None, 5), {}, ValueError, "k = 5", "4 experts")
    check_errors(*balance, (logits, counts, None, 2, "mean"), {}, ValueError, "norm", "'mean'")
    check_errors(
        *balance, (logits, counts[:3], None, 2), {}, RuntimeError, "counts", "[3]", "[5, 4]"
    )
    check_errors(*balance, (logits, counts.float(), None, 2), {}, TypeError, "counts", "float32")
    check_errors(*balance, (logits.double(), counts, None, 2), {}, TypeError, "logits", "float64")
    check_errors(*balance, (logits, counts, mask[:2], 2), {}, RuntimeError, "token_mask", "[2]")
    seed = (ops.router_seed_loss, raw.router_seed_loss)
    h, r = rand(5, 3).to(device), rand(3).to(device)
    check_errors(*seed, (h, r[:2]), {}, ValueError, "r", "[5, 3]", "[2]")
    check_errors(*seed, (h, r.view(1, 1, 3)), {}, ValueError, "r", "[1, 1, 3]")
    check_errors(*seed, (h[None], r.expand(2, 3)), {}, ValueError, "r", "[1, 5, 3]", "[2, 3]")
    check_errors(*seed, (h[0], r), {}, ValueError, "h", "[3]")
    check_errors(*seed, (h, r.half()), {}, TypeError, "r", "float16")
    check_errors(*seed, (h.double(), r), {}, TypeError, "h", "float64")
    check_errors(*seed, (h, r, mask[:2]), {}, RuntimeError, "token_mask", "[2]", "[5, 3]")
    check_errors(*seed, (h, r, None, h[:2, 0]), {}, RuntimeError, "target", "[2]", "[5, 3]")
    x = logits.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        torch.autograd.grad(ops.load_balance_loss(x, counts, None, 2), x, create_graph=True)
    h.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(ops.router_seed_loss(h, r), h, create_graph=True)


def test_registration(device):
    logits, counts = rand(20, 6).to(device).requires_grad_(), torch.arange(6, device=device)
    mask = mask_of(20).to(device)
    check_op(raw.load_balance_loss, (logits, counts, mask, 2, "tokens"))
    h, r = rand(2, 20, 9).to(device).requires_grad_(), rand(2, 9).to(device).requires_grad_()
    check_op(raw.router_seed_loss, (h, r, mask, torch.rand(20).to(device)))


def test_every_isa_is_tried(device):
    assert len(every_isa(device)) >= (2 if device.type == "cpu" else 1)
