# SPDX-License-Identifier: Apache-2.0
"""Decode ops of decoupled-head attention (DHA, arXiv 2406.06567): attention over a cache, cache writes.

Inference only: inputs that require grad under grad mode raise RuntimeError. Notation: B batch, H query
heads, HK key heads, HV value heads, D head dim of queries and keys, DV of values, Sq new tokens,
L slots. ``kmap`` and ``vmap`` [H] name the key head and the value head of every query head: any
mapping, groups of unequal size and unused heads included. Float tensors are float32, bfloat16 or
float16; index tensors int32 or int64.

| layout | k_cache | v_cache | tokens of sequence b |
|---|---|---|---|
| contiguous | [B, HK, L, D] | [B, HV, L, DV] | slots from ``kv_start[b]`` (default 0) |
| paged (``block_table`` given) | [blocks, block, HK, D] | [blocks, block, HV, DV] | in the blocks ``block_table[b]`` |
| ragged (``offsets`` given) | [N, HK, D] | [N, HV, DV] | rows from ``offsets[b]`` |
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold


@torch.library.register_fake("tenfold::dha_decode")
def _(
    q, k_cache, v_cache, kmap, vmap, kv_lens, *, block_table=None, block_size=0, scale=None,
    window_left=-1, num_splits=0, kv_start=None, offsets=None, softcap=0.0,
):  # fmt: skip
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("tenfold::dha_cache_append_")
def _(k_cache, v_cache, k, v, slots, *, paged=False, cos=None, sin=None) -> None:
    return None


inference_only("dha_decode")
inference_only("dha_cache_append_", mutates=(0, 1))


def dha_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kmap: Tensor,
    vmap: Tensor,
    kv_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    block_size: int = 0,
    scale: float | None = None,
    window_left: int = -1,
    num_splits: int = 0,
    kv_start: Tensor | None = None,
    offsets: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a KV cache with separate key and value heads.

    ``out[b, h, s] = softmax_j(scale * q[b, h, s] . K[b, kmap[h], j]) V[b, vmap[h], j]`` (DHA, section 3).
    Every key row and every value row is read once, also where the two maps group the query heads
    differently.

    Args:
        q: [B, H, D], or [B, H, Sq, D] with Sq <= 16: the newest Sq tokens of each sequence, which are
            in the cache already. Row s sees ``kv_lens - (Sq - 1 - s)`` keys.
        k_cache, v_cache: the caches, dtype of ``q``, in one of the three layouts (see the module).
        kmap, vmap: [H] key head and value head of each query head.
        kv_lens: [B] tokens of each sequence; 0 gives out 0 and lse -inf.
        block_table: [B, max_blocks] block of every ``block`` tokens (paged layout). Entries behind the
            last token are not read.
        block_size: tokens of a block; 0 takes it from the cache, anything else must be equal to it.
        scale: logit scale; default ``1 / sqrt(D)``.
        window_left: a token sees at most so many keys before its own; -1 for all.
        num_splits: parts in which the keys of a sequence are worked on; 0 chooses. The results of
            different numbers agree to rounding.
        kv_start: [B] first slot of each sequence (left padding); contiguous and paged layouts.
        offsets: [B + 1] ascending first rows (ragged layout); the room behind the last token of a
            sequence is not read.
        softcap: c > 0 caps logits: ``c * tanh(logit / c)``.

    Returns:
        out, like ``q`` with DV, contiguous, and lse float32 (natural log of the scaled, capped
        logits). A row that sees nothing gives 0 and -inf.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed. Values of maps,
            lengths, starts, offsets and block tables are checked on CPU only; CUDA kernels clamp them
            to what exists.

    Example:
        >>> kmap, vmap = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 0])
        >>> q, k, v = torch.randn(1, 4, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 3, 100, 64)
        >>> out, lse = dha_decode(q, k, v, kmap, vmap, torch.tensor([73]))
    """
    return call_inference(
        _ops.dha_decode, q, k_cache, v_cache, kmap, vmap, kv_lens, block_table=block_table,
        block_size=block_size, scale=scale, window_left=window_left, num_splits=num_splits,
        kv_start=kv_start, offsets=offsets, softcap=softcap,
    )  # fmt: skip


def dha_cache_append_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    paged: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """Writes new keys and values into their slots of a cache, rotating the keys on the way if asked.

    Args:
        k_cache, v_cache: the caches, written in place; rows (the last dimension) must be contiguous.
        k: [B, HK, S, D]. v: [B, HV, S, DV]. Dtype of the caches; any strides.
        slots: [B, S] where token s of sequence b goes; -1 skips it. Contiguous caches [B, HK, L, D]:
            a slot of row b. ``paged``: block * block_size + place in it. Ragged caches [N, HK, D]: a
            row. Two tokens must not share a slot: which of them it holds then is undefined (it may
            even be the key of one and the value of the other).
        paged: the 4-dimensional caches are [blocks, block, HK, D] pools.
        cos, sin: [B or 1, S, D] (transformers' layout); k is written as
            ``k * cos + rotate_half(k) * sin``, computed in float32 and rounded once.

    Raises:
        ValueError, TypeError, IndexError (a slot out of range): and then nothing was written. CUDA
            does not read slots beforehand: tokens whose slot is out of range are skipped.

    Example:
        >>> position = torch.tensor([[73]])
        >>> dha_cache_append_(k_cache, v_cache, k_new, v_new, position, cos=cos, sin=sin)
    """
    call_inference(
        _ops.dha_cache_append_, k_cache, v_cache, k, v, slots, mutates=(k_cache, v_cache),
        paged=paged, cos=cos, sin=sin,
    )  # fmt: skip
