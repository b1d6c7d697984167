# SPDX-License-Identifier: Apache-2.0
"""Llama with decoupled heads: ``DhaLlamaForCausalLM``, a transformers model like any other.

    import tenfold.dha  # registers the model type "dha_llama"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(**prompt)

Only attention differs from Llama: ``k_proj`` has ``key_heads[layer]`` heads, ``v_proj``
``value_heads[layer]``, and two maps say which of them each query head reads. Caches hold the shared
heads only. ``attn_implementation="tenfold"`` (default) reads them through the maps; ``"sdpa"``, ``"eager"``
and others get keys and values expanded to the query heads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from tenfold.dha.cache import DhaStaticCache, DhaStaticLayer
from tenfold.dha.layout import HeadLayout
from tenfold.integrations import attention as tenfold_attention
from tenfold.integrations import transformers as hf


class DhaLlamaConfig(LlamaConfig):
    """Llama's config with four more fields; without them the maps are those of ``num_key_value_heads``.

    Attributes:
        key_heads, value_heads: head counts per layer.
        key_head_map, value_head_map: per layer, the key / value head of each query head.
        attention_out_bias: bias of ``o_proj``; None: as ``attention_bias`` (Qwen2 has q, k, v only).

    Raises:
        ValueError: counts or maps that do not fit, naming layer, position and value.
    """

    model_type = "dha_llama"
    # Heads are shared across any split of the query heads, so only the MLP can be sharded by columns.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    key_heads: list[int] | None = None
    value_heads: list[int] | None = None
    key_head_map: list[list[int]] | None = None
    value_head_map: list[list[int]] | None = None
    attention_out_bias: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = [name for name in _FIELDS if getattr(self, name) is not None]
        if given and len(given) < len(_FIELDS):
            raise ValueError(
                f"{', '.join(_FIELDS)} must be given together, missing: "
                f"{', '.join(name for name in _FIELDS if name not in given)}"
            )
        layout = HeadLayout.from_config(self)
        if layout.num_layers != self.num_hidden_layers:
            raise ValueError(
                f"key_heads must have one entry per layer ({self.num_hidden_layers}), got "
                f"{layout.num_layers}"
            )
        for name, value in layout.config_fields().items():
            setattr(self, name, value)
        # What other code reads it for (repeating heads, sizing caches) is right for H heads only.
        self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def head_layout(self) -> HeadLayout:
        """The four fields as a :class:`HeadLayout`."""
        return HeadLayout.from_config(self)


_FIELDS = ("key_heads", "value_heads", "key_head_map", "value_head_map")


class DhaLlamaAttention(LlamaAttention):
    """Attention in which query head h reads key head ``key_map[h]`` and value head ``value_map[h]``."""

    key_map: Tensor
    value_map: Tensor

    def __init__(self, config: DhaLlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1  # what the other implementations get is expanded already
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        layout = config.head_layout
        self.key_heads = layout.key_heads[layer_idx]
        self.value_heads = layout.value_heads[layer_idx]
        width, rows = config.hidden_size, config.num_attention_heads * self.head_dim
        bias, out_bias = config.attention_bias, config.attention_out_bias
        self.q_proj = nn.Linear(width, rows, bias=bias)
        self.k_proj = nn.Linear(width, self.key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(rows, width, bias=bias if out_bias is None else out_bias)
        for name in ("key_map", "value_map"):
            empty = torch.zeros(config.num_attention_heads, dtype=torch.int32)
            self.register_buffer(name, empty, persistent=False)
        self.reset_maps()

    def reset_maps(self) -> None:
        """Fills the map buffers from the config (they are not saved)."""
        for buffer, name in ((self.key_map, "key_head_map"), (self.value_map, "value_head_map")):
            entries = getattr(self.config, name)[self.layer_idx]
            init.copy_(buffer, torch.tensor(entries, dtype=torch.int32))

    def set_maps(self, key_map: Any, value_map: Any) -> None:
        """Replaces both maps [H]; the caller sees to the config."""
        for buffer, entries in ((self.key_map, key_map), (self.value_map, value_map)):
            buffer.copy_(torch.as_tensor(entries, dtype=torch.int32))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Llama's; the cache comes under any of its names."""
        cache = hf.get_cache(kwargs)
        for name in hf.CACHE_NAMES:
            kwargs.pop(name, None)
        shape = hidden_states.shape[:-1]
        query, key, value = (
            linear(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            self._check_cache(cache)
            key, value = cache.update(key, value, self.layer_idx)

        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        if name not in tenfold_attention.NAMES:
            key, value = key.index_select(1, self.key_map), value.index_select(1, self.value_map)
        out, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0, **kwargs,
        )  # fmt: skip
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights

    def _check_cache(self, cache: Any) -> None:
        if self.key_heads == self.value_heads or not isinstance(cache, StaticCache):
            return
        if not isinstance(cache.layers[self.layer_idx], DhaStaticLayer):
            raise TypeError(
                f"{type(cache).__name__} gives values the head count of keys, but layer "
                f"{self.layer_idx} has {self.key_heads} key heads and {self.value_heads} value heads; "
                "use tenfold.dha.DhaStaticCache(config, max_cache_len) or a DynamicCache"
            )


class DhaLlamaPreTrainedModel(LlamaPreTrainedModel):
    """Base of the models: config class, default attention, initialisation of the map buffers."""

    config: DhaLlamaConfig
    config_class = DhaLlamaConfig
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        **LlamaPreTrainedModel._can_record_outputs,
        "attentions": DhaLlamaAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DhaLlamaAttention):  # from_pretrained starts on the meta device
            module.reset_maps()

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Where nothing is asked for: the implementation that reads shared heads as they are."""
        name = tenfold_attention.NAME if attn_implementation is None else attn_implementation
        return super()._check_and_adjust_attn_implementation(name, *args, **kwargs)


class DhaLlamaModel(DhaLlamaPreTrainedModel, LlamaModel):
    """``LlamaModel`` with decoupled heads."""

    def __init__(self, config: DhaLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = DhaLlamaAttention(config, index)
        self.post_init()  # initialises what is new only


class DhaLlamaForCausalLM(DhaLlamaPreTrainedModel, LlamaForCausalLM):
    """``LlamaForCausalLM`` with decoupled heads.

    ``from_pretrained``, ``save_pretrained`` and ``generate`` work as ever, with a ``DynamicCache`` or
    :class:`tenfold.dha.DhaStaticCache`.
    """

    def __init__(self, config: DhaLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DhaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Any:
        """``generate(cache_implementation="static")``: our cache in the place of the stock one."""
        stock = super()._prepare_static_cache(*args, **kwargs)
        if not isinstance(stock, StaticCache) or isinstance(stock, DhaStaticCache):
            return stock
        first = stock.layers[0]
        cache = DhaStaticCache(self.config, first.max_cache_len, offloading=stock.offloading)
        if first.is_initialized:  # chunked prompts are compiled and need it now
            batch, _, _, dim = first.keys.shape
            cache.early_initialization(batch, None, dim, first.keys.dtype, first.keys.device)
        return cache


def register() -> None:
    """Makes transformers' Auto classes know the model type (done by ``import tenfold.dha``)."""
    AutoConfig.register(DhaLlamaConfig.model_type, DhaLlamaConfig, exist_ok=True)
    AutoModel.register(DhaLlamaConfig, DhaLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(DhaLlamaConfig, DhaLlamaForCausalLM, exist_ok=True)


register()
