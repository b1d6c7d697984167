# SPDX-License-Identifier: Apache-2.0
"""A tiny causal LM and rows for the tests of GPTfluence's recorder."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, max_position_embeddings=64, attention_dropout=dropout,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )  # fmt: skip


def rows(count, length=10, seed=0):
    """Rows of which the first three tokens are a prompt."""
    ids = torch.randint(0, 32, (count, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def items(count, **options):
    """The same, a dict per row, with a column that no model takes."""
    made = rows(count, **options)
    return [
        {k: v[i] for k, v in made.items() if k != "attention_mask"} | {"name": f"e{i}"}
        for i in range(count)
    ]
