# SPDX-License-Identifier: Apache-2.0
"""Tiny random Llamas and token rows for the tests of DHA's conversion."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold.dha.config import DhaConfig

VOCAB = 61


def make(heads=8, kv_heads=None, layers=2, head_dim=8, bias=False, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=heads * head_dim, intermediate_size=64,
            num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads, head_dim=head_dim, max_position_embeddings=128,
            attention_bias=bias, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if "proj" in name:  # attention that looks at something, and biases that are there
            weight.data += (0.1 if "bias" in name else 0.05) * torch.randn(weight.shape)
    return model.eval().to(dtype)


def rows(count=32, length=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count, length), generator=generator)


def config(**changes):
    """A few steps of each stage; ``force``, because so few cannot fuse."""
    base = {"search_steps": 3, "fusion_steps": 5, "recovery_steps": 4, "batch_size": 4,
            "recovery_batch_size": 4, "force": True, "checkpoint_every": 1}  # fmt: skip
    return DhaConfig.from_preset("small", **(base | changes))


def logits(model, ids):
    """Without the family's own attention kernels, so that a test sees the conversion alone."""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()
