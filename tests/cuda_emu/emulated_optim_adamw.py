# SPDX-License-Identifier: Apache-2.0
"""Runs the emulated CUDA kernels of the AdamW ops against the ops on the CPU, bit for bit:
``emulated_optim_adamw.py CHECK``.

Started by test_emulated.py with ASan preloaded. Every case runs under two thread schedules, whose
results must be the same bits.
"""

from __future__ import annotations

import ctypes
import itertools
import sys

import torch

from build import build
from emu_calls import CODES, numbers, ptr, shifted
from tenfold import ops

LIB = ctypes.CDLL(str(build("kernels_optim_adamw", "-shared", "-fPIC")))
KINDS = {"none": 0, "row": 1, "col": 2, "block": 3, "element": 4}
DTYPES = {
    "float32": [torch.float32, torch.bfloat16],
    "bfloat16": [torch.float32, torch.bfloat16],
    "float16": [torch.float32, torch.bfloat16, torch.float16],
}
LR_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def pack(bits):
    """Packed mask of a bool tensor."""
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (bits.int() << torch.arange(8, dtype=torch.int32)).sum(1).to(torch.uint8)


def prefix_of(bits):
    """``mask_prefix`` of 256-bit blocks."""
    counts = (
        torch.stack([b.sum() for b in bits.split(256)]) if len(bits) else bits.new_zeros(0).long()
    )
    return (counts.cumsum(0) - counts).int()


def expand_mask(kind, bits, shape, block):
    n = torch.Size(shape).numel()
    if kind == "none":
        return torch.ones(n, dtype=torch.bool)
    if kind == "row":
        return bits.repeat_interleave(n // shape[0])
    if kind == "col":
        return bits.repeat(n // shape[-1])
    return bits.repeat_interleave(block)[:n] if kind == "block" else bits


def units(kind, shape, block):
    n = torch.Size(shape).numel()
    return {"row": shape[0], "col": shape[-1], "block": -(-n // block), "element": n}.get(kind, 0)


class Case:
    """Tensors of one call, cloned for every run."""

    def __init__(self, shapes, dtype, state, kind, *, block=256, compact=False, amsgrad=False,
                 fraction=0.5, misaligned=False):  # fmt: skip
        self.kind, self.block, self.amsgrad = kind, block, amsgrad
        move = shifted if misaligned else lambda t: t
        self.lists = {name: [] for name in ("p", "g", "m", "v", "s", "mask", "max", "prefix")}
        self.numbers = []
        for i, shape in enumerate(shapes):
            bits = torch.rand(units(kind, shape, block)) < fraction
            on = expand_mask(kind, bits, shape, block)
            states = [int(on.sum())] if compact else shape
            grad = torch.randn(shape)
            grad.view(-1)[~on] = float("nan")
            self.add("p", move(torch.randn(shape).to(dtype)))
            self.add("g", move(grad.to(dtype)))
            self.add("m", move(torch.randn(states).to(state)))
            self.add("v", move(torch.rand(states).to(state)))
            self.add("s", torch.tensor(float(3 * i)))
            self.add("mask", None if kind == "none" else pack(bits))
            self.add("max", move(torch.rand(states).to(state)) if amsgrad else None)
            self.add("prefix", prefix_of(bits) if compact else None)
            inner = {"row": on.numel() // max(shape[0], 1), "col": shape[-1], "block": block}
            self.numbers += [on.numel(), torch.Size(states).numel(), int(bits.sum()),
                             KINDS[kind], inner.get(kind, 1), CODES[dtype], CODES[state], i]  # fmt: skip

    def add(self, name, value):
        self.lists[name].append(value)

    def fresh(self):
        return {k: [None if t is None else t.clone() if t.storage_offset() == 0 else shifted(t)
                    for t in v] for k, v in self.lists.items()}  # fmt: skip


def arguments(case, x, extra, options):
    count = len(x["p"])
    pointers = (ctypes.c_void_p * (10 * count))()
    names = ("p", "g", "m", "v", "max", "s", "prefix", "mask", *extra)
    for i, (at, name) in itertools.product(range(count), enumerate(names)):
        t = (extra | x)[name][i]
        pointers[10 * i + at] = None if t is None else t.data_ptr()
    o = {"lr": torch.tensor(1e-2), "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
    o |= options
    scalars = [o["lr"], *(o.get(name) for name in ("grad_scale", "found_inf", "clip_coef"))]
    inputs = (ctypes.c_void_p * 4)(*(None if t is None else t.data_ptr() for t in scalars))
    values = (ctypes.c_double * 5)(0, *(o[k] for k in ("beta1", "beta2", "weight_decay", "eps")))
    flags = numbers(o.get("maximize", False), case.amsgrad, o.get("stochastic_round", False),
                    o.get("mask_scope") == "param_only", o.get("seed", 0),
                    LR_CODES[o["lr"].dtype])  # fmt: skip
    return o, (ctypes.c_int64(count), pointers, numbers(*case.numbers), values, flags, inputs)


def same(got, want, what):
    for name, tensors in want.items():
        for i, (a, b) in enumerate(zip(got[name], tensors, strict=True)):
            if b is None:
                continue
            size = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[b.element_size()]
            equal = (a.contiguous().view(size) == b.contiguous().view(size)) | (
                a.isnan() & b.isnan()
            )
            assert bool(equal.all()), (
                f"{what}: {name}[{i}] differs at {(~equal).nonzero().flatten()[:5].tolist()}"
            )


def compare(case, what, **options):
    for schedule in (1, 77):
        LIB.emu_schedule(schedule)
        x = case.fresh()
        none = [None] * len(x["p"])
        o, args = arguments(case, x, {"absmax1": none, "absmax2": none}, options)
        LIB.emu_masked_adamw(*args)
        y = case.fresh()
        with_prefix = y["prefix"] if any(t is not None for t in y["prefix"]) else []
        ops.masked_adamw_(y["p"], y["g"], y["m"], y["v"], y["s"], y["mask"],
                          y["max"] if case.amsgrad else [], with_prefix, mask_kind=case.kind,
                          block_size=case.block, amsgrad=case.amsgrad, **o)  # fmt: skip
        same(x, y, what)


SHAPES = [(1,), (7,), (4099,), (0,), (8200,)]
MATRICES = [(37, 19), (5, 3), (9, 130), (3, 1000), (40, 256), (64, 1), (1, 64)]


def run_dtype(name):
    dtype = getattr(torch, name)
    for state, misaligned in itertools.product(DTYPES[name], (False, True)):
        what = f"{name} {state} {misaligned}"
        compare(Case(SHAPES, dtype, state, "none", misaligned=misaligned), what)
        for kind, compact in itertools.product(("row", "col", "block", "element"), (False, True)):
            shapes = MATRICES if kind in ("row", "col") else SHAPES
            case = Case(shapes, dtype, state, kind, block=32, compact=compact,
                        amsgrad=misaligned, misaligned=misaligned)  # fmt: skip
            compare(case, f"{what} {kind} {compact}", maximize=compact)
    rounds = {"stochastic_round": True, "seed": 7 << 33 | 5} if name == "bfloat16" else {}
    for kind in ("none", "element", "col"):
        shapes = MATRICES if kind == "col" else SHAPES
        case = Case(shapes, dtype, torch.float32, kind)
        compare(case, f"{name} options", grad_scale=torch.tensor(3.0),
                clip_coef=torch.tensor(0.7), lr=torch.tensor(1e-2, dtype=dtype), **rounds)  # fmt: skip
        compare(case, f"{name} scale 2^k", grad_scale=torch.tensor(65536.0),
                lr=torch.tensor(1e-2, dtype=torch.float64), beta1=0.2)  # fmt: skip
        compare(case, f"{name} skipped", found_inf=torch.tensor(1.0))
        if kind != "none":
            compare(case, f"{name} param_only", mask_scope="param_only")


def check_float32():
    run_dtype("float32")


def check_bfloat16():
    run_dtype("bfloat16")


def check_float16():
    run_dtype("float16")


def check_many():  # more than one table
    compare(Case([(3,)] * 500, torch.float32, torch.float32, "none"), "many")


def code_book(signed):
    """256 values that grow like those of the dynamic map: even within a decade, ten-fold over them."""
    decade = torch.arange(1, 129) / 128
    values = torch.cat([decade * 10.0**-e for e in range(8)]).unique()
    positive = values[:: len(values) // (127 if signed else 255)][: 127 if signed else 255]
    zero = torch.zeros(1)
    found = torch.cat([-positive.flip(0), zero, positive, torch.ones(1)]) if signed else torch.cat(
        [zero, positive])  # fmt: skip
    found = found.unique()
    more = torch.linspace(found[-2], 1, 258 - len(found))[1:-1]
    return torch.cat([found, more]).unique()[:256].float()


def run_8bit(dtype, kind, books, **options):
    shapes = MATRICES if kind in ("row", "col") else [*SHAPES, (256,), (257,)]
    case = Case(shapes, dtype, torch.float32, kind, block=64, fraction=0.3)
    absmax = [torch.rand(-(-torch.Size(s).numel() // 256)) for s in shapes]
    absmax[0].zero_()
    codes = [torch.randint(0, 256, s, dtype=torch.uint8) for s in shapes]
    for schedule in (1, 77):
        LIB.emu_schedule(schedule)
        results = []
        for emulated in (True, False):
            x = case.fresh() | {"m": [c.clone() for c in codes], "v": [c.flip(0) for c in codes]}
            extra = {n: [a.clone() for a in absmax] for n in ("absmax1", "absmax2")}
            o, args = arguments(case, x, extra, options)
            if emulated:
                LIB.emu_masked_adamw_8bit(*args, ptr(books[0]), ptr(books[1]))
            else:
                ops.masked_adamw_8bit_(x["p"], x["g"], x["m"], x["v"], x["s"], x["mask"],
                                       extra["absmax1"], extra["absmax2"], *books,
                                       mask_kind=kind, block_size=64, **o)  # fmt: skip
            results.append(x | extra)
        same(*results, f"8 bits {dtype} {kind}")


def check_8bit():
    dynamic = code_book(True), code_book(False)
    assert all(len(b) == 256 for b in dynamic)
    dense = torch.cat([torch.linspace(-1e-9, 1e-9, 128), torch.linspace(0.5, 1, 128)])
    twice = torch.linspace(0, 1, 128).repeat_interleave(2)
    for dtype, kind in itertools.product(CODES, KINDS):
        run_8bit(dtype, kind, dynamic, grad_scale=torch.tensor(3.0))
    run_8bit(torch.float32, "element", (dense, twice), clip_coef=torch.tensor(0.5))
    run_8bit(torch.bfloat16, "none", dynamic, stochastic_round=True, seed=3)
    run_8bit(torch.bfloat16, "none", dynamic, found_inf=torch.tensor(2.0))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
