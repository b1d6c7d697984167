# SPDX-License-Identifier: Apache-2.0
"""Cases of t5_attention, and how its results are judged."""

from __future__ import annotations

import torch
from torch import Tensor

import tenfold
from tenfold import ops, reference
from tenfold.testing import (
    PlainSums,
    assert_close_to_ref,
    forced_isa,
    poisoned_memory,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENCODER = {"bidirectional": True, "causal": False}
DECODER = {"bidirectional": False, "causal": True}


def make(b, h, lq, lk, d, dtype=torch.float32, device="cpu", *, dv=None, table=32, seed=0):
    """q, k, v of the size that T5's initialisation gives, and a table."""
    g = torch.Generator().manual_seed(seed)
    shapes = (b, h, lq, d), (b, h, lk, d), (b, h, lk, dv or d)
    q, k, v = (torch.randn(s, generator=g) for s in shapes)
    rows = (q * d**-0.5).to(dtype), k.to(dtype), v.to(dtype)
    made = torch.randn(table, h, generator=g) if table else None
    return [x.to(device) for x in rows], None if made is None else made.to(device)


def wide(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def samples(args, most=4):
    """Small cases are judged over more samples: one rounding error of each side is a coin toss."""
    q, k, v = args
    count = most if q.numel() < 20000 else 1
    return [(q.roll(i, 2), k.roll(i, 1), v) for i in range(count)]


def judge(names, results, what):
    """Each result: what the kernel, the definition in float64 and plain PyTorch have made."""
    for name, *sides in zip(names, *(zip(*side) for side in zip(*results))):
        assert_close_to_ref(*(torch.cat(side) for side in sides), what=f"{name} {what}")


def on_isas(isas, call):
    """One result for each instruction set; None: as it is."""
    for isa in isas:
        with forced_isa(isa or tenfold.cpu_capability()), poisoned_memory():
            yield isa, call()


def check_forward(args, table, kv_len, options, what="", isas=(None,)):
    results = {isa: [] for isa in isas}
    for some in samples(args):
        ref, ref_lse = reference.t5_attention(*map(wide, some), wide(table), kv_len, **options)
        with PlainSums():
            low, _ = reference.t5_attention(*some, table, kv_len, **options)
        for isa, (out, lse) in on_isas(
            isas, lambda x=some: ops.t5_attention(*x, table, kv_len, **options)
        ):
            results[isa].append(((out,), (ref,), (low,)))
            torch.testing.assert_close(lse.double(), ref_lse, atol=2e-5, rtol=2e-5)
    for isa, result in results.items():
        judge(["out"], result, f"{what} {isa}")


def up(x):
    """bf16 and fp16 to float32."""
    return x if x.dtype == torch.float64 else x.float()


def eager(args, table, kv_len, dout, out, lse, dlse, options):
    """The backward in plain PyTorch in the tested dtype: from out and lse, products rounded to it."""
    q, k, v = args
    scale, p_drop = options.get("scale", 1.0), options.get("dropout_p", 0.0)
    key = torch.arange(k.shape[2], device=q.device)
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    r = key - row - options.get("q_offset", 0)
    logits = up(q @ k.mT) * scale
    bucket = None
    if table is not None:
        bucket = reference.t5_buckets(
            r, bidirectional=options["bidirectional"], num_buckets=table.shape[0],
            max_distance=options.get("max_distance", 128),
        )  # fmt: skip
        logits = logits + up(table)[bucket].permute(2, 0, 1)
    seen = (r <= 0) if options.get("causal") else torch.ones_like(r, dtype=torch.bool)
    if kv_len is not None:
        seen = seen & (key < kv_len[:, None, None, None])
    p = torch.exp(logits - up(lse)[..., None]).masked_fill(~seen, 0.0)
    drop = torch.ones_like(p)
    if p_drop:
        drop = reference.t5_dropout(
            p.shape, p_drop, options.get("seed", 0), options.get("offset", 0)
        )
        drop = drop.to(p)
    delta = (up(dout) * up(out)).sum(-1) - (0.0 if dlse is None else dlse)
    ds = p * (up(dout @ v.mT) * drop - delta[..., None])
    dtable = ds.new_zeros(0, q.shape[1])
    if table is not None:
        dtable = ds.new_zeros(table.shape).index_add_(
            0, bucket.flatten(), up(ds.to(q.dtype)).sum(0).flatten(1).T.contiguous()
        ).to(table.dtype)  # fmt: skip
    ds = (ds * scale).to(q.dtype)
    dv = (p * drop).to(q.dtype).mT @ dout
    return ds @ k, ds.mT @ q, dv, dtable


def expected(args, table, kv_len, dout, dlse, options):
    """out and lse that the kernel gets, the gradients of the definition in float64, and what may be off: plain
    PyTorch, or its formula in float64 where that is further off, because out and lse are rounded."""
    wide_args = [wide(x) for x in (*args, table)]
    out, lse = reference.t5_attention(*wide_args, kv_len, **options)
    ref = reference.t5_attention_backward(
        wide(dout), *wide_args, kv_len, out, lse, dlse=wide(dlse), **options
    )
    out, lse = out.to(dout.dtype), lse.float()
    with PlainSums():
        low = eager(args, table, kv_len, dout, out, lse, dlse, options)
    rounded = eager(wide_args[:3], wide_args[3], kv_len, wide(dout), out, lse, dlse, options)
    low = [
        torch.where((x - r).abs() > (y.double() - r).abs(), x.double(), y.double())
        for x, y, r in zip(rounded, low, ref)
    ]
    return out, lse, ref, low


def check_backward(args, table, kv_len, options, what="", dlse=None, isas=(None,)):
    made = torch.Generator().manual_seed(9)
    shape = (*args[0].shape[:3], args[2].shape[-1])
    dout = torch.randn(shape, generator=made).to(args[0])
    results = {isa: [] for isa in isas}
    for some in samples(args):
        out, lse, ref, low = expected(some, table, kv_len, dout, dlse, options)
        given = (dout, *some, table, kv_len, out, lse)
        for isa, mine in on_isas(
            isas, lambda x=given: ops.t5_attention_backward(*x, dlse=dlse, **options)
        ):
            results[isa].append((mine, ref, low))
    for isa, result in results.items():
        judge(("dq", "dk", "dv", "dtable"), result, f"{what} {isa}")
