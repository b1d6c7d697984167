# SPDX-License-Identifier: Apache-2.0
"""The roundings of masked_adamw_: the definition's FMA; stochastic rounding, its bits and statistics."""

import math
from fractions import Fraction

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
from tenfold.reference.optim.adamw import fma, stochastic_bf16

STEP = ops.masked_adamw_


def check(lists, device, count=3, **kwargs):
    return check_against(STEP, reference.masked_adamw_, lists, device, count, **kwargs)


def test_the_definitions_fma_rounds_once():
    """At ties of the second rounding, where float64 alone is wrong, and at huge and tiny values."""
    one = torch.ones(4)
    a = torch.tensor([1 + 2.0**-12, 1 + 2.0**-12, 3e38, float("nan")])
    c = torch.tensor([2.0**-70, -(2.0**-70), 3e38, 1.0])
    up, down = 1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11
    assert fma(a, a, c)[:2].tolist() == [up, down]  # a * a is half-way between the two
    assert (a.double() * a + c)[:2].float().tolist() == [down, down]  # twice rounded
    assert fma(a, one, c)[2].isposinf() and fma(a, one, c)[3].isnan()
    x, y, z = (torch.randn(300) for _ in range(3))
    got = fma(x, y, z)
    for around in (-math.inf, math.inf):  # no neighbour is nearer to the exact value
        other = torch.nextafter(got, torch.tensor(around))
        for i, j, k, mine, next_ in zip(x, y, z, got, other):
            exact = Fraction(float(i)) * Fraction(float(j)) + Fraction(float(k))
            assert abs(Fraction(float(mine)) - exact) <= abs(Fraction(float(next_)) - exact)


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
