# SPDX-License-Identifier: Apache-2.0
"""flash-attn's three functions over tenfold's ops, with maps from query heads to key and value heads.

    from tenfold.integrations.flash_attn import flash_attn_func  # was: from flash_attn import ...

Names, argument order, layouts ([batch, seqlen, heads, dim]), defaults and the meaning of masks are
flash-attn's (2.x; key and value head counts may differ, as in its fork FlexHeadFA). New are the last
arguments ``kmap`` and ``vmap`` [H], which key and which value head each query head reads; without them
it is ``h // (H / HK)`` and ``h // (H / HV)``. CPU tensors and float32 work as well.

Not there, and refused by name: dropout, ALiBi slopes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.integrations.heads import DECODE_STEPS, grouped_map

MAX_SPLITS = 1 << 20  # the op's limit


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    kmap: Tensor | None = None,
    vmap: Tensor | None = None,
) -> Any:
    """Attention of a dense batch; differentiable.

    Args:
        q: [B, Sq, H, D]. k: [B, Sk, HK, D]. v: [B, Sk, HV, DV].
        dropout_p: must be 0. alibi_slopes: must be None. deterministic: gradients always are.
        softmax_scale: default ``1 / sqrt(D)``.
        causal: bottom-right aligned.
        window_size: (left, right), query i sees keys ``[i + Sk - Sq - left, i + Sk - Sq + right]``; -1: no
            limit.
        softcap: c > 0 caps logits, ``c * tanh(logits / c)``.
        return_attn_probs: return the log-sum-exp as well.
        kmap, vmap: [H] int32 or int64.

    Returns:
        out [B, Sq, H, DV]; with ``return_attn_probs`` (out, lse [B, H, Sq] float32, None): flash-attn's
        third value are debugging probabilities with dropout.

    Raises:
        ValueError: what is not supported, by name; shapes that do not fit.
    """
    _refuse("flash_attn_func", dropout_p, alibi_slopes)
    out, lse = ops.dha_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), *_maps(q, k, v, kmap, vmap),
        **_settings(softmax_scale, causal, window_size, softcap),
    )  # fmt: skip
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    kmap: Tensor | None = None,
    vmap: Tensor | None = None,
) -> Any:
    """Attention of sequences packed one after another; differentiable.

    Args:
        q: [Tq, H, D]. k: [Tk, HK, D]. v: [Tk, HV, DV].
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, first rows of the sequences.
        max_seqlen_q, max_seqlen_k: longest sequences.
        block_table: must be None; for paged caches use :func:`flash_attn_with_kvcache`.
        others: as in :func:`flash_attn_func`.

    Returns:
        out [Tq, H, DV]; with ``return_attn_probs`` (out, lse [H, Tq] float32, None).

    Raises:
        ValueError: as :func:`flash_attn_func`.
    """
    _refuse("flash_attn_varlen_func", dropout_p, alibi_slopes)
    if block_table is not None:
        raise ValueError(
            "flash_attn_varlen_func: block_table is not supported; use flash_attn_with_kvcache for "
            "paged caches"
        )
    out, lse = ops.dha_attention(
        q, k, v, *_maps(q, k, v, kmap, vmap), cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_q=int(max_seqlen_q), max_k=int(max_seqlen_k),
        **_settings(softmax_scale, causal, window_size, softcap),
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    kmap: Tensor | None = None,
    vmap: Tensor | None = None,
) -> Any:
    """Attention of new queries over a cache, after appending new keys and values to it in place.

    Inference only. The newest query of a sequence stands at its last token (bottom-right aligned).

    Args:
        q: [B, Sq, H, D].
        k_cache: [B_cache, L, HK, D], or with ``block_table`` [blocks, block, HK, D]. v_cache: likewise with
            HV, DV.
        k, v: [B, S, HK, D] and [B, S, HV, DV], written at tokens ``cache_seqlens`` and on.
        rotary_cos, rotary_sin: [rows, R / 2], R <= D: the new keys are rotated by the rows of their
            tokens, queries by ``cache_seqlens + i`` (with ``causal`` or a window) or ``cache_seqlens``.
        cache_seqlens: tokens in the cache before the call, int or [B]; default: all of it (without k).
        cache_batch_idx: [B] row of the cache of each sequence; default b.
        cache_leftpad: [B] first token of each sequence; those before it are padding.
        block_table: [B, max_blocks] block of every ``block`` tokens.
        causal, window_size, softcap, softmax_scale, kmap, vmap: as in :func:`flash_attn_func`.
        rotary_interleaved: pairs (2i, 2i + 1) are rotated, else (i, i + R / 2).
        num_splits: parts in which a sequence is worked on; 0 chooses.
        return_softmax_lse: return the log-sum-exp as well.

    Returns:
        out [B, Sq, H, DV]; with ``return_softmax_lse`` (out, lse [B, H, Sq] float32).

    Raises:
        ValueError: arguments that do not fit or are not supported; then the cache is unchanged.
    """
    name = "flash_attn_with_kvcache"
    _refuse(name, 0.0, alibi_slopes)
    pool = _Pool(name, q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad,
                 block_table)  # fmt: skip
    maps = _maps(q, k_cache, v_cache, kmap, vmap)
    settings = _settings(softmax_scale, causal, window_size, softcap)
    if (k is None) != (v is None):
        raise ValueError(f"{name}: k and v must be given together")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{name}: rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None and k is None:
        raise ValueError(f"{name}: rotary_cos needs new keys k and v, as in flash-attn")
    if cache_seqlens is None and k is not None:
        raise ValueError(
            f"{name}: new keys need cache_seqlens, the tokens in the cache before them"
        )
    pool.check(q, k, v, (kmap, vmap), settings, num_splits)
    if rotary_cos is not None:
        assert k is not None and rotary_sin is not None
        steps = causal or tuple(window_size) != (-1, -1)
        angles = (rotary_cos, rotary_sin, rotary_interleaved)
        k = _rotate(name, k, pool.before, True, *angles)
        q = _rotate(name, q, pool.before, steps, *angles)
    if k is not None and v is not None:
        pool.append(k, v)
    out, lse = pool.attend(q, maps, settings, num_splits)
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


class _Pool:
    """A cache of flash-attn's as pages: a dense one has one page per row."""

    def __init__(
        self,
        name: str,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        seqlens: int | Tensor | None,
        rows: Tensor | None,
        leftpad: Tensor | None,
        table: Tensor | None,
    ) -> None:
        self.name, self.keys, self.values = name, keys, values
        batch, device = q.shape[0], q.device
        if table is not None and rows is not None:
            raise ValueError(f"{name}: cache_batch_idx is not for paged caches (block_table given)")
        if q.dim() != 4 or keys.dim() != 4 or values.dim() != 4:
            raise ValueError(
                f"{name}: q, k_cache and v_cache must be 4-D, got shapes {list(q.shape)}, "
                f"{list(keys.shape)} and {list(values.shape)}"
            )
        if table is None:
            if rows is None and keys.shape[0] != batch:
                raise ValueError(
                    f"{name}: k_cache must have one row per sequence of q ({batch}) or "
                    f"cache_batch_idx, got {keys.shape[0]} rows"
                )
            table = torch.arange(batch, device=device) if rows is None else rows
            _check_ints(name, "cache_batch_idx", table, (batch,))
            table = table[:, None]
            self.table_name = "cache_batch_idx"
        else:
            columns = table.shape[-1] if isinstance(table, Tensor) and table.dim() else 0
            _check_ints(name, "block_table", table, (batch, columns))
            self.table_name = "block_table"
        self.table = table.to(torch.int32)
        self.room = self.table.shape[1] * keys.shape[1]
        if isinstance(seqlens, Tensor):
            _check_ints(name, "cache_seqlens", seqlens, (batch,))
            lens = seqlens.to(torch.int32)
        else:
            every = self.room if seqlens is None else int(seqlens)
            lens = torch.full((batch,), every, dtype=torch.int32, device=device)
        if leftpad is not None:
            _check_ints(name, "cache_leftpad", leftpad, (batch,))
        self.before = self.lens = lens  # tokens in the cache, padding included
        self.start = None if leftpad is None else leftpad.to(torch.int32)

    def check(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        maps: tuple[Tensor | None, Tensor | None],
        settings: dict[str, Any],
        num_splits: int,
    ) -> None:
        """What the ops would find wrong after the cache was written."""
        self._check_devices(q, k, v, maps)
        left = settings["window_left"]
        if q.shape[1] > 1 and self._reaches_behind(settings):  # then all tokens are copied
            left = -1
        new = 0 if k is None or k.dim() < 2 else k.shape[1]
        self._check_tokens(new, math.inf if left < 0 else q.shape[1] + left)
        fits = q.shape[-1] == self.keys.shape[-1] and q.dtype == self.keys.dtype
        if not fits or self.values.dtype != q.dtype:
            raise ValueError(
                f"{self.name}: q and the caches must agree in dtype and q and k_cache in head dim, got "
                f"{q.dtype} {list(q.shape)}, {self.keys.dtype} {list(self.keys.shape)} and "
                f"{self.values.dtype} {list(self.values.shape)}"
            )
        for arg, new, cache in (("k", k, self.keys), ("v", v, self.values)):
            batch = q.shape[0], new.shape[1] if new is not None and new.dim() == 4 else 0
            if new is not None and tuple(new.shape) != (*batch, *cache.shape[2:]):
                raise ValueError(
                    f"{self.name}: {arg} must be {[batch[0], 'S', *cache.shape[2:]]}, got shape "
                    f"{list(new.shape)}"
                )
        if k is not None and v is not None and (k.shape[1] != v.shape[1] or k.dtype != v.dtype):
            raise ValueError(f"{self.name}: k and v must hold the same tokens in one dtype")
        for arg, given, cache in zip(("kmap", "vmap"), maps, (self.keys, self.values)):
            if given is None:
                continue
            _check_ints(self.name, arg, given, (q.shape[2],))
            if given.device.type == "cpu" and bool(((given < 0) | (given >= cache.shape[2])).any()):
                raise ValueError(
                    f"{self.name}: {arg} must be in [0, {cache.shape[2]}), got {given.tolist()}"
                )
        limits = settings["window_left"], settings["window_right"], num_splits - 1
        scale = settings["scale"]
        fits = 0 <= settings["softcap"] < math.inf and num_splits <= MAX_SPLITS
        if min(limits) < -1 or not fits or (scale and not math.isfinite(scale)):
            raise ValueError(
                f"{self.name}: window_size must be >= -1, num_splits in [0, {MAX_SPLITS}], softcap >= 0 "
                f"and finite, softmax_scale finite, got {limits[:2]}, {num_splits}, {settings['softcap']} and {scale}"
            )

    def _check_devices(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        maps: tuple[Tensor | None, Tensor | None],
    ) -> None:
        given = {
            "k_cache": self.keys, "v_cache": self.values, "k": k, "v": v, "kmap": maps[0],
            "vmap": maps[1], "cache_seqlens": self.before, "cache_leftpad": self.start,
            self.table_name: self.table,
        }  # fmt: skip
        for arg, x in given.items():
            if x is not None:
                _check_device(self.name, arg, x, q.device)

    def _check_tokens(self, new: int, seen: float) -> None:
        """Lengths, padding and pages, on the CPU, for ``new`` tokens and the last ``seen`` to be read."""
        if self.table.device.type != "cpu" or not self.table.numel():
            return
        start = torch.zeros_like(self.before) if self.start is None else self.start
        for arg, x in (("cache_seqlens", self.before), ("cache_leftpad", start)):
            if bool(((x < 0) | (x > self.room)).any()):
                raise ValueError(
                    f"{self.name}: {arg} must be in [0, {self.room}], the room of a sequence, got "
                    f"{x.tolist()}"
                )
        end = self.before + new
        if bool((end > self.room).any()):
            raise ValueError(
                f"{self.name}: {new} new tokens do not fit: the cache has room for {self.room} "
                f"per sequence, cache_seqlens goes up to {int(self.before.max())}"
            )
        first = torch.arange(self.table.shape[1]) * self.keys.shape[1]  # token of each page
        oldest = torch.minimum(torch.maximum(start, end - seen), self.before)[:, None]
        used = (first < end[:, None]) & (first + self.keys.shape[1] > oldest)
        pages = self.table[used]
        if bool(((pages < 0) | (pages >= self.keys.shape[0])).any()):
            raise ValueError(
                f"{self.name}: {self.table_name} must be in [0, {self.keys.shape[0]}) where tokens "
                f"are, got {self.table.tolist()}"
            )

    def append(self, k: Tensor, v: Tensor) -> None:
        """Writes [B, S, heads, dim] behind the tokens of each sequence."""
        block, count = self.keys.shape[1], k.shape[1]
        token = self.before[:, None] + torch.arange(count, dtype=torch.int32, device=k.device)
        page = self.table.gather(1, (token // block).clamp(max=self.table.shape[1] - 1).long())
        slots = torch.where(token < self.room, page * block + token % block, -1)
        ops.dha_cache_append_(
            self.keys, self.values, k.transpose(1, 2), v.transpose(1, 2), slots, paged=True
        )
        self.lens = self.before + count

    def attend(
        self, q: Tensor, maps: list[Tensor], settings: dict[str, Any], num_splits: int
    ) -> tuple[Tensor, Tensor]:
        """out [B, H, Sq, DV] and lse [B, H, Sq] of queries [B, Sq, H, D]."""
        count = q.shape[1]
        q = q.transpose(1, 2)
        lens = self.lens if self.start is None else (self.lens - self.start).clamp(min=0)
        packed = count > 1 and self._reaches_behind(settings)
        causal = settings.pop("causal") or settings["window_right"] == 0
        right = settings.pop("window_right")
        if packed:
            return self._packed(q, lens, maps, settings | {"causal": False, "window_right": right})
        how = settings | {"num_splits": num_splits}
        if not count:
            return q.new_empty((*q.shape[:3], self.values.shape[-1])), q.new_empty(
                q.shape[:3], dtype=torch.float32
            )
        if (
            not causal
        ):  # every query sees all tokens: each is a head of its own, the cache read once
            own = [m.repeat_interleave(count) for m in maps]
            out, lse = self._decode(q.flatten(1, 2), own, how, lens)
            return out.unflatten(1, (-1, count)), lse.unflatten(1, (-1, count))
        parts = [
            self._decode(q[:, :, at : at + DECODE_STEPS], maps, how,
                         lens - max(count - at - DECODE_STEPS, 0))
            for at in range(0, count, DECODE_STEPS)
        ]  # fmt: skip
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    @staticmethod
    def _reaches_behind(settings: dict[str, Any]) -> bool:
        """A window that is not causal: a query's keys do not end at its own token."""
        left, right = settings["window_left"], settings["window_right"]
        return not settings["causal"] and right != 0 and (right > 0 or left >= 0)

    def _decode(
        self, q: Tensor, maps: list[Tensor], how: dict[str, Any], lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        kmap, vmap = maps
        return ops.dha_decode(
            q, self.keys, self.values, kmap, vmap, lens.clamp(min=0), block_table=self.table,
            kv_start=self.start, **how,
        )  # fmt: skip

    def _packed(
        self, q: Tensor, lens: Tensor, maps: list[Tensor], settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Windows that reach behind a query: the tokens in use are copied out and packed."""
        batch, heads, count, _ = q.shape
        block = self.keys.shape[1]
        token = torch.arange(self.room, dtype=torch.int32, device=q.device)
        first = torch.zeros_like(lens) if self.start is None else self.start
        used = (token >= first[:, None]) & (token < (first + lens)[:, None])
        rows = (self.table[:, token // block] * block + token % block)[used].long()
        keys, values = (x.reshape(-1, *x.shape[2:])[rows] for x in (self.keys, self.values))
        zero = lens.new_zeros(1)
        out, lse = ops.dha_attention(
            q.transpose(1, 2).reshape(-1, heads, q.shape[-1]), keys, values, *maps,
            cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=q.device) * count,
            cu_seqlens_k=torch.cat([zero, lens.cumsum(0, dtype=torch.int32)]),
            max_q=count, **settings,
        )  # fmt: skip
        out = out.view(batch, count, heads, -1).transpose(1, 2)
        return out, lse.view(heads, batch, count).transpose(0, 1)


def _check_ints(name: str, arg: str, given: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name}: {arg} must be an int32 or int64 tensor, got {what}")
    if tuple(given.shape) != shape:
        raise ValueError(f"{name}: {arg} must be {list(shape)}, got shape {list(given.shape)}")


def _check_device(name: str, arg: str, given: Tensor, device: torch.device) -> None:
    if given.device != device:
        raise ValueError(f"{name}: {arg} must be on the device of q, {device}, got {given.device}")


def _refuse(name: str, dropout_p: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p > 0:
        raise ValueError(f"{name}: dropout is not supported, got dropout_p={dropout_p}")
    if alibi_slopes is not None:
        raise ValueError(f"{name}: alibi_slopes is not supported; use dha_attention's attn_bias")


def _maps(
    q: Tensor, k: Tensor, v: Tensor, kmap: Tensor | None, vmap: Tensor | None
) -> list[Tensor]:
    """Given maps, or the grouped ones of the head counts (the last dimension but one of each)."""
    heads = q.shape[-2]
    given = zip((kmap, vmap), (k, v))
    return [grouped_map(heads, x.shape[-2], q.device) if m is None else m for m, x in given]


def _settings(
    scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float
) -> dict[str, Any]:
    left, right = (int(size) for size in window_size)
    return {
        "scale": scale, "causal": bool(causal), "window_left": left, "window_right": right,
        "softcap": float(softcap),
    }  # fmt: skip


def _rotate(
    name: str, x: Tensor, before: Tensor, steps: bool, cos: Tensor, sin: Tensor, interleaved: bool
) -> Tensor:
    """Rotary embedding of x [B, S, heads, D] at positions ``before + s`` (``before`` if not steps)."""
    for arg, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_device(name, arg, table, x.device)
    if cos.dim() != 2 or 2 * cos.shape[1] > x.shape[-1] or sin.shape != cos.shape:
        raise ValueError(
            f"{name}: rotary_cos and rotary_sin must be [rows, R / 2] with R <= {x.shape[-1]}, got shapes "
            f"{list(cos.shape)} and {list(sin.shape)}"
        )
    count, half = x.shape[1], cos.shape[1]
    step = torch.arange(count, device=x.device) if steps else torch.zeros_like(before[:1])
    position = before[:, None].long() + step
    if x.device.type == "cpu" and position.numel() and int(position.max()) >= cos.shape[0]:
        raise ValueError(
            f"{name}: rotary_cos has {cos.shape[0]} rows, but position {int(position.max())} is rotated"
        )
    c, s = (t[position][:, :, None].float() for t in (cos, sin))
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((out.to(x.dtype), rest), -1)
