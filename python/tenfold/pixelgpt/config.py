# SPDX-License-Identifier: Apache-2.0
"""The model's configuration: Llama's, and what a model of patches adds to it; sizes by name."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from tenfold.training.checks import integers, one_of, positive

MODALITIES = ("text", "pixel", "pair")
# Which streams of data each variant is pre-trained on.
VARIANTS: dict[str, tuple[str, ...]] = {
    "textgpt": ("text",),
    "pixelgpt": ("pixel",),
    "monogpt": ("text", "pixel"),
    "dualgpt": ("text", "pixel", "pair"),
}
TITLES = {"textgpt": "TextGPT", "pixelgpt": "PixelGPT", "monogpt": "MonoGPT", "dualgpt": "DualGPT"}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# "base" is the paper's; the others are for CPUs.
SIZES: dict[str, dict[str, Any]] = {
    "base": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
             "num_key_value_heads": 8, "max_position_embeddings": 1024, "vocab_size": 32000},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
              "num_key_value_heads": 4, "max_position_embeddings": 512, "vocab_size": 2048},
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 1024},
}  # fmt: skip


class PixelGPTConfig(LlamaConfig):
    """Llama's config with the fields of patches; the defaults are the paper's 317M trunk.

    Attributes:
        patch_size: pixels per side, p. num_channels: of strips, C; a patch has P = p * p * C values.
        norm_pix_loss: the target of a patch is normalised by its own mean and variance.
        norm_pix_eps: added to that variance. layer_norm_eps: of the patch embedding.
        eos_in_loss: is the black patch that ends a text a target of the regression?

    Raises:
        ValueError, TypeError: a field that is out of range.

    Source:
        arXiv 2404.10710, section 3.4 of the method's specification.
    """

    model_type = "pixelgpt"

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    patch_size: int = 16
    num_channels: int = 3
    norm_pix_loss: bool = True
    norm_pix_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    eos_in_loss: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if getattr(self, "rope_parameters", None) is None:
            self.rope_parameters = dict(_ROPE)
        integers(self, {"patch_size": 1, "num_channels": 1})
        positive("norm_pix_eps", self.norm_pix_eps)
        positive("layer_norm_eps", self.layer_norm_eps)
        super().__post_init__(**kwargs)

    @property
    def patch_values(self) -> int:
        """P, the numbers of a patch."""
        return self.patch_size**2 * self.num_channels

    @classmethod
    def from_size(cls, name: str = "base", **changes: Any) -> PixelGPTConfig:
        """A size by name with some fields changed: ``"base"`` (the paper's), ``"small"`` or ``"tiny"``."""
        one_of("size", name, tuple(SIZES))
        return cls(**(SIZES[name] | changes))


AutoConfig.register(PixelGPTConfig.model_type, PixelGPTConfig, exist_ok=True)
