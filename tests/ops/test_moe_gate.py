# SPDX-License-Identifier: Apache-2.0
"""``moe_gate`` and ``moe_gate_linear`` against their definitions in float64."""

import pytest
import torch
from moe_cases import agree, every_isa, rand

from tenfold import ops, reference
from tenfold.testing import DTYPES, check_errors, check_op, threads
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold
INF, NAN = float("inf"), float("nan")
# Tokens, experts, k: around tiles of 16 tokens and vectors of 8 and 16 experts; k = n; k above 8.
SHAPES = [(0, 8, 2), (1, 1, 1), (7, 3, 2), (16, 8, 2), (37, 8, 8), (33, 64, 8), (130, 13, 5),
          (50, 40, 12), (20, 257, 3), (18, 17, 17)]  # fmt: skip


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape, dtype, renormalize, device):
    tokens, experts, k = shape
    logits = rand(tokens, experts, dtype=dtype, scale=3.0)
    agree("moe_gate", [logits, k, renormalize], device, wrt=(0,))


@pytest.mark.parametrize("shape", SHAPES)
def test_route_is_gate_and_sort(shape, device):
    tokens, experts, k = shape
    for dtype in DTYPES:
        logits = rand(tokens, experts, dtype=dtype, scale=3.0)
        agree("moe_route", [logits, k, dtype != DTYPES[0]], device, wrt=(0,))


def test_route_of_many_tokens(device):
    """Several chunks of slots, of which the last is short; any threads; logits of more dims and without a gradient."""
    for tokens, experts, k in ((20_011, 8, 2), (3_001, 64, 8)):
        logits = rand(tokens, experts).to(device)
        weight, index = ops.moe_gate(logits, k)
        want = (weight, index, *ops.moe_sort(index, experts))
        for count in (1, 2, 3):
            with threads(count):
                made = ops.moe_route(logits, k)
                assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))
        whole = tokens // 3 * 3
        made = ops.moe_route(logits[:whole].view(3, -1, experts), k)
        assert made[0].shape == (3, whole // 3, k) and torch.equal(
            made[1].flatten(0, 1), index[:whole]
        )
    with torch.inference_mode():
        assert torch.equal(ops.moe_route(logits, k)[2], want[2])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 11])
def test_ties_go_to_the_lower_index(k, device):
    logits = torch.randint(0, 3, (100, 11), generator=torch.Generator().manual_seed(k)).float()
    logits[0], logits[1] = 0.0, -0.0
    logits[2, ::2] = -INF
    want = reference.moe_gate(logits, k)
    for isa in every_isa(device):
        with isa:
            weight, index = ops.moe_gate(logits.to(device), k)
        assert torch.equal(index.cpu(), want[1])
        assert index[0].tolist() == index[1].tolist() == list(range(k))
        torch.testing.assert_close(weight.cpu(), want[0])


@pytest.mark.parametrize("experts", [8, 17, 64, 200, 1024, 1100])
@pytest.mark.parametrize("k", [3, 4, 6, 8, 12, 16])
def test_logits_that_differ_in_their_last_bits(k, experts, device):
    """The CPU's keys have no room for these: rows of floats next to each other, one of them among others or all, of
    both signs; and floats that were bfloat16, which leave room and have many ties."""
    k = min(k, experts)
    g = torch.Generator().manual_seed(100 * k + experts)
    logits = torch.randn(75, experts, generator=g)
    near = (torch.full((75, experts), 2.5).view(torch.int32)
            + torch.randint(0, 3, (75, experts), generator=g, dtype=torch.int32)).view(torch.float32)  # fmt: skip
    logits[5:20] = near[5:20]
    logits[20:30] = -near[20:30]
    logits[30:40] = torch.where(
        torch.rand(10, experts, generator=g) < 0.2, near[30:40], -near[30:40]
    )
    logits[40:60] = logits[40:60].bfloat16().float()
    logits[60] = -INF
    logits[60, 0] = near[0, 0]
    logits[74] = near[74]
    last = torch.linspace(
        2.1, -2.0, experts
    )  # only the last chosen and the first left out are near
    if k < experts:
        last[k] = last[k - 1].nextafter(torch.tensor(-INF))
    apart = torch.stack([last[torch.randperm(experts, generator=g)] for _ in range(32)])
    for x in (logits, logits[40:56], logits[5:6], logits[73:], apart):
        want = reference.moe_gate(x, k)
        for isa in every_isa(device):
            with isa:
                weight, index = ops.moe_gate(x.to(device), k)
            assert torch.equal(index.cpu(), want[1])
            torch.testing.assert_close(weight.cpu(), want[0])


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("k", [2, 3, 6, 9])
def test_special_values(k, renormalize, device):
    rows = torch.zeros(6, 12)
    rows[0, 3] = NAN
    rows[0, 5] = 2.0
    rows[1] = -INF
    rows[1, 7] = -3.0
    rows[2] = -INF  # no expert is left
    rows[3, 4] = INF
    rows[4] = 3e38
    rows[5] = NAN
    want, chosen = reference.moe_gate(rows, k, renormalize)
    for isa in every_isa(device):
        with isa:
            weight, index = (x.cpu() for x in ops.moe_gate(rows.to(device), k, renormalize))
        assert torch.equal(index, chosen) and index[0, 0] == 5 and index[1, :2].tolist() == [7, 0]
        torch.testing.assert_close(weight, want, equal_nan=True)
        assert (
            weight[[0, 2, 3, 5]].isnan().all() and weight[1, 0] == 1 and (weight[1, 1:] == 0).all()
        )


def test_masked_experts_have_no_gradient(device):
    logits = rand(40, 9)
    logits[:, 4] = -INF
    for renormalize in (True, False):
        x = logits.to(device).requires_grad_()
        ops.moe_gate(x, 3, renormalize)[0].square().sum().backward()
        assert x.grad.isfinite().all() and (x.grad[:, 4] == 0).all()


def test_renormalized_is_the_softmax_of_the_chosen(device):
    logits = rand(200, 16, scale=2.0).to(device)
    top, index = logits.topk(4)
    weight, mine = ops.moe_gate(logits, 4)
    assert torch.equal(mine, index.int())
    torch.testing.assert_close(weight, top.softmax(-1), rtol=0, atol=1.5e-7)


def test_expanded_gradient_and_strided_logits(device):
    logits = rand(30, 10).to(device)
    want = ops.moe_gate(logits, 2)
    wide = torch.nn.functional.pad(logits, (2, 3))[:, 2:12]
    for x in (wide, logits.t().contiguous().t(), logits.repeat_interleave(2, 0)[::2]):
        assert all(torch.equal(a, b) for a, b in zip(ops.moe_gate(x, 2), want))
    for renormalize in (True, False):
        grads = []
        for up in (torch.ones(1, 1, device=device).expand(30, 2), torch.ones(30, 2, device=device)):
            x = wide.detach().clone().requires_grad_()
            (g,) = torch.autograd.grad(ops.moe_gate(x, 2, renormalize)[0], x, up)
            grads.append(g)
        assert torch.equal(*grads)


def test_leading_dimensions(device):
    logits = rand(12, 6).to(device)
    want = ops.moe_gate(logits, 2)
    for got, w in zip(ops.moe_gate(logits.view(3, 4, 6), 2), want):
        assert torch.equal(got, w.view(3, 4, 2))
    x, w_router = rand(12, 5).to(device), rand(6, 5).to(device)
    for got, w in zip(
        ops.moe_gate_linear(x.view(3, 4, 5), w_router, 2), ops.moe_gate_linear(x, w_router, 2)
    ):
        assert torch.equal(got, w.view(3, 4, -1))


LAYERS = [(0, 5, 8, 2), (1, 1, 1, 1), (5, 7, 3, 2), (48, 64, 8, 2), (51, 100, 12, 4),
          (100, 33, 13, 5), (7, 2100, 9, 2), (150, 48, 6, 6)]  # fmt: skip


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                    (torch.float16, torch.float16), (torch.bfloat16, torch.float32)])  # fmt: skip
@pytest.mark.parametrize("shape", LAYERS)
def test_gate_linear(shape, dtypes, device):
    tokens, dim, experts, k = shape
    x = rand(tokens, dim, dtype=dtypes[0])
    w = rand(experts, dim, dtype=dtypes[1], seed=1, scale=dim**-0.5)
    for renormalize in (True, False):
        agree("moe_gate_linear", [x, w, k, renormalize], device, wrt=(0, 1), plain_sums=dim > 1000)


def test_a_frozen_router_or_input(device):
    x, w = rand(60, 24).to(device), rand(8, 24, seed=1).to(device)

    def grads(of_x, of_w, use):
        inputs = [x.clone().requires_grad_(of_x), w.clone().requires_grad_(of_w)]
        made = ops.moe_gate_linear(*inputs, 2)
        sum((made[i] ** 2).mean() for i in use).backward()
        return [t.grad for t in inputs]

    for use in ((0,), (1,), (0, 1)):
        full = grads(True, True, use)
        for i in range(2):
            part = grads(i == 0, i == 1, use)
            assert part[1 - i] is None and torch.equal(part[i], full[i])
    both = [a + b for a, b in zip(grads(True, True, (0,)), grads(True, True, (1,)))]
    for a, b in zip(grads(True, True, (0, 1)), both):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_routed_alike_in_every_batch(dtype, device):
    x, w = rand(101, 300, dtype=dtype).to(device), rand(12, 300, dtype=dtype, seed=1).to(device)
    for isa in every_isa(device):
        with isa:
            whole = ops.moe_gate_linear(x, w, 3)
            for some in (slice(0, 1), slice(1, 50), slice(98, 101)):
                for a, b in zip(ops.moe_gate_linear(x[some], w, 3), whole):
                    assert torch.equal(a, b[some])
            wide = torch.nn.functional.pad(x, (1, 2))[:, 1:301]
            for a, b in zip(ops.moe_gate_linear(wide, w, 3), whole):
                assert torch.equal(a, b)


class TestGradcheck:
    """Of the definitions, in float64; kernels are compared with these above."""

    @pytest.mark.parametrize("renormalize", [True, False])
    def test_gate(self, renormalize):
        x = rand(7, 3).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: reference.moe_gate(x, 2, renormalize)[0], x)

    def test_gate_linear(self):
        x, w = (rand(*s).double().requires_grad_() for s in ((7, 5), (3, 5)))
        assert torch.autograd.gradcheck(lambda x, w: reference.moe_gate_linear(x, w, 2)[:2], (x, w))


def test_differentiable_once(device):
    x = rand(4, 6).to(device).requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        torch.autograd.grad(ops.moe_gate(x, 2)[0].sum(), x, create_graph=True)
    w = rand(3, 6).to(device)
    with pytest.raises(RuntimeError, match="inference only"):
        torch.autograd.grad(ops.moe_gate_linear(x, w, 2)[0].sum(), x, create_graph=True)


def test_autocast_leaves_routing_in_float32(device):
    x, w = rand(20, 16).to(device), rand(4, 16, seed=1).to(device)
    want = ops.moe_gate_linear(x, w, 2)
    with torch.autocast(device.type, torch.bfloat16):
        for a, b in zip(ops.moe_gate_linear(x, w, 2), want):
            assert torch.equal(a, b)
        mixed = ops.moe_gate_linear(x.bfloat16(), w, 2)
    assert [t.dtype for t in mixed] == [torch.float32, torch.float32, torch.int32]


def test_errors(device):
    logits, w = rand(5, 4).to(device), rand(3, 4).to(device)
    gate = (ops.moe_gate, raw.moe_gate)
    for k in (0, 5, -1):
        check_errors(*gate, (logits, k), {}, ValueError, "k", f"{k} for 4 experts")
        check_errors(ops.moe_gate_linear, raw.moe_gate_linear, (logits, w, k), {}, ValueError,
                     f"{k} for 3 experts")  # fmt: skip
    check_errors(*gate, (logits.double(), 2), {}, TypeError, "logits", "float64")
    if device.type == "cpu":
        check_errors(
            ops.moe_route, raw.moe_route, (logits, 5), {}, ValueError, "k", "5 for 4 experts"
        )
        check_errors(ops.moe_route, raw.moe_route, (logits.double(), 2), {}, TypeError, "float64")
    linear = (ops.moe_gate_linear, raw.moe_gate_linear)
    check_errors(*linear, (logits, w[:, :3], 2), {}, ValueError, "w_router", "[3, 3]", "[5, 4]")
    check_errors(*linear, (logits, w.half(), 2), {}, TypeError, "w_router", "float16")
    check_errors(*linear, (logits.int(), w, 2), {}, TypeError, "x", "int32")
    check_errors(*linear, (logits, w[:0], 1), {}, ValueError, "w_router")
    check_errors(*linear, (logits, w[0], 1), {}, ValueError, "w_router", "[n, d]")
    weight, index = ops.moe_gate(logits, 2)
    back = raw.moe_gate_backward
    for args, words in (
        ((weight[:3], logits, weight, index), ("grad_weight", "[3, 2]", "[5, 2]")),
        ((weight, logits, weight, index[:3]), ("index", "[3, 2]", "[5, 2]")),
        ((weight, logits, weight, index + 3), ("index", "[0, 4)")),
        ((weight.half(), logits, weight, index), ("grad_weight", "float16")),
    ):
        if device.type == "cuda" and words[-1] == "[0, 4)":
            continue  # values are not read there
        with pytest.raises(RuntimeError) as caught:
            back(*args)
        assert all(word in str(caught.value) for word in words)


@cuda_only
def test_devices_must_be_the_same(device):
    with pytest.raises(
        RuntimeError, match=r"w_router must be on the device of x \(cuda:0\), got cpu"
    ):
        ops.moe_gate_linear(rand(5, 4).to(device), rand(3, 4), 2)


def test_registration(device):
    logits = rand(20, 6).to(device).requires_grad_()
    for renormalize in (True, False):
        check_op(raw.moe_gate, (logits, 2, renormalize))
        if device.type == "cpu":
            check_op(raw.moe_route, (logits, 2, renormalize))
    check_op(raw.moe_gate_linear, (rand(60, 9).to(device).requires_grad_(),
                                   rand(6, 9, seed=1).to(device).requires_grad_(), 2))  # fmt: skip
