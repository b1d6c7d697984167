# SPDX-License-Identifier: Apache-2.0
"""Results of the Triton provider of grouped_gemm, for test_moe_triton.py: ``python triton_calls.py FILE``.

A process of its own, since Triton decides when it is imported whether kernels are interpreted.
"""

import itertools
import sys

import torch
from moe_expert_cases import TRITON_GROUPS, groups, triton_layouts

from bench.moe_triton import grouped_gemm
from tenfold.testing import DTYPES, poisoned_memory

BLOCKS = ((16, 64, 64), (32, 128, 128))


def problems():
    """(name, arguments) of every call."""
    choices = itertools.product(range(len(TRITON_GROUPS)), DTYPES, (False, True))
    for at, (case, dtype, gathered) in enumerate(choices):
        a, w, offsets, gather = groups(*TRITON_GROUPS[case], dtype, gathered)
        for trans_w in triton_layouts(dtype, gathered):
            m = w if trans_w else w.transpose(1, 2).contiguous()
            call = a, m, offsets, trans_w, gather, BLOCKS[at % len(BLOCKS)]
            yield (case, dtype, gathered, trans_w), call


if __name__ == "__main__":
    # Rows that are left out would be garbage sometimes; so they are NaN.
    with poisoned_memory():
        torch.save({name: grouped_gemm(*call) for name, call in problems()}, sys.argv[1])
