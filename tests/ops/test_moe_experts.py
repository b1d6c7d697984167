# SPDX-License-Identifier: Apache-2.0
"""moe_swiglu_mlp, moe_lora_swiglu_mlp, grouped_gemm and its weight gradient against their definitions."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from moe_expert_cases import (
    GROUPS,
    KINDS,
    ROUTES,
    SCALE,
    compare,
    eager_experts,
    experts,
    groups,
    lora,
    problem_of,
    run_experts,
    run_lora,
    step,
)

import tenfold
from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    assert_close_to_ref,
    check_deterministic,
    fill,
    forced_isa,
    on,
    poisoned_memory,
)  # fmt: skip

raw = torch.ops.tenfold
SHAPES = [  # T, d, f, n, k: none, one, odd, few and many rows of an expert, past a strip, a tile, a block of rows
    (0, 5, 3, 2, 1), (1, 1, 1, 1, 1), (7, 5, 6, 3, 2), (5, 77, 70, 2, 2), (1, 64, 48, 8, 2), (33, 17, 31, 5, 3),
    (40, 96, 130, 4, 2), (100, 257, 65, 3, 2), (300, 48, 100, 1, 1), (64, 640, 33, 2, 2), (150, 33, 450, 3, 3),
    (9, 300, 500, 4, 1),
]  # fmt: skip


def draws(shape):
    """Rounding of few numbers is a coin toss: small problems count several times."""
    size = math.prod(shape[:2])
    return 1 if size == 0 else 64 if size < 100 else 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape, dtype, device):
    compare("experts", lambda seed: experts(shape, dtype, seed=seed), device, samples=draws(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROUTES)
def test_routes(kind, dtype, device):
    options = {"allow_sentinel": kind in ("sentinels", "nobody")}
    for shape in ((50, 40, 33, 6, 2), (300, 20, 35, 3, 3)):
        compare("experts", lambda s, p=shape: experts(p, dtype, kind, s), device, **options)
    compare("lora", lambda s: lora((50, 40, 33, 6, 2), 5, dtype, kind, s), device, samples=6, **options)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank"), [((0, 5, 3, 2, 1), 2), ((1, 1, 1, 1, 1), 1), ((7, 5, 6, 3, 2), 3),
                                             ((40, 96, 130, 4, 2), 16), ((290, 33, 65, 2, 2), 8),
                                             ((30, 270, 400, 3, 2), 65), ((9, 12, 10, 2, 2), 0)])  # fmt: skip
def test_lora_matches_the_definition(shape, rank, dtype, device):
    """The definition makes every product slot by slot."""
    compare("lora", lambda seed: lora(shape, rank, dtype, seed=seed), device, samples=draws(shape))


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_meets_the_rule(isa, dtype):
    cpu = torch.device("cpu")
    with forced_isa(isa):
        for shape in ((33, 77, 31, 2, 2), (90, 130, 49, 2, 1), (3, 100, 70, 2, 2)):
            compare("experts", lambda s, p=shape: experts(p, dtype, seed=s), cpu, samples=8)
        compare("lora", lambda s: lora((70, 66, 35, 2, 2), 9, dtype, seed=s), cpu, samples=8)


# -- acceptance checks of the specification ----------------------------------------------------------


def same_experts(x, gate_up, down, n):
    return gate_up[:1].expand(n, -1, -1), down[:1].expand(n, -1, -1)


def dense(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def gated(op, x, gate_up, down, router, k, renormalize=True):
    p = (x @ router.T).softmax(-1)
    weight, index = p.topk(k)
    weight = weight / weight.sum(-1, keepdim=True) if renormalize else weight
    return op(x, gate_up, down, index, weight)


def test_identical_experts_are_the_dense_block(device):
    """Check 1: 1e-15 in fp64 (definition), 5e-7 in fp32; the router's gradient is 0 with renormalisation only."""
    (x, gate_up, down, _), _ = experts((64, 32, 48, 8, 2), torch.float64)
    x, gate_up, down = x / 4, gate_up / 2, down / 2
    router = torch.randn(8, 32, dtype=torch.float64)
    alike = same_experts(x, gate_up, down, 8)
    got = gated(reference.moe_swiglu_mlp, x, *alike, router, 2)
    assert (got - dense(x, gate_up[0], down[0])).abs().max() <= 1e-15
    x, *alike, router = (t.float().to(device) for t in (x, *alike, router))
    want = dense(x.double(), alike[0][0].double(), alike[1][0].double())
    for renormalize in (True, False):
        r = router.clone().requires_grad_()
        got = gated(ops.moe_swiglu_mlp, x, *alike, r, 2, renormalize)
        got.mean().backward()
        top = float(r.grad.abs().max())
        if renormalize:
            assert (got - want).abs().max() <= 5e-7 and top <= 1e-7
        else:
            assert top > 1e-5


def test_all_experts_are_the_dense_mixture(device):
    """Check 2: k = n, and n = 1 with weight 1."""
    (x, gate_up, down, _), _ = experts((40, 24, 36, 4, 4), torch.float32)
    p = torch.randn(40, 4).softmax(-1)
    exact = [dense(x.double(), gate_up[e].double(), down[e].double()) for e in range(4)]
    want = sum(p[:, e, None].double() * y for e, y in enumerate(exact))
    weight, index = p.topk(4)
    got = ops.moe_swiglu_mlp(*on(device, (x, gate_up, down, index, weight))).cpu()
    assert_close_to_ref(got, want, eager_experts(x, gate_up, down, index, weight))
    at, one = torch.zeros(40, 1, dtype=torch.int32), torch.ones(40, 1)
    got = ops.moe_swiglu_mlp(*on(device, (x, gate_up[:1], down[:1], at, one))).cpu()
    want = dense(x.double(), gate_up[0].double(), down[0].double())
    assert_close_to_ref(got, want, dense(x, gate_up[0], down[0]))


def test_gradcheck_of_the_definitions():
    """Check 3: T=7, d=5, f=6, n=3, k=2 in fp64, one expert empty."""
    tensors, index = experts((7, 5, 6, 3, 2), torch.float64, "random")
    index = index.clamp(max=1)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: run_experts(reference.moe_swiglu_mlp, t, index), leaves)  # fmt: skip
    tensors, _ = lora((7, 5, 6, 3, 2), 2, torch.float64)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: run_lora(reference.moe_lora_swiglu_mlp, t, index), leaves)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_without_tokens_has_gradient_zero(dtype, device):
    """Check 3: bit for bit, also where memory holds NaN, and T = 0."""
    for tokens in (30, 0):
        tensors, index = experts((tokens, 20, 24, 3, 2), dtype)
        index[index == 1] = 2
        with poisoned_memory():
            up = torch.ones(tokens, 20, device=device)
            mine = on(device, tensors), index.to(device), up
            _, _, gate_up, down, _ = step(run_experts, ops.moe_swiglu_mlp, *mine)
        for grad in (gate_up, down):
            assert torch.equal(grad[1], torch.zeros_like(grad[1]))
            assert tokens == 0 or all(grad[e].abs().sum() > 0 for e in (0, 2))
            assert tokens > 0 or not grad.any()


def test_fifty_shapes_equal_the_plain_loop(device):
    """Check 4: fp32 rtol 1e-5; bf16 atol 1.4e-2, rtol 2e-2 on values of about 1."""
    made = torch.Generator().manual_seed(4)
    for i in range(50):
        t, d, f, n = (int(torch.randint(1, most, (1,), generator=made)) for most in (60, 90, 90, 9))
        shape = t, d, f, n, int(torch.randint(1, min(n, 4) + 1, (1,), generator=made))
        for dtype in (torch.float32, torch.bfloat16):
            tensors, index = experts(shape, dtype, seed=i)
            got = run_experts(ops.moe_swiglu_mlp, on(device, tensors), index.to(device)).cpu()
            want = run_experts(reference.moe_swiglu_mlp, [x.double() for x in tensors], index)
            rtol, atol = (1e-5, 2e-6) if dtype == torch.float32 else (2e-2, 1.4e-2)
            scale = max(1.0, float(want.abs().max())) / 3  # values about 1
            torch.testing.assert_close(got.double() / scale, want / scale, rtol=rtol, atol=atol)


def test_order_of_tokens_and_of_experts_does_not_matter(device):
    """Check 5: bit for bit."""
    (x, gate_up, down, weight), index = on(device, experts((50, 40, 33, 6, 2), torch.float32))
    want = ops.moe_swiglu_mlp(x, gate_up, down, index, weight)
    tokens, names = torch.randperm(50, device=device), torch.randperm(6, device=device)
    got = ops.moe_swiglu_mlp(x[tokens], gate_up, down, index[tokens], weight[tokens])
    assert torch.equal(got, want[tokens])
    renamed = torch.empty_like(names).scatter_(0, names, torch.arange(6, device=device))[index]
    assert torch.equal(ops.moe_swiglu_mlp(x, gate_up[names], down[names], renamed, weight), want)


def test_lora_equals_the_slot_form_and_the_base(device):
    """Check 11: 1e-6; with all B = 0 the base model."""
    tensors, index = lora((40, 48, 64, 4, 2), 8, torch.float32)
    tensors = [tensors[0], *(t / 2 for t in tensors[1:-1]), tensors[-1]]
    want = run_lora(reference.moe_lora_swiglu_mlp, [t.double() for t in tensors], index)
    got = run_lora(ops.moe_lora_swiglu_mlp, on(device, tensors), index.to(device)).cpu()
    assert (got - want).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))
    for i in range(7, 10):
        tensors[i] = torch.zeros_like(tensors[i])
    x, wg, wu, wd = tensors[:4]
    half = torch.full((40, 2), 0.5)
    got = run_lora(ops.moe_lora_swiglu_mlp, on(device, [*tensors[:-1], half]), index.to(device))
    plain = torch.cat([wg, wu])[None], wd[None]
    one = torch.zeros(40, 1, dtype=torch.int32), torch.ones(40, 1)
    assert torch.equal(got, ops.moe_swiglu_mlp(*on(device, (x, *plain, *one))))


def test_transformers_mixtral(device):
    """Check 4: outputs and gradients of the stock block."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4,
                           num_experts_per_tok=2, experts_implementation="eager")  # fmt: skip
    block = mixtral.MixtralExperts(config).to(device)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    (x, _, _, weight), index = on(device, experts((60, 32, 48, 4, 2), torch.float32))
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    parameters = block.gate_up_proj, block.down_proj
    theirs = block(leaves[0], index, leaves[1])
    want = torch.autograd.grad(theirs.sum(), (*leaves, *parameters))
    mine = ops.moe_swiglu_mlp(leaves[0], *parameters, index, leaves[1])
    got = torch.autograd.grad(mine.sum(), (*leaves, *parameters))
    for a, b in zip((mine, *got), (theirs, *want)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


# -- what is asked for -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_some_tensors(kind, device):
    """Equal to those of all, and none where none is asked for."""
    run, op, *_ = KINDS[kind]
    tensors, index = problem_of(kind, (40, 30, 20, 4, 2), 6, torch.float32)
    tensors, index = on(device, tensors), index.to(device)
    up = torch.randn(40, 30, device=device)
    want = step(run, op, tensors, index, up)[1:]
    for i in range(len(tensors)):
        leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
        out = run(op, leaves, index)
        out.backward(up)
        assert [t.grad is not None for t in leaves] == [j == i for j in range(len(leaves))]
        assert torch.equal(leaves[i].grad, want[i])
        frozen = [t.detach() for t in tensors]
        assert torch.equal(run(op, frozen, index), out) and not run(op, frozen, index).requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(kind, dtype, device):
    """Strided inputs, an expanded upstream gradient (stride 0) and int32 indices change no bit."""
    run, op, *_ = KINDS[kind]
    shape = 36, 40, 25, 4, 2
    tensors, index = on(device, problem_of(kind, shape, 6, dtype))
    ones = torch.ones(36, 40, device=device)
    want = step(run, op, tensors, index, ones)
    expanded = torch.ones(1, 1, device=device).expand(36, 40)
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    sliced = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in tensors]
    for mine, at in ((tensors, index.int()), (turned, index.t().contiguous().t()), (sliced, index)):
        for a, b in zip(step(run, op, mine, at, expanded), want):
            assert torch.equal(a, b)
    folded = [tensors[0].view(4, 9, 40), *tensors[1:-1], tensors[-1].view(4, 9, 2)]
    for a, b in zip(step(run, op, folded, index.view(4, 9, 2), ones.view(4, 9, 40)), want):
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_runs_do_not_matter(kind, dtype, device):
    run, op, *_ = KINDS[kind]
    for shape in ((130, 100, 210, 3, 2), (4, 400, 330, 8, 2)):
        tensors, index = problem_of(kind, shape, 7, dtype)
        call = functools.partial(step, run, op)
        check_deterministic(call, on(device, (tensors, index, torch.randn(shape[:2]))))


def test_nan_and_inf_stay_in_their_rows(device):
    (x, gate_up, down, weight), index = experts((40, 30, 20, 4, 2), torch.float32)
    want = ops.moe_swiglu_mlp(*on(device, (x, gate_up, down, index, weight)))
    x[3, 5], x[17, 0], weight[30, 1] = math.nan, math.inf, math.nan
    got = ops.moe_swiglu_mlp(*on(device, (x, gate_up, down, index, weight)))
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 17, 30]] = True
    assert torch.equal(got[~bad], want[~bad]) and not got[bad].isfinite().all(-1).any()


def test_autocast(device):
    (x, gate_up, down, weight), index = on(device, experts((20, 30, 20, 4, 2), torch.float32))
    low = [t.bfloat16() for t in (x, gate_up, down)]
    with torch.autocast(device.type, torch.bfloat16):
        got = ops.moe_swiglu_mlp(x, gate_up, down, index, weight)
    assert torch.equal(got, ops.moe_swiglu_mlp(*low, index, weight))
    assert torch.equal(ops.moe_swiglu_mlp(*low, index, weight.bfloat16()),
                       ops.moe_swiglu_mlp(*low, index, weight.bfloat16().float()))  # fmt: skip


# -- grouped_gemm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("case", GROUPS)
def test_grouped_gemm(case, gathered, dtype, device):
    """Both layouts, both gradients; rows past the last group are 0."""
    a, w, offsets, gather = groups(*case, dtype, gathered)
    rows = a if gather is None else a[gather]
    up = torch.randn(rows.shape[0], case[2])

    def sides(op, a, w, trans_w, gather, offsets=offsets, up=up):
        leaves = a.detach().requires_grad_(), w.detach().requires_grad_()
        out = op(*leaves, offsets, trans_w, gather)
        return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, up.to(out)))]  # fmt: skip

    def eager(a, w, offsets, trans_w, gather):
        rows = a if gather is None else a[gather]
        parts = [rows[i:j] @ (m.t() if trans_w else m)
                 for i, j, m in zip(offsets.tolist(), offsets.tolist()[1:], w)]  # fmt: skip
        out = torch.cat(parts)
        return F.pad(out, (0, 0, 0, len(rows) - len(out)))

    for trans_w in (True, False):
        m = w if trans_w else w.transpose(1, 2).contiguous()
        with poisoned_memory():
            mine = sides(ops.grouped_gemm, *on(device, (a, m, trans_w, gather, offsets, up)))
        exact = sides(reference.grouped_gemm, a.double(), m.double(), trans_w, gather)
        low = sides(eager, a, m, trans_w, gather)
        for name, x, y, z in zip(("out", "a", "w"), mine, exact, low):
            assert_close_to_ref(x, y, z, what=name)
        assert not mine[0][sum(case[3]) :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_gemm_wgrad(dtype, device):
    """A group without rows: exactly 0."""
    a, _, offsets, gather = groups(40, 60, 1, [11, 0, 9, 0], dtype, True)
    dy = fill((44, 50), dtype)
    with poisoned_memory():
        got = ops.grouped_gemm_wgrad(*on(device, (dy, a, offsets, gather))).cpu()
    want = reference.grouped_gemm_wgrad(dy.double(), a.double(), offsets, gather)
    assert_close_to_ref(got, want, reference.grouped_gemm_wgrad(dy, a, offsets, gather))
    assert got.dtype == dtype and not got[[1, 3]].any() and got[[0, 2]].any()


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weight_gradients(isa, dtype):
    """From 16 MB on aligned rows are written past the caches: of 2064 numbers in bf16 every other one."""
    a, _, offsets, gather = groups(8, 2064, 1, [3, 0], dtype, True)
    dy = fill((12, 2100), dtype)
    with forced_isa(isa), poisoned_memory():
        got = ops.grouped_gemm_wgrad(dy, a, offsets, gather)
        small = ops.grouped_gemm_wgrad(dy[:, :64].contiguous(), a, offsets, gather)
    assert got.nbytes >= 16 << 20 and not got[1].any()
    few = slice(None, None, 41)  # of the rows
    rows, cols = a[gather[:3]], dy[:3, few]
    assert_close_to_ref(got[0, few], cols.double().T @ rows.double(), cols.T @ rows)
    assert torch.equal(got[0, :64], small[0])


def test_grouped_gemm_equals_torch(device):
    """Check 4: the product of torch.nn.functional.grouped_mm."""
    a, w, offsets, _ = groups(32, 64, 48, [8, 0, 24], torch.bfloat16, False)
    a, w, offsets = on(device, (a, w, offsets))
    want = F.grouped_mm(a, w.transpose(1, 2), offs=offsets[1:])
    got = ops.grouped_gemm(a, w, offsets)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_scale_multiplies_the_low_rank_part(device):
    tensors, index = on(device, lora((20, 12, 10, 3, 2), 4, torch.float32))
    x, wg, wu, wd, *ab, weight = tensors
    twice = [2 * SCALE * b for b in ab[3:]]
    got = ops.moe_lora_swiglu_mlp(x, wg, wu, wd, ab[:3], twice, 1.0, index, weight)
    want = ops.moe_lora_swiglu_mlp(x, wg, wu, wd, ab[:3], ab[3:], 2 * SCALE, index, weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
