# SPDX-License-Identifier: Apache-2.0
"""The family ``loss`` against its definitions in float64."""

import pytest
import torch

from tenfold.ops import loss as ops
from tenfold.reference import loss as ref
from tenfold.testing import assert_close_to_ref, check_errors, check_op

raw = torch.ops.tenfold
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 7), (5, 1000), (2, 16384), (3, 40001), (0, 5)]


def problem(shape, dtype, device, scale=3.0):
    made = torch.Generator().manual_seed(sum(shape))
    logits = (torch.randn(shape, generator=made) * scale).to(dtype)
    ids = torch.randint(0, shape[1], shape[:1], generator=made)
    if shape[0] > 2:
        ids[1] = -100
    return logits.to(device), ids.to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(shape, dtype, temperature, device):
    logits, ids = problem(shape, dtype, device)
    mine = logits.clone().requires_grad_()
    got = ops.selective_logprob(mine, ids, temperature)
    weights = torch.randn(3, shape[0], generator=torch.Generator().manual_seed(1))
    exact, plain = logits.cpu().double().requires_grad_(), logits.cpu().clone().requires_grad_()
    want, simple = (ref.selective_logprob(x, ids.cpu(), temperature) for x in (exact, plain))
    for g, w, s in zip(got, want, simple):
        assert g.dtype == torch.float32 and g.shape == ids.shape
        assert_close_to_ref(g.detach().cpu(), w.detach(), s.detach())
    for use in ((0,), (1,), (2,), (0, 1, 2)):

        def total(values, there, use=use):
            return sum((weights[i].to(there) * values[i]).sum() for i in use)

        (g,) = torch.autograd.grad(total(got, device), mine, retain_graph=True)
        (w,) = torch.autograd.grad(total(want, "cpu"), exact, retain_graph=True)
        (s,) = torch.autograd.grad(total(simple, "cpu"), plain, retain_graph=True)
        assert g.dtype == dtype
        assert_close_to_ref(g.cpu(), w, s)


def test_is_cross_entropy(device):
    logits, ids = problem((6, 50), torch.float32, device)
    ids = ids.clamp_min(0)
    logp, lse, entropy = ops.selective_logprob(logits, ids)
    want = -torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(logp, want)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


def test_leading_dimensions_and_strides(device):
    logits, ids = problem((12, 33), torch.float32, device)
    want = ops.selective_logprob(logits, ids)
    folded = ops.selective_logprob(logits.view(3, 4, 33), ids.view(3, 4).int())
    for w, f in zip(want, folded):
        assert torch.equal(w.view(3, 4), f)
    wide = torch.nn.functional.pad(logits, (0, 7))[:, :33]
    turned = logits.t().contiguous().t()
    for other in (wide, turned):
        for w, g in zip(want, ops.selective_logprob(other, ids)):
            assert torch.equal(w, g)


def test_special_values(device):
    inf = float("inf")
    rows = [[-inf, 0.0, 1.0, -inf], [-inf] * 4, [1e4, -1e4, 0, 0], [float("nan"), 0, 0, 0], [-3e38] * 4,
            [inf, 0, 0, 0]]  # fmt: skip
    logits = torch.tensor(rows, device=device)
    ids = torch.tensor([2, 0, 0, 1, 1, 1], device=device)
    logp, lse, entropy = ops.selective_logprob(logits, ids)
    want = logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0].float()
    torch.testing.assert_close(logp[[0, 2, 3, 4]], want[[0, 2, 3, 4]], equal_nan=True)
    torch.testing.assert_close(lse[:5], logits.double().logsumexp(-1).float()[:5], equal_nan=True)
    assert entropy[0].isfinite() and entropy[3].isnan()
    grown = logits[:1].clone().requires_grad_()
    sum(x.sum() for x in ops.selective_logprob(grown, ids[:1])).backward()
    assert grown.grad.isfinite().all() and grown.grad[0, 0] == 0


def test_rows_alone(device):
    logits, ids = problem((4, 20000), torch.bfloat16, device)
    whole = ops.selective_logprob(logits, ids)
    for i in range(4):
        for w, one in zip(whole, ops.selective_logprob(logits[i : i + 1], ids[i : i + 1])):
            assert torch.equal(w[i : i + 1], one)


def test_errors(device):
    logits, ids = problem((3, 7), torch.float32, device)
    both = (ops.selective_logprob, raw.selective_logprob)
    check_errors(*both, (logits, ids, 0.0), {}, ValueError, "temperature")
    check_errors(*both, (logits, ids[:2]), {}, ValueError, "ids")
    check_errors(*both, (logits, ids.float()), {}, TypeError, "ids")
    check_errors(*both, (logits.int(), ids), {}, TypeError, "logits")


def test_registration(device):
    logits, ids = problem((3, 7), torch.float32, device)
    check_op(raw.selective_logprob, (logits.requires_grad_(), ids))
