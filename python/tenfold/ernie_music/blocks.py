# SPDX-License-Identifier: Apache-2.0
"""The U-Net's parts: time embedding, residual block, conditional self-attention, a level with its resampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tenfold.ernie_music.config import ErnieMusicConfig

KERNELS = ("tenfold", "torch")


def operations(kernels: str) -> ModuleType:
    """Where the fused operations come from: ``tenfold.ops``, or plain PyTorch."""
    if kernels == "tenfold":
        from tenfold import ops

        return ops
    from tenfold.ernie_music import plain

    return plain


@dataclass
class Condition:
    """What the blocks read beside the waveform.

    Attributes:
        planes: float [B, P], constant over time. states: [B, n, d_E], keys of attention, or None.
        mask: bool [B, n], True: a token, or None.
    """

    planes: Tensor
    states: Tensor | None = None
    mask: Tensor | None = None


class TimeEmbedding(nn.Module):
    """``concat(cos f, sin f)`` with ``f = 2 pi t w`` and learned frequencies w; float32 whatever the model is in."""

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(frequencies, 1))

    def forward(self, t: Tensor) -> Tensor:
        """Values float32 [B, 2 * frequencies] of times [B]."""
        with torch.autocast(t.device.type, enabled=False):
            f = 2 * math.pi * t.float()[:, None] * self.weight.float()[:, 0]
            return torch.cat([f.cos(), f.sin()], 1)


class Fused(nn.Module):
    """A module whose operations are the kernels' or plain PyTorch's."""

    kernels = "tenfold"
    watched: Any = (
        None  # what stands before the operations while a measurement looks at their inputs
    )

    @property
    def ops(self) -> Any:
        """Where its operations come from."""
        return self.watched or operations(self.kernels)


class ResBlock(Fused):
    """``conv5, norm, GELU`` twice, beside a skip; ``last``: the second convolution is bare.

    Norms are over channels and time of a sample. Where ``planes`` constant planes stand beside the input, both
    convolutions take them as a bias (with corrections at the edges).
    """

    def __init__(
        self, a: int, m: int, o: int, eps: float, last: bool = False, planes: int = 0
    ) -> None:
        super().__init__()
        self.eps, self.planes = eps, planes
        self.conv1 = nn.Conv1d(a + planes, m, 5, padding=2)
        self.norm1 = nn.GroupNorm(1, m, eps)
        self.conv2 = nn.Conv1d(m, o, 5, padding=2)
        self.norm2 = None if last else nn.GroupNorm(1, o, eps)
        self.skip = nn.Conv1d(a + planes, o, 1, bias=False) if a + planes != o else None

    def _conv(self, conv: nn.Conv1d, x: Tensor, condition: Condition) -> Tensor:
        if not self.planes:
            return conv(x)
        return self.ops.conv1d_planes(x, condition.planes, conv.weight, conv.bias)

    def _act(self, norm: nn.GroupNorm, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.ops.gn1_gelu(x, norm.weight, norm.bias, residual, eps=self.eps)[0]

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """[B, a, L] -> [B, o, L]."""
        skip = x if self.skip is None else self._conv(self.skip, x, condition)
        y = self._act(self.norm1, self._conv(self.conv1, x, condition))
        y = self.conv2(y)
        return y + skip if self.norm2 is None else self._act(self.norm2, y, skip.to(y.dtype))


class ConditionalSelfAttention(nn.Module):
    """Self-attention over time whose keys and values are followed by those of the text.

    Without text it is plain self-attention. The text has no positions here: its order does not matter.
    """

    def __init__(self, width: int, head_dim: int, text_dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.head_dim = width // head_dim, head_dim
        self.norm = nn.GroupNorm(1, width, eps)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.text_key = nn.Linear(text_dim, width, bias=False) if text_dim else None
        self.text_value = nn.Linear(text_dim, width, bias=False) if text_dim else None
        self.out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """[B, c, l] -> [B, c, l]."""
        b, c, length = x.shape
        norm = self.norm
        phi = F.group_norm(x, 1, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        q, k, v = (
            p.reshape(b, self.heads, self.head_dim, length).transpose(2, 3)
            for p in self.qkv(phi).chunk(3, 1)
        )
        mask = None
        if (
            condition.states is not None
            and self.text_key is not None
            and self.text_value is not None
        ):
            states = condition.states.to(x.dtype)
            keys, values = (
                p(states).view(b, -1, self.heads, self.head_dim).transpose(1, 2)
                for p in (self.text_key, self.text_value)
            )
            k, v = torch.cat([k, keys.to(k.dtype)], 2), torch.cat([v, values.to(v.dtype)], 2)
            if condition.mask is not None:
                own = condition.mask.new_ones(b, length)
                mask = torch.cat([own, condition.mask], 1)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(2, 3).reshape(b, c, length))


class Level(Fused):
    """Level i and all levels inside it: halves, blocks, [inner], blocks, doubles beside its own input.

    The outermost level neither halves nor doubles. ``gradient_checkpointing``: its blocks keep their inputs only.
    """

    def __init__(self, config: ErnieMusicConfig, index: int) -> None:
        super().__init__()
        self.outermost, self.gradient_checkpointing = index == 1, False
        width = config.widths[index - 1]
        outside = config.channels if self.outermost else config.widths[index - 2]
        planes = config.plane_dim if self.outermost else 0
        n, attends = config.layers_per_level, index in config.attn_levels
        self.inner = Level(config, index + 1) if index < config.depth else None

        def block(a: int, o: int, last: bool = False, planes: int = 0) -> list[nn.Module]:
            made: list[nn.Module] = [ResBlock(a, width, o, config.norm_eps, last, planes)]
            if attends:
                made.append(
                    ConditionalSelfAttention(o, config.head_dim, config.text_dim, config.norm_eps)
                )
            return made

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i in range(n):
            self.down.extend(block(width if i else outside, width, planes=0 if i else planes))
        first = width if self.inner is None else 2 * width
        for i in range(n):
            end = i == n - 1
            self.up.extend(
                block(width if i else first, outside if end else width, end and self.outermost)
            )

    def _through(self, layers: nn.ModuleList, x: Tensor, condition: Condition) -> Tensor:
        for layer in layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, condition, use_reentrant=False)
            else:
                x = layer(x, condition)
        return x

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """[B, outside, l] -> [B, 2 * outside, l]; the outermost: [B, C, L] -> [B, C, L]."""
        y = self._through(self.down, x if self.outermost else self.ops.fir_down2(x), condition)
        if self.inner is not None:
            y = self.inner(y, condition)
        y = self._through(self.up, y, condition)
        return y if self.outermost else self.ops.fir_up2_cat(y, x.to(y.dtype))


def set_kernels(module: nn.Module, kernels: str) -> None:
    """All fused operations inside come from ``"tenfold"`` or plain ``"torch"``."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    for part in module.modules():
        if isinstance(part, Fused):
            part.kernels = kernels
