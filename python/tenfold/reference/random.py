# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011) and the Gumbel draw made of it.

A draw is a pure function of (seed, logical position), so it does not depend on device, threads,
launch shape or batch order. Integers are exact; the logarithms here are computed in float64,
those of the kernels in float32 (``csrc/core/det_math.h``).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MUL = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mulhilo(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * x`` for unsigned 32-bit values held in int64."""
    lo_part = a * (x & 0xFFFF)  # < 2**48
    hi_part = a * (x >> 16)  # < 2**48
    mid = hi_part + (lo_part >> 16)
    return mid >> 16, ((mid & 0xFFFF) << 16) | (lo_part & 0xFFFF)


def philox4x32_10(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (int64 tensors) for each 128-bit ``counter`` and 64-bit key ``seed``.

    ``counter`` is four tensors that broadcast.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(c.to(torch.int64) & _MASK for c in counter))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mulhilo(_MUL[0], c0)
        hi1, lo1 = _mulhilo(_MUL[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel noise ``-log(-log u)``, float64, with ``u = ((word >> 9) + 0.5) * 2**-23`` in (0, 1)."""
    u = ((word >> 9).to(torch.float64) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def name_stream(name: str) -> int:
    """The 64-bit stream of what has a name, a tensor of a model for example.

    It is the first eight bytes of the SHA-256 of the name in UTF-8, as a little-endian two's complement integer: the
    same on every machine and in every run (Python's own ``hash`` is not).
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
