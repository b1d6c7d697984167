# SPDX-License-Identifier: Apache-2.0
"""nacl_select: indices equal to the definition, on every ISA, and the right distribution."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

import tenfold
from tenfold import ops, reference
from tenfold.testing import (
    check_compiles,
    check_cuda_graph,
    check_errors,
    check_op,
    fill,
    forced_isa,
    layout,
    on,
    peak_growth,
    poisoned_memory,
)  # fmt: skip
from tenfold.testing.plugin import cuda_only

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
    for isa in tenfold.cpu_capabilities() if device.type == "cpu" else [tenfold.cpu_capability()]:
        with forced_isa(isa), poisoned_memory():
            got = ops.nacl_select(scores.to(device), 1, n, n, n, **moved, **kwargs)
        assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1]), isa


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    length=st.integers(1, 200), parts=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    seed=st.integers(0, 2**62), start=st.integers(0, 20), pool=st.sampled_from([1, 3, 7]),
    distinct=st.integers(1, 50),
)  # fmt: skip
def test_contract(device, length, parts, seed, start, pool, distinct):
    """Increasing, right size, sinks and recents in, no pad; few distinct scores force ties."""
    total = sum(parts)
    if total > length:
        parts = [x * length // total for x in parts]
    start = min(start, length)
    generator = torch.Generator().manual_seed(seed % 1000)
    scores = torch.randint(0, distinct, (1, 2, length), generator=generator).float()
    where = {"kv_start": torch.tensor([start])}
    got = ops.nacl_select(scores.to(device), *parts, seed=seed, pool_kernel=pool,
                          kv_start=where["kv_start"].to(device))  # fmt: skip
    idx, lens = (x.cpu() for x in got)
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


def test_draws_do_not_depend_on_batch_order_padding_or_company(device):
    scores = fill((4, 2, 90), torch.float32).abs().to(device)
    rows = torch.tensor([10, 11, 12, 13]).to(device)

    def select(scores, **kwargs):
        return ops.nacl_select(scores, 2, 3, 10, 20, **kwargs)[0].cpu()

    want = select(scores, seed=5, row_id=rows)
    order = torch.tensor([2, 0, 3, 1])
    there = order.to(device)
    assert torch.equal(select(scores[there], seed=5, row_id=rows[there]), want[order])
    assert torch.equal(select(scores[2:3], seed=5, row_id=rows[2:3]), want[2:3])
    padded = torch.cat([torch.full((4, 2, 17), 99.0).to(device), scores], -1)
    got = select(padded, seed=5, row_id=rows, kv_start=torch.full((4,), 17).to(device))
    assert torch.equal(got - 17, want)
    assert not torch.equal(select(scores, seed=6, row_id=rows), want)
    assert not torch.equal(select(scores, seed=5, layer=1, row_id=rows), want)
    same = scores[:1, :1].expand(1, 2, 90)  # the heads draw independently
    assert not torch.equal(select(same)[0, 0], select(same)[0, 1])


def test_garbage_in_padding_is_never_read(device):
    scores = fill((2, 3, 70), torch.float32).abs()
    start, lens = torch.tensor([9, 0]), torch.tensor([50, 41])
    where = {"kv_start": start.to(device), "kv_lens": lens.to(device)}
    for kwargs in ({}, {"pool_kernel": 5}, {"pool_kernel": 3, "pool": "avg"}):
        results = []
        for garbage in (0.0, float("nan"), float("inf")):
            for b in range(2):
                scores[b, :, : start[b]] = garbage
                scores[b, :, start[b] + lens[b] :] = garbage
            got = ops.nacl_select(scores.to(device), 2, 4, 10, 8, **where, **kwargs)
            results.append([x.cpu() for x in got])
        for idx, n in results[1:]:
            assert torch.equal(idx, results[0][0]) and torch.equal(n, results[0][1])
        want = reference.nacl_select(scores, 2, 4, 10, 8, kv_start=start, kv_lens=lens, **kwargs)
        assert torch.equal(results[0][0], want[0]) and torch.equal(results[0][1], want[1])


@pytest.mark.parametrize("kind", ["sliced", "transposed", "misaligned"])
def test_layouts(kind, device):
    scores = fill((2, 3, 70), torch.float32).abs().to(device)
    want = ops.nacl_select(scores, 1, 2, 10, 8, seed=3)
    got = ops.nacl_select(layout(scores, kind), 1, 2, 10, 8, seed=3)
    assert torch.equal(got[0].cpu(), want[0].cpu()) and torch.equal(got[1].cpu(), want[1].cpu())
    for step in (scores[:, :, ::2], scores[:1, :1].expand(2, 3, 70)):
        got = ops.nacl_select(step, 1, 2, 10, 8, seed=3)
        want = ops.nacl_select(step.contiguous(), 1, 2, 10, 8, seed=3)
        assert torch.equal(got[0].cpu(), want[0].cpu())


def test_no_random_part_no_seed(device):
    scores = fill((1, 2, 80), torch.float32).to(device)
    results = [ops.nacl_select(scores, 1, 2, 10, 0, seed=s)[0].cpu() for s in range(4)]
    assert all(torch.equal(results[0], r) for r in results)


def test_nan_is_the_lowest_score_or_an_error(device):
    scores = torch.tensor([5.0, float("nan"), 1.0, float("-inf"), 3.0, 2.0]).view(1, 1, 6)
    scores = scores.to(device)
    assert ops.nacl_select(scores, 0, 0, 3, 0)[0].tolist() == [[[0, 4, 5]]]
    assert ops.nacl_select(scores, 0, 0, 5, 0)[0].tolist() == [[[0, 1, 2, 4, 5]]]
    check_errors(ops.nacl_select, op, (scores, 0, 0, 3, 0), {"check_nan": True}, ValueError, "NaN")
    good = scores.nan_to_num(nan=0.0)
    assert ops.nacl_select(good, 0, 0, 3, 0, check_nan=True)[0].tolist() == [[[0, 4, 5]]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, 1e30])
@pytest.mark.parametrize("logits", ["score", "log_score"])
def test_special_scores(value, logits, device):
    scores = fill((2, 2, 90), torch.float32).abs()
    scores[:, 0, 10:40:3] = value
    for kwargs in ({}, {"pool_kernel": 3}):
        kwargs |= {"logits": logits, "seed": 9}
        want = reference.nacl_select(scores, 1, 2, 30, 20, **kwargs)
        got = ops.nacl_select(scores.to(device), 1, 2, 30, 20, **kwargs)
        assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])


def test_counts_per_row_and_per_head(device):
    scores = fill((2, 3, 60), torch.float32).abs()
    rows = torch.tensor([[1, 2, 3, 4], [0, 0, 20, 0]], dtype=torch.int32)
    heads = torch.randint(0, 6, (2, 3, 4), dtype=torch.int32)
    for counts in (rows, heads, heads.long()):
        got = ops.nacl_select(scores.to(device), 0, 24, 0, 0, counts=counts.to(device))
        idx, lens = (x.cpu() for x in got)
        want, want_lens = reference.nacl_select(scores, 0, 24, 0, 0, counts=counts)
        assert torch.equal(idx, want) and torch.equal(lens, want_lens)
        assert idx.shape == (2, 3, 24) and lens.shape == counts.shape[:-1]


@pytest.mark.parametrize("length", [50_000])
def test_long_rows_and_large_magnitudes(length, device):
    scores = fill((1, 1, length), torch.float32) * 1e30
    args = (4, 100, 3000, 2000)
    got = ops.nacl_select(scores.to(device), *args)[0].cpu()
    assert torch.equal(got, reference.nacl_select(scores, *args)[0])


def test_standing_checks(device):
    scores = fill((2, 3, 70), torch.float32).abs().to(device)
    check_op(op, (scores, 1, 2, 10, 5), {"seed": 3})
    counts, start = torch.ones(2, 3, 4, dtype=torch.int32), torch.tensor([0, 4])
    where = {"counts": counts.to(device), "kv_start": start.to(device)}
    check_op(op, (scores, 0, 9, 0, 0), where)


def test_compiles_with_inductor():
    scores = fill((2, 3, 70), torch.float32).abs()
    check_compiles(ops.nacl_select, (scores, 1, 2, 3, 4), backend="inductor", dynamic=None)


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(shape, device):
    n = min(shape[2], 1)
    with poisoned_memory():
        idx, lens = ops.nacl_select(torch.zeros(shape).to(device), n, n, n, n)
    assert idx.shape == (*shape[:2], 4 * n) and lens.shape == shape[:1]
    assert not lens.any()


@cuda_only
@pytest.mark.parametrize("length", [700, 9000])
def test_cuda_graph(length, device):
    """Replays follow changed scores, pads and counts."""

    def inputs(seed, start, counts):
        scores = fill((2, 3, length), torch.float32, seed=seed).abs().to(device)
        where = {"kv_start": start, "row_id": [seed, 3], "counts": counts}
        return (scores, 10, 10, 20, 20), {n: torch.tensor(x).to(device) for n, x in where.items()}

    first = inputs(1, [0, 5], [[1, 2, 3, 4], [5, 5, 20, 9]])
    fresh = inputs(2, [60, 0], [[0, 20, 0, 30], [4, 0, 0, 0]])
    for _, where in (first, fresh):
        where["seed"] = 5
    check_cuda_graph(ops.nacl_select, *first, *fresh)


def test_memory_stays_at_a_few_rows():
    """Of the outputs' size, and a few rows of keys: no sorted copy of the scores."""
    setup = """
        from tenfold import ops
        scores = torch.rand(1, 64, 65536)
        ops.nacl_select(scores[:, :, :64].contiguous(), 1, 1, 10, 10)
        scores[:, :, :64].sort(-1)
    """
    most = 64 * 1000 * 8 + 12 * 65536 * 4
    assert peak_growth(setup, "ops.nacl_select(scores, 100, 100, 400, 400)") < most
    assert peak_growth(setup, "scores.sort(-1)") > 4 * most  # it can be seen


def check_bad(device, error, *words, scores=None, args=(1, 1, 1, 1), **kwargs):
    """Bad arguments in place of good ones, all on the device."""
    scores = (torch.zeros(2, 3, 20) if scores is None else scores).to(device)
    kwargs = on(device, kwargs)
    check_errors(ops.nacl_select, op, (scores, *args), kwargs, error, "nacl_select", *words)


def test_bad_input(device):
    scores = torch.zeros(2, 3, 20)
    bad = functools.partial(check_bad, device)
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
    bad(ValueError, "row_id", "[B]", row_id=torch.zeros(3, dtype=torch.int32))
    bad(TypeError, "counts", "float32", counts=torch.zeros(2, 4))
    bad(ValueError, "counts", "[2, 5]", counts=torch.zeros(2, 5, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="inference only"):
        ops.nacl_select(scores.to(device).requires_grad_(), 1, 1, 1, 1)


def test_bad_index_values():
    """CPU only: CUDA does not wait for values on the device."""
    bad = functools.partial(check_bad, "cpu")
    bad(ValueError, "kv_start[0]", "30", kv_start=torch.tensor([30, 0]))
    bad(ValueError, "kv_lens[1]", "21", kv_lens=torch.tensor([3, 21]))
    bad(ValueError, "counts", "at most", counts=torch.full((2, 4), 2, dtype=torch.int32))
    bad(ValueError, "counts", "-1", counts=torch.full((2, 4), -1, dtype=torch.int32))


def _spread(kind, n, g):
    """Scores that defeat a sample or a bound, if anything does."""
    x = torch.rand(n, generator=g)
    if kind == "equal":
        return torch.full((n,), 0.25)
    if kind == "steps":  # long runs of ties
        return (x * 4).floor()
    if kind == "powers":  # 60 decades, subnormals and zeros
        x = 10.0 ** (x * 60 - 45)
        x[::7] = 0.0
        return x
    if kind == "few large":  # what a sample does not see
        x = x * 1e-6
        x[torch.randperm(n, generator=g)[: n // 200 + 1]] += 1.0
        return x
    if kind == "sorted":
        return x.sort(descending=True).values
    if kind == "specials":
        x = x - 0.5  # negative: log gives NaN
        x[::5], x[1::11], x[2::13], x[3::17] = float("nan"), float("inf"), float("-inf"), -0.0
        return x
    x[n // 2 :] = 0.0  # half of them cannot be drawn by their logarithm
    return x


@pytest.mark.parametrize("logits", ["score", "log_score"])
@pytest.mark.parametrize("tau", [1.0, 0.05, 40.0])
@pytest.mark.parametrize(
    "kind", ["equal", "steps", "powers", "few large", "sorted", "specials", "half zero"]
)
def test_no_winner_is_pruned(kind, tau, logits, device):
    g = torch.Generator().manual_seed(len(kind))
    for n in (600, 5000, 20011):
        scores = torch.stack([_spread(kind, n, g) for _ in range(2)])[None]
        for topk, random in ((n // 10, n // 10), (0, 3), (5, n // 2), (n // 3, 1)):
            args = (2, 3, topk, random)
            kwargs = {"tau": tau, "logits": logits, "seed": n}
            want = reference.nacl_select(scores, *args, **kwargs)
            for isa in tenfold.cpu_capabilities()[-1:] if device.type == "cpu" else [None]:
                with forced_isa(isa or tenfold.cpu_capability()):
                    got = ops.nacl_select(scores.to(device), *args, **kwargs)
                assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want)), (n, args)


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
def test_pruning_is_the_same_on_every_isa(isa):
    g = torch.Generator().manual_seed(1)
    for kind in ("powers", "few large", "specials"):
        scores = _spread(kind, 3000, g)[None, None]
        for logits in ("score", "log_score"):
            want = reference.nacl_select(scores, 1, 1, 300, 300, logits=logits)[0]
            with forced_isa(isa):
                assert torch.equal(ops.nacl_select(scores, 1, 1, 300, 300, logits=logits)[0], want)
