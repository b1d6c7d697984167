# SPDX-License-Identifier: Apache-2.0
"""LoRA by PEFT, as all methods use it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any


def with_lora(
    model: Any, rank: int, alpha: int, targets: str | Sequence[str] = "all-linear", *,
    dropout: float = 0.0, whole: Sequence[str] = (), tied: bool = False,
) -> Any:  # fmt: skip
    """A causal LM with LoRA on its linear layers, or on those named; its own weights are frozen.

    Args:
        whole: modules that train fully, and are saved with the adapters. tied: whether that holds for what their
            weights are tied to.

    ModuleNotFoundError says how to install PEFT.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("LoRA needs peft; install it with `pip install 'tenfold[train]'`")
    from peft import LoraConfig, get_peft_model

    more: dict[str, Any] = {"ensure_weight_tying": True} if tied else {}  # older versions lack it
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(whole) or None, **more,
    )  # fmt: skip
    return get_peft_model(model, settings)
