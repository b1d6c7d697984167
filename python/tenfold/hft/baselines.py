"""Baselines behind the same interface: LoRA by PEFT. Full fine-tuning and LISA are draws."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from tenfold.hft.config import HFTConfig


def add_lora(model: Any, config: HFTConfig) -> Any:
    """The model with LoRA on all linear layers; its own weights are frozen.

    ModuleNotFoundError says how to install PEFT.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(
            "the LoRA baseline needs peft; install it with `pip install 'tenfold[train]'`"
        )
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=0.0, bias="none",
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, settings)


def merge_lora(model: Any) -> Any:
    """The plain model with the adapters added to its weights."""
    return model.merge_and_unload().requires_grad_(True)


def prepared(model: nn.Module, config: HFTConfig) -> Any:
    """What a method trains: the model, or the model with adapters."""
    return add_lora(model, config) if config.method == "lora" else model
