# SPDX-License-Identifier: Apache-2.0
"""Head operations of DHA on tensors: fuse, collapse, fusion loss, similarity, against the definitions."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tenfold
from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    VALUES,
    assert_close_to_ref,
    check_compiles,
    check_cuda_graph,
    check_deterministic,
    check_errors,
    check_inputs_unmodified,
    check_isas_agree,
    check_op,
    check_opcheck,
    check_strides_equal_fake,
    fill,
    forced_isa,
    layout,
    peak_growth,
    poisoned_memory,
)  # fmt: skip
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold
# N, g, d, m: every block of outputs (1 to 8, more), whole strips and tails, one head, one column.
SHAPES = [(1, 1, 1, 1), (2, 2, 3, 7), (3, 3, 4, 16), (2, 4, 5, 256), (1, 5, 2, 257), (2, 6, 1, 33),
          (1, 7, 3, 600), (1, 8, 2, 100), (1, 9, 2, 300), (3, 17, 1, 40), (1, 32, 3, 530)]  # fmt: skip


def problem(n, g, d, m, dtype=torch.float32, device="cpu", values="normal"):
    """w [H, d, m], omega [N, g, g, d] and a shuffled partition."""
    made = torch.Generator().manual_seed(n * 100 + g)
    w = fill((n * g, d, m), dtype, values, seed=g)
    omega = fill((n, g, g, d), torch.float32, seed=m)
    groups = torch.randperm(n * g, generator=made).view(n, g)
    return w.to(device), omega.to(device), groups.to(device)


def identity(n, g, d):
    return torch.eye(g)[None, :, :, None].expand(n, g, g, d).contiguous()


def gradients(function, w, omega, groups, dout):
    w, omega = w.clone().requires_grad_(), omega.clone().requires_grad_()
    function(w, omega, groups).backward(dout)
    return w.grad, omega.grad


# -- fuse_heads, collapse_heads ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fuse_and_collapse_match_reference(shape, dtype, device):
    args = problem(*shape, dtype, device)
    w, omega, groups = (x.cpu() for x in args)
    for name in ("fuse_heads", "collapse_heads"):
        ours, theirs = getattr(ops, name), getattr(reference, name)
        with poisoned_memory():
            got = ours(*args)
        assert got.dtype == dtype and got.is_contiguous() and got.device.type == device.type
        want = theirs(w.double(), omega.double(), groups)
        assert_close_to_ref(got.cpu(), want, theirs(w, omega, groups), what=name)
        assert torch.equal(got, ours(args[0], args[1], args[2].int()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_match_reference(shape, dtype, device):
    w, omega, groups = problem(*shape, dtype, device)
    dout = fill((*groups.shape, *w.shape[1:]), dtype, seed=9)
    with poisoned_memory():
        got = gradients(ops.fuse_heads, w, omega, groups, dout.to(device))
    there = [x.cpu() for x in (w, omega, groups)]
    want = gradients(reference.fuse_heads, there[0].double(), there[1].double(), there[2],
                     dout.double())  # fmt: skip
    lowp = gradients(reference.fuse_heads, *there, dout)
    for x, ref, low, name in zip(got, want, lowp, ("dw", "domega")):
        assert_close_to_ref(x.cpu(), ref, low, what=name)
    for need in ((True, False), (False, True)):  # one alone equals that of both
        alone = ops.fuse_heads_backward(dout.to(device), w, omega, groups, need_dw=need[0],
                                        need_domega=need[1])  # fmt: skip
        assert [x.numel() > 0 for x in alone] == list(need)
        x, y = alone[need[1]].cpu(), got[need[1]].cpu()
        torch.testing.assert_close(x, y, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_outputs_past_the_caches(dtype):
    """From 8 MB on outputs are streamed, on every ISA; a tail of columns keeps the plain way."""
    for m in (8192, 8200):
        w, omega, groups = problem(2, 4, 256, m, dtype)
        dout = fill((2, 4, *w.shape[1:]), dtype, seed=3)
        x = reference.fuse_heads(w[:, :3], omega[..., :3], groups)
        for isa in tenfold.cpu_capabilities():
            with forced_isa(isa), poisoned_memory():
                got = ops.fuse_heads(w, omega, groups)
                dw, _ = ops.fuse_heads_backward(dout, w, omega, groups)
            torch.testing.assert_close(got[:, :, :3], x, rtol=1e-2, atol=1e-5)
            assert bool(got.isfinite().all()) and bool(dw.isfinite().all())
        want = gradients(reference.fuse_heads, w, omega, groups, dout)[0]
        torch.testing.assert_close(dw, want, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(kind, dtype, device):
    w, omega, groups = problem(2, 3, 5, 48, dtype, device)
    dout = fill((2, 3, 5, 48), dtype, seed=1).to(device)
    for f in (ops.fuse_heads, ops.collapse_heads):
        assert torch.equal(f(layout(w, kind), layout(omega, kind), groups), f(w, omega, groups))
    want = ops.fuse_heads_backward(dout, w, omega, groups)
    got = ops.fuse_heads_backward(layout(dout, kind), layout(w, kind), layout(omega, kind), groups)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    assert torch.equal(ops.head_cka(layout(w, kind)), ops.head_cka(w))
    every_other = torch.stack([w, w], -1).flatten(-2)[..., ::2]
    assert torch.equal(ops.fuse_heads(every_other, omega, groups), ops.fuse_heads(w, omega, groups))


@pytest.mark.parametrize("values", VALUES)
def test_values(values, device):
    w, omega, groups = problem(2, 4, 3, 50, device=device, values=values)
    there = [x.cpu() for x in (w, omega, groups)]
    for name in ("fuse_heads", "collapse_heads"):
        want = getattr(reference, name)(there[0].double(), there[1].double(), there[2])
        lowp = getattr(reference, name)(*there)
        assert_close_to_ref(getattr(ops, name)(w, omega, groups).cpu(), want, lowp)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(n=st.integers(0, 4), g=st.integers(1, 13), d=st.integers(0, 9), m=st.integers(0, 70))
def test_odd_shapes(n, g, d, m, device):
    w, omega, groups = problem(n, g, d, m, device=device)
    got = ops.fuse_heads(w, omega, groups)
    torch.testing.assert_close(got, reference.fuse_heads(w, omega, groups), rtol=1e-4, atol=1e-4)
    dout = torch.ones_like(got)
    got = gradients(ops.fuse_heads, w, omega, groups, dout)
    want = gradients(reference.fuse_heads, w, omega, groups, dout)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_returns_the_heads(dtype, device):
    w, _, groups = problem(3, 4, 6, 40, dtype, device)
    assert torch.equal(ops.fuse_heads(w, identity(3, 4, 6).to(device), groups), w[groups])


def test_weight_space_equals_state_space(device):
    """Projecting with fused weights equals fusing the projections: before rotation it is linear."""
    w, omega, groups = problem(2, 3, 8, 20, device=device)
    x = torch.randn(2, 5, 20, device=device)
    fused = torch.einsum("bsm,nhim->bnhsi", x, ops.fuse_heads(w, omega, groups))
    states = torch.einsum("bsm,njim->bnjsi", x, w[groups])
    torch.testing.assert_close(fused, reference.fuse_states(states, omega), rtol=1e-4, atol=1e-4)


def test_state_space_after_rotation_needs_tied_omega():
    w, omega, groups = problem(1, 4, 8, 20)
    x, angle = torch.randn(1, 6, 20), torch.rand(6, 4) * 3
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))

    def rotate(k):
        return k * cos + torch.cat([-k[..., 4:], k[..., :4]], -1) * sin

    tied = omega.clone()
    tied[..., 4:] = tied[..., :4]
    for each, equal in ((tied, True), (omega, False)):
        fused = rotate(torch.einsum("bsm,nhim->bnhsi", x, ops.fuse_heads(w, each, groups)))
        states = rotate(torch.einsum("bsm,njim->bnjsi", x, w[groups]))
        after = reference.fuse_states(states, each)
        assert torch.allclose(fused, after, rtol=1e-4, atol=1e-4) == equal


@pytest.mark.parametrize("dtype", DTYPES)
def test_collapse_with_equal_shares_is_mean_pooling(dtype, device):
    w, _, groups = problem(3, 4, 6, 40, dtype, device)
    omega = torch.full((3, 4, 4, 6), 0.25, device=device)
    mean = w[groups].float().mean(1).to(dtype)
    torch.testing.assert_close(ops.collapse_heads(w, omega, groups), mean)


def test_collapse_of_equal_rows_is_any_fused_head(device):
    w, omega, groups = problem(2, 4, 6, 40, device=device)
    omega = omega[:, :1].expand(-1, 4, -1, -1)
    fused, one = ops.fuse_heads(w, omega, groups), ops.collapse_heads(w, omega, groups)
    for h in range(4):
        torch.testing.assert_close(one, fused[:, h], rtol=1e-5, atol=1e-5)


def test_scalar_omega_by_expansion(device):
    w, omega, groups = problem(2, 3, 7, 20, device=device)
    scalar = omega[..., :1].clone().requires_grad_()
    got = ops.fuse_heads(w, scalar.expand(-1, -1, -1, 7), groups)
    want = torch.einsum("nhj,njim->nhim", scalar.detach()[..., 0], w[groups])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert scalar.grad.shape == (2, 3, 3, 1)


def test_gradcheck_of_the_references():
    w, omega, groups = problem(2, 3, 2, 4)
    w, omega = w.double().requires_grad_(), omega.double().requires_grad_()
    for f in (reference.fuse_heads, reference.collapse_heads):
        assert torch.autograd.gradcheck(lambda a, b, f=f: f(a, b, groups), (w, omega))
    assert torch.autograd.gradcheck(reference.fusion_mse, (omega,))
    states = torch.randn(2, 2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.fuse_states, (states, omega))


def test_second_derivatives_are_refused():
    w, omega, groups = problem(1, 2, 2, 4)
    out = ops.fuse_heads(w.requires_grad_(), omega, groups).square().sum()
    with pytest.raises(RuntimeError, match="inference only"):
        torch.autograd.grad(out, w, create_graph=True)


# -- fusion_mse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 2, 5), (2, 4, 128), (5, 9, 17), (1, 32, 64)])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_fusion_mse_matches_the_pair_loop(shape, spread, device):
    """Also where heads are almost equal: there the textbook closed form cancels."""
    n, g, d = shape
    omega = fill((n, g, g, d), torch.float32) * spread + 1.0
    want = omega.double().requires_grad_()
    got = omega.to(device).requires_grad_()
    ref, mse = reference.fusion_mse(want), ops.fusion_mse(got)
    assert mse.dtype == torch.float32 and mse.shape == (n,)
    torch.testing.assert_close(mse.detach().cpu().double(), ref.detach(), rtol=1e-5, atol=0)
    weight = torch.arange(1.0, n + 1)
    (ref * weight).sum().backward()
    (mse * weight.to(device)).sum().backward()
    scale = float(want.grad.abs().max()) if g > 1 else 1.0
    torch.testing.assert_close(got.grad.cpu().double(), want.grad, rtol=1e-3, atol=2e-4 * scale)


@pytest.mark.parametrize(("g", "pair"), [(2, 1.0), (4, 0.5), (8, 0.25)])
def test_fusion_mse_of_identity_is_the_specifications_number(g, pair, device):
    """2 / g a pair, over j; each of the d columns has that before the mean over d."""
    omega = identity(3, g, 16).to(device)
    columns = (omega[:, 0] - omega[:, 1]).square().mean(1)
    torch.testing.assert_close(columns, torch.full_like(columns, pair))
    torch.testing.assert_close(ops.fusion_mse(omega), torch.full((3,), pair, device=device))


def test_fusion_mse_of_equal_rows_and_of_one_head_is_zero(device):
    rows = torch.randn(2, 1, 4, 8, device=device).expand(2, 4, 4, 8)
    assert float(ops.fusion_mse(rows).abs().max()) < 1e-12
    assert ops.fusion_mse(torch.randn(3, 1, 1, 8, device=device)).tolist() == [0.0] * 3
    one = torch.randn(3, 1, 1, 8, device=device, requires_grad=True)
    ops.fusion_mse(one).sum().backward()
    assert not one.grad.any()


# -- head_cka ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 33, 130), (2, 130, 257), (9, 64, 300)])
@pytest.mark.parametrize("center", [False, True])
def test_head_cka_matches_reference(shape, dtype, center, device):
    w = fill(shape, dtype) + 0.25
    ref = reference.head_cka(w.double(), center=center)
    for isa in tenfold.cpu_capabilities() if device.type == "cpu" else [tenfold.cpu_capability()]:
        with forced_isa(isa), poisoned_memory():
            got = ops.head_cka(w.to(device), center=center)
        assert got.dtype == torch.float32 and got.shape == (shape[0],) * 2
        tolerance = {"atol": 3e-6, "rtol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(got.cpu().double(), ref, **tolerance)


def test_head_cka_properties(device):
    """Self 1, symmetric, within [0, 1], invariant to scaling and rotation of a head's basis."""
    w = torch.randn(5, 16, 300, device=device)
    q = torch.linalg.qr(torch.randn(16, 16, device=device))[0]
    moved = w.clone()
    moved[2] = 3.5 * (q @ w[2])
    a, b = ops.head_cka(w), ops.head_cka(moved)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.diagonal(), torch.ones(5, device=device))
    assert torch.equal(a, a.T) and float(a.min()) >= 0 and float(a.max()) <= 1 + 1e-6
    both = torch.stack([w[2], moved[2]])
    torch.testing.assert_close(ops.head_cka(both), torch.ones(2, 2, device=device))


def test_head_cka_of_unrelated_heads_is_d_over_m(device):
    """The specification's number: 0.03 for 4096 x 128."""
    cka = ops.head_cka(torch.randn(2, 128, 4096).to(device))
    assert abs(float(cka[0, 1]) - 128 / 4096) < 0.002


def test_head_cka_of_zeros_is_nan(device):
    w = torch.randn(3, 4, 20, device=device)
    w[1] = 0
    got = ops.head_cka(w)
    assert bool(got[1].isnan().all()) and bool(got[:, 1].isnan().all())
    assert bool(got[0, 2].isfinite())
    assert not ops.head_cka(torch.zeros(0, 4, 20, device=device)).numel()


def test_head_cka_keeps_no_gram_matrix():
    setup = """
        from tenfold import ops
        w = torch.randn(32, 64, 256)
        ops.head_cka(w[:2])
    """
    assert peak_growth(setup, "ops.head_cka(w)") < 32 * 64 * 32 * 64 * 4 // 4


# -- all of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [3, 12])
def test_standing_checks(g, device):
    w, omega, groups = problem(2, g, 5, 70, torch.bfloat16, device)
    dout = fill((2, g, 5, 70), torch.bfloat16, seed=2).to(device)
    check_op(raw.fuse_heads, (w, omega, groups), rtol=1e-2)
    check_op(raw.fuse_heads_backward, (dout, w, omega, groups), rtol=1e-2, atol=1e-4)
    check_op(raw.collapse_heads, (w, omega, groups), rtol=1e-2)
    check_op(raw.fusion_mse, (omega,))
    check_op(raw.fusion_mse_backward, (fill((2,), torch.float32).to(device), omega))
    check_op(raw.head_cka, (w,))
    check_op(raw.head_cka, (w,), {"center": True})


def test_differentiable_standing_checks(device):
    w, omega, groups = problem(2, 4, 5, 70, device=device)
    leaves = (w.requires_grad_(), omega.requires_grad_(), groups)
    check_opcheck(raw.fuse_heads, leaves)
    check_opcheck(raw.fusion_mse, leaves[1:2])

    def step(w, omega, groups):
        loss = ops.fuse_heads(w, omega, groups).square().mean() + ops.fusion_mse(omega).sum()
        return torch.autograd.grad(loss, (w, omega))

    check_compiles(lambda w, o, g: ops.fuse_heads(w, o, g).tanh() * ops.fusion_mse(o).sum(), leaves)
    if device.type == "cpu":
        check_deterministic(step, leaves)
        check_isas_agree(step, leaves)
    check_inputs_unmodified(step, leaves)


def test_compiles_with_inductor():
    w, omega, groups = problem(2, 4, 5, 70)
    check_compiles(ops.fuse_heads, (w, omega, groups), backend="inductor", dynamic=None)


def test_large_problem_is_deterministic():
    """Enough work for threads, and outputs past the caches."""
    w, omega, groups = problem(2, 4, 64, 4096)
    check_deterministic(raw.fuse_heads, (w, omega, groups))
    check_deterministic(raw.head_cka, (w[:, :, :512],))
    check_strides_equal_fake(raw.collapse_heads, (w, omega, groups))


@cuda_only
def test_cuda_graph(device):
    first, fresh = (
        (fill((8, 4, 64), torch.bfloat16, seed=s).to(device), torch.randn(2, 4, 4, 4, device=device),
         torch.randperm(8).view(2, 4).to(device))
        for s in (0, 1)
    )  # fmt: skip
    check_cuda_graph(ops.fuse_heads, first, None, fresh)
    check_cuda_graph(ops.collapse_heads, first, None, fresh)
    check_cuda_graph(ops.fusion_mse, first[1:2], None, fresh[1:2])
    check_cuda_graph(ops.head_cka, first[:1], None, fresh[:1])
    grads = [(torch.randn(2, 4, 4, 64, device=device).bfloat16(), *x) for x in (first, fresh)]
    check_cuda_graph(ops.fuse_heads_backward, grads[0], None, grads[1])


class TestBadInput:
    def bad(self, name, args, error, *words, **kwargs):
        check_errors(getattr(ops, name), getattr(raw, name), args, kwargs, error, name, *words)

    def test_fuse_and_collapse(self, device):
        w, omega, groups = problem(2, 3, 4, 8, device=device)
        for name in ("fuse_heads", "collapse_heads"):
            self.bad(name, (w.double(), omega, groups), TypeError, "w", "float64", "bfloat16")
            self.bad(name, (w, omega.half(), groups), TypeError, "omega", "float32", "float16")
            self.bad(name, (w, omega, groups.float()), TypeError, "groups", "int32", "float32")
            self.bad(name, (w[0], omega, groups), ValueError, "w", "[H, d, m]", "[4, 8]")
            self.bad(name, (w, omega, groups[0]), ValueError, "groups", "[N, g]", "[3]")
            self.bad(name, (w[:5], omega, groups), ValueError, "N * g = H", "[2, 3]", "[5, 4, 8]")
            self.bad(name, (w, omega, groups[:1]), ValueError, "N * g = H", "[1, 3]")
            self.bad(
                name, (w, omega[:1], groups), ValueError, "omega", "[2, 3, 3, 4]", "[1, 3, 3, 4]"
            )
            self.bad(name, (w, omega[..., :1], groups), ValueError, "omega", "[2, 3, 3, 1]")
            self.bad(name, (w[:0], omega, groups[:, :0]), ValueError, "g >= 1", "[2, 0]")

    def test_groups_that_are_no_partition(self):
        """CPU only: CUDA does not wait for values on the device."""
        w, omega, groups = problem(2, 3, 4, 8)
        groups = torch.tensor([[0, 1, 2], [3, 4, 5]])
        dout = torch.randn(2, 3, 4, 8)
        for name, first in (("fuse_heads", ()), ("collapse_heads", ()),
                            ("fuse_heads_backward", (dout,))):  # fmt: skip
            twice, beyond, negative = (groups.clone() for _ in range(3))
            twice[1, 2], beyond[0, 1], negative[1, 0] = 2, 6, -1
            self.bad(name, (*first, w, omega, twice), ValueError, "every head once", "head 2",
                     "[0, 2]", "[1, 2]")  # fmt: skip
            self.bad(name, (*first, w, omega, beyond), IndexError, "groups[0, 1]", "[0, 6)", "6")
            self.bad(name, (*first, w, omega, negative), IndexError, "groups[1, 0]", "-1")

    def test_backward(self, device):
        w, omega, groups = problem(2, 3, 4, 8, device=device)
        dout = torch.randn(2, 3, 4, 8, device=device)
        name = "fuse_heads_backward"
        self.bad(name, (dout.half(), w, omega, groups), ValueError, "dout", "dtype of w", "float16")
        self.bad(name, (dout[:, :2], w, omega, groups), ValueError, "dout", "[2, 3, 4, 8]")

    def test_fusion_mse(self, device):
        omega = torch.randn(2, 3, 3, 4, device=device)
        self.bad("fusion_mse", (omega.bfloat16(),), TypeError, "omega", "float32", "bfloat16")
        self.bad("fusion_mse", (omega[0],), ValueError, "omega", "[N, g, g, d]", "[3, 3, 4]")
        self.bad("fusion_mse", (omega[:, :2],), ValueError, "omega", "[2, 2, 3, 4]")
        self.bad("fusion_mse", (omega[:, :0, :0],), ValueError, "g >= 1")
        grad = torch.ones(3, device=device)
        self.bad("fusion_mse_backward", (grad, omega), ValueError, "dout", "[N]", "[2]", "[3]")

    def test_head_cka(self, device):
        w = torch.randn(3, 4, 8, device=device)
        self.bad("head_cka", (w.double(),), TypeError, "w", "float64")
        self.bad("head_cka", (w[0],), ValueError, "w", "[H, d, m]")
        with pytest.raises(RuntimeError, match="inference only"):
            ops.head_cka(w.requires_grad_())
