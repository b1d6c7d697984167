# SPDX-License-Identifier: Apache-2.0
"""``grouped_gemm`` in Triton: a provider beside ours on a GPU, tested on the CPU by Triton's interpreter.

A program computes one tile of the result. The tiles of all groups are numbered one after another; a program
finds its group in the running sum of the groups' tiles, so that the host never waits for ``offsets``. More
programs are started than there may be tiles: those behind the last one clear rows that belong to no group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

Blocks = tuple[int, int, int]  # rows, columns and depth of a tile


def blocks_for(rows: int, groups: int) -> Blocks:
    """Tiles no taller than an average group: the rows of a tile beyond its group are wasted."""
    mean = rows // max(groups, 1)
    if mean <= 16:
        return 16, 128, 64
    return (64, 128, 64) if mean <= 64 else (128, 128, 64)


@triton.jit
def grouped_gemm_kernel(
    a, w, offsets, gather, out, rows, groups, cols, depth, a_stride, w_group, w_col, w_depth,
    GATHER: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``out[r] = a[gather[r]] w[g].T`` of every row r of group g; strides in elements.

    ``WIDEN``: for the interpreter, which takes bfloat16's bits for numbers where it multiplies matrices.
    """
    tile = tl.program_id(0)
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    g = tl.arange(0, GROUPS)
    begin = tl.load(offsets + g, mask=g < groups, other=0)
    end = tl.load(offsets + g + 1, mask=g < groups, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    total = tl.sum(tiles, 0)
    if tile < total:
        group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
        mine = g == group
        earlier = tl.sum(tl.where(g < group, tiles, 0), 0)
        last = tl.sum(tl.where(mine, end, 0), 0)
        first = tl.sum(tl.where(mine, begin, 0), 0) + (tile - earlier) * ROWS
        r = first + tl.arange(0, ROWS)
        there = r < last
        source = r.to(tl.int64)
        if GATHER:
            source = tl.load(gather + r, mask=there, other=0).to(tl.int64)
        a_rows = a + source[:, None] * a_stride
        w_cols = w + group.to(tl.int64) * w_group + n[None, :].to(tl.int64) * w_col
        sums = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            k = start + tl.arange(0, DEPTH)
            x = tl.load(a_rows + k[None, :], mask=there[:, None] & (k[None, :] < depth), other=0.0)
            y = tl.load(w_cols + k[:, None].to(tl.int64) * w_depth,
                        mask=(n[None, :] < cols) & (k[:, None] < depth), other=0.0)  # fmt: skip
            if WIDEN:
                x, y = x.to(tl.float32), y.to(tl.float32)
            # No TF32: float32 stays float32.
            sums = tl.dot(x, y, sums, input_precision="ieee")
        to = out + r[:, None].to(tl.int64) * cols + n[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=there[:, None] & (n[None, :] < cols))
    else:
        used = tl.load(offsets + groups)
        r = used + (tile - total) * ROWS + tl.arange(0, ROWS)
        to = out + r[:, None].to(tl.int64) * cols + n[None, :]
        none = tl.zeros((ROWS, COLS), dtype=out.dtype.element_ty)
        tl.store(to, none, mask=(r[:, None] < rows) & (n[None, :] < cols))


def grouped_gemm(
    a: Tensor, w: Tensor, offsets: Tensor, trans_w: bool = True, gather: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """As ``tenfold.ops.grouped_gemm``, without its checks; ``blocks``: sizes of a tile, powers of two."""
    w = w if trans_w else w.transpose(1, 2)
    groups, cols, depth = w.shape
    a = a if a.stride(1) == 1 else a.contiguous()
    rows = a.shape[0] if gather is None else gather.shape[0]
    out = torch.empty(rows, cols, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    sizes = blocks or blocks_for(rows, groups)
    warps = 8 if sizes[0] * sizes[1] > 64 * 128 else 4
    grid = (triton.cdiv(rows, sizes[0]) + groups, triton.cdiv(cols, sizes[1]))
    grouped_gemm_kernel[grid](
        a, w, offsets, a if gather is None else gather, out, rows, groups, cols, depth,
        a.stride(0), *w.stride(), GATHER=gather is not None,
        GROUPS=max(triton.next_power_of_2(groups), 2), ROWS=sizes[0], COLS=sizes[1],
        DEPTH=sizes[2], WIDEN=triton.knobs.runtime.interpret, num_warps=warps,
    )  # fmt: skip
    return out
