# SPDX-License-Identifier: Apache-2.0
"""The routed batches that the cases of ``moe`` share.

Every expert has its own popularity, so that groups are ragged: of 64 experts some get several times the mean,
some nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .case import Inputs, Shape

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = (FP32, BF16)
PEAK = {FP32: "fma_fp32", BF16: "dot_bf16"}
FEW = {"n": 8, "k": 2, "d": 1024, "f": 2048}  # Mixtral's routing
MANY = {"n": 64, "k": 8, "d": 1024, "f": 512}  # OLMoE's


def logits_of(tokens: int, n: int) -> Tensor:
    """[T, n], float32."""
    made = torch.Generator().manual_seed(7)
    return torch.randn(tokens, n, generator=made) + torch.randn(n, generator=made)


@functools.lru_cache(maxsize=64)
def routed(tokens: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """(weight float32, index int64) [T, k]."""
    p, index = logits_of(tokens, n).softmax(-1).topk(k)
    return p / p.sum(-1, keepdim=True), index


@functools.lru_cache(maxsize=64)
def counts_of(tokens: int, n: int, k: int) -> Tensor:
    """Slots of every expert, int64 [n]."""
    return torch.bincount(routed(tokens, n, k)[1].flatten(), minlength=n)


def hit(s: Shape) -> int:
    """How many experts get a token: the others' weights need not be read."""
    return int((counts_of(s["t"], s["n"], s["k"]) > 0).sum())


def offsets_of(s: Shape) -> Tensor:
    """int32 [n + 1]."""
    ends = counts_of(s["t"], s["n"], s["k"]).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).int()


def slots(s: Shape) -> int:
    return s["t"] * s["k"]


def randn(*sizes: int, seed: int, scale: float = 1.0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=made).mul_(scale)


def widened(i: Inputs) -> Inputs:
    """The same in float32: what is compared are sums of hundreds of products, with tolerances far above."""
    return Inputs(**{name: _wide(value) for name, value in vars(i).items()})


def _wide(value: object) -> object:
    if isinstance(value, list):
        return [_wide(v) for v in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
