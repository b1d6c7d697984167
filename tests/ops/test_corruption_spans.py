# SPDX-License-Identifier: Apache-2.0
"""span_mask, span_corrupt, span_corruption: acceptance numbers, the published procedure, definitions, distributions."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from corruption_cases import (
    COUNT,
    EOS,
    FIRST,
    MANY,
    PAD,
    exact,
    masks,
    published_mask,
    published_sides,
    rows,
    shuffler,
)

from tenfold import ops, reference
from tenfold.ops.corruption import corrupted_sizes, longest_chunk, span_counts
from tenfold.testing import LAYOUTS, check_cuda_graph, check_op, layout
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold
GOLDEN = Path(__file__).parent / "golden" / "span_corruption.json"
RULES = [(0.0, 3.0), (0.15, 3.0), (0.5, 1.0), (0.5, 1.5), (0.93, 2.0), (0.999, 40.0)]
LENGTHS = [0, 1, 2, 3, 10, 31, 32, 33, 63, 64, 65, 128, 190, 257]


def sides(tokens, lengths, mask, **options):
    widths = (tokens.shape[1] + 1, 2 * tokens.shape[1] + 3)
    return tokens, lengths, mask, FIRST, MANY, EOS, PAD, *widths, *options.values()


def test_closed_form(device):
    """Acceptance 1: the printed tokens, counts and chunks, which no seed changes: there is one span."""
    for seed, (n, masked) in itertools.product(range(3), ((10, 2), (20, 3))):
        tokens = torch.arange(100, 100 + n, device=device)[None]
        lengths = torch.tensor([n], device=device)
        got = ops.span_corruption(
            tokens, lengths, 0.15, 3.0, seed, 0, FIRST, COUNT, EOS, PAD, 24, 8
        )
        kept, gone = list(range(100, 100 + n - masked)), list(range(100 + n - masked, 100 + n))
        inputs, targets = [*kept, FIRST, EOS], [FIRST, *gone, EOS]
        print(inputs, targets)
        assert [int(x) for x in (got[1], got[3])] == [len(inputs), len(targets)]
        assert got[0].tolist() == [inputs + [PAD] * (24 - len(inputs))]
        assert got[2].tolist() == [targets + [PAD] * (8 - len(targets))]
    counts = {n: span_counts(n, 0.15, 3.0) for n in (10, 30, 568, 1137)}
    print(counts)
    assert counts == {10: (2, 1), 30: (4, 1), 568: (85, 28), 1137: (171, 57)}


def test_chunks():
    """Step 1 of section 3.3: the printed lengths; one token more does not fit."""
    got = {m: longest_chunk(m) for m in (128, 256, 512, 1024)}
    print(got)
    assert got == {128: (141, 29), 256: (284, 58), 512: (568, 114), 1024: (1137, 229)}
    for density, mean_span, width in itertools.product(
        (0.0, 0.15, 0.5, 0.9), (1.0, 3.0, 7.5), (2, 3, 60, 997)
    ):
        n, targets = longest_chunk(width, density, mean_span)
        assert corrupted_sizes(n, density, mean_span) == (pytest.approx(width, abs=1), targets)
        assert (
            corrupted_sizes(n, density, mean_span)[0]
            <= width
            < corrupted_sizes(n + 1, density, mean_span)[0]
        )
        assert longest_chunk(width, density, mean_span, True) == (n, targets + 1)
    with pytest.raises(ValueError, match=r"max_inputs.*2.*1"):
        longest_chunk(1)
    with pytest.raises(ValueError, match="length"):
        corrupted_sizes(-1)
    for bad, words in (
        ((0.15, 0.5), "mean_span"),
        ((1.0, 3.0), "density"),
        ((-0.1, 3.0), "density"),
    ):
        with pytest.raises(ValueError, match=words):
            corrupted_sizes(10, *bad)


def test_rounding(device):
    """Section 3.3: float32 differs from float64 for 166 of the lengths 2..20000, the first ones 190, 350, 390."""
    odd = []
    for n in range(2, 20001):
        noise = min(max(int(np.round(0.15 * n)), 1), n - 1)
        if (noise, max(int(np.round(noise / 3.0)), 1)) != span_counts(n, 0.15, 3.0):
            odd.append(n)
    print(len(odd), odd[:3])
    assert len(odd) == 166 and odd[:3] == [190, 350, 390]
    lengths = torch.tensor([*odd[:40], 568, 1137], device=device)
    mask = ops.span_mask(lengths, int(lengths.max()), 0.15, 3.0, 0)
    assert mask.sum(1).tolist() == [span_counts(int(n), 0.15, 3.0)[0] for n in lengths]


def test_lengths_and_sentinels(device):
    """Acceptance 3: lengths by the spans of the mask; sentinels descend, each once a side."""
    tokens, lengths = rows([random.Random(n).randint(0, 1200) for n in range(200)], 1200)
    args = (lengths.to(device), 1200, 0.15, 3.0, 3, 17)
    mask = ops.span_mask(*args).cpu()
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    spans, noise = (mask & ~before).sum(1), mask.sum(1)
    inputs, in_len, targets, tgt_len = (
        x.cpu()
        for x in ops.span_corruption(
            tokens.to(device), args[0], *args[2:], FIRST, COUNT, EOS, PAD, 1200, 300
        )
    )
    assert torch.equal(in_len, (lengths - noise + spans + 1).int())
    assert torch.equal(tgt_len, (noise + spans + 1).int())
    for row in range(200):
        want = list(range(FIRST, FIRST - int(spans[row]), -1))
        for side, n in ((inputs, in_len), (targets, tgt_len)):
            found = side[row, : n[row]]
            assert found[found > FIRST - COUNT].tolist() == want
            assert found[-1] == EOS and (side[row, n[row] :] == PAD).all()
        if lengths[row] > 1:
            assert not mask[row, 0] and mask[row, lengths[row] - 1]  # step 2 of section 3.3
        assert not mask[row, lengths[row] :].any()


def test_masks(device):
    """Acceptance 4: of 12 tokens, 6 masked in 3 spans, each of the 100 masks is drawn in 1 %."""
    draws = 100_000
    mask = ops.span_mask(torch.full((draws,), 12, device=device), 12, 0.5, 2.0, 2024).cpu()
    ids, counts = (mask.long() << torch.arange(12)).sum(1).unique(return_counts=True)
    chi = float(((counts - draws / 100) ** 2 / (draws / 100)).sum())
    print(f"{len(ids)} masks, chi-square {chi:.1f} of 99 degrees of freedom")
    assert len(ids) == 100 and chi < 148.2  # the 99.9 % point
    rolled = ops.span_mask(torch.full((draws,), 7, device=device), 7, 0.15, 3.0, 5, 0, True).cpu()
    assert (rolled.sum(1) == 1).all()
    chi = float(((rolled.sum(0) - draws / 7) ** 2 / (draws / 7)).sum())
    print(f"rolls: chi-square {chi:.1f} of 6 degrees of freedom")
    assert chi < 22.5


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize(("density", "mean_span"), RULES)
def test_mask(density, mean_span, roll, device):
    for seed, offset, dtype in (
        (0, 0, torch.int64),
        (-(2**62) - 5, 2**40 - 3, torch.int32),
        (7, -4, torch.int64),
    ):
        lengths = torch.tensor(LENGTHS, dtype=dtype)
        exact("span_mask", (lengths, 260, density, mean_span, seed, offset, roll), device)
    assert exact("span_mask", (lengths[:0], 9, density, mean_span, 0, 0), device).shape == (0, 9)
    assert exact("span_mask", (lengths[:1], 0, density, mean_span, 0, 0), device).shape == (1, 0)


def test_rejected_words(device, monkeypatch):
    """Bounds do not divide 2^32: some words are not taken, and the next attempt is. Seldom: in a long row."""
    n, seed = 150_000, 1
    mask = exact("span_mask", (torch.tensor([n]), n, 0.3, 2.0, seed, 0), device)
    real, attempts = reference.corruption.philox4x32_10, []

    def counted(counter, key):
        attempts.append(int(counter[1]) // 4)
        return real(counter, key)

    monkeypatch.setattr(reference.corruption, "philox4x32_10", counted)
    assert torch.equal(reference.span_mask(torch.tensor([n]), n, 0.3, 2.0, seed, 0), mask)
    assert max(attempts) >= 1


def test_rows_of_any_batch(device):
    """A row's mask is that of its stream: the same in parts of the batch, in any order of calls, in a wider one."""
    lengths = torch.tensor([100, 37, 568, 2, 300], device=device)
    whole = ops.span_mask(lengths, 568, 0.15, 3.0, 9, 40, True)
    for i, n in reversed(list(enumerate(lengths.tolist()))):
        alone = ops.span_mask(lengths[i : i + 1], n, 0.15, 3.0, 9, 40 + i, True)
        assert torch.equal(alone[0], whole[i, :n])
    assert not torch.equal(whole, ops.span_mask(lengths, 568, 0.15, 3.0, 8, 40, True))
    same = ops.span_mask(lengths[:1].repeat(50), 100, 0.15, 3.0, 9, 40)
    assert len(same.unique(dim=0)) > 40  # streams differ


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_corrupt(aligned, final, device):
    for dtype, shift in ((torch.int64, 0), (torch.int32, 5)):
        lengths = LENGTHS[shift:] + LENGTHS[:shift]
        tokens, sizes = rows(lengths, 257, dtype, shift)
        mask = masks(lengths, 257, shift)
        args = sides(tokens, sizes.to(dtype), mask, aligned=aligned, final=final)
        exact("span_corrupt", args, device)
        exact(
            "span_corrupt",
            (*args[:2], mask.to(torch.uint8) * 7, *args[3:]),
            device,
            target_pad_id=-100,
        )
        exact("span_corrupt", (*args[:2], mask.double(), *args[3:]), device)
    exact("span_corrupt", sides(tokens[:0], sizes[:0], mask[:0]), device)
    exact(
        "span_corrupt",
        sides(tokens[:, :0], sizes * 0, mask[:, :0], aligned=aligned, final=final),
        device,
    )


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_fused(aligned, roll, device):
    for density, mean_span, dtype in (
        (0.15, 3.0, torch.int64),
        (0.5, 1.0, torch.int32),
        (0.0, 3.0, torch.int64),
    ):
        tokens, lengths = rows(LENGTHS, 257, dtype)
        draw = density, mean_span, 77, 2**33
        args = (tokens, lengths, *draw, FIRST, MANY, EOS, PAD, 300, 500, roll, aligned, not aligned)
        want = exact("span_corruption", args, device, target_pad_id=-100)
        mask = ops.span_mask(lengths, 257, *draw, roll)
        two = ops.span_corrupt(tokens, lengths, mask, FIRST, MANY, EOS, PAD, 300, 500, aligned, not aligned,
                               target_pad_id=-100)  # fmt: skip
        assert all(map(torch.equal, want, two))


def test_just_enough(device):
    """Results with no room to spare, from rows at the very end of memory."""
    # 7001: more than a block of CUDA has shared memory for.
    for n, dtype in itertools.product((1, 7, 8, 9, 64, 568, 7001), (torch.int64, torch.int32)):
        tokens, lengths = rows([n, n], n, dtype, n)
        inputs, targets = corrupted_sizes(n)
        exact(
            "span_corruption",
            (tokens, lengths, 0.15, 3.0, 1, 2, FIRST, MANY, EOS, PAD, inputs, targets),
            device,
        )


def test_sentinels_as_text(device):
    """allow_sentinels takes rows that hold them, and copies them."""
    tokens, lengths = rows([40, 40], 40)
    tokens[1, 7] = FIRST - 5
    mask = torch.zeros(2, 40, dtype=torch.bool)
    exact("span_corrupt", sides(tokens, lengths, mask), device, allow_sentinels=True)


def test_golden():
    """Acceptance 5: inputs and targets of masks of the published procedure, stored beside it."""
    golden = json.loads(GOLDEN.read_text())
    for case in golden["rows"]:
        tokens, mask = (
            torch.tensor(case["tokens"], dtype=torch.int64),
            torch.tensor(case["mask"]).bool(),
        )
        assert published_sides(tokens, mask) == (case["inputs"], case["targets"])
        n = len(tokens)
        args = (tokens[None], torch.tensor([n]), mask[None], FIRST, COUNT, EOS, PAD, n + 2, n + 2)
        regular = n > 1 and not mask[0] and bool(mask[-1])  # else the two rules differ
        for aligned in (False, True) if regular else (False,):
            inputs, in_len, targets, tgt_len = ops.span_corrupt(*args, aligned)
            assert inputs[0, : in_len[0]].tolist() == case["inputs"]
            assert targets[0, : tgt_len[0]].tolist() == case["targets"]


def test_published_masks():
    """Both procedures draw from the same set of masks: equal counts, and every small one is found by each."""
    made = shuffler(0)
    for n, density, mean_span in ((0, 0.15, 3.0), (1, 0.15, 3.0), (2, 0.15, 3.0), (190, 0.15, 3.0), (568, 0.15, 3.0),
                                  (77, 0.5, 2.0)):  # fmt: skip
        theirs = published_mask(n, density, mean_span, made)
        mine = ops.span_mask(torch.tensor([n]), n, density, mean_span, n)[0].numpy()
        edges = [
            np.diff(np.concatenate([[0], m.astype(int)])).clip(0).sum() for m in (theirs, mine)
        ]
        assert theirs.sum() == mine.sum() and edges[0] == edges[1] and len(theirs) == len(mine)
    theirs = {published_mask(9, 0.5, 2.0, made).tobytes() for _ in range(2000)}
    mine = {m.numpy().tobytes() for m in ops.span_mask(torch.full((2000,), 9), 9, 0.5, 2.0, 1)}
    assert theirs == mine and len(mine) == 12  # C(3, 1) C(4, 1): 4 of 9 are masked, in 2 spans


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    tokens, lengths = rows(LENGTHS, 257)
    mask = masks(LENGTHS, 257)
    for x, m in (
        (layout(tokens, kind), mask),
        (tokens, layout(mask, kind)),
        (tokens.t().contiguous().t(), mask),
    ):
        exact("span_corrupt", sides(x, lengths, m), device)
    exact("span_mask", (lengths.repeat_interleave(2)[::2], 257, 0.15, 3.0, 0, 0), device)


def test_registration(device):
    tokens, lengths = rows(LENGTHS * 8, 257)
    mask = masks(LENGTHS * 8, 257)
    tokens, lengths, mask = (x.to(device) for x in (tokens, lengths, mask))
    check_op(raw.span_mask, (lengths, 257, 0.15, 3.0, 1, 2, True))
    check_op(raw.span_corrupt, sides(tokens, lengths, mask), {"target_pad_id": -100})
    check_op(raw.span_corruption,
             (tokens.int(), lengths, 0.15, 3.0, 1, 2, FIRST, COUNT, EOS, PAD, 260, 60, True, False, True))  # fmt: skip


@cuda_only
def test_cuda_graph(device):
    def call(tokens, lengths):
        return ops.span_corruption(
            tokens, lengths, 0.15, 3.0, 1, 2, FIRST, COUNT, EOS, PAD, 512, 114
        )

    first, second = ([x.to(device) for x in rows([568, n, 0], 568, seed=n)] for n in (3, 400))
    check_cuda_graph(call, first, None, second)


@cuda_only
def test_rows_that_do_not_fit(device):
    """Where values cannot be seen such a row is marked, and the others are as ever."""
    tokens, lengths = rows([40, 10, 40], 40)
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[2, ::2] = True
    args = (FIRST, 19, EOS, PAD, 11, 100)
    inputs, in_len, targets, tgt_len = ops.span_corrupt(
        *(x.to(device) for x in (tokens, lengths, mask)), *args
    )
    assert in_len.tolist() == [-1, 11, -1] and tgt_len.tolist() == [-1, 1, -1]
    assert (inputs[[0, 2]] == PAD).all() and (targets[[0, 2]] == PAD).all()
    with pytest.raises(
        ValueError, match=r"as many tokens as there are columns, 40, needs .* max_inputs is 11"
    ):
        ops.span_corruption(tokens.to(device), lengths.to(device), 0.15, 3.0, 0, 0, *args)
