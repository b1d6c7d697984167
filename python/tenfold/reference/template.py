# SPDX-License-Identifier: Apache-2.0
"""Definition of the template family's op (``csrc/_template``): the pattern to copy."""

from __future__ import annotations

from torch import Tensor


def template_scale(x: Tensor, scale: float) -> Tensor:
    """``y = x * scale``, computed in float32 and rounded once to the dtype of ``x``."""
    return (x.float() * scale).to(x.dtype) if x.dtype.itemsize < 4 else x * scale
