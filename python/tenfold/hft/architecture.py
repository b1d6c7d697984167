# SPDX-License-Identifier: Apache-2.0
"""What half fine-tuning can freeze in a model: its layers, and in each the matrices by category.

A *unit* is what is frozen or trained as one: a weight matrix with its bias, a part of a fused matrix
(the keys in ``qkv_proj``), one projection of all experts of a layer, or a norm. Categories are
``attention``, ``ffn`` and ``norm``. What lies outside the layers (embeddings, head, final norm) and the
routers of mixtures of experts are in no unit: they always train.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

CATEGORIES = ("attention", "ffn", "norm")
Ranges = tuple[tuple[int, int, int], ...]  # (start, stop, step) of rows, columns or elements

_ATTENTION = {"self_attn", "attn", "attention", "self_attention", "selfattention", "cross_attn",
              "encdecattention", "encoder_attn", "crossattention", "linear_attn", "mixer"}  # fmt: skip
_FFN = {"mlp", "ffn", "feed_forward", "feedforward", "densereludense", "block_sparse_moe", "moe",
        "experts", "shared_expert", "shared_experts", "intermediate", "output", "fc1", "fc2",
        "linear1", "linear2", "c_fc"}  # fmt: skip
_ROUTER = {"gate", "router", "shared_expert_gate", "gate_network"}
_QKV = {"qkv_proj", "wqkv", "qkv", "c_attn", "query_key_value", "in_proj", "in_proj_weight"}
_GATE_UP = {"gate_up_proj"}


@dataclass(frozen=True)
class Piece:
    """A tensor, or the part of it that ``ranges`` names (None: all): indices of dimension ``kind``.

    ``kind``: ``row`` counts rows of the tensor seen as [numel / last dimension, last dimension],
    ``col`` indices of the last dimension, ``element`` elements.
    """

    name: str
    numel: int
    kind: str = "row"
    ranges: Ranges | None = None


@dataclass(frozen=True)
class Unit:
    """What is selected as one."""

    label: str
    layer: int
    category: str
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements in all pieces."""
        return sum(p.numel for p in self.pieces)


@dataclass
class Architecture:
    """The units of a model, per layer and category, and the names that belong to no unit."""

    name: str
    layers: list[dict[str, list[Unit]]]
    outside: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)

    def units(self) -> Iterable[Unit]:
        """All units, layer by layer."""
        for layer in self.layers:
            for category in CATEGORIES:
                yield from layer[category]


def _is_norm(part: str) -> bool:
    return "norm" in part or re.fullmatch(r"ln(_?(\d+|f|attn|mlp|cross_attn))?", part) is not None


def category_of(path: list[str]) -> str | None:
    """Category of a parameter by its path inside the layer; ``router``: always trains; None: unknown."""
    parts = [p.lower() for p in path[:-1]]
    if "relative_attention_bias" in parts:  # T5's position embedding
        return "router"
    if any(map(_is_norm, parts)):
        return "norm"
    # BERT: attention.output.dense is attention, output.dense is not.
    for part in parts:
        if part in _ATTENTION:
            return "attention"
        if part in _FFN:
            return "router" if parts[-1] in _ROUTER else "ffn"
    return None


def _heads(config: Any) -> tuple[int, int, int]:
    """(query heads, key-value heads, head dimension) of a configuration, 0 where unknown."""

    def first(*names: str) -> int:
        return next((int(v) for n in names if (v := getattr(config, n, None))), 0)

    heads, width = first("num_attention_heads", "n_head"), first("hidden_size", "n_embd")
    kv = first("num_key_value_heads") or heads
    return heads, kv, first("head_dim") or (width // heads if heads else 0)


def _spans(sizes: list[int], repeat: int = 1) -> list[Ranges]:
    """Ranges of consecutive parts of these sizes, the whole pattern ``repeat`` times."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    period = sum(sizes)
    return [
        tuple((r * period + s, r * period + s + n, 1) for r in range(repeat))
        for s, n in zip(starts, sizes)
    ]


def _qkv_ranges(name: str, size: int, config: Any) -> list[tuple[str, Ranges]]:
    """Where queries, keys and values lie along a fused dimension of ``size``."""
    heads, kv, dim = _heads(config)
    kind = getattr(config, "model_type", "")
    labels = ("q", "k", "v")
    if size == (heads + 2 * kv) * dim and "query_key_value" not in name:
        return list(zip(labels, _spans([heads * dim, kv * dim, kv * dim])))
    if "query_key_value" in name and kind in ("gpt_neox", "bloom") and size == 3 * heads * dim:
        return list(zip(labels, _spans([dim, dim, dim], heads)))  # [heads, 3, dim]
    raise ValueError(
        f"{name}: cannot tell queries, keys and values apart in a fused dimension of {size} "
        f"({heads} query and {kv} key-value heads of {dim}, model type {kind!r})"
    )


def _gate_up_ranges(
    name: str, shape: tuple[int, ...], config: Any
) -> tuple[str, list[tuple[str, Ranges]]]:
    """(dimension, parts) of a fused gate and up projection, alone [2f, d] or stacked [E, 2f, d]."""
    if getattr(config, "model_type", "") == "gpt_oss":  # [E, d, 2f], interleaved
        return "col", [("gate", ((0, shape[-1], 2),)), ("up", ((1, shape[-1], 2),))]
    rows, stacked = shape[-2], 1
    for n in shape[:-2]:
        stacked *= n
    if rows % 2:
        raise ValueError(f"{name}: {rows} rows cannot be a gate and an up projection")
    gate, up = _spans([rows // 2, rows // 2], stacked)
    return "row", [("gate", gate), ("up", up)]


def _fused(
    name: str, parameter: Tensor, transposed: bool, config: Any
) -> tuple[str, list[tuple[str, Ranges]]] | None:
    """(dimension, named parts) of a fused weight; None if it is one matrix."""
    parts = name.lower().split(".")
    last = parts[-1] if parts[-1] in _QKV | _GATE_UP else parts[-2]
    if last in _QKV:
        size = parameter.shape[-1] if transposed else parameter.shape[0]
        return "col" if transposed else "row", _qkv_ranges(name, size, config)
    if last in _GATE_UP:
        return _gate_up_ranges(name, tuple(parameter.shape), config)
    return None


def _covered(ranges: Ranges) -> int:
    return sum(len(range(*r)) for r in ranges)


def _pieces(name: str, parameter: Tensor, transposed: bool, config: Any) -> list[tuple[str, Piece]]:
    """A weight's parts as (suffix of the unit's label, piece)."""
    fused = _fused(name, parameter, transposed, config)
    if fused is None:
        return [("", Piece(name, parameter.numel()))]
    kind, parts = fused
    per = parameter.numel() // parameter.shape[-1] if kind == "col" else parameter.shape[-1]
    return [(f":{p}", Piece(name, _covered(r) * per, kind, r)) for p, r in parts]


def _bias_pieces(weights: list[tuple[str, Piece]], name: str, bias: Tensor) -> list[Piece]:
    """What of a bias belongs to each part of its weight."""
    if len(weights) == 1:
        return [Piece(name, bias.numel())]
    made: list[Piece] = []
    for _, piece in weights:
        ranges = piece.ranges or ()
        stacked = piece.kind == "col" and bias.ndim == 2  # [experts, outputs]
        size, per = (bias.shape[-1], bias.shape[0]) if stacked else (bias.numel(), 1)
        if max(r[1] for r in ranges) > size:
            raise ValueError(
                f"{name}: a bias of {bias.numel()} does not fit the parts of its weight"
            )
        kind = "col" if stacked else "element"
        made.append(Piece(name, _covered(ranges) * per, kind, ranges))
    return made


def _split(name: str) -> tuple[tuple[str, int], list[str]] | None:
    """((prefix, index) of the layer, path inside it); None outside layers."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit() and at > 0:
            return (".".join(parts[:at]), int(part)), parts[at + 1 :]
    return None


def describe(model: nn.Module) -> Architecture:
    """The units of a model.

    Raises ValueError, with what was found, for a model without layers, with layers in which a matrix
    belongs to no category, or with LoRA modules in it.
    """
    parameters = dict(model.named_parameters())
    lora = [n for n in parameters if "lora_" in n]
    if lora:
        raise ValueError(
            f"half fine-tuning selects a model's own weights, and this one has LoRA modules "
            f"({lora[0]}, ...); merge or unload them first"
        )
    config = getattr(model, "config", None)
    transposed = {n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    inside: dict[tuple[str, int], dict[str, list[str]]] = {}
    outside: list[str] = []
    unknown: list[str] = []
    for name, parameter in parameters.items():
        found = _split(name)
        if found is None:
            outside.append(name)
            continue
        key, path = found
        category = category_of(path)
        if category is None and parameter.ndim >= 2:
            unknown.append(name)
        inside.setdefault(key, {}).setdefault(category or "other", []).append(name)
    layers = _layers(inside, parameters, transposed, config, outside)
    listed = ", ".join(list(parameters)[:8]) + (", ..." if len(parameters) > 8 else "")
    if not any(layer[c] for layer in layers for c in ("attention", "ffn")):
        raise ValueError(
            f"no layers with attention or FFN matrices in {type(model).__name__}; found: {listed}"
        )
    if unknown:
        raise ValueError(
            f"{len(unknown)} matrices of {type(model).__name__} belong to no category (attention, ffn, "
            f"norm): {', '.join(unknown[:8])}"
        )
    return Architecture(type(model).__name__, layers, outside, _embeddings(model, outside))


def _embeddings(model: nn.Module, outside: list[str]) -> list[str]:
    """Embeddings and output head among the names outside the layers."""
    found = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found |= {id(p) for p in head.parameters()} if head is not None else set()
    parameters = dict(model.named_parameters())
    return [n for n in outside if id(parameters[n]) in found]


def _layers(
    inside: dict[tuple[str, int], dict[str, list[str]]],
    parameters: dict[str, nn.Parameter],
    transposed: set[str],
    config: Any,
    outside: list[str],
) -> list[dict[str, list[Unit]]]:
    layers: list[dict[str, list[Unit]]] = []
    for at, (key, categories) in enumerate(inside.items()):
        prefix = f"{key[0]}.{key[1]}."
        made: dict[str, list[Unit]] = {c: [] for c in CATEGORIES}
        for category in CATEGORIES:
            pieces: dict[str, list[Piece]] = {}
            weights: dict[str, list[tuple[str, Piece]]] = {}
            names = categories.get(category, [])
            # Weights first: a bias follows its weight.
            for name in sorted(names, key=lambda n: n.endswith("bias")):
                # Expert 0's and expert 1's w1 are one unit.
                label = re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.", name.removeprefix(prefix))
                module = name.rsplit(".", 1)[0]
                owner = name.removesuffix("_bias").removesuffix(".bias")
                bias = name.endswith("bias") and parameters[name].ndim < 3
                stem = next((w for w in (f"{owner}.weight", owner) if w in weights), None)
                if bias and stem is not None:
                    base = re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.", stem.removeprefix(prefix))
                    for (suffix, _), piece in zip(
                        weights[stem], _bias_pieces(weights[stem], name, parameters[name])
                    ):
                        pieces[base + suffix].append(piece)
                    continue
                if category != "norm" and parameters[name].ndim < 2:
                    outside.append(name)  # sinks and other vectors of no matrix
                    continue
                is_norm = category == "norm"
                parts = (
                    [("", Piece(name, parameters[name].numel()))]
                    if is_norm
                    else _pieces(name, parameters[name], module in transposed, config)
                )
                weights[name] = parts
                for suffix, piece in parts:
                    pieces.setdefault(label + suffix, []).append(piece)
            made[category] = [Unit(n, at, category, tuple(p)) for n, p in pieces.items()]
        outside.extend(categories.get("router", []) + categories.get("other", []))
        layers.append(made)
    return layers
