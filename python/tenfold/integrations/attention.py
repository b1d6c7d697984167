# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="tenfold"`` (alias ``"dha"``) for transformers' decoder models.

    from tenfold.integrations import attention  # registers it; nothing else is changed
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tenfold")
    attention.patch(model)  # or a model that is there already; attention.unpatch(model) undoes it

Prompts and training run through ``dha_attention``, the newest few tokens through ``dha_decode``. Grouped
heads are read in place, through the model's own maps or ``h // (Hq / Hkv)``.

Masks. transformers asks a mask function once per forward and hands its answer to every layer. Ours
answers with as little as is true (B batch, Sq queries, Sk slots):

* None: plain causal attention, bottom-right aligned, every slot in use.
* spans, int32 [B, 1 + window, 1 + end, 2]: (start, length) of each row's one run of visible slots, up
  to its newest query. Left padding and static caches are of this kind. The middle sizes carry what the
  host knows, at no memory: the sliding window and the number of slots in use (0: none; all).
* padding, uint8 [B, 1, 1, Sk]: which slots hold a token, causal on top.
* anything else that transformers can express: its boolean mask [B, 1, Sq, Sk], True where seen.

All are 4-D, so that transformers passes them through a second time as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

from tenfold import ops
from tenfold.integrations import transformers as hf
from tenfold.integrations._hosts import Patched, refuse_patched, undo_patch
from tenfold.integrations.heads import DECODE_STEPS, grouped_map

hf.require("tenfold.integrations.attention", 5, 5)  # mask functions took other arguments before

NAME = "tenfold"
NAMES = (NAME, "dha")

_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "head_mask")


# -- masks ---------------------------------------------------------------------------------------


def _window_of(mask_function: Callable) -> int | None:
    """0 for plain causal, the window of a sliding causal mask, None for any other pattern."""
    if mask_function is causal_mask_function:
        return 0
    if torch.compiler.is_compiling():
        return None
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if len(parts) != 1 or not isinstance(parts[0], tuple) or len(parts[0]) != 2:
        return None
    overlay, causal = parts[0]
    like = sliding_window_overlay(1)
    if causal is not causal_mask_function or getattr(overlay, "__code__", 0) is not like.__code__:
        return None
    window = overlay.__closure__[0].cell_contents
    return window if isinstance(window, int) else None


def _spans(start: Tensor, lens: Tensor, window: int = 0, end: int = 0) -> Tensor:
    """Packs (start, length) [B] each; both stay contiguous in memory.

    Window and end are sizes with stride 0: no memory stands behind them. Whoever makes such a mask
    contiguous (``.contiguous()``, ``.clone(memory_format=...)``, a transfer to another device) gets the
    same answers, but ``8 (1 + window) (1 + end)`` bytes a row: expand anew from ``mask[:, :1, :1]`` instead.
    Sizes and not numbers beside the tensor, because transformers hands on tensors only.
    """
    both = torch.stack((start, lens)).to(torch.int32)
    return both.t()[:, None, None].expand(-1, 1 + window, 1 + end, -1)


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
    """The least mask that says what a forward may see; the forms are those of the module's docstring.

    Arguments are those of transformers' mask functions: ``attention_mask`` [B, tokens] bool or None,
    queries at positions ``q_offset + i``, slots at ``kv_offset + j``.
    """
    if attention_mask is not None:
        device = attention_mask.device
    window = _window_of(mask_function)
    found: Tensor | bool | None = False
    if window is not None:
        found = _least_mask(batch_size, q_length, kv_length, q_offset, kv_offset, window,
                            attention_mask, device)  # fmt: skip
    if not isinstance(found, bool):
        return found
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        device=device, **kwargs,
    )  # fmt: skip


def _least_mask(
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    window: int,
    padding: Tensor | None,
    device: torch.device | str,
) -> Tensor | bool | None:
    """A mask of the first three kinds, or False where none of them says it."""
    steps = q_length <= DECODE_STEPS
    if isinstance(q_offset, Tensor) and not (steps and padding is None):
        if torch.compiler.is_compiling():
            return False  # the host cannot know how many slots are in use
        q_offset = int(q_offset)
    end = q_offset + q_length - kv_offset  # slots in use
    if padding is None:
        if steps:
            lens = torch.as_tensor(end, device=device).expand(batch)
            return _spans(torch.zeros_like(lens), lens, window)
        return _unpadded(batch, int(end), kv_length, window, device)
    end = int(end)
    if end > kv_length or padding.shape[1] < kv_offset + end:
        return False
    padding = padding[:, kv_offset : kv_offset + end]
    if torch.compiler.is_compiling():
        return padding.to(torch.uint8)[:, None, None] if end == kv_length and not window else False
    count = padding.sum(-1)
    slot = torch.arange(end, device=padding.device)
    if bool((padding != (slot >= (end - count)[:, None])).any()):  # not all at the end
        whole = end == kv_length and not window
        return padding.to(torch.uint8)[:, None, None] if whole else False
    if not steps and int(count.sum()) == batch * end:
        return _unpadded(batch, end, kv_length, window, device)
    return _spans(end - count, count, window, 0 if steps or end == kv_length else end)


def _unpadded(
    batch: int, end: int, kv_length: int, window: int, device: torch.device | str
) -> Tensor | bool | None:
    if end > kv_length:
        return False
    if end == kv_length and not window:
        return None
    lens = torch.full((batch,), end, device=device)
    return _spans(torch.zeros_like(lens), lens, window, 0 if end == kv_length else end)


# -- attention -----------------------------------------------------------------------------------


def head_maps(
    module: nn.Module, heads: int, key_heads: int, value_heads: int, device: torch.device
) -> list[Tensor]:
    """The module's own ``key_map`` and ``value_map``, else grouped ones, int32 [H] each.

    Raises ValueError if the head counts do not divide the query heads and the module has no maps.
    """
    own: Any = module
    if getattr(own, "key_map", None) is not None:
        return [own.key_map, own.value_map]
    return [grouped_map(heads, count, device) for count in (key_heads, value_heads)]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over tenfold's ops.

    Args:
        module: the attention layer; its ``key_map`` and ``value_map`` are used if it has them.
        query: [B, H, Sq, D]. key: [B, HK, Sk, D]. value: [B, HV, Sk, DV].
        attention_mask: as ``attention_mask`` of this module makes it, or any 4-D boolean or additive
            mask (then nothing else is masked), or None.
        scaling: logit scale; default ``1 / sqrt(D)``. dropout: must be 0.
        sliding_window: keys each query sees, itself included. softcap: ``c * tanh(logits / c)``.
        is_causal: overrides ``module.is_causal``.

    Returns:
        [B, Sq, H, DV], and None in the place of the weights.

    Raises:
        ValueError: dropout, or a feature that the ops do not have, by name.
    """
    _refuse(module, dropout, kwargs)
    if query.dtype != value.dtype:  # autocast leaves rotated queries and keys in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    softcap = softcap or getattr(module, "attn_logit_softcapping", None) or 0.0
    how: dict[str, Any] = {"scale": scaling, "softcap": float(softcap)}
    kmap, vmap = head_maps(module, query.shape[1], key.shape[1], value.shape[1], query.device)
    window = -1 if sliding_window is None else sliding_window - 1
    mask, steps = attention_mask, query.shape[2] <= DECODE_STEPS
    if mask is None and steps and causal and query.shape[2] <= key.shape[2]:
        lens = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32, device=query.device)
        mask = _spans(torch.zeros_like(lens), lens)
    spans = mask is not None and mask.dtype == torch.int32
    if steps and spans and not _needs_grad(query, key, value):
        assert mask is not None
        how |= {"window_left": _window(mask, window), "kv_start": mask[:, 0, 0, 0]}
        out, _ = ops.dha_decode(query, key, value, kmap, vmap, mask[:, 0, 0, 1], **how)
        return out.transpose(1, 2), None
    slots, masking = _masking(mask, query.shape[2], key.shape[2], causal, window)
    if slots < key.shape[2]:
        key, value = key[:, :, :slots], value[:, :, :slots]
    out, _ = ops.dha_attention(query, key, value, kmap, vmap, **how, **masking)
    return out.transpose(1, 2), None


def _refuse(module: nn.Module, dropout: float, kwargs: dict) -> None:
    if dropout > 0:
        raise ValueError(
            f"attn_implementation={NAME!r} has no attention dropout, got dropout={dropout} in "
            f"{type(module).__name__}; set config.attention_dropout = 0.0 or use 'sdpa'"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} does not support {name!r} of "
                f"{type(module).__name__}; use 'eager'"
            )


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _window(spans: Tensor, window: int) -> int:
    """``window_left`` of a mask that carries one, else the layer's own."""
    return spans.shape[1] - 2 if spans.shape[1] > 1 else window


def _masking(
    mask: Tensor | None, count: int, slots: int, causal: bool, window: int
) -> tuple[int, dict[str, Any]]:
    """Slots in use, and the masking arguments of ``dha_attention`` for a mask of any kind.

    ``count`` queries over ``slots`` slots; ``causal`` and ``window`` are the layer's own.
    """
    if mask is None:
        return slots, {"causal": causal, "window_left": window}
    if mask.dtype == torch.uint8:
        return slots, {"causal": True, "window_left": window, "attn_bias": mask.view(torch.bool)}
    if mask.dtype != torch.int32:  # complete in itself
        return slots, {"causal": False, "attn_bias": mask[..., :slots]}
    window = _window(mask, window)
    start, lens = mask[:, 0, 0, 0, None], mask[:, 0, 0, 1, None]
    if count > DECODE_STEPS:
        end = mask.shape[2] - 1
        slots = end if 0 < end < slots else slots
        slot = torch.arange(slots, dtype=torch.int32, device=mask.device)
        bias = (slot >= start)[:, None, None]
        return slots, {"causal": True, "window_left": window, "attn_bias": bias}
    slot = torch.arange(slots, dtype=torch.int32, device=mask.device)
    row = torch.arange(count, dtype=torch.int32, device=mask.device)
    last = (start + lens - count + row)[..., None]  # the slot of each query [B, Sq, 1]
    see = (slot <= last) & (slot >= start[..., None])
    if window >= 0:
        see = see & (slot >= last - window)
    return slots, {"causal": False, "attn_bias": see[:, None]}


def register() -> None:
    """Registers attention and mask functions under both names (importing this module does it)."""
    for name in NAMES:
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)


def unregister() -> None:
    """Takes both names back; models that are set to them must be set to another. A second call does nothing."""
    for interface, own in (
        (AttentionInterface, attention_forward),
        (AttentionMaskInterface, attention_mask),
    ):
        for name in NAMES:
            if interface._global_mapping.get(name) is own:
                del interface._global_mapping[name]


def patch(model: Any) -> Patched:
    """Runs the attention of a transformers model through tenfold; :func:`unpatch`, or the handle, undoes it.

    Raises:
        TypeError: no transformers model, or one that computes its attention by itself. RuntimeError: patched already.
            Nothing is changed then.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"patch needs a model of transformers, got {type(model).__name__}")
    refuse_patched(model, "attention")
    register()
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    found = {id(c): c for c in configs if hasattr(c, "_attn_implementation_internal")}
    before = [(c, c._attn_implementation_internal) for c in found.values()]

    def undo() -> None:
        for config, name in before:
            config._attn_implementation_internal = name

    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        undo()
        raise TypeError(
            f"{type(model).__name__} computes its attention by itself; supported: models that call transformers' "
            "AttentionInterface"
        )
    return Patched(model, "attention", undo)


def unpatch(model: Any) -> None:
    """Undoes :func:`patch`. Raises RuntimeError for a model that is not patched."""
    undo_patch(model, "attention")


register()
