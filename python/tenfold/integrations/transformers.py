# SPDX-License-Identifier: Apache-2.0
"""What the presses need to know about transformers models (5.x), in one place.

Tested range: see ``docs/methods/nacl.md``. The attention modules' cache argument is called
``past_key_values`` up to 5.1x and ``cache`` after it; both are read.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SUPPORTED_ATTENTION = ("sdpa", "eager", "tenfold", "dha")
RAGGED = "tenfold_ragged"
CAPTURE = "tenfold_capture"
CACHE_NAMES = ("cache", "past_key_values", "past_key_value")


def require(name: str, *version: int) -> None:
    """Raises ImportError, naming ``name`` and both versions, if transformers is older than ``version``."""
    import transformers

    found = tuple(int(part) for part in transformers.__version__.split(".")[: len(version)])
    if found < version:
        least = ".".join(map(str, version))
        raise ImportError(
            f"{name} needs transformers >= {least}, found {transformers.__version__}. Upgrade it with "
            f"`pip install 'transformers>={least}'`.",
            name="transformers",
        )


def get_cache(kwargs: dict) -> Any:
    """The cache among a forward's keyword arguments, by any of its names."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def cache_name(model: nn.Module) -> str:
    """What a model's forward calls its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def forward(model: nn.Module, input_ids: Tensor, cache: Any, **kwargs: Any) -> Any:
    """``model(input_ids, cache)``, under the name that this version gives the cache."""
    return model(input_ids, use_cache=True, **{cache_name(model): cache}, **kwargs)


def hidden_states(args: tuple, kwargs: dict) -> Tensor:
    """The layer's input [B, S, hidden]."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The full-attention self-attention modules of a decoder; sliding-window ones are left alone.

    Raises TypeError naming what is supported if the model has none, or another attention.
    """
    used = getattr(model.config, "_attn_implementation", None)
    if used not in (*SUPPORTED_ATTENTION, RAGGED):
        raise TypeError(
            f"attention implementation {used!r} is not supported; supported: "
            f"{', '.join(SUPPORTED_ATTENTION)} (from_pretrained(..., attn_implementation=...))"
        )
    found = []
    for module in model.modules():
        if all(hasattr(module, name) for name in ("q_proj", "k_proj", "layer_idx", "scaling")):
            types = getattr(model.config, "layer_types", None)
            if types is None or types[module.layer_idx] == "full_attention":
                found.append(module)
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no supported attention layer; supported: decoder models whose "
            "attention has q_proj, k_proj and rotary position embeddings (Llama, Mistral, Qwen2, "
            "Qwen3, Gemma, SmolLM and alike)"
        )
    return found


def own_layer(cache: Any, index: int, make: type) -> Any:
    """The cache layer ``index``, replaced by ``make()`` while it is still an empty dynamic one."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None)
    if layers is None:
        raise TypeError(
            f"cache type {type(cache).__name__} is not supported; supported: DynamicCache, NaclCache"
        )
    while len(layers) <= index:
        layers.append(make())
    layer = layers[index]
    if isinstance(layer, make):
        return layer
    fresh = not layer.is_initialized or layer.keys.numel() == 0
    if type(layer) is not DynamicLayer or not fresh:
        raise TypeError(
            f"cache layer {type(layer).__name__}{'' if fresh else ' with content'} is not supported; "
            "supported: an empty DynamicCache or a NaclCache used with the same press settings"
        )
    layers[index] = make()
    return layers[index]


class _Captured(Exception):
    """Carries the queries out of a layer's forward."""

    def __init__(self, query: Tensor) -> None:
        super().__init__()
        self.query = query


def _capture(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise _Captured(query)


class _CapturingConfig:
    """A layer's configuration that names ``_capture`` as its attention; all else is the layer's own."""

    _attn_implementation = CAPTURE

    def __init__(self, config: Any) -> None:
        self._own = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


@torch.no_grad()
def queries(module: nn.Module, hidden: Tensor, kwargs: dict, last: int) -> Tensor:
    """Post-RoPE queries [B, Hq, last, D] of ``hidden`` [B, last, hidden], the last tokens of a forward.

    The layer itself makes them: its forward runs for these tokens up to the attention function. So
    norms, gates, interleaved, partial or absent rotary embeddings are right whatever the model.
    """
    embeddings = kwargs.get("position_embeddings")
    if embeddings is None:
        raise TypeError(
            f"{type(module).__name__} got no position_embeddings: only models with rotary position "
            "embeddings are supported"
        )
    from transformers import AttentionInterface

    AttentionInterface.register(CAPTURE, _capture)
    config = module.config
    module.config = _CapturingConfig(config)
    try:
        module.forward(
            hidden_states=hidden, attention_mask=None,
            position_embeddings=tuple(x[:, -last:] for x in embeddings),
        )  # fmt: skip
    except _Captured as captured:
        return captured.query
    finally:
        module.config = config
    raise TypeError(
        f"{type(module).__name__} computes its attention by itself; supported: layers that call "
        "transformers' AttentionInterface"
    )


def inv_freq(model: nn.Module | None, keys: Tensor) -> Tensor:
    """The rotary frequencies [D / 2] float32 of a model.

    Raises TypeError where keys cannot be re-rotated with one fixed set (partial or scaled rotary).
    """
    for module in model.modules() if model is not None else ():
        freq = getattr(module, "inv_freq", None)
        if isinstance(freq, Tensor) and freq.dim() == 1:
            if freq.numel() * 2 != keys.shape[-1] or getattr(module, "attention_scaling", 1.0) != 1:
                break
            return freq.to(keys.device, torch.float32)
    raise TypeError("rerotate=True needs a model with plain rotary embeddings over the whole head")


def as_mask(module: nn.Module, see: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the module's attention wants it: additive for eager, else boolean."""
    if module.config._attn_implementation != "eager":
        return see
    return torch.zeros(see.shape, dtype=dtype, device=see.device).masked_fill(
        ~see, torch.finfo(dtype).min
    )


def _ragged_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
):
    layer = getattr(module, "_tenfold_layer", None)
    if layer is not None and getattr(layer, "flat_keys", None) is not None:
        scale = kwargs.get("scaling") or module.scaling
        return layer.attend(query, scale).transpose(1, 2).contiguous(), None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


@contextlib.contextmanager
def ragged_attention(model: nn.Module) -> Iterator[None]:
    """Routes the attention of evicted ragged layers to ``ragged_decode`` while the context is open."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(RAGGED, _ragged_forward)
    AttentionMaskInterface.register(RAGGED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    layers = attention_layers(model)

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = get_cache(kwargs)
        module._tenfold_layer = None if cache is None else cache.layers[module.layer_idx]

    hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in layers]
    model.set_attn_implementation(RAGGED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for hook, module in zip(hooks, layers):
            hook.remove()
            module._tenfold_layer = None
