# SPDX-License-Identifier: Apache-2.0
"""Cases of ``grouped_gemm`` and ``grouped_gemm_wgrad``: part of the family ``moe``.

Sorted rows of a batch times their experts' matrices, and the matrices' gradients. A GPU has one form more, of
Triton (``moe_triton``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from tenfold import ops

from .case import Case, Function, Inputs, NotAvailable, Provider, Shape, provider
from .moe_batch import BF16, DTYPES, FEW, FP32, MANY, PEAK, hit, offsets_of, randn, slots, widened

TOKENS = (16, 1024)


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows = slots(s)
    a, dy = randn(rows, s["d"], seed=1), randn(rows, 2 * s["f"], seed=2)
    w = randn(s["n"], 2 * s["f"], s["d"], seed=3, scale=s["d"] ** -0.5)
    offsets = offsets_of(s)
    return Inputs(a=a.to(device, dtype), w=w.to(device, dtype), dy=dy.to(device, dtype),
                  offsets=offsets.to(device), ends=offsets[1:].to(device))  # fmt: skip


def _spans(i: Inputs) -> list[tuple[int, int, int]]:
    """(group, begin, end) of groups that have rows."""
    at = i.offsets.tolist()  # waits for a GPU
    return [(g, b, e) for g, (b, e) in enumerate(itertools.pairwise(at)) if e > b]


def product_loop(i: Inputs) -> Tensor:
    out = i.a.new_empty(i.a.shape[0], i.w.shape[1])
    for g, begin, end in _spans(i):
        torch.mm(i.a[begin:end], i.w[g].T, out=out[begin:end])
    return out


def wgrad_loop(i: Inputs) -> Tensor:
    out = i.a.new_zeros(i.offsets.shape[0] - 1, i.dy.shape[1], i.a.shape[1])
    for g, begin, end in _spans(i):
        torch.mm(i.dy[begin:end].T, i.a[begin:end], out=out[g])
    return out


def _torchs(product: bool) -> Provider:
    def build(_: Inputs) -> Function:
        if not hasattr(torch.nn.functional, "grouped_mm"):
            raise NotAvailable("torch has no grouped_mm before 2.10")
        grouped = torch.nn.functional.grouped_mm
        if product:
            return lambda i: grouped(i.a, i.w.transpose(1, 2), offs=i.ends)
        return lambda i: grouped(i.dy.T, i.a, offs=i.ends)

    return Provider("peer:torch_grouped_mm", "peer", build)


def _triton() -> Provider:
    def build(i: Inputs) -> Function:
        if not i.a.is_cuda:
            raise NotAvailable("Triton has kernels for GPUs only")
        try:
            from . import moe_triton
        except ImportError:
            raise NotAvailable("triton is not installed") from None
        return lambda i: moe_triton.grouped_gemm(i.a, i.w, i.offsets)

    return Provider("peer:triton", "peer", build)


def _case(base: Shape, tokens: int, dtype: torch.dtype, product: bool) -> Case:
    s = {"t": tokens, **base}
    if product:
        forms = [
            provider("tenfold", lambda i: ops.grouped_gemm(i.a, i.w, i.offsets)),
            provider("eager:loop", product_loop, graph=False), _torchs(True), _triton(),
        ]  # fmt: skip
    else:
        forms = [
            provider("tenfold", lambda i: ops.grouped_gemm_wgrad(i.dy, i.a, i.offsets)),
            provider("eager:loop", wgrad_loop, graph=False), _torchs(False),
        ]  # fmt: skip
    groups = hit if product else lambda s: s["n"]  # gradients of all are written
    return Case(
        op="grouped_gemm" if product else "grouped_gemm_wgrad", shape=s, dtype=dtype,
        inputs=_inputs, traffic="read" if product else "copy",
        bytes=lambda s, size: size * (
            slots(s) * (s["d"] + 2 * s["f"]) + groups(s) * 2 * s["f"] * s["d"]),
        flops=lambda s: 4 * slots(s) * s["d"] * s["f"], peak=PEAK[dtype], providers=forms,
        reference=lambda i: (product_loop if product else wgrad_loop)(widened(i)),
        tolerance=1e-4 if dtype == FP32 else 1e-2,
        quick=base is MANY and tokens == 16 and dtype == BF16,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for product in (True, False):
        for base in (FEW, MANY):
            for dtype in DTYPES:
                for tokens in TOKENS:
                    yield _case(base, tokens, dtype, product)
