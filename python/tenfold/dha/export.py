# SPDX-License-Identifier: Apache-2.0
"""Into DHA and out of it: a DHA model from a stock one, and stock models for engines without DHA kernels.

dha = from_mha(llama)                 # maps of MHA or GQA, same function, nothing lost
dha = from_mha(llama, layout, ...)    # with fused key and value weights
llama = dha_to_mha(dha)               # every query head gets its own copy of its heads
llama = dha_to_gqa(dha)               # where the maps are those of GQA in some order
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold.dha.layout import HeadLayout, expanded
from tenfold.dha.model import DhaLlamaConfig, DhaLlamaForCausalLM

SUPPORTED = ("llama", "mistral", "qwen2")
# Makes the new tensors of one attention layer, by parameter name.
_Rebuild = Callable[[int, nn.Module], dict[str, Tensor]]


def from_mha(
    model: nn.Module,
    layout: HeadLayout | None = None,
    key_weights: Sequence[Tensor] | None = None,
    value_weights: Sequence[Tensor] | None = None,
    *,
    key_biases: Sequence[Tensor] | None = None,
    value_biases: Sequence[Tensor] | None = None,
    attn_implementation: str | None = None,
) -> DhaLlamaForCausalLM:
    """A DHA model from a stock MHA or GQA one; the source is not changed, and shares no memory with it.

    Without further arguments the maps are those of the source, and so is the function. With them,
    keys and values are replaced: that is the last step of a conversion.

    Args:
        model: a causal LM of the Llama layout with full attention (Llama, Mistral and Qwen2 without
            sliding windows); any dtype.
        layout: head counts and maps; then both weights are needed.
        key_weights, value_weights: per layer, [HK, D, m] and [HV, D, m] (rows of ``k_proj`` by head).
        key_biases, value_biases: per layer, [HK, D] and [HV, D]; needed if the source has biases.
        attn_implementation: of the new model; default ``"tenfold"``.

    Raises:
        TypeError: another kind of model. ValueError: weights that do not fit the layout, by layer.
    """
    config = _source_config(model)
    given = {"key_weights": key_weights, "value_weights": value_weights}
    missing = [name for name, value in given.items() if value is None]
    if layout is None and len(missing) < 2:
        raise ValueError("key_weights and value_weights need a layout")
    if layout is not None and missing:
        raise ValueError(f"a layout needs {' and '.join(missing)}, too")
    new = layout or HeadLayout.from_config(model.config)
    fields = new.config_fields() | {"attention_bias": False, "attention_out_bias": None}
    first = _attentions(model)[0]
    if first.q_proj.bias is not None:
        fields |= {"attention_bias": True, "attention_out_bias": first.o_proj.bias is not None}
    dha_config = DhaLlamaConfig(**(config | fields))
    if layout is None:
        return _build(DhaLlamaForCausalLM, dha_config, model, lambda *_: {}, attn_implementation)

    def rebuild(index: int, attention: nn.Module) -> dict[str, Tensor]:
        out = {}
        for name, heads, weights, biases in (
            ("k_proj", new.key_heads, key_weights, key_biases),
            ("v_proj", new.value_heads, value_weights, value_biases),
        ):
            old = getattr(attention, name)
            shape = (heads[index], dha_config.head_dim, dha_config.hidden_size)
            out[f"{name}.weight"] = _flat(name, "weights", weights, index, shape, old.weight)
            if old.bias is not None:
                out[f"{name}.bias"] = _flat(name, "biases", biases, index, shape[:2], old.bias)
        return out

    return _build(DhaLlamaForCausalLM, dha_config, model, rebuild, attn_implementation)


def dha_to_mha(
    model: DhaLlamaForCausalLM, *, attn_implementation: str | None = None
) -> LlamaForCausalLM:
    """A stock MHA Llama of the same function: each query head gets copies of its key and value head.

    For engines without DHA kernels. The cache is that of MHA again. The source is not changed.
    """
    layout = _dha_layout(model)

    def rebuild(index: int, attention: nn.Module) -> dict[str, Tensor]:
        return _taken(attention, layout.key_head_map[index], layout.value_head_map[index])

    config = _llama_config(model.config, layout.num_heads)
    return _build(LlamaForCausalLM, config, model, rebuild, attn_implementation)


def dha_to_gqa(
    model: DhaLlamaForCausalLM, *, expand: bool = False, attn_implementation: str | None = None
) -> LlamaForCausalLM:
    """A stock GQA Llama of the same function, query heads sorted; the source is not changed.

    Possible where keys and values are shared by the same groups of query heads, of one size, the same
    in all layers. With ``expand`` heads are repeated until that holds: groups become the largest equal
    ones inside which neither map changes (at worst those of MHA).

    Raises:
        ValueError: the maps allow no GQA, naming the layer and why. TypeError: not a DHA model.
    """
    layout = _dha_layout(model)
    count = gqa_heads(layout, expand)
    order = layout.sort_order()
    step = layout.num_heads // count

    def rebuild(index: int, attention: nn.Module) -> dict[str, Tensor]:
        heads, dim = order[index], attention.head_dim
        kmap, vmap = layout.key_head_map[index], layout.value_head_map[index]
        out = _taken(attention, [kmap[h] for h in heads[::step]], [vmap[h] for h in heads[::step]])
        out["q_proj.weight"] = expanded(attention.q_proj.weight, heads, dim)
        if attention.q_proj.bias is not None:
            out["q_proj.bias"] = expanded(attention.q_proj.bias, heads, dim)
        out["o_proj.weight"] = expanded(attention.o_proj.weight.t(), heads, dim).t().contiguous()
        return out

    return _build(
        LlamaForCausalLM, _llama_config(model.config, count), model, rebuild, attn_implementation
    )


def gqa_heads(layout: HeadLayout, expand: bool = False) -> int:
    """Key/value heads of the GQA model that :func:`dha_to_gqa` makes; errors as there."""
    sizes: list[int] = []
    for layer, maps in enumerate(zip(layout.key_head_map, layout.value_head_map)):
        groups = Counter(zip(*maps)).values()
        if not expand:
            if not layout.is_equal(layer):
                raise ValueError(
                    f"layer {layer} has {layout.key_heads[layer]} key heads and "
                    f"{layout.value_heads[layer]} value heads shared by different groups of query "
                    "heads, which GQA cannot express; use expand=True or dha_to_mha"
                )
            if len(set(groups)) > 1:
                raise ValueError(
                    f"layer {layer} has groups of {sorted(groups)} query heads, GQA needs equal ones; "
                    "use expand=True or dha_to_mha"
                )
            if sizes and sizes[0] not in groups:
                raise ValueError(
                    f"layer {layer} has {len(groups)} groups, layer 0 has "
                    f"{layout.num_heads // sizes[0]}; a GQA config has one number for all layers; "
                    "use expand=True or dha_to_mha"
                )
        sizes += groups
    return layout.num_heads // math.gcd(*sizes)


# -- shared --------------------------------------------------------------------------------------


def _attentions(model: nn.Module) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def _dha_layout(model: nn.Module) -> HeadLayout:
    if not isinstance(model, DhaLlamaForCausalLM):
        raise TypeError(f"{type(model).__name__} is not supported; supported: DhaLlamaForCausalLM")
    return HeadLayout.from_config(model.config)


def _source_config(model: nn.Module) -> dict[str, Any]:
    """The Llama fields of a stock model's config; TypeError if it is no model of the Llama layout."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in SUPPORTED or not hasattr(model, "lm_head"):
        raise TypeError(
            f"{type(model).__name__} (model type {kind!r}) is not supported; supported: causal LMs of "
            f"type {', '.join(SUPPORTED)}"
        )
    window = getattr(config, "sliding_window", None)
    plain = "full_attention" if window is None else "sliding_attention"
    if set(getattr(config, "layer_types", None) or [plain]) != {"full_attention"}:
        raise TypeError(
            f"{type(model).__name__} has sliding-window layers (sliding_window={window}), which "
            "are not supported; supported: full attention (config.sliding_window = None)"
        )
    return _llama_fields(config)


def _llama_fields(config: Any) -> dict[str, Any]:
    names = set(LlamaConfig().to_dict()) - {"model_type", "transformers_version", "architectures"}
    return {name: value for name, value in config.to_dict().items() if name in names}


def _llama_config(config: DhaLlamaConfig, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(**(_llama_fields(config) | {"num_key_value_heads": kv_heads}))


def _taken(attention: Any, keys: Sequence[int], values: Sequence[int]) -> dict[str, Tensor]:
    """Key and value projections with the given heads one after another."""
    out = {}
    for name, heads in (("k_proj", keys), ("v_proj", values)):
        linear = getattr(attention, name)
        out[f"{name}.weight"] = expanded(linear.weight, heads, attention.head_dim)
        if linear.bias is not None:
            out[f"{name}.bias"] = expanded(linear.bias, heads, attention.head_dim)
    if attention.q_proj.bias is not None and attention.o_proj.bias is None:
        # Stock Llama has either all biases or none.
        out["o_proj.bias"] = attention.o_proj.weight.new_zeros(attention.o_proj.weight.shape[0])
    return out


def _flat(
    name: str, kind: str, given: Sequence[Tensor] | None, layer: int, shape: tuple, old: Tensor
) -> Tensor:
    """The layer's tensor as rows [heads * D, ...], in the dtype and on the device of the old one."""
    what = f"{'key' if name == 'k_proj' else 'value'}_{kind}"
    if given is None:
        raise ValueError(f"the source has biases in {name}, so {what} are needed")
    if layer >= len(given):
        raise ValueError(f"{what} must have one tensor per layer, got {len(given)}")
    tensor = given[layer]
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{what} of layer {layer} must be {list(shape)} to fit the layout, got "
            f"{list(tensor.shape)}"
        )
    return tensor.detach().reshape(-1, *shape[2:]).to(old)


@torch.no_grad()
def _build(
    kind: Any, config: Any, source: nn.Module, rebuild: _Rebuild, attn_implementation: str | None
) -> Any:
    """A model of the class ``kind`` with the source's weights, those of attention rebuilt."""
    state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    for index, attention in enumerate(_attentions(source)):
        for name, tensor in rebuild(index, attention).items():
            state[f"model.layers.{index}.self_attn.{name}"] = tensor
    if getattr(config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    how = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    device = next(source.parameters()).device
    model = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=source.dtype, **how
    ).to(device)
    model.train(source.training)
    if getattr(source, "generation_config", None) is not None:
        model.generation_config = type(source.generation_config).from_dict(
            source.generation_config.to_dict()
        )
    return model
