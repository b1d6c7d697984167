# SPDX-License-Identifier: Apache-2.0
"""Loading an assembled mixture as transformers does, with our experts inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenfold.upit.layout import check_mixtral, read_config
from tenfold.upit.lora_model import SETTINGS
from tenfold.upit.mixture import fuse_routers, mixture_layers


def set_implementation(model: Any, implementation: str) -> None:
    """Sets the experts implementation of a model that has experts with transformers' interface."""
    from tenfold.integrations import experts
    from tenfold.integrations._hosts import is_patched

    if not experts.experts_of(model):
        return
    if is_patched(model, "experts"):
        experts.unpatch(model)
    if implementation == "tenfold":
        experts.replace_moe(model)
    else:
        model.set_experts_implementation(implementation)


def load(folder: str | Path, *, experts_implementation: str = "tenfold", **kwargs: Any) -> Any:
    """A causal LM from a folder, with the experts implementation and the routing that the method trained it with.

    Args:
        folder: an assembled or post-trained Mixtral in either layout, or any causal LM of transformers.
        kwargs: of ``from_pretrained``.

    Raises:
        FileNotFoundError: no model there, or LoRA experts alone. KeyError: a Mixtral without one of its experts (the
            tensor's name).
    """
    from transformers import AutoModelForCausalLM

    if (Path(folder) / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{folder} has LoRA experts without their model: load that one, then load_lora_experts(model, folder)"
        )
    config = read_config(folder)
    mixtral = config.get("model_type") == "mixtral"
    if mixtral:
        check_mixtral(folder)
    model = AutoModelForCausalLM.from_pretrained(str(folder), **kwargs)
    set_implementation(model, experts_implementation)
    if mixtral and config.get("norm_topk_prob") is False:
        fuse_routers(mixture_layers(model), renormalize=False)
    return model
