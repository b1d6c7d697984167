"""nacl_select: indices equal to the definition, on every ISA, and the right distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import tenfold
from tenfold import ops, reference
from tenfold.testing import check_compiles, check_errors, check_op, fill, forced_isa

op = torch.ops.tenfold.nacl_select


def test_philox_known_answers():
    """Random123's vectors for Philox4x32-10."""
    t = torch.tensor
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]  # fmt: skip
    for counter, key, want in cases:
        got = reference.philox4x32_10(tuple(t(c) for c in counter), key)
        assert tuple(int(x) for x in got) == want


CASES = [
    {}, {"pool_kernel": 5}, {"pool_kernel": 3, "pool": "avg"}, {"logits": "log_score", "tau": 0.5},
    {"seed": 2**40 + 3, "layer": 7}, {"seed": -1, "tau": 3.0},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", CASES)
@pytest.mark.parametrize("length", [8, 17, 100, 1000, 4099])
def test_equals_reference_on_every_isa(length, kwargs, device):
    scores = fill((2, 3, length), torch.float32, seed=length).abs()
    n = max(length // 12, 1)
    where = {"kv_start": torch.tensor([0, length // 7]), "row_id": torch.tensor([3, 5])}
    want = reference.nacl_select(scores, 1, n, n, n, **where, **kwargs)
    moved = {k: v.to(device) for k, v in where.items()}
    for isa in tenfold.cpu_capabilities():
        with forced_isa(isa):
            got = ops.nacl_select(scores.to(device), 1, n, n, n, **moved, **kwargs)
        assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1]), isa


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(1, 200), parts=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    seed=st.integers(0, 2**62), start=st.integers(0, 20), pool=st.sampled_from([1, 3, 7]),
    distinct=st.integers(1, 50),
)  # fmt: skip
def test_contract(length, parts, seed, start, pool, distinct):
    """Increasing, right size, sinks and recents in, no pad; few distinct scores force ties."""
    total = sum(parts)
    if total > length:
        parts = [x * length // total for x in parts]
    start = min(start, length)
    generator = torch.Generator().manual_seed(seed % 1000)
    scores = torch.randint(0, distinct, (1, 2, length), generator=generator).float()
    where = {"kv_start": torch.tensor([start])}
    idx, lens = ops.nacl_select(scores, *parts, seed=seed, pool_kernel=pool, **where)
    want, want_lens = reference.nacl_select(scores, *parts, seed=seed, pool_kernel=pool, **where)
    assert torch.equal(idx, want) and torch.equal(lens, want_lens)
    n = length - start
    for row in idx[0]:
        kept = row[: int(lens[0])].tolist()
        assert kept == sorted(set(kept)) and len(kept) == min(sum(parts), n)
        assert all(start <= j < length for j in kept) and (row[int(lens[0]) :] == -1).all()
        if n > sum(parts):
            assert set(range(start, start + parts[0])) <= set(kept)
            assert set(range(length - parts[1], length)) <= set(kept)


def test_worked_case_of_the_specification():
    """scores, 1 sink, 2 recent, 2 top, 1 drawn: the sixth token is 2, 4 or 5 with known chances."""
    scores = torch.tensor([9, 0.5, 0.1, 0.9, 0.2, 0.3, 7, 7]).view(1, 1, 8)
    rows = torch.arange(20_000, dtype=torch.int32)
    idx, _ = ops.nacl_select(scores.expand(20_000, 1, 8), 1, 2, 2, 1, row_id=rows)
    kept = torch.zeros(20_000, 8, dtype=torch.bool).scatter(1, idx[:, 0], True)
    assert kept[:, [0, 1, 3, 6, 7]].all()
    seen = kept[:, [2, 4, 5]].sum(0).numpy()
    expected = np.array([0.3006, 0.3322, 0.3672])
    assert stats.chisquare(seen, expected / expected.sum() * 20_000).pvalue > 1e-3


def test_two_draws_have_the_inclusion_probabilities_of_the_specification():
    scores = torch.tensor([0.1, 0.9, 2.0, -1.0, 0.4]).view(1, 1, 5).expand(40_000, 1, 5)
    idx, _ = ops.nacl_select(scores, 0, 0, 0, 2, row_id=torch.arange(40_000))
    share = torch.zeros(40_000, 5).scatter(1, idx[:, 0], 1.0).mean(0)
    want = torch.tensor([0.2381, 0.5025, 0.8611, 0.0811, 0.3171])
    torch.testing.assert_close(share, want, atol=4 * 0.5 / 200, rtol=0)


def test_equal_scores_cover_every_token_over_heads():
    """C / L = 0.2: a token survives in at least one of 32 heads with 1 - 0.8^32 = 0.9992."""
    scores = torch.zeros(200, 32, 100)
    idx, _ = ops.nacl_select(scores, 0, 0, 0, 20, row_id=torch.arange(200))
    kept = torch.zeros(200, 32, 100).scatter(2, idx, 1.0)
    assert abs(float(kept.mean()) - 0.2) < 1e-6
    assert abs(float(kept.amax(1).mean()) - (1 - 0.8**32)) < 0.002


def test_draws_do_not_depend_on_batch_order_padding_or_company():
    scores = fill((4, 2, 90), torch.float32).abs()
    rows = torch.tensor([10, 11, 12, 13])
    want, _ = ops.nacl_select(scores, 2, 3, 10, 20, seed=5, row_id=rows)
    order = torch.tensor([2, 0, 3, 1])
    got, _ = ops.nacl_select(scores[order], 2, 3, 10, 20, seed=5, row_id=rows[order])
    assert torch.equal(got, want[order])
    one, _ = ops.nacl_select(scores[2:3], 2, 3, 10, 20, seed=5, row_id=rows[2:3])
    assert torch.equal(one, want[2:3])
    padded = torch.cat([torch.full((4, 2, 17), 99.0), scores], -1)
    got, _ = ops.nacl_select(padded, 2, 3, 10, 20, seed=5, row_id=rows,
                             kv_start=torch.full((4,), 17))  # fmt: skip
    assert torch.equal(got - 17, want)
    again = ops.nacl_select(scores, 2, 3, 10, 20, seed=6, row_id=rows)[0]
    other_layer = ops.nacl_select(scores, 2, 3, 10, 20, seed=5, layer=1, row_id=rows)[0]
    assert not torch.equal(again, want) and not torch.equal(other_layer, want)
    assert not torch.equal(ops.nacl_select(scores[:1, :1].expand(1, 2, 90).contiguous(),
                                           2, 3, 10, 20)[0][0, 0],
                           ops.nacl_select(scores[:1, :1].expand(1, 2, 90).contiguous(),
                                           2, 3, 10, 20)[0][0, 1])  # fmt: skip


def test_no_random_part_no_seed():
    scores = fill((1, 2, 80), torch.float32)
    results = [ops.nacl_select(scores, 1, 2, 10, 0, seed=s)[0] for s in range(4)]
    assert all(torch.equal(results[0], r) for r in results)


def test_nan_is_the_lowest_score_or_an_error():
    scores = torch.tensor([5.0, float("nan"), 1.0, float("-inf"), 3.0, 2.0]).view(1, 1, 6)
    assert ops.nacl_select(scores, 0, 0, 3, 0)[0].tolist() == [[[0, 4, 5]]]
    assert ops.nacl_select(scores, 0, 0, 5, 0)[0].tolist() == [[[0, 1, 2, 4, 5]]]
    check_errors(ops.nacl_select, op, (scores, 0, 0, 3, 0), {"check_nan": True}, ValueError, "NaN")


def test_counts_per_row_and_per_head():
    scores = fill((2, 3, 60), torch.float32).abs()
    rows = torch.tensor([[1, 2, 3, 4], [0, 0, 20, 0]], dtype=torch.int32)
    heads = torch.randint(0, 6, (2, 3, 4), dtype=torch.int32)
    for counts in (rows, heads, heads.long()):
        idx, lens = ops.nacl_select(scores, 0, 24, 0, 0, counts=counts)
        want, want_lens = reference.nacl_select(scores, 0, 24, 0, 0, counts=counts)
        assert torch.equal(idx, want) and torch.equal(lens, want_lens)
        assert idx.shape == (2, 3, 24) and lens.shape == counts.shape[:-1]


@pytest.mark.parametrize("length", [50_000])
def test_long_rows_and_large_magnitudes(length):
    scores = fill((1, 1, length), torch.float32) * 1e30
    args = (4, 100, 3000, 2000)
    assert torch.equal(ops.nacl_select(scores, *args)[0], reference.nacl_select(scores, *args)[0])


def test_standing_checks():
    scores = fill((2, 3, 70), torch.float32).abs()
    check_op(op, (scores, 1, 2, 10, 5), {"seed": 3})
    check_op(op, (scores, 0, 9, 0, 0), {"counts": torch.ones(2, 3, 4, dtype=torch.int32),
                                        "kv_start": torch.tensor([0, 4])})  # fmt: skip
    check_compiles(ops.nacl_select, (scores, 1, 2, 3, 4), backend="inductor", dynamic=None)
    for shape in ((0, 2, 5), (2, 0, 5)):
        idx, lens = ops.nacl_select(torch.zeros(shape), 1, 1, 1, 1)
        assert idx.shape == (*shape[:2], 4) and lens.shape == shape[:1]


def test_bad_input():
    scores = torch.zeros(2, 3, 20)

    def bad(error, *words, scores=scores, args=(1, 1, 1, 1), **kwargs):
        check_errors(ops.nacl_select, op, (scores, *args), kwargs, error, "nacl_select", *words)

    bad(TypeError, "scores", "float32", "float16", scores=scores.half())
    bad(ValueError, "scores", "3-dimensional", scores=scores[0])
    for i, name in enumerate(("n_sink", "n_recent", "n_topk", "n_random")):
        bad(ValueError, name, "-1", args=tuple(-1 if j == i else 1 for j in range(4)))
    bad(ValueError, "<= L = 20", "= 21", args=(1, 10, 5, 5))
    bad(ValueError, "tau", "0", tau=0.0)
    bad(ValueError, "tau", "-1", tau=-1.0)
    bad(ValueError, "logits", "'raw'", logits="raw")
    bad(ValueError, "pool_kernel", "2", pool_kernel=2)
    bad(ValueError, "pool", "'min'", pool="min")
    bad(ValueError, "layer", "-1", layer=-1)
    bad(ValueError, "kv_start[0]", "30", kv_start=torch.tensor([30, 0]))
    bad(ValueError, "kv_lens[1]", "21", kv_lens=torch.tensor([3, 21]))
    bad(ValueError, "row_id", "[B]", row_id=torch.zeros(3, dtype=torch.int32))
    bad(TypeError, "counts", "float32", counts=torch.zeros(2, 4))
    bad(ValueError, "counts", "[2, 5]", counts=torch.zeros(2, 5, dtype=torch.int32))
    bad(ValueError, "counts", "at most", counts=torch.full((2, 4), 2, dtype=torch.int32))
    bad(ValueError, "counts", "-1", counts=torch.full((2, 4), -1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="inference only"):
        ops.nacl_select(scores.clone().requires_grad_(), 1, 1, 1, 1)
