# SPDX-License-Identifier: Apache-2.0
"""What the tests of expert blocks share: problems, plain PyTorch in the tested dtype, the comparison."""

import torch
import torch.nn.functional as F

from tenfold import ops, reference
from tenfold.testing import assert_close_to_ref, on, poisoned_memory

ROUTES = ("random", "one", "empty", "duplicates", "sentinels", "nobody")


def route(tokens, k, n, kind, made):
    """index [T, k] and weight [T, k]."""
    index = torch.randn(tokens, n, generator=made).topk(min(k, n)).indices
    if k > n or kind == "duplicates":
        index = torch.randint(0, n, (tokens, k), generator=made)
        index[:, -1] = index[:, 0]
    if kind == "one":
        index = torch.full((tokens, k), n // 2)
    elif kind == "empty":  # only the first experts
        index = index % max(1, n // 2)
    elif kind == "sentinels":
        index[torch.rand(tokens, k, generator=made) < 0.4] = n + 3
    elif kind == "nobody":
        index = torch.full((tokens, k), n)
    return index, torch.randn(tokens, k, generator=made).softmax(-1)


def experts(shape, dtype, kind="random", seed=0):
    """x, gate_up, down, weight, and index; values about 1."""
    tokens, d, f, n, k = shape
    made = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(tokens, d, generator=made)
    gate_up = torch.randn(n, 2 * f, d, generator=made) / d**0.5 * 1.5
    down = torch.randn(n, d, f, generator=made) / f**0.5 * 2
    index, weight = route(tokens, k, n, kind, made)
    return [x.to(dtype), gate_up.to(dtype), down.to(dtype), weight], index


def lora(shape, rank, dtype, kind="random", seed=0):
    """x, wg, wu, wd, three A, three B, weight, and index."""
    tokens, d, f, n, k = shape
    made = torch.Generator().manual_seed(seed + sum(shape) + rank)

    def draw(*sizes):
        return torch.randn(*sizes, generator=made) / max(sizes[-1], 1) ** 0.5 * 1.5

    base = draw(f, d), draw(f, d), draw(d, f)
    a = draw(n, rank, d), draw(n, rank, d), draw(n, rank, f)
    b = draw(n, f, rank), draw(n, f, rank), draw(n, d, rank)
    index, weight = route(tokens, k, n, kind, made)
    x = torch.randn(tokens, d, generator=made)
    return [t.to(dtype) for t in (x, *base, *a, *b)] + [weight], index


def problem_of(kind, shape, rank, dtype):
    return experts(shape, dtype) if kind == "experts" else lora(shape, rank, dtype)


GROUPS = [  # R, K, N, lengths of groups
    (0, 5, 3, [0, 0]), (5, 7, 0, [2, 3]), (5, 0, 4, [5]), (1, 1, 1, [1]), (30, 33, 17, [3, 0, 20, 7]),
    (70, 300, 401, [1, 40, 0, 29]), (300, 65, 50, [290, 3]), (40, 640, 70, [10, 0, 0, 12]),
]  # fmt: skip
# Of them for Triton's slow interpreter, with fewer blocks: one more than full, in each direction.
TRITON_GROUPS = [
    *GROUPS[:5],
    (70, 140, 150, [1, 40, 0, 29]),
    (75, 65, 50, [66, 3]),
    (40, 260, 70, [10, 0, 0, 12]),
]


def groups(rows, depth, cols, lengths, dtype, gathered):
    made = torch.Generator().manual_seed(rows)
    a = torch.randn(rows, depth, generator=made).to(dtype)
    w = (torch.randn(len(lengths), cols, depth, generator=made) / max(depth, 1) ** 0.5).to(dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    gather = torch.randint(0, rows, (rows + 4,), generator=made) if gathered and rows else None
    return a, w, offsets, gather


def triton_layouts(dtype, gathered):
    """``trans_w`` of the calls that Triton's slow interpreter makes: both where they cost least to check."""
    return (True, False) if dtype == torch.float32 else (not gathered,)


SCALE = 0.75


def run_experts(op, tensors, index, **options):
    x, gate_up, down, weight = tensors
    return op(x, gate_up, down, index, weight, **options)


def run_lora(op, tensors, index, **options):
    x, wg, wu, wd, *ab, weight = tensors
    return op(x, wg, wu, wd, ab[:3], ab[3:], SCALE, index, weight, **options)


def eager_experts(x, gate_up, down, index, weight, allow_sentinel=False):
    """What one writes: every product, activation and weighted row is rounded to the dtype."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, choice = (index == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down[e]) * weight[token, choice, None].to(x.dtype)
        out = out.index_add(0, token, y)
    return out


def eager_lora(x, wg, wu, wd, a, b, scale, index, weight, allow_sentinel=False):
    """The products with the shared block once per token."""
    base = F.linear(x, wg), F.linear(x, wu)
    summed, out = torch.zeros_like(base[0]), torch.zeros_like(x)

    def low(e, part, x):
        return scale * F.linear(F.linear(x, a[part][e]), b[part][e])

    for e in range(a[0].shape[0]):
        token, choice = (index == e).nonzero(as_tuple=True)
        gate, up = (base[part][token] + low(e, part, x[token]) for part in (0, 1))
        y = F.silu(gate) * up * weight[token, choice, None].to(x.dtype)
        summed = summed.index_add(0, token, y)
        out = out.index_add(0, token, low(e, 2, y))
    return F.linear(summed, wd) + out


KINDS = {
    "experts": (run_experts, ops.moe_swiglu_mlp, reference.moe_swiglu_mlp, eager_experts,
                ("out", "x", "gate_up", "down", "weight")),
    "lora": (run_lora, ops.moe_lora_swiglu_mlp, reference.moe_lora_swiglu_mlp, eager_lora,
             ("out", "x", "wg", "wu", "wd", "a_g", "a_u", "a_d", "b_g", "b_u", "b_d", "weight")),
}  # fmt: skip


def step(run, op, tensors, index, up, **options):
    """The result and the gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = run(op, leaves, index, **options)
    grads = torch.autograd.grad(out, leaves, up.to(out), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves))]


def compare(kind, problem, device, *, samples=1, **options):
    """The kernel against float64, judged by plain PyTorch. ``problem(seed)``: tensors and index."""
    run, op, definition, eager, names = KINDS[kind]
    sides = []
    for seed in range(samples):
        tensors, index = problem(seed)
        up = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(seed))
        with poisoned_memory():
            mine = step(run, op, on(device, tensors), index.to(device), up.to(device), **options)
        exact = step(run, definition, [t.double() for t in tensors], index, up, **options)
        low = step(run, eager, tensors, index, up, **options)
        for x, y in zip(mine, low):
            assert x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous()
        sides.append(([x.cpu() for x in mine], exact, low))
    for name, *three in zip(names, *(zip(*side) for side in zip(*sides))):
        assert_close_to_ref(*(torch.cat([x.flatten() for x in t]) for t in three), what=name)
