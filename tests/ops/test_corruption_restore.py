# SPDX-License-Identifier: Apache-2.0
"""span_restore: every corrupted row comes back; generated targets; and the errors of all ops on spans."""

import itertools
import random

import pytest
import torch
from corruption_cases import COUNT, EOS, FIRST, MANY, PAD, exact, masks, rows

from tenfold import ops
from tenfold.testing import LAYOUTS, check_cuda_graph, check_errors, check_op, layout
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold


def come_back(tokens, lengths, corrupted, count):
    got, sizes = ops.span_restore(*corrupted, FIRST, count, EOS, pad_id=-1)
    assert torch.equal(sizes, lengths.int())
    inside = torch.arange(got.shape[1], device=got.device)[None] < lengths[:, None]
    kept = torch.where(inside[:, : tokens.shape[1]], tokens, -1)
    assert torch.equal(got[:, : tokens.shape[1]], kept)
    assert (got[:, tokens.shape[1] :] == -1).all()


def test_thousand_rows(device):
    """Acceptance 2: 1,000 random rows of 0 to 1200 tokens, as drawn and rolled."""
    made = random.Random(0)
    tokens, lengths = rows([0, 1, 2, 1200, *(made.randint(0, 1200) for _ in range(996))], 1200)
    tokens, lengths = tokens.to(device), lengths.to(device)
    for roll in (False, True):
        made = ops.span_corruption(
            tokens, lengths, 0.15, 3.0, 5, 0, FIRST, COUNT, EOS, PAD, 1100, 300, roll
        )
        come_back(tokens, lengths, made, COUNT)


@pytest.mark.parametrize("final", [False, True])
def test_any_mask(final, device):
    """Acceptance 2: aligned rows of any mask come back."""
    made = random.Random(1)
    sizes = [made.randint(0, 150) for _ in range(200)]
    for dtype in (torch.int64, torch.int32):
        tokens, lengths = (x.to(device) for x in rows(sizes, 150, dtype))
        corrupted = ops.span_corrupt(tokens, lengths, masks(sizes, 150).to(device), FIRST, MANY, EOS, PAD, 151, 300,
                                     True, final)  # fmt: skip
        come_back(tokens, lengths, corrupted, MANY)


def test_generated(device):
    """Sentinels without a partner, out of order, repeated (the first counts); no EOS; text before the first."""
    s = [FIRST - j for j in range(5)]
    inputs = [[7, s[0], 8, s[1], 9, EOS], [s[1], s[0], s[1], 5, s[3], EOS], [s[0], 4, EOS, 4, 0, 0],
              [EOS, 3, 3, 3, 3, 3], [s[0], s[0], s[0], s[0], s[0], s[0]]]  # fmt: skip
    targets = [[s[0], 1, 2, s[1], EOS, 0, 0], [44, s[0], 11, s[1], 12, 13, s[4]], [s[0], 5, s[0], 6, s[1], 7, EOS],
               [s[0], 6, 6, EOS, 3, 3, 3], [s[0], 2, 3, 4, 5, 6, 7]]  # fmt: skip
    in_len, tgt_len = [6, 6, 3, 0, 6], [5, 7, 7, 4, 7]
    want = [[7, 1, 2, 8, 9], [12, 13, 11, 5], [5, 4], [], [2, 3, 4, 5, 6, 7]]
    for dtype in (torch.int64, torch.int32):
        args = (torch.tensor(inputs, dtype=dtype), torch.tensor(in_len), torch.tensor(targets, dtype=dtype),
                torch.tensor(tgt_len, dtype=dtype), FIRST, 5, EOS)  # fmt: skip
        got, sizes = exact("span_restore", args, device, pad_id=9)
        assert [row[:n].tolist() for row, n in zip(got, sizes)] == want
    made = torch.Generator().manual_seed(0)
    for width in (1, 2, 5, 70, 300):
        both = [
            torch.randint(FIRST - 12, FIRST + 6, (6, w), generator=made) for w in (width, width + 3)
        ]
        sizes = [torch.randint(0, b.shape[1] + 1, (6,), generator=made) for b in both]
        exact("span_restore", (both[0], sizes[0], both[1], sizes[1], FIRST, 7, FIRST + 1), device)
        exact(
            "span_restore", (both[0], sizes[0], both[1], sizes[1], FIRST, 20_000, FIRST + 1), device
        )
        exact(
            "span_restore",
            (both[0], sizes[0], both[0][:, :1], sizes[0] * 0 + 1, FIRST, 7, FIRST + 1),
            device,
        )
    none = torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    exact("span_restore", (*none, *none, FIRST, 7, EOS), device)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    tokens, lengths = rows([20, 33, 0, 9], 33)
    made = ops.span_corrupt(
        tokens, lengths, masks([20, 33, 0, 9], 33), FIRST, MANY, EOS, PAD, 40, 60
    )
    inputs, in_len, targets, tgt_len = made
    exact(
        "span_restore",
        (layout(inputs, kind), in_len, layout(targets, kind), tgt_len, FIRST, MANY, EOS),
        device,
    )


def test_errors(device):
    cpu = device.type == "cpu"
    tokens, lengths = (x.to(device) for x in rows([8, 3], 8))
    mask = torch.zeros(2, 8, dtype=torch.bool, device=device)
    names = ("tokens", "lengths", "mask", "first_sentinel", "num_sentinels", "eos_id", "pad_id", "max_inputs",
             "max_targets")  # fmt: skip
    good = dict(zip(names, (tokens, lengths, mask, FIRST, COUNT, EOS, PAD, 10, 10)))
    draw = {"density": 0.15, "mean_span": 3.0, "seed": 0, "offset": 0}
    odd = tokens.clone()
    odd[1, 2] = FIRST - 99
    below = tokens.clone()
    below[0, 7] = -3
    shared = [
        ({"tokens": tokens.float()}, TypeError, ("tokens", "float32", "int64")),
        ({"tokens": tokens[0]}, ValueError, ("tokens", "[8]")),
        ({"lengths": lengths.float()}, TypeError, ("lengths", "float32")),
        ({"lengths": lengths[:1]}, ValueError, ("lengths", "[1]")),
        ({"num_sentinels": 0}, ValueError, ("num_sentinels", "0")),
        ({"first_sentinel": 50}, ValueError, ("first_sentinel", "50", "100")),
        ({"eos_id": FIRST - 1}, ValueError, ("eos_id", str(FIRST - 1), "250000 to 250099")),
        ({"max_inputs": 0}, ValueError, ("max_inputs", "0")),
        ({"max_targets": 2**31}, ValueError, ("max_targets", str(2**31))),
        ({"tokens": tokens.int(), "pad_id": 2**31}, ValueError, ("pad_id", str(2**31), "int32")),
        ({"tokens": tokens.int(), "target_pad_id": -(2**31) - 1}, ValueError, ("target_pad_id", "int32")),
    ]  # fmt: skip
    drawn = [
        *(({"density": x}, ValueError, ("density", "[0, 1)", f"got {x:g}")) for x in (1.0, -0.5, float("nan"))),
        ({"mean_span": 0.5}, ValueError, ("mean_span", "0.5")),
    ]  # fmt: skip
    if cpu:
        shared += [
            ({"lengths": lengths + 1}, IndexError, ("lengths[0] = 9", "[0, 8]")),
            ({"lengths": lengths - 4}, IndexError, ("lengths[1] = -1",)),
            ({"tokens": odd}, ValueError, ("tokens[1, 2] = 250000", "sentinel", "allow_sentinels")),
            ({"tokens": odd.int()}, ValueError, ("tokens[1, 2] = 250000",)),
            ({"tokens": below}, IndexError, ("tokens[0, 7] = -3",)),
            ({"tokens": below.int()}, IndexError, ("tokens[0, 7] = -3",)),
            ({"max_inputs": 8}, ValueError, ("row 0", "needs", "max_inputs is 8")),
        ]  # fmt: skip
        drawn += [
            ({"max_targets": 2}, ValueError, ("row 0", "needs 3 tokens of targets", "max_targets is 2")),
            ({"density": 0.9, "mean_span": 1.0, "num_sentinels": 0 + 1, "tokens": torch.full((2, 40), 7),
              "lengths": torch.tensor([3, 40]), "max_inputs": 99, "max_targets": 99}, ValueError,
             ("row 1", "needs 4 sentinels", "rows of at most")),
        ]  # fmt: skip
    for change, error, words in shared:
        given = good | change
        check_errors(ops.span_corrupt, raw.span_corrupt, (), given, error, "span_corrupt", *words)
        given.pop("mask")
        check_errors(
            ops.span_corruption,
            raw.span_corruption,
            (),
            given | draw,
            error,
            "span_corruption",
            *words,
        )
    for change, error, words in drawn:
        given = good | draw | change
        given.pop("mask")
        check_errors(
            ops.span_corruption, raw.span_corruption, (), given, error, "span_corruption", *words
        )
    given = {"lengths": lengths, "max_len": 8, **draw}
    for change, error, words in [
        *drawn[:4], ({"lengths": lengths.half()}, TypeError, ("float16",)),
        ({"lengths": lengths[None]}, ValueError, ("[1, 2]",)), ({"max_len": -1}, ValueError, ("max_len", "-1")),
        *([({"max_len": 7}, IndexError, ("lengths[0] = 8", "[0, 7]"))] if cpu else []),
    ]:  # fmt: skip
        check_errors(ops.span_mask, raw.span_mask, (), given | change, error, "span_mask", *words)
    check_errors(
        ops.span_corrupt,
        raw.span_corrupt,
        (),
        good | {"mask": mask[:1]},
        ValueError,
        "mask",
        "[1, 8]",
    )
    with pytest.raises(RuntimeError, match="mask must be bool"):
        raw.span_corrupt(**(good | {"mask": mask.long()}))
    both = {"inputs": tokens, "in_len": lengths, "targets": tokens, "tgt_len": lengths, "first_sentinel": FIRST,
            "num_sentinels": COUNT, "eos_id": EOS}  # fmt: skip
    for change, error, words in [
        ({"targets": tokens.int()}, (TypeError, ValueError), ("targets", "int32")),
        ({"targets": tokens[:1]}, ValueError, ("targets", "[1, 8]")),
        ({"tgt_len": lengths[:1]}, ValueError, ("tgt_len", "[1]")),
        ({"eos_id": FIRST}, ValueError, ("eos_id",)),
        *([({"in_len": lengths + 1}, IndexError, ("in_len[0] = 9", "[0, 8]"))] if cpu else []),
    ]:  # fmt: skip
        error = error if isinstance(error, type) else ValueError
        check_errors(
            ops.span_restore, raw.span_restore, (), both | change, error, "span_restore", *words
        )


def test_longest_row():
    """Section 8: with 100 sentinels, at 0.15 in spans of 3, a row of 2009 tokens is the longest."""
    args = (0.15, 3.0, 0, 0, FIRST, COUNT, EOS, PAD, 2010)
    tokens = torch.full((1, 2010), 7)
    assert int(ops.span_corruption(tokens, torch.tensor([2009]), *args, 500)[1]) > 0
    with pytest.raises(
        ValueError, match=r"row 0, needs 101 sentinels; num_sentinels is 100; rows of at most 2009"
    ):
        ops.span_corruption(tokens, torch.tensor([2010]), *args, 500)
    # A roll may need one more, of either kind of run, and so does a final sentinel.
    for roll, aligned, final in itertools.product((False, True), repeat=3):
        free = COUNT - roll - final
        longest = max(n for n in range(2, 2010) if round(round(0.15 * n) / 3) <= free)
        with pytest.raises(ValueError, match=f"rows of at most {longest} tokens have enough"):
            ops.span_corruption(
                torch.full((1, 2100), 7), torch.tensor([2100]), *args, 700, roll, aligned, final
            )


def test_registration(device):
    tokens, lengths = rows([20, 33, 0, 9] * 30, 33)
    mask = masks([20, 33, 0, 9] * 30, 33)
    made = ops.span_corrupt(
        *(x.to(device) for x in (tokens, lengths, mask)), FIRST, MANY, EOS, PAD, 40, 60
    )
    check_op(raw.span_restore, (*made, FIRST, MANY, EOS), {"pad_id": 3})
    with pytest.raises(RuntimeError, match="inference only"):
        ops.span_restore(made[0].double().requires_grad_(), *made[1:], FIRST, MANY, EOS)


@cuda_only
def test_cuda_graph(device):
    def call(*made):
        return ops.span_restore(*made, FIRST, MANY, EOS)

    first, second = ([x.to(device) for x in ops.span_corrupt(*rows([20, n], 33), masks([20, n], 33, n), FIRST, MANY,
                                                             EOS, PAD, 40, 60)] for n in (33, 5))  # fmt: skip
    check_cuda_graph(call, first, None, second)
