# SPDX-License-Identifier: Apache-2.0
"""The model's operations in plain PyTorch: what the kernels are measured against, and what runs without them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Taps of the resampling filter; a half, mirrored.
_HALF = (-0.01171875, -0.03515625, 0.11328125, 0.43359375)


def _taps(x: Tensor, scale: float = 1.0) -> Tensor:
    taps = torch.tensor([*_HALF, *reversed(_HALF)], dtype=x.dtype, device=x.device) * scale
    return taps.expand(x.shape[1], 1, -1).contiguous()


def gn1_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor]:
    """``gelu(group_norm(x, 1)) + residual``, alone in a tuple; x [B, C, L]."""
    y = F.gelu(F.group_norm(x, 1, weight.to(x.dtype), bias.to(x.dtype), eps))
    return (y if residual is None else y + residual,)


def fir_down2(x: Tensor) -> Tensor:
    """Half the samples of x [B, C, L], through the filter."""
    return F.conv1d(F.pad(x, (3, 3), mode="reflect"), _taps(x), stride=2, groups=x.shape[1])


def fir_up2_cat(x: Tensor, skip: Tensor) -> Tensor:
    """``cat([up, skip], 1)``: twice the samples of x [B, C, L / 2], through the filter, beside skip [B, S, L]."""
    up = F.conv_transpose1d(
        F.pad(x, (2, 2), mode="reflect"), _taps(x, 2.0), stride=2, padding=7, groups=x.shape[1]
    )
    return torch.cat([up, skip], 1)


def conv1d_planes(x: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A same-length convolution of x [B, C, L] beside constant planes c [B, P], with weight [O, C + P, K]."""
    planes = c.to(x.dtype)[:, :, None].expand(-1, -1, x.shape[2])
    return F.conv1d(torch.cat([x, planes], 1), weight, bias, padding=weight.shape[2] // 2)
