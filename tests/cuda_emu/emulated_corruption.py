# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of ``corruption`` on its emulated CUDA kernels: ``emulated_corruption.py all``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the
tests of ``tests/ops`` see them through the public ops. Calls run under two thread schedules, whose results must
be the same bits.
"""

from __future__ import annotations

import ctypes
import sys

import torch

import tenfold
from build import build
from emu_calls import numbers, pointers, ptr, row_stride, rows_of, run_tests, scheduled, stand_in

LIB = ctypes.CDLL(str(build("kernels_corruption", "-shared", "-fPIC")))
WIDE = torch.int64


def real(*values):
    return (ctypes.c_double * len(values))(*values)


def poisoned(*made):
    """Fresh tensors of (shape, dtype)."""
    return [torch.full(shape, 77, dtype=dtype) for shape, dtype in made]


def sides(tokens, rows, max_inputs, max_targets):
    of_rows = (rows,), torch.int32
    return ((rows, max_inputs), tokens.dtype), of_rows, ((rows, max_targets), tokens.dtype), of_rows


def span_mask(lengths, max_len, density, mean_span, seed, offset, roll=False):
    lengths = lengths.contiguous()
    n = numbers(lengths.dtype == WIDE, len(lengths), max_len, seed, offset, roll)

    def run():
        made = torch.full((len(lengths), max_len), True)
        LIB.emu_span_mask(ptr(lengths), ptr(made), n, real(density, mean_span))
        return made

    return scheduled(LIB, run)


def corrupted(
    tokens,
    lengths,
    mask,
    draw,
    first,
    count,
    eos,
    pad,
    max_inputs,
    max_targets,
    aligned,
    final,
    target_pad,
):
    density, mean_span, seed, offset, roll = draw
    tokens, lengths, mask = (
        rows_of(tokens),
        lengths.contiguous(),
        None if mask is None else rows_of(mask),
    )
    target_pad = pad if target_pad is None else target_pad
    n = numbers(tokens.dtype == WIDE, lengths.dtype == WIDE, *tokens.shape, row_stride(tokens),
                0 if mask is None else row_stride(mask), max_inputs, max_targets, seed, offset, roll, first, count, eos,
                pad, target_pad, aligned, final)  # fmt: skip
    here = (
        tokens if mask is None or mask.numel() else torch.ones(1)
    )  # of no columns: still not drawn

    def run():
        made = poisoned(*sides(tokens, len(tokens), max_inputs, max_targets))
        given = None if mask is None else mask if mask.numel() else here
        LIB.emu_span_corrupt(
            pointers(tokens, lengths, given), pointers(*made), n, real(density, mean_span)
        )
        return made

    return tuple(scheduled(LIB, run))


def span_corrupt(tokens, lengths, mask, first, count, eos, pad, max_inputs, max_targets, aligned=True, final=False, *,
                 allow_sentinels=False, target_pad_id=None):  # fmt: skip
    return corrupted(tokens, lengths, mask, (0.0, 1.0, 0, 0, 0), first, count, eos, pad, max_inputs, max_targets,
                     aligned, final, target_pad_id)  # fmt: skip


def span_corruption(tokens, lengths, density, mean_span, seed, offset, first, count, eos, pad, max_inputs, max_targets,
                    roll=False, aligned=True, final=False, *, allow_sentinels=False, target_pad_id=None):  # fmt: skip
    return corrupted(tokens, lengths, None, (density, mean_span, seed, offset, roll), first, count, eos, pad,
                     max_inputs, max_targets, aligned, final, target_pad_id)  # fmt: skip


def span_restore(inputs, in_len, targets, tgt_len, first, count, eos, *, pad_id=0):
    inputs, targets, in_len, tgt_len = (
        rows_of(inputs),
        rows_of(targets),
        in_len.contiguous(),
        tgt_len.contiguous(),
    )
    width = inputs.shape[1] + max(targets.shape[1] - 2, 0)
    n = numbers(inputs.dtype == WIDE, in_len.dtype == WIDE, tgt_len.dtype == WIDE, *inputs.shape, targets.shape[1],
                row_stride(inputs), row_stride(targets), first, count, eos, pad_id, width)  # fmt: skip

    def run():
        made = poisoned(((len(inputs), width), inputs.dtype), ((len(inputs),), torch.int32))
        LIB.emu_span_restore(pointers(inputs, in_len, targets, tgt_len), pointers(*made), n)
        return made

    return tuple(scheduled(LIB, run))


def pair_pack(source, source_offsets, target, target_offsets, prefix, prefix_offsets, eos, pad, max_inputs,
              max_targets, *, target_pad_id=None):  # fmt: skip
    given = [None if t is None else t.contiguous()
             for t in (source, source_offsets, target, target_offsets, prefix, prefix_offsets)]  # fmt: skip
    rows = len(source_offsets) - 1
    kinds = [x for at in (0, 2, 4) for x in
             ((0, 0) if given[at] is None else (given[at + 1].dtype == WIDE, given[at].numel()))]  # fmt: skip
    n = numbers(source.dtype == WIDE, *kinds, rows, max_inputs, max_targets, eos, pad,
                pad if target_pad_id is None else target_pad_id)  # fmt: skip

    def run():
        made = poisoned(*sides(source, rows, max_inputs, max_targets), ((rows, 2), torch.int32))
        LIB.emu_pair_pack(pointers(*given), pointers(*made), n)
        return made

    return tuple(scheduled(LIB, run))


def shift_right(labels, start_id=0, pad_id=0, ignore_index=-100):
    labels = rows_of(labels)
    n = numbers(
        labels.dtype == WIDE, *labels.shape, row_stride(labels), start_id, pad_id, ignore_index
    )

    def run():
        (made,) = poisoned((labels.shape, labels.dtype))
        LIB.emu_shift_right(ptr(labels), ptr(made), n)
        return made

    return scheduled(LIB, run)


def rows_that_do_not_fit():
    """Such rows are marked, hold nothing but padding, and the others are as ever."""
    tokens = torch.arange(100, 220).view(3, 40)
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[2, ::2] = True
    for lengths, fits in ((torch.tensor([40, 10, 8]), [1]), (torch.tensor([99, -5, 2]), [1, 2])):
        inputs, in_len, targets, tgt_len = span_corrupt(tokens, lengths, mask, 9, 3, 1, 0, 11, 7)
        got = [i for i in range(3) if in_len[i] != -1]
        assert got == fits and [i for i in range(3) if tgt_len[i] != -1] == fits
        for i in {0, 1, 2} - set(fits):
            assert not inputs[i].any() and not targets[i].any()
    at = torch.tensor([0, 3, 9])
    source = torch.arange(5, 14)
    inputs, in_len, targets, tgt_len, cut = pair_pack(
        source, at, source, at, source, at, 1, 0, 4, 4
    )
    assert in_len.tolist() == [4, -1] and tgt_len.tolist() == [4, -1]
    assert cut.tolist() == [[3, 0], [6, 6]] and not inputs[1].any() and not targets[1].any()
    wild = torch.tensor([-4, 99, 2])
    assert pair_pack(source, wild, source, at, None, None, 1, 0, 20, 4)[1].tolist() == [10, 1]


def check_all():
    rows_that_do_not_fit()
    small = ("not errors and not registration and not graph and not chunks and not longest and not transformers and "
             "not fit and not test_masks and not golden and not thousand")  # fmt: skip
    for file in ("spans", "restore", "pairs"):
        run_tests(f"test_corruption_{file}.py", "-k", f"cpu and {small}")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tenfold.cpu_capabilities = lambda: [tenfold.cpu_capability()]  # none of them is asked
    stand_in((span_mask, span_corrupt, span_corruption, span_restore, pair_pack, shift_right))
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
