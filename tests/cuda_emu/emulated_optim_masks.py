# SPDX-License-Identifier: Apache-2.0
"""Runs the emulated CUDA kernels of the mask operations of ``optim``: ``emulated_optim_masks.py CHECK``.

Started by test_emulated.py with ASan preloaded. Every case runs under two thread schedules, whose
results must be the same bits.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import sys

import torch

from build import build
from emu_calls import CODES, numbers, ptr, shifted, twice
from tenfold import reference
from tenfold.testing.tolerance import assert_close_to_ref

LIB = ctypes.CDLL(str(build("kernels_optim_masks", "-shared", "-fPIC")))
KINDS = {"none": 0, "row": 1, "col": 2, "block": 3, "element": 4}
LENGTHS = (0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 257, 4099, 20000)


def long(value):
    return ctypes.c_int64(value)


def pointers(tensors):
    return (ctypes.c_void_p * max(len(tensors), 1))(
        *(None if t is None else t.data_ptr() for t in tensors)
    )


def random_mask(units, share=0.5):
    return reference.pack_mask(torch.rand(units) < share)


def check_bits():
    for n, share in itertools.product(LENGTHS, (0.5, 0.0, 1.0)):
        for mask in (torch.rand(n) < share, shifted(torch.rand(n) < share)):
            packed = reference.pack_mask(mask)

            def pack(mask=mask, packed=packed):
                out = torch.full_like(packed, 77)
                LIB.emu_pack(ptr(mask), long(mask.numel()), ptr(out))
                return out

            assert torch.equal(twice(LIB, pack), packed)
            for held in (packed, shifted(packed)):

                def unpack(held=held, n=n):
                    out = torch.full((n,), 7, dtype=torch.uint8)
                    LIB.emu_unpack(ptr(held), long(n), ptr(out))
                    return out

                assert torch.equal(twice(LIB, unpack).bool(), mask)

                def popcount(held=held):
                    out = torch.full((), -1, dtype=torch.int64)
                    LIB.emu_popcount(ptr(held), long(held.numel()), ptr(out))
                    return out

                assert int(twice(LIB, popcount)) == int(mask.sum())
                for block in (32, 256, 1024):

                    def prefix(held=held, block=block):
                        steps = -(-8 * held.numel() // block)
                        out = torch.full((steps,), -1, dtype=torch.int32)
                        LIB.emu_prefix(ptr(held), long(held.numel()), long(block), ptr(out))
                        return out

                    assert torch.equal(
                        twice(LIB, prefix).long(), reference.mask_prefix(packed, block).long()
                    )
    packed = torch.randint(0, 256, (300 * 32 * 4,), dtype=torch.uint8)  # several blocks of steps

    def prefix():
        out = torch.full((300 * 32,), -1, dtype=torch.int32)
        LIB.emu_prefix(ptr(packed), long(packed.numel()), long(32), ptr(out))
        return out

    assert torch.equal(twice(LIB, prefix), reference.mask_prefix(packed, 32))


def topk(score, n, k, dtype=torch.float32, seed=0, stream=0):
    ints = numbers(CODES[dtype], n, k, seed, stream)

    def run():
        out = torch.full(((n + 7) // 8,), 77, dtype=torch.uint8)
        LIB.emu_mask_topk(ptr(score), ptr(out), ints)
        return out

    return twice(LIB, run)


def check_topk():
    for n, dtype in itertools.product((0, 1, 7, 33, 257, 4099, 40000), CODES):
        plain = torch.randn(n)
        coarse = torch.randint(-2, 3, (n,)).float()  # many ties, zeros of both signs below
        coarse[::3] *= -1.0
        broken = plain.clone()
        broken[::5], broken[1::7], broken[2::11] = float("nan"), float("inf"), float("-inf")
        for score, fraction in itertools.product((plain, coarse, broken), (0.5, 0.03, 0.0, 1.0)):
            if n > 10000 and (fraction != 0.5 or score is broken):
                continue  # slow here; what it computes is the same
            score = score.to(dtype)
            got = topk(score, n, math.floor(fraction * n), dtype)
            assert torch.equal(got, reference.mask_topk(score, fraction)), (n, dtype, fraction)
    for n, seed, stream in ((1, 0, 0), (70, -5, 3), (3000, 1 << 40, -1)):
        got = topk(None, n, n // 2, seed=seed, stream=stream)
        assert torch.equal(got, reference.mask_random(n, 0.5, seed, stream))


def cases_of(shape):
    """(kind, mask, inner) of a tensor."""
    n, block = math.prod(shape), 64
    found = [("none", None, 1), ("element", random_mask(n), 1),
             ("block", random_mask(-(-n // block)), block)]  # fmt: skip
    if len(shape) > 1:
        found += [("row", random_mask(shape[0]), n // shape[0] if shape[0] else 0),
                  ("col", random_mask(shape[-1]), shape[-1])]  # fmt: skip
    return found


SHAPES = [(1,), (7,), (3, 5), (64, 16), (5, 13, 7), (40, 129), (9, 8000)]


def check_grad_norm():
    for shape, dtype in itertools.product(SHAPES, CODES):
        for kind, mask, inner in cases_of(shape):
            grads = [torch.randn(shape).to(dtype), shifted(torch.randn(shape).to(dtype))]
            if mask is not None:
                frozen = ~reference.optim.masks.trained_elements(grads[0], mask, kind, 64)
                grads[0].view(-1)[frozen] = float("nan")
            masks = [mask, None]
            n = grads[0].numel()
            ints = numbers(2, KINDS[kind], *(n, inner, CODES[dtype]) * 2)
            scale = torch.tensor([-3.0])
            for tensor in (None, scale):

                def run(grads=grads, masks=masks, ints=ints, tensor=tensor):
                    out = torch.full((), float("nan"))
                    LIB.emu_grad_norm(pointers(grads), pointers(masks), ints, ctypes.c_double(3.0),
                                      ptr(tensor), ptr(out))  # fmt: skip
                    return out

                want = reference.grad_norm(grads, masks, 3.0, mask_kind=kind, block_size=64)
                torch.testing.assert_close(twice(LIB, run), want, rtol=2e-7, atol=0)
    many = [torch.randn(5) for _ in range(600)]  # several launches
    ints = numbers(600, 0, *(5, 1, 0) * 600)
    out = torch.zeros(())
    LIB.emu_grad_norm(
        pointers(many), pointers([None] * 600), ints, ctypes.c_double(1.0), None, ptr(out)
    )
    torch.testing.assert_close(out, torch.cat(many).norm())


def check_masked_copy():
    sizes = [(torch.uint8, 1), (torch.bfloat16, 2), (torch.float32, 4), (torch.int64, 8)]
    for shape in SHAPES[:-1]:
        for kind, mask, inner in cases_of(shape):
            for (dtype, size), move in itertools.product(sizes, (lambda t: t, shifted)):
                dst = torch.randint(0, 100, shape).to(dtype)
                src = move(torch.randint(0, 100, shape).to(dtype))
                ints = numbers(1, KINDS[kind], dst.numel(), inner, 0)

                def run(dst=dst, src=src, mask=mask, ints=ints, size=size):
                    out = dst.clone()
                    LIB.emu_masked_copy(pointers([out]), pointers([src]), pointers([mask]), ints,
                                        long(size))  # fmt: skip
                    return out

                got, want = twice(LIB, run), dst.clone()
                reference.masked_copy_([want], [src], [mask], mask_kind=kind, block_size=64)
                assert torch.equal(got, want), (shape, kind, dtype)
            for to, of in itertools.permutations(CODES, 2):
                dst, src = torch.randn(shape).to(to), torch.randn(shape).to(of)
                ints = numbers(1, KINDS[kind], dst.numel(), inner, CODES[of])
                got, want = dst.clone(), dst.clone()
                LIB.emu_masked_copy(pointers([got]), pointers([src]), pointers([mask]), ints,
                                    long(-CODES[to]))  # fmt: skip
                reference.masked_copy_([want], [src], [mask], mask_kind=kind, block_size=64)
                assert torch.equal(got, want), (shape, kind, to, of)


def wgrad(dy, x, rows):
    (t, out), width = dy.shape, x.shape[1]
    ints = numbers(CODES[x.dtype], t, out, width, rows.numel(), dy.stride(0), x.stride(0),
                   rows.dtype == torch.int64)  # fmt: skip

    def run():
        got = x.new_full((rows.numel(), width), float("nan"))
        LIB.emu_linear_wgrad_rows(ptr(dy), ptr(x), ptr(rows), ptr(got), ints)
        return got

    return twice(LIB, run)


def check_wgrad():
    shapes = [(0, 4, 3, 2), (1, 1, 1, 1), (5, 20, 7, 9), (33, 64, 40, 32), (200, 300, 136, 150)]
    for (t, out, width, count), dtype in itertools.product(shapes, CODES):
        dy, x = torch.randn(t, out).to(dtype), torch.randn(t, width).to(dtype)
        picks = [torch.randperm(out)[:count].sort().values]
        picks.append(torch.arange(out)[out - count :].int())  # a range: runs of vectors
        for rows in picks:
            got = wgrad(dy, x, rows)
            want = reference.linear_wgrad_rows(dy.double(), x.double(), rows)
            assert_close_to_ref(got, want, reference.linear_wgrad_rows(dy, x, rows))
            assert torch.equal(got, wgrad(shifted(dy), shifted(x), rows.long()))
    dy, x = torch.randn(9, 8).bfloat16(), torch.randn(9, 16).bfloat16()
    got = wgrad(dy, x, torch.tensor([1, 3, 8]))  # no such row: zeros, and no access outside
    assert bool((got[2] == 0).all())
    assert torch.equal(got[:2], wgrad(dy, x, torch.tensor([1, 3])))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
