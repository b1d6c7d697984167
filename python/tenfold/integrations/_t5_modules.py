# SPDX-License-Identifier: Apache-2.0
"""The modules of T5, mT5 and UMT5 on tenfold's ops, as subclasses of transformers' own.

:func:`tenfold.integrations.t5.patch` gives a module one of these classes in place of its own: parameters, names, hooks
and buffers stay where they are. Each class computes what it can and hands the rest to the class it stands for.

Masks. transformers asks a mask function once per forward and hands its answer to every layer. Ours answers None (every
key is seen, causal or not as the layer is), int32 [B, 1, 1, 1] (so many keys are seen, from the first on), or
transformers' own boolean mask [B, 1, Lq, Lk] for everything else, for which the layer's own class is called.

The bias. Layer 0 hands its table [32, H] to the layers above it in the place of the stock bias [1, H, Lq, Lk].
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, T5ForConditionalGeneration
from transformers.cache_utils import EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from tenfold import ops

# Names of the attention implementation: the second is promised that padding is at the end.
NAME, RIGHT = "tenfold_t5", "tenfold_t5_right"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What transformers calls the cache: since 5.24, and before. Callers may use either name.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(T5ForConditionalGeneration.forward).parameters
)
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}


# -- masks ---------------------------------------------------------------------------------------


def _seen(padding: Tensor, checked: bool) -> Tensor | None:
    """int32 [B]: how many keys each row of a mask [B, Lk] sees; None where those are not its first ones."""
    count = padding.sum(-1)
    if checked:
        first = torch.arange(padding.shape[1], device=padding.device) < count[:, None]
        if not bool((padding == first).all()):
            return None
    return count.to(torch.int32)


def _mask_function(right: bool) -> Callable[..., Tensor | None]:
    def attention_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable = causal_mask_function,
        attention_mask: Tensor | None = None,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> Tensor | None:
        """The least mask that says what a forward may see; arguments as of transformers' mask functions."""
        causal = mask_function is causal_mask_function
        plain = (causal or mask_function is bidirectional_mask_function) and kv_offset == 0
        # A static cache: how many slots are in use is known on the device only.
        plain = plain and not isinstance(q_offset, Tensor)
        plain = plain and (not causal or q_offset + q_length == kv_length)
        if plain and attention_mask is None:
            return None
        checked = not right
        padding = attention_mask if plain else None
        if padding is not None and padding.shape == (batch_size, kv_length):
            if checked and torch.compiler.is_compiling():
                _warn("a mask in a compiled graph cannot be looked at; patch(model, padding='right') "
                      "promises that padding is at the end")  # fmt: skip
            elif (count := _seen(padding, checked)) is not None:
                if checked and bool((count == kv_length).all()):
                    return None
                return count[:, None, None, None]
            else:
                _warn("an attention_mask is not a prefix of ones (padding at the beginning, or in "
                      "between); pad at the end")  # fmt: skip
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            device=device, **kwargs,
        )  # fmt: skip

    return attention_mask


def _warn(why: str) -> None:
    warnings.warn(
        f"tenfold.integrations.t5: {why}. Attention runs through transformers' own code here",
        stacklevel=2,
    )


def _is_count(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32


def stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention for what the op does not do: SDPA, or eager where probabilities are wanted."""
    weights = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    mask = attention_mask
    if _is_count(mask) or (weights and mask is None):
        steps, slots = query.shape[2], key.shape[2]
        slot = torch.arange(slots, device=key.device)
        mask = slot < (slots if mask is None else mask)
        if getattr(module, "is_causal", False):
            last = torch.arange(slots - steps, slots, device=key.device)
            mask = mask & (slot <= last[:, None])
    if not weights:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if mask is not None and mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, hidden)
    stock = getattr(type(module), "tenfold_stock", type(module))
    eager = sys.modules[stock.__module__].eager_attention_forward
    return eager(module, query, key, value, mask, **kwargs)


# -- attention -----------------------------------------------------------------------------------


def _seed() -> int:
    # From torch's generator, whose state checkpointing keeps: a recomputed layer draws the same.
    return int(torch.randint(1 << 62, ()))


def _runs(
    module: Any, hidden: Tensor, mask: Tensor | None, bias: Tensor | None, kwargs: dict
) -> bool:
    """Can the op do it?"""
    weights = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    seen = mask is None or _is_count(mask)
    return seen and not weights and hidden.dtype in DTYPES and (bias is None or bias.dim() == 2)


def attend(module: Any, hidden: Tensor, states: Tensor | None, mask: Tensor | None, table: Tensor | None,
           cache: Any, kwargs: dict[str, Any]) -> Tensor:  # fmt: skip
    """The layer's output [B, Lq, d_model]; ``states`` are those of the encoder, in cross-attention."""
    cross, index = states is not None, module.layer_idx

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, module.key_value_proj_dim).transpose(1, 2)

    own, updated, past = cache, False, 0
    if isinstance(cache, EncoderDecoderCache):
        own = cache.cross_attention_cache if cross else cache.self_attention_cache
        updated = cross and bool(cache.is_updated.get(index))
    if cache is not None and not cross:
        past = own.get_seq_length(index)
    query = heads(module.q(hidden))
    if updated:
        key, value = own.layers[index].keys, own.layers[index].values
    else:
        source = states if cross else hidden
        key, value = heads(module.k(source)), heads(module.v(source))
        if own is not None:
            key, value = own.update(key, value, index, kwargs=kwargs)
            if cross and isinstance(cache, EncoderDecoderCache):
                cache.is_updated[index] = True
    dropout = float(module.dropout) if module.training else 0.0
    causal = bool(module.is_causal) and not cross
    out, _ = ops.t5_attention(
        query, key, value, table, None if mask is None else mask[:, 0, 0, 0],
        bidirectional=table is not None and not module.is_decoder, causal=causal,
        max_distance=module.relative_attention_max_distance, q_offset=past if not cross else 0,
        dropout_p=dropout, seed=_seed() if dropout else 0,
    )  # fmt: skip
    return module.o(out.transpose(1, 2).flatten(2))


class Attention:
    """T5's and mT5's attention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        cache = kwargs.pop("past_key_values", cache)
        if not _runs(self, hidden_states, mask, position_bias, kwargs):
            return super().forward(  # type: ignore[misc]
                hidden_states, mask=mask, key_value_states=key_value_states,
                position_bias=position_bias, **{CACHE: cache}, **kwargs,
            )  # fmt: skip
        if position_bias is None and self.has_relative_attention_bias:
            # A copy: FSDP takes the parameter of layer 0 away before the layers above are run.
            position_bias = self.relative_attention_bias.weight.clone()
        made = attend(self, hidden_states, key_value_states, mask, position_bias, cache, kwargs)
        return made, position_bias, None


class PerLayerAttention:
    """UMT5's attention, where each layer has a table."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = kwargs.pop("past_key_values", cache)
        if not _runs(self, hidden_states, attention_mask, None, kwargs):
            return super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask, **{CACHE: cache}, **kwargs,
            )  # fmt: skip
        table = self.relative_attention_bias.weight if self.has_relative_attention_bias else None
        return attend(
            self, hidden_states, encoder_hidden_states, attention_mask, table, cache, kwargs
        ), None


# -- norm, feed-forward, loss ----------------------------------------------------------------------


class Norm:
    """T5LayerNorm."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        wider = self.weight.dtype == torch.float32 != hidden_states.dtype  # stock gives float32
        if wider or hidden_states.dtype not in DTYPES:
            return super().forward(hidden_states)  # type: ignore[misc]
        return ops.rms_norm(hidden_states, None, self.weight, self.variance_epsilon, order="t5")[0]


class GatedFeedForward:
    """The gated feed-forward with gelu (both forms) or silu."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        a, b = self.wi_0(hidden_states), self.wi_1(hidden_states)
        kind = self.tenfold_act
        if a.dtype not in DTYPES:
            made = self.act(a) * b
        else:
            made = (
                ops.swiglu(a, b)
                if kind == "silu"
                else ops.gated_gelu(a, b, approximate=GELUS[kind])
            )
        made = self.dropout(made)
        weight = self.wo.weight
        if isinstance(weight, Tensor) and weight.dtype not in (made.dtype, torch.int8):
            made = made.to(weight.dtype)
        return self.wo(made)


class ConditionalGeneration:
    """The model with its loss: :func:`tenfold.integrations.t5.patch` says when it returns logits."""

    @can_return_tuple
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        head = self.lm_head
        plain = type(head) is nn.Linear and head.bias is None and head.weight.dtype in DTYPES
        held = {CACHE: kwargs.pop("past_key_values", cache)}
        if labels is None or not plain:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids, attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs, inputs_embeds=inputs_embeds,
                decoder_inputs_embeds=decoder_inputs_embeds, labels=labels, use_cache=use_cache,
                **held, **kwargs,
            )  # fmt: skip
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask,
                                           inputs_embeds=inputs_embeds, **kwargs)  # fmt: skip
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        decoded = self.decoder(
            input_ids=decoder_input_ids, attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds, **held,
            encoder_hidden_states=encoder_outputs[0], encoder_attention_mask=attention_mask,
            use_cache=use_cache, **kwargs,
        )  # fmt: skip
        hidden = decoded[0]
        # UMT5 of transformers 5.20 has no such field, and scales.
        before = self.config.model_type == "umt5"
        if getattr(self.config, "scale_decoder_outputs", before):
            hidden = hidden * self.model_dim**-0.5
        loss = _loss(hidden, head.weight, labels.to(hidden.device), num_items_in_batch)
        wanted = self.tenfold_logits == "always" or (
            self.tenfold_logits == "auto" and not self.training
        )
        return Seq2SeqLMOutput(
            loss=loss, logits=head(hidden) if wanted else None, **{CACHE: getattr(decoded, CACHE)},
            decoder_hidden_states=decoded.hidden_states, decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )  # fmt: skip


def _loss(hidden: Tensor, weight: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    if items is None:
        return ops.linear_cross_entropy(hidden, weight, labels)[0]
    return ops.linear_cross_entropy(hidden, weight, labels, reduction="sum")[0] / items


def register() -> None:
    """Makes both names known to transformers; a second call does nothing."""
    for name in (NAME, RIGHT):
        AttentionInterface.register(name, stock_attention)
        AttentionMaskInterface.register(name, _mask_function(name == RIGHT))
