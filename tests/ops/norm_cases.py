# SPDX-License-Identifier: Apache-2.0
"""What the tests of the family ``norm`` share."""

import torch
from moe_cases import rand

from tenfold import ops

SHAPES = [(0, 5), (1, 1), (5, 7), (2, 3, 33), (4, 64), (9, 257), (3, 1100), (23, 136)]
# How a gate is called, into a given tensor too, and with what.
GATES = {
    "silu": (ops.swiglu, ops.swiglu_, {}),
    "tanh": (ops.gated_gelu, ops.gated_gelu_, {"approximate": "tanh"}),
    "erf": (ops.gated_gelu, ops.gated_gelu_, {"approximate": "none"}),
}
# Results of so many rows of 1,024 are written past the caches.
LARGE = {torch.float32: 4200, torch.bfloat16: 8400, torch.float16: 8400}


def weight_of(n, dtype=torch.float32):
    return (1 + rand(n, seed=3, scale=0.3)).to(dtype)


def same_bits(got, want):
    return all(
        torch.equal(*(t.view(torch.int32 if t.dtype == torch.float32 else torch.int16) for t in pair))
        for pair in zip(got, want, strict=True)
    )  # fmt: skip


def in_pieces(call, inputs, rows):
    """``call`` of so many rows of the inputs at a time."""
    parts = [[t[i : i + rows] for t in inputs] for i in range(0, len(inputs[0]), rows)]
    return [torch.cat(p) for p in zip(*(call(*part) for part in parts))]
