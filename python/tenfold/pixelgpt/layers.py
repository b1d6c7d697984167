# SPDX-License-Identifier: Apache-2.0
"""The trunk's parts on tenfold's ops, under Llama's names: norms, MLP, decoder layer; and the patch embedding."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from tenfold import ops
from tenfold.pixelgpt.config import PixelGPTConfig


class PixelGPTRMSNorm(LlamaRMSNorm):
    """``LlamaRMSNorm`` by ``ops.rms_norm``; with a residual, the sum in the same pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The normalised hidden states [..., D]."""
        return ops.rms_norm(hidden_states, None, self.weight, self.variance_epsilon)[0]

    def add(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(hidden_states + residual), hidden_states + residual), both [..., D]."""
        # Under autocast a linear layer's output is narrower than the residual stream.
        hidden_states = hidden_states.to(residual.dtype)
        normed, total, _ = ops.rms_norm(hidden_states, residual, self.weight, self.variance_epsilon)
        return normed, total


class PixelGPTMLP(LlamaMLP):
    """``LlamaMLP`` with its gate by ``ops.swiglu``."""

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)), [..., D]."""
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class PixelGPTDecoderLayer(GradientCheckpointingLayer):
    """``LlamaDecoderLayer`` with these norms and this MLP; the first sum goes into the second norm."""

    def __init__(self, config: PixelGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = PixelGPTMLP(config)
        self.input_layernorm = PixelGPTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = PixelGPTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Arguments as of ``LlamaDecoderLayer``, whatever this version calls the cache."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **kwargs)
        normed, hidden_states = self.post_attention_layernorm.add(attended, hidden_states)
        return hidden_states + self.mlp(normed)


class PatchEmbedding(nn.Module):
    """Strips to embeddings: a convolution of the patch's size as one matrix product, then a LayerNorm.

    The weight is the convolution's [D, C, p, p], so patches are read in its order (channel, row, column).
    """

    def __init__(self, config: PixelGPTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.patch_size, self.num_channels = p, config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=p, stride=p
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, image: Tensor) -> Tensor:
        """[B, L, D] of strips [B, C, H, W] or [B, H, W, C], uint8 or floating in [0, 1]."""
        return self.embed(
            ops.patchify_u8(
                image, self.patch_size, layout="crc", dtype=self.projection.weight.dtype
            )
        )

    def embed(self, patches: Tensor) -> Tensor:
        """[B, L, D] of patches [B, L, P] in [0, 1], in the order (channel, row, column)."""
        made = F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)
        return self.norm(made)

    def reordered(self, patches: Tensor) -> Tensor:
        """Patches in the loss's order (row, column, channel) as :meth:`embed` wants them."""
        p, c = self.patch_size, self.num_channels
        return patches.unflatten(-1, (p * p, c)).transpose(-1, -2).flatten(-2)
