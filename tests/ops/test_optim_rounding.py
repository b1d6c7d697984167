"""Stochastic rounding of masked_adamw_ and masked_adamw_8bit_: bits, statistics, invariants."""

import math

import pytest
import torch
from optim_cases import (
    BF16,
    F32,
    assert_bits,
    assert_lists,
    check_against,
    copies,
    hyper,
    make,
    steps,
)  # fmt: skip

from tenfold import ops, reference
from tenfold.reference.optim.adamw import stochastic_bf16

STEP = ops.masked_adamw_


def check(lists, device, count=3, **kwargs):
    return check_against(STEP, reference.masked_adamw_, lists, device, count, **kwargs)


@pytest.mark.parametrize("state", [F32, BF16])
@pytest.mark.parametrize("kind", ["none", "element", "block"])
def test_stochastic_rounding_is_the_definitions(state, kind, device):
    """Bit by bit, for other seeds, ids and steps, and with frozen neighbours."""
    lists = make([(0,), (7,), (33,), (4099,), (70_001,)], BF16, state, kind)
    for seed, ids in ((0, []), (-1, [5, 4, 3, 2, 1]), (2**63 - 1, [0, 2**31, 9, 9, 7])):
        check(lists, device, 2, mask_kind=kind, stochastic_round=True, seed=seed, tensor_ids=ids,
              **hyper())  # fmt: skip


def rounded(n, lr, device, seed=0, ids=(), ones=1.0):
    """1 - lr, rounded n times."""
    p, g = (torch.full((n,), x, dtype=BF16, device=device) for x in (ones, 1.0))
    m, v = torch.zeros(2, n, device=device)
    STEP([p], [g], [m], [v], [torch.zeros((), device=device)], [], mask_kind="none",
         stochastic_round=True, seed=seed, tensor_ids=list(ids), **hyper(lr=lr, weight_decay=0.0))  # fmt: skip
    return p.cpu()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_stochastic_rounding_is_unbiased(share, device):
    """The mean of 10^5 roundings is within three standard errors."""
    step = 2.0**-8  # of bfloat16 below 1
    got = rounded(100_000, share * step, device).double()
    assert set(got.unique().tolist()) == {1.0, 1.0 - step}
    error = step * math.sqrt(share * (1 - share) / 100_000)
    assert abs(float(got.mean()) - (1 - share * step)) < 3 * error
    halves = got.view(-1, 8).mean(0)  # every position within a Philox block
    assert float((halves - (1 - share * step)).abs().max()) < 4.5 * error * math.sqrt(8)


def test_stochastic_rounding_depends_on_seed_tensor_and_step(device):
    base = rounded(4096, 2.0**-9, device)
    assert torch.equal(base, rounded(4096, 2.0**-9, device))
    assert torch.equal(base[:100], rounded(100, 2.0**-9, device))  # position only, not size
    for other in (rounded(4096, 2.0**-9, device, seed=1), rounded(4096, 2.0**-9, device, ids=[1])):
        assert 0.4 < float((base != other).float().mean()) < 0.6


def test_stochastic_rounding_keeps_what_is_representable_or_not_finite(device):
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    n = len(everything)
    p, g = everything.clone().to(device), torch.ones(n, dtype=BF16, device=device)
    m, v = torch.zeros(2, n, device=device)
    STEP([p], [g], [m], [v], [torch.zeros((), device=device)], [], mask_kind="none",
         stochastic_round=True, **hyper(lr=0.0, weight_decay=0.0))  # fmt: skip
    finite = everything.isfinite()
    nonzero = finite & (everything != 0)  # -0 + 0 = +0
    assert_bits([p.cpu()[nonzero]], [everything[nonzero]])
    assert torch.equal(p.cpu()[~finite].isinf(), everything[~finite].isinf())
    assert torch.equal(p.cpu()[~finite].isnan(), everything[~finite].isnan())
    assert torch.equal(p.cpu()[everything.isinf()], everything[everything.isinf()])


def test_the_definitions_stochastic_rounding():
    x = torch.tensor([1.0, 1.0 + 2.0**-8, -1.0 - 2.0**-8, 3.3895e38, float("inf"), float("nan")])
    low, high = (stochastic_bf16(x, torch.full((6,), r)) for r in (0, 0xFFFF))
    assert low[:3].tolist() == [1.0, 1.0, -1.0]
    assert high[:3].tolist() == [1.0, 1.0078125, -1.0078125]
    assert low[4].isinf() and high[4].isinf() and low[5].isnan() and high[5].isnan()


def test_stochastic_rounding_ignores_fp32(device):
    lists = make([(1000,)])
    got = check(lists, device, mask_kind="none", stochastic_round=True, **hyper())
    plain = steps(reference.masked_adamw_, copies(lists), 3, {"mask_kind": "none"} | hyper())
    assert_lists(got, plain)
