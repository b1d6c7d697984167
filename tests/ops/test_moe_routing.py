# SPDX-License-Identifier: Apache-2.0
"""The routing ops together, around experts in plain PyTorch: UpIT's acceptance checks 1, 2, 4 and 5."""

import pytest
import torch
from moe_cases import rand
from torch.nn.functional import silu

from tenfold import ops, reference


class Experts:
    """n feed-forward blocks, all the same with ``identical``."""

    def __init__(self, n, d, f, dtype=torch.float32, identical=False):
        many = 1 if identical else n
        gate_up, down = rand(many, 2 * f, d, scale=d**-0.5), rand(many, d, f, seed=1, scale=f**-0.5)
        self.gate_up, self.down = (w.expand(n, -1, -1).to(dtype) for w in (gate_up, down))
        self.n = n

    def to(self, device):
        self.gate_up, self.down = self.gate_up.to(device), self.down.to(device)
        return self

    def __call__(self, e, x):
        gate, up = (x @ self.gate_up[e].t()).chunk(2, -1)
        return (silu(gate) * up) @ self.down[e].t()


def routed(module, experts, x, logits, k, renormalize=True):
    """The layer by the ops of ``module``."""
    weight, index = module.moe_gate(logits, k, renormalize)
    order, inverse, _, offsets = module.moe_sort(index, experts.n)
    slots = module.moe_permute(x, order, k)
    bounds = offsets.tolist()
    y = torch.cat([experts(e, slots[bounds[e] : bounds[e + 1]]) for e in range(experts.n)])
    weight = weight.to(y.dtype) if y.dtype == torch.float64 else weight
    return module.moe_combine(y, weight, inverse)


def plain_loop(experts, x, logits, k):
    """What transformers' eager experts do."""
    p = logits.float().softmax(-1)
    top, index = p.topk(k)
    top = (top / top.sum(-1, keepdim=True)).to(x.dtype)
    out = torch.zeros_like(x)
    for e in range(experts.n):
        token, j = (index == e).nonzero(as_tuple=True)
        out.index_add_(0, token, experts(e, x[token]) * top[token, j, None])
    return out


@pytest.mark.parametrize(
    "module, dtype, limit", [(reference, torch.float64, 1e-15), (ops, torch.float32, 5e-7)]
)
def test_identical_experts_are_dense(module, dtype, limit, device):
    device = torch.device("cpu") if module is reference else device
    experts = Experts(4, 16, 24, dtype, identical=True).to(device)
    x, logits = (
        rand(40, 16, dtype=dtype, scale=0.5).to(device),
        rand(40, 4, dtype=dtype, seed=3).to(device),
    )
    got = routed(module, experts, x, logits, 2)
    assert (got - experts(0, x)).abs().max() <= limit


@pytest.mark.parametrize("module", [reference, ops])
def test_identical_experts_do_not_move_a_renormalized_router(module, device):
    device = torch.device("cpu") if module is reference else device
    experts = Experts(4, 16, 24, identical=True).to(device)
    x = rand(40, 16, scale=0.5).to(device)
    logits = rand(40, 4, seed=3).to(device).requires_grad_()

    def grad(renormalize):
        out = routed(module, experts, x, logits, 2, renormalize)
        return torch.autograd.grad(out.square().mean(), logits)[0].abs().max()

    assert grad(True) <= 1e-7 < 1e-5 < grad(False)


def test_k_of_n_is_the_dense_mixture(device):
    experts = Experts(5, 12, 20).to(device)
    x, logits = rand(30, 12).to(device), rand(30, 5, seed=2).to(device)
    want = sum(logits.softmax(-1)[:, e, None] * experts(e, x) for e in range(5))
    for renormalize in (True, False):
        torch.testing.assert_close(routed(ops, experts, x, logits, 5, renormalize), want)


def test_one_expert(device):
    experts = Experts(1, 12, 20).to(device)
    x, logits = rand(30, 12).to(device), rand(30, 1, seed=2).to(device)
    weight, index = ops.moe_gate(logits, 1)
    assert (weight == 1).all() and (index == 0).all()
    assert torch.equal(routed(ops, experts, x, logits, 1), experts(0, x))


@pytest.mark.parametrize("dtype, limits", [(torch.float32, {"rtol": 1e-5, "atol": 1e-6}),
                                           (torch.bfloat16, {"rtol": 2e-2, "atol": 1.4e-2})])  # fmt: skip
def test_is_the_plain_loop_on_50_shapes(dtype, limits, device):
    made = torch.Generator().manual_seed(0)
    for seed in range(50):
        tokens, n, d = (int(torch.randint(1, m, (), generator=made)) for m in (60, 12, 40))
        k = int(torch.randint(1, n + 1, (), generator=made))
        experts = Experts(n, d, 2 * d, dtype).to(device)
        x = rand(tokens, d, dtype=dtype, seed=seed).to(device)
        logits = rand(tokens, n, seed=seed + 1).to(device)
        got, want = routed(ops, experts, x, logits, k), plain_loop(experts, x, logits, k)
        torch.testing.assert_close(got, want, **limits)


def test_permuting_tokens_permutes_outputs(device):
    experts = Experts(6, 12, 20).to(device)
    x, logits = rand(30, 12).to(device), rand(30, 6, seed=2).to(device)
    turn = torch.randperm(30, generator=torch.Generator().manual_seed(0)).to(device)
    out = routed(ops, experts, x, logits, 2)
    torch.testing.assert_close(routed(ops, experts, x[turn], logits[turn], 2), out[turn])


def test_permuting_experts_with_the_router_changes_nothing(device):
    experts = Experts(6, 12, 20).to(device)
    x, logits = rand(30, 12).to(device), rand(30, 6, seed=2).to(device)
    out = routed(ops, experts, x, logits, 2)
    turn = torch.tensor([3, 0, 5, 1, 4, 2], device=device)
    experts.gate_up, experts.down = experts.gate_up[turn], experts.down[turn]
    torch.testing.assert_close(routed(ops, experts, x, logits[:, turn], 2), out)


def test_gradients_of_the_whole(device):
    def both(module, device):
        experts = Experts(4, 10, 16).to(device)
        x, w = rand(25, 10).to(device), rand(4, 10, seed=5).to(device)
        x.requires_grad_(), w.requires_grad_()
        out = routed(module, experts, x, module.moe_gate_linear(x, w, 2)[0], 2)
        return [g.cpu() for g in torch.autograd.grad(out.square().sum(), (x, w))]

    for got, want in zip(both(ops, device), both(reference, "cpu")):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
