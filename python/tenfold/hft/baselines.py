# SPDX-License-Identifier: Apache-2.0
"""Baselines behind the same interface: LoRA by PEFT. Full fine-tuning and LISA are draws."""

from __future__ import annotations

from typing import Any

from torch import nn

from tenfold.hft.config import HFTConfig
from tenfold.training.lora import with_lora


def add_lora(model: Any, config: HFTConfig) -> Any:
    """The model with LoRA on all linear layers; its own weights are frozen.

    ModuleNotFoundError says how to install PEFT.
    """
    return with_lora(model, config.lora_rank, config.lora_alpha)


def merge_lora(model: Any) -> Any:
    """The plain model with the adapters added to its weights."""
    return model.merge_and_unload().requires_grad_(True)


def prepared(model: nn.Module, config: HFTConfig) -> Any:
    """What a method trains: the model, or the model with adapters."""
    return add_lora(model, config) if config.method == "lora" else model
