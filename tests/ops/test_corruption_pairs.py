# SPDX-License-Identifier: Apache-2.0
"""pair_pack and shift_right: definitions, truncation that keeps prefix and EOS, errors."""

import random

import pytest
import torch
from corruption_cases import EOS, PAD, exact

from tenfold import ops
from tenfold.testing import check_cuda_graph, check_errors, check_op
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold


def ragged(sizes, dtype=torch.int64, gap=0, seed=0):
    """Tokens of rows one after the other, behind `gap` others, and their offsets."""
    made = torch.Generator().manual_seed(seed)
    ends = torch.tensor([gap, *sizes]).cumsum(0)
    values = torch.randint(2, 250000, (int(ends[-1]) + 3,), generator=made)
    return values.to(dtype), ends


def pairs(count, dtype=torch.int64, seed=0):
    made = random.Random(seed)
    sizes = [[made.choice((0, 1, 7, 8, 9, 40, 120)) for _ in range(count)] for _ in range(2)]
    prefix = ragged([made.randint(0, 12) for _ in range(count)], dtype, 2, seed)
    return *ragged(sizes[0], dtype, 5, seed), *ragged(sizes[1], dtype, 0, seed), *prefix


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_pack(dtype, device):
    for count, widths in ((9, (200, 150)), (40, (60, 33)), (5, (13, 1)), (0, (3, 3))):
        args = pairs(count, dtype, count)
        want = exact("pair_pack", (*args, EOS, PAD, *widths), device, target_pad_id=-100)
        inputs, in_len, targets, tgt_len, cut = want
        assert (inputs.gather(1, in_len[:, None].long() - 1) == EOS).all()
        assert (targets.gather(1, tgt_len[:, None].long() - 1) == EOS).all()
        sizes = [args[at].diff() for at in (1, 3, 5)]
        assert torch.equal(in_len, (sizes[0] + sizes[2] + 1 - cut[:, 0]).int())
        assert torch.equal(tgt_len, (sizes[1] + 1 - cut[:, 1]).int())
        assert (cut[:, 0] > 0).eq(sizes[0] + sizes[2] + 1 > widths[0]).all()
        exact("pair_pack", (*args[:4], None, None, EOS, PAD, *widths), device)
        exact("pair_pack", (args[0], args[1].int(), *args[2:], EOS, PAD, *widths), device)


def test_by_hand(device):
    """A source loses its end; prefix and EOS stay."""

    def flat(*rows):
        ends = [sum(map(len, rows[:i])) for i in range(len(rows) + 1)]
        return torch.tensor([x for r in rows for x in r], device=device), torch.tensor(
            ends, device=device
        )

    args = *flat([11, 12, 13, 14], [15]), *flat([21, 22, 23], []), *flat([5, 6], [7])
    inputs, in_len, targets, tgt_len, cut = ops.pair_pack(*args, EOS, PAD, 5, 3, target_pad_id=-100)
    assert inputs.tolist() == [[5, 6, 11, 12, EOS], [7, 15, EOS, PAD, PAD]]
    assert targets.tolist() == [[21, 22, EOS], [EOS, -100, -100]]
    assert (in_len.tolist(), tgt_len.tolist(), cut.tolist()) == ([5, 3], [3, 1], [[2, 1], [0, 0]])
    read = ops.shift_right(targets, 0, PAD)
    assert read.tolist() == [[0, 21, 22], [0, EOS, PAD]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_shift(dtype, device):
    made = torch.Generator().manual_seed(0)
    for shape in ((0, 4), (3, 0), (3, 1), (2, 8), (5, 9), (7, 33), (300, 229)):
        labels = torch.randint(-1, 6, shape, generator=made, dtype=dtype)
        labels[labels == 3] = -100
        exact("shift_right", (labels,), device)
        exact("shift_right", (labels, 4, 5, -1), device)
        exact("shift_right", (labels.t().contiguous().t(), 4, 5), device)
        wide = torch.nn.functional.pad(labels, (0, 3))[:, : shape[1]]
        exact("shift_right", (wide,), device)


def test_labels_of_transformers():
    """Decoder inputs are those that T5 makes of labels."""
    from transformers import T5Config, T5ForConditionalGeneration

    labels = torch.tensor([[5, 6, 1, -100], [7, 1, -100, -100]])
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    config.decoder_start_token_id = 0
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    assert torch.equal(model._shift_right(labels), ops.shift_right(labels))


def test_errors(device):
    cpu = device.type == "cpu"
    names = ("source", "source_offsets", "target", "target_offsets", "prefix", "prefix_offsets", "eos_id", "pad_id",
             "max_inputs", "max_targets")  # fmt: skip
    values = pairs(4)
    good = dict(zip(names, (*(x.to(device) for x in values), EOS, PAD, 50, 50)))
    at = good["source_offsets"]
    negative = good["target"].clone()
    negative[: int(good["target_offsets"][-1])] = -9
    bad = [
        ({"source": good["source"].float()}, TypeError, ("source", "float32")),
        ({"target": good["target"][None]}, ValueError, ("target", "[N]")),
        ({"source_offsets": at.float()}, TypeError, ("source_offsets", "float32")),
        ({"source_offsets": at[:0]}, ValueError, ("source_offsets", "[0]")),
        ({"target_offsets": at[:3]}, ValueError, ("target_offsets", "[3]")),
        ({"prefix": None}, ValueError, ("prefix", "prefix_offsets", "None")),
        ({"max_inputs": 0}, ValueError, ("max_inputs", "0")),
        ({"max_targets": -1}, ValueError, ("max_targets", "-1")),
    ]
    narrow = {n: good[n].int() for n in ("source", "target", "prefix")}
    bad.append((narrow | {"eos_id": 2**40}, ValueError, ("eos_id", str(2**40), "int32")))
    if cpu:
        most = int(good["prefix_offsets"].diff().max())
        bad += [
            ({"source_offsets": at + 100000}, IndexError, ("source_offsets[0] = 100005", "source")),
            ({"source_offsets": at.flip(0)}, IndexError, ("source_offsets", "fall")),
            ({"source_offsets": at - 6}, IndexError, ("source_offsets[0] = -1",)),
            ({"target": negative}, IndexError, ("target", "-9")),
            ({"max_inputs": most}, ValueError, ("prefix", f"{most} tokens", "EOS")),
        ]
    for change, error, words in bad:
        check_errors(ops.pair_pack, raw.pair_pack, (), good | change, error, "pair_pack", *words)
    labels = torch.zeros(2, 3, dtype=torch.int32, device=device)
    for args, error, words in (((labels.float(),), TypeError, ("labels", "float32")),
                               ((labels[0],), ValueError, ("labels", "[3]")),
                               ((labels, 2**31), ValueError, ("start_id", "int32"))):  # fmt: skip
        check_errors(ops.shift_right, raw.shift_right, args, {}, error, "shift_right", *words)


def test_registration(device):
    args = tuple(x.to(device) for x in pairs(500))
    check_op(raw.pair_pack, (*args, EOS, PAD, 60, 50), {"target_pad_id": -100})
    check_op(raw.pair_pack, (*args[:4], None, None, EOS, PAD, 60, 50))
    labels = torch.randint(0, 9, (1000, 50)).to(device)
    check_op(raw.shift_right, (labels, 1, 2, 3))


@cuda_only
def test_cuda_graph(device):
    def call(*args):
        return ops.pair_pack(*args, EOS, PAD, 40, 40), ops.shift_right(args[0][None])

    first = [x.to(device) for x in pairs(6)]
    check_cuda_graph(call, first, None, [x.clone() for x in first])


@cuda_only
def test_prefix_that_does_not_fit(device):
    args = [x.to(device) for x in pairs(6)]
    sizes = args[5].diff().tolist()
    got = ops.pair_pack(*args, EOS, PAD, 6, 40)
    for i, n in enumerate(sizes):
        assert (int(got[1][i]) == -1) == (int(got[3][i]) == -1) == (n > 5)
