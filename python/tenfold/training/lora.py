"""LoRA by PEFT, as all methods use it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any


def with_lora(
    model: Any, rank: int, alpha: int, targets: str | Sequence[str] = "all-linear"
) -> Any:
    """A causal LM with LoRA on its linear layers, or on those named; its own weights are frozen.

    ModuleNotFoundError says how to install PEFT.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("LoRA needs peft; install it with `pip install 'tenfold[train]'`")
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets),
    )  # fmt: skip
    return get_peft_model(model, settings)
