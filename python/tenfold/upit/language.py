# SPDX-License-Identifier: Apache-2.0
"""The loss of a causal language model, without its logits in memory where the head allows it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tenfold import ops

# Models whose logits are the head's product and nothing else.
_PLAIN_HEADS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe",
                "smollm3")  # fmt: skip


def inner(model: Any) -> Any:
    """The causal LM itself, where PEFT has wrapped it; its adapters are inside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_plain_head(model: Any) -> bool:
    """Are the logits of a model one product with a matrix?"""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind in _PLAIN_HEADS and isinstance(head, nn.Linear) and head.bias is None


def lm_loss(model: Any, batch: dict[str, Tensor], fused: bool = True) -> Tensor:
    """Mean loss (nats) of the tokens that ``labels`` [B, S] ask for (-100: none), 0-d float32; 0 without any.

    ``fused``: through ``linear_cross_entropy`` where the head is a plain product.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    causal, target = inner(model), batch["labels"][:, 1:]
    if fused and has_plain_head(causal):
        hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state
        weight = causal.get_output_embeddings().weight
        return ops.linear_cross_entropy(hidden[:, :-1], weight, target)[0]
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    return total / (target != -100).sum().clamp_min(1)
