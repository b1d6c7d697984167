# SPDX-License-Identifier: Apache-2.0
"""Dense models with LoRA experts: putting them in, from adapters of PEFT if there are any; saving and loading them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.training.store import write_text
from tenfold.upit.lora import PARTS, LoraExperts
from tenfold.upit.options import LoraExpertsConfig
from tenfold.upit.router import ffn_modules

TENSORS, SETTINGS = "lora_experts.safetensors", "lora_experts.json"
_ADAPTER = re.compile(r"layers\.(\d+)\.mlp\.(gate|up|down)_proj\.lora_([AB])\.(?:\w+\.)?weight$")


def lora_layers(model: nn.Module) -> dict[str, LoraExperts]:
    """The modules with LoRA experts, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraExperts)}


def add_lora_experts(
    model: Any,
    config: LoraExpertsConfig | None = None,
    *,
    adapters: Sequence[Mapping[str, Tensor]] | None = None,
    routers: Tensor | None = None,
) -> Any:
    """Gives every FFN of a dense model LoRA experts, in place; everything else is frozen.

    Args:
        model: a Llama-type causal LM. config: :class:`LoraExpertsConfig`.
        adapters: n LoRA adapters with PEFT's names, of the rank of ``config``; without them all pairs are 0.
        routers: [n, L, d], of ``routing="block"``; else drawn at random.

    Returns:
        ``model``.

    Raises:
        ValueError: numbers or shapes that do not fit; an adapter on other layers than the FFNs'. TypeError: another
            kind of MLP. RuntimeError: the model has LoRA experts already. KeyError: a tensor of an adapter is missing.
    """
    config = config or LoraExpertsConfig()
    if lora_layers(model):
        raise RuntimeError("the model has LoRA experts already")
    mlps = {id(m) for m in ffn_modules(model)}
    places = [(parent, child, m) for parent in model.modules() for child, m in parent.named_children()
              if id(m) in mlps]  # fmt: skip
    made = [LoraExperts(m, config) for _, _, m in places]
    for i, layer in enumerate(made):
        layer.reset(torch.Generator().manual_seed(config.seed * 1009 + i))
    if adapters is not None:
        _load_adapters(made, adapters, config)
    if routers is not None:
        _set_routers(made, routers, config)
    model.requires_grad_(False)
    for (parent, child, _), layer in zip(places, made):
        setattr(parent, child, layer)
        for part in (layer.experts, *layer._routers()):
            part.requires_grad_(True)
    return model


def _set_routers(layers: Sequence[LoraExperts], routers: Tensor, config: LoraExpertsConfig) -> None:
    if config.routing != "block":
        raise ValueError("routers are vectors at the input of FFNs: they need routing='block'")
    wanted = [config.experts, len(layers), layers[0].gate.weight.shape[1]]
    if list(routers.shape) != wanted:
        raise ValueError(
            f"routers must be [experts, layers, hidden size] = {wanted}, got {list(routers.shape)}"
        )
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.gate.weight.copy_(routers[:, i])


@torch.no_grad()
def _load_adapters(
    layers: Sequence[LoraExperts],
    adapters: Sequence[Mapping[str, Tensor]],
    config: LoraExpertsConfig,
) -> None:
    if len(adapters) != config.experts:
        raise ValueError(f"{len(adapters)} adapters for {config.experts} experts")
    for e, adapter in enumerate(adapters):
        found: dict[tuple[int, str, str], Tensor] = {}
        for name, tensor in adapter.items():
            match = _ADAPTER.search(name)
            if match is None:
                raise ValueError(
                    f"adapters[{e}] has {name}: LoRA experts are pairs on gate, up and down of FFNs "
                    "(target_modules gate_proj, up_proj, down_proj)"
                )
            found[int(match[1]), match[2], match[3]] = tensor
        for i, layer in enumerate(layers):
            for part in PARTS:
                for side in "AB":
                    target = getattr(layer.experts, f"{side.lower()}_{part}")[e]
                    given = found.get((i, part, side))
                    if given is None:
                        raise KeyError(
                            f"adapters[{e}] lacks layers.{i}.mlp.{part}_proj.lora_{side}.weight"
                        )
                    if given.shape != target.shape:
                        raise ValueError(
                            f"adapters[{e}]: layers.{i}.mlp.{part}_proj.lora_{side} is {list(given.shape)}, "
                            f"the configuration asks for {list(target.shape)}"
                        )
                    target.copy_(given)


def save_lora_experts(model: nn.Module, folder: str | Path) -> Path:
    """Writes experts and routers (not the shared model) to ``lora_experts.safetensors`` and ``.json``.

    Raises:
        ValueError: the model has no LoRA experts.
    """
    from safetensors.torch import save_file

    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA experts")
    out = Path(folder).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{n}": p.detach().cpu().contiguous() for name, layer in layers.items()
               for n, p in layer.named_parameters() if not n.startswith("base.")}  # fmt: skip
    temporary = out / f".{TENSORS}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(out / TENSORS)
    write_text(
        out / SETTINGS, json.dumps(asdict(next(iter(layers.values())).config), indent=2) + "\n"
    )
    return out


def load_lora_experts(model: Any, folder: str | Path) -> Any:
    """Gives a dense model the experts that :func:`save_lora_experts` wrote, in place.

    Raises:
        FileNotFoundError: none there. KeyError: a tensor is missing (its name). ValueError: tensors of another model.
    """
    from safetensors.torch import load_file

    path = Path(folder).expanduser()
    if not (path / SETTINGS).is_file():
        raise FileNotFoundError(f"{path} has no {SETTINGS}: no LoRA experts were saved there")
    config = LoraExpertsConfig(**json.loads((path / SETTINGS).read_text()))
    saved = load_file(path / TENSORS)
    add_lora_experts(model, config)
    for name, layer in lora_layers(model).items():
        for inner, parameter in layer.named_parameters():
            if inner.startswith("base."):
                continue
            full = f"{name}.{inner}"
            if full not in saved:
                raise KeyError(f"{path / TENSORS} lacks {full}")
            if saved[full].shape != parameter.shape:
                raise ValueError(
                    f"{full} is {list(saved[full].shape)}, this model needs {list(parameter.shape)}"
                )
            parameter.data.copy_(saved[full])
    return model
