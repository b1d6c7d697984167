# SPDX-License-Identifier: Apache-2.0
"""The network under a language model's head, what it is called with, and a head of values on it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def plain_face(model: Any) -> Any:
    """The transformers model itself, whose layers hold PEFT's adapters where PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model: nn.Module) -> nn.Module:
    """A causal LM's (or classifier's) network without its head; a network without one is its own trunk."""
    model = plain_face(model)
    return getattr(model, "base_model", model)


def hidden_size(trunk: Any) -> int:
    """Width of a transformers model; ValueError if its configuration does not say."""
    config = trunk.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "hidden_size", None)
    if size is None:
        raise ValueError(
            f"{type(config).__name__} has no hidden_size; give the value head yourself"
        )
    return size


def model_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Arguments of a transformers model for padded rows: positions count the tokens of ``mask`` [B, S].

    So what stands in the padding, and how wide it is, changes nothing.
    """
    made = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(plain_face(model).forward).parameters:
        made["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return made


def value_head(trunk: nn.Module) -> nn.Linear:
    """A bias-free head of zeros for a trunk, in float32."""
    device = next(trunk.parameters()).device
    head = nn.utils.skip_init(nn.Linear, hidden_size(trunk), 1, bias=False, device=device)
    nn.init.zeros_(head.weight)
    return head


def apply_head(head: nn.Module, hidden: Tensor, keep: int | None) -> Tensor:
    """Float32 values [B, keep] of hidden states [B, S, H]."""
    hidden = hidden if keep is None else hidden[:, hidden.shape[1] - keep :]
    weight = next(head.parameters())
    # Rounded to bfloat16, values of about 1 would be 0.008 apart.
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(weight.dtype))[..., 0].float()
