# SPDX-License-Identifier: Apache-2.0
"""What the tests of linear_cross_entropy and linear_logprob share: problems, the three sides, the comparison."""

import math

import torch

from tenfold import ops, reference
from tenfold.testing import assert_close_to_ref, on, poisoned_memory

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignore": {"ignore_index": 0},
    "weights": {"weighted": True},
    "softcap": {"softcap": 1.5, "reduction": "none"},
    "z_loss": {"z_loss": 0.3},
    "temperature": {"temperature": 0.6, "reduction": "sum"},
    "everything": {"softcap": 4.0, "z_loss": 1e-2, "temperature": 1.7, "weighted": True, "ignore_index": 3},
    "all_of_none": {"softcap": 2.0, "z_loss": 0.1, "temperature": 0.5, "weighted": True, "reduction": "none"},
}  # fmt: skip


def problem(shape, dtype, seed=0, *, weighted=False, ignore_index=-100, poison=True, scale=1.0):
    """hidden, weight, target, row_weight; some rows do not count, and those are NaN."""
    n, h, v = shape
    made = torch.Generator().manual_seed(seed + sum(shape))
    hidden = torch.randn(n, h, generator=made) * scale
    weight = torch.randn(v, h, generator=made) * (2 / math.sqrt(h))
    target = torch.randint(0, v, (n,), generator=made)
    row_weight = torch.rand(n, generator=made) + 0.1 if weighted else None
    target[1::5] = ignore_index
    if weighted:
        row_weight[2::7] = 0.0
    skipped = (target == ignore_index) | (False if row_weight is None else row_weight == 0)
    if poison:
        hidden[skipped] = math.nan
    return hidden.to(dtype), weight.to(dtype), target, row_weight


def eager_logits(hidden, weight, softcap, temperature, dtype=torch.float32):
    x = (hidden @ weight.t()).to(dtype)
    return (softcap * torch.tanh(x / softcap) if softcap > 0 else x) / temperature


def eager_cross_entropy(hidden, weight, target, *, row_weight=None, ignore_index=-100,
                        reduction="mean", softcap=0.0, z_loss=0.0, temperature=1.0):  # fmt: skip
    """What one writes in plain PyTorch: logits are stored in the tested dtype."""
    w = torch.ones(target.shape) if row_weight is None else row_weight
    at = (target != ignore_index) & (w != 0)
    x = eager_logits(hidden[at], weight, softcap, temperature)
    some = x.logsumexp(-1)
    each = w[at] * (some - x.gather(1, target[at][:, None])[:, 0] + z_loss * some**2)
    lse = torch.zeros(target.shape).masked_scatter(at, some)
    if reduction == "none":
        return torch.zeros(target.shape).masked_scatter(at, each), lse
    return each.sum() / (w[at].sum() if reduction == "mean" and at.any() else 1.0), lse


def eager_logprob(hidden, weight, ids, temperature=1.0):
    at = (ids >= 0) & (ids < weight.shape[0])
    logp = eager_logits(hidden[at], weight, 0.0, temperature).log_softmax(-1)
    both = logp.gather(1, ids[at][:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    return tuple(torch.zeros(ids.shape).masked_scatter(at, x) for x in both)


def rounded(x, toward):
    """The float32 beside x in one direction, or x."""
    near = x.float()
    off = (near.double() > x) if toward < 0 else (near.double() < x)
    return torch.where(off, near.nextafter(torch.tensor(toward)), near).double()


def logprob_from_rounded(hidden, weight, ids, temperature=1.0, toward=math.inf):
    """Has the gradients of the formula in float64 from lse and entropy that a forward has rounded to float32."""
    at = (ids >= 0) & (ids < weight.shape[0])
    x = eager_logits(hidden[at], weight, 0.0, temperature, torch.float64)
    lse = rounded(x.logsumexp(-1, keepdim=True).detach(), toward)
    p = (x - lse).exp().detach()
    entropy = rounded(-(p * (x - lse)).sum(-1, keepdim=True).detach(), toward)
    chosen = x.gather(1, ids[at][:, None])[:, 0] - (p * x).sum(-1)
    both = chosen, -((p * (x - lse + entropy)).detach() * x).sum(-1)
    return tuple(torch.zeros(ids.shape).double().masked_scatter(at, y) for y in both)


FACES = {
    "cross_entropy": (ops.linear_cross_entropy, reference.linear_cross_entropy, eager_cross_entropy),
    "logprob": (ops.linear_logprob, reference.linear_logprob, eager_logprob),
}  # fmt: skip


def step(op, hidden, weight, target, ups, **options):
    """The two results, and the gradients of hidden and weight for the gradients ``ups`` of the results."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    values = op(*leaves, target, **options)
    used = [(v, u.to(v)) for v, u in zip(values, ups) if u is not None]
    grads = torch.autograd.grad([v for v, _ in used], leaves, [u for _, u in used])
    return [x.detach() for x in (*values, *grads)]


NAMES = ("first result", "second result", "grad of hidden", "grad of weight")


def run(face, tensors, ups, device, **options):
    """The three sides: kernel, float64, and plain PyTorch. Plain values are those of float32 logits: the kernel
    never rounds logits to the dtype; plain gradients are those of the tested dtype."""
    op, definition, eager = FACES[face]
    hidden, weight, target = tensors
    with poisoned_memory():
        mine = step(op, *on(device, tensors), on(device, ups), **on(device, options))
    exact = step(definition, hidden.double(), weight.double(), target, ups, **options)
    values = step(definition, *tensors, ups, **options)[:2]
    low = values + step(eager, *tensors, ups, **options)[2:]
    for toward in (-math.inf, math.inf) if face == "logprob" else ():
        # What is further off, number by number: this or plain PyTorch.
        options["toward"] = toward
        from_rounded = step(
            logprob_from_rounded, hidden.double(), weight.double(), target, ups, **options
        )
        for i in (2, 3):
            far = (from_rounded[i] - exact[i]).abs() > (low[i].double() - exact[i]).abs()
            low[i] = torch.where(far, from_rounded[i], low[i].double()).to(low[i].dtype)
    for x, y in zip(mine, low):
        assert x.dtype == y.dtype and x.shape == y.shape and x.device.type == device.type
    assert mine[0].dtype == mine[1].dtype == torch.float32
    return [x.cpu() for x in mine], exact, low


def compare(shape, dtype, device, face="cross_entropy", ups=(True, True), *, seed=0, scale=1.0, samples=8,
            weighted=False, **options):  # fmt: skip
    """Rounding of few numbers is a coin toss, and a reduced loss is one number: small problems count several times.

    ``ups``: the gradients of the two results, True for a random one, None for none. linear_logprob's backward
    begins with lse and entropy in float32, whose rounding is beyond it.
    """
    results = []
    for again in range(samples if math.prod(shape) < 300_000 else 3):
        *tensors, row_weight = problem(shape, dtype, seed + 100 * again, weighted=weighted, scale=scale,
                                       ignore_index=options.get("ignore_index", -100))  # fmt: skip
        if weighted:
            options["row_weight"] = row_weight
        made = torch.Generator().manual_seed(again)
        whole = face == "cross_entropy" and options.get("reduction", "mean") != "none"
        shapes = () if whole else shape[:1], shape[:1]
        drawn = [torch.randn(s, generator=made) for s in shapes]
        given = [d if up is True else up for d, up in zip(drawn, ups)]
        results.append(run(face, tensors, given, device, **options))
    for name, *sides in zip(NAMES, *(zip(*side) for side in zip(*results))):
        assert_close_to_ref(*(torch.cat([x.flatten() for x in side]) for side in sides), what=name)
