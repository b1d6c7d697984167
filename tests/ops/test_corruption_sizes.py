# SPDX-License-Identifier: Apache-2.0
"""How long corrupted rows are: counts of T5's rounding, and what a row needs at most."""

import struct

import pytest
import torch
from corruption_cases import COUNT, EOS, FIRST, MANY, PAD, rows

from tenfold import ops
from tenfold.ops.corruption import corrupted_sizes, longest_chunk, span_counts
from tenfold.testing.plugin import cuda_only

RULES = [(0.15, 3.0), (0.5, 1.0), (0.5, 1.5), (0.93, 2.0), (0.999, 40.0)]


def float32(x):
    """A float64 rounded to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def test_counts(device):
    """Section 3.3, step 2, of Python's floats: a product of two float32 is exact there, so it is rounded once."""
    lengths = torch.arange(2, 700, device=device)
    for density, mean_span in RULES:
        want = []
        for n in lengths.tolist():
            noise = min(max(round(float32(n * float32(density))), 1), n - 1)
            spans = min(max(round(float32(noise / float32(mean_span))), 1), n - noise)
            want.append((noise, spans))
        assert [span_counts(n, density, mean_span) for n in lengths.tolist()] == want
        mask = ops.span_mask(lengths, 700, density, mean_span, 1)
        begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        assert list(zip(mask.sum(1).tolist(), begins.sum(1).tolist())) == want


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_most_sizes(aligned, roll, device):
    """corrupted_sizes with the options: what the longest of many draws needs, and no more."""
    for density, n in ((0.0, 0), (0.15, 0), (0.0, 9), (0.15, 1), (0.15, 2), (0.15, 30), (0.5, 40)):
        tokens, lengths = (x.to(device) for x in rows([n] * 300, n))
        got = ops.span_corruption(tokens, lengths, density, 3.0, 0, 0, FIRST, MANY, EOS, PAD, 99, 99,
                                  roll, aligned)  # fmt: skip
        most = tuple(int(got[at].max()) for at in (1, 3))
        sizes = corrupted_sizes(n, density, roll=roll, aligned=aligned)
        # A roll of two tokens cuts nothing: its parts are of one token.
        assert most == ((sizes[0] - 1, sizes[1] - 1) if roll and n == 2 else sizes)
        if sizes[0] > 1:
            width = sizes[0]
            length, targets = longest_chunk(width, density, roll=roll, aligned=aligned)
            assert (length, targets) == (n, sizes[1])


@cuda_only
def test_shapes_that_do_not_fit(device):
    """A roll may cut a run of kept tokens, or a span: with no room for one more, the shape is refused."""
    n = 30
    tokens, lengths = (x.to(device) for x in rows([n] * 64, n))
    inputs, targets = corrupted_sizes(n)
    draw = 0.15, 3.0, 0, 0, FIRST
    for aligned in (False, True):
        for count, width_in, width_out, word in (
            (COUNT, inputs + 1, targets, "max_targets"),
            (COUNT, inputs, targets + 1, "max_inputs"),
            (1, inputs + 1, targets + 1, "sentinels"),
        ):
            with pytest.raises(ValueError, match=word):
                ops.span_corruption(
                    tokens, lengths, *draw, count, EOS, PAD, width_in, width_out, True, aligned
                )
        got = ops.span_corruption(
            tokens, lengths, *draw, 2, EOS, PAD, inputs + 1, targets + 1, True, aligned
        )
        assert (got[1] > 0).all() and (got[3] > 0).all()
    none = tokens[:, :0], lengths * 0
    got = ops.span_corruption(*none, *draw, 1, EOS, PAD, 1, 1, False, False)
    assert (got[3] == 1).all()
