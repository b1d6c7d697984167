# SPDX-License-Identifier: Apache-2.0
"""Reward models small enough for a CPU: a Llama over bytes that knows the special tokens of traces."""

from __future__ import annotations

from typing import Any

import torch

from tenfold.themis.model import ThemisRewardModel
from tenfold.themis.tokens import byte_tokenizer


def small_model(
    tokenizer: Any = None, seed: int = 0, *, layers: int = 4, heads: int = 8, head_dim: int = 32, pooling: str = "last"
) -> tuple[Any, Any]:  # fmt: skip
    """(random reward model, its tokenizer).

    Args:
        tokenizer: default a token per byte (:func:`~tenfold.themis.tokens.byte_tokenizer`).
        layers, heads, head_dim: of the trunk, whose width is heads * head_dim.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    width = heads * head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim,
                max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    return ThemisRewardModel.from_model(model, seed=seed, pooling=pooling).eval(), tokenizer
