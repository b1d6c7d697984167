"""Cache layers that stay right after eviction: positions, masks, padding, and memory really freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tenfold import ops


class NaclCacheLayer(DynamicLayer):
    """A ``DynamicLayer`` that remembers how many tokens it has seen, whatever it still holds.

    ``keys``, ``values`` [B, Hkv, physical, D]. ``get_seq_length`` counts tokens seen, so true positions
    go on; ``get_mask_sizes`` describes the physical slots. ``valid`` [B, physical] marks slots that
    hold a token (None: all do); slots of a row that keeps fewer tokens are not attended.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.evicted = False
        self.valid: Tensor | None = None
        self.kept: Tensor | None = None
        self.position_shift: Tensor | None = None
        self.appended = 0  # tokens since the last eviction

    @property
    def physical(self) -> int:
        """Slots in use."""
        return super().get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Appends; returns all keys and values the new queries may see."""
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: the position of the next token."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys after the update, position of the first of them if they were the latest)."""
        return self.physical + query_length, self.seen - self.physical

    def cache_bytes(self) -> int:
        """Bytes of the storages behind keys and values."""
        if not self.is_initialized:
            return 0
        return sum(t.untyped_storage().nbytes() for t in (self.keys, self.values))

    def shrink(
        self, idx: Tensor, new_lens: Tensor, inv_freq: Tensor | None, kv_start: Tensor | None
    ) -> None:
        """Keeps the tokens ``idx`` [B, H, C] only, in fresh tensors; the full ones are freed."""
        if inv_freq is not None:
            start = torch.zeros_like(new_lens) if kv_start is None else kv_start
            tokens = (self.seen - start) if self.position_shift is None else self.physical
            self.position_shift = (tokens - new_lens).to(torch.int64)
        self.keys, self.values = ops.kv_gather(
            self.keys, self.values, idx, new_lens=new_lens, inv_freq=inv_freq, kv_start=kv_start
        )
        slot = torch.arange(idx.shape[-1], device=idx.device)
        valid = slot[None] < new_lens[:, None]
        self.valid = None if bool(valid.all()) else valid
        original = idx.clamp(min=0)
        if self.kept is not None:  # a second eviction: slots are not positions any more
            new = torch.arange(self.seen - self.appended, self.seen, device=idx.device)
            slots = torch.cat([self.kept, new.expand(*self.kept.shape[:2], -1)], -1)
            original = slots.gather(-1, original)
        self.kept = torch.where(idx >= 0, original, -1)
        self.appended = 0
        self.evicted = True

    def note_append(self, new_valid: Tensor | None, count: int) -> None:
        """Book-keeping before ``update``: validity [B, count] of the tokens about to come."""
        self.appended += count
        if self.valid is None and (new_valid is None or bool(new_valid.all())):
            return
        past = self.valid
        if past is None:
            assert new_valid is not None
            past = new_valid.new_ones((new_valid.shape[0], self.physical))
        if new_valid is None:
            new_valid = past.new_ones((past.shape[0], count))
        self.valid = torch.cat([past, new_valid.to(past.device)], -1)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders sequences (beam search)."""
        super().reorder_cache(beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))
        if self.kept is not None:
            self.kept = self.kept.index_select(0, beam_idx.to(self.kept.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens."""
        before = self.physical
        super().crop(tokens_to_remove)
        self.seen -= before - self.physical
        if self.valid is not None:
            self.valid = self.valid[:, : self.physical]


class RaggedCacheLayer(NaclCacheLayer):
    """A layer whose KV heads keep different numbers of tokens, in one flat cache.

    After ``shrink``: ``flat_keys``, ``flat_values`` [N, D]; segment b * Hkv + h starts at ``offsets``
    and uses ``lens`` rows; the rest of it is room for new tokens. ``attend`` is its attention.
    """

    spare = 64

    def __init__(self) -> None:
        super().__init__()
        self.flat_keys: Tensor | None = None

    @property
    def physical(self) -> int:
        """Slots of the fullest head."""
        return super().physical if self.flat_keys is None else int(self.lens.max())

    def cache_bytes(self) -> int:
        """Bytes of the storages behind keys and values."""
        if self.flat_keys is None:
            return super().cache_bytes()
        return sum(t.untyped_storage().nbytes() for t in (self.flat_keys, self.flat_values))

    def shrink(
        self, idx: Tensor, new_lens: Tensor, inv_freq: Tensor | None, kv_start: Tensor | None
    ) -> None:
        """Packs the tokens ``idx`` [B, H, C] of every head, ``new_lens`` [B, H] of them."""
        b, h, length, _ = self.keys.shape
        segment = torch.arange(b * h, device=idx.device).view(b, h, 1)
        rows = (idx + segment * length)[idx >= 0]
        self.kept, self.evicted, self.heads = idx, True, h
        self._pack(self.keys.reshape(b * h * length, -1), self.values.reshape(b * h * length, -1),
                   rows, new_lens.reshape(-1).to(torch.int64))  # fmt: skip
        self.keys = self.keys.new_empty((b, h, 0, self.keys.shape[-1]))
        self.values = self.values.new_empty((b, h, 0, self.values.shape[-1]))

    def _pack(self, keys: Tensor, values: Tensor, rows: Tensor, lens: Tensor) -> None:
        """Fresh flat cache with the given source rows, segment after segment, plus spare room."""
        room = lens + self.spare
        self.offsets = torch.cat([room.new_zeros(1), room.cumsum(0)])
        first = lens.cumsum(0) - lens
        into = torch.arange(rows.shape[0], device=rows.device)
        into = into + (self.offsets[:-1] - first).repeat_interleave(lens)
        total = int(self.offsets[-1])
        self.flat_keys = keys.new_zeros((total, keys.shape[-1])).index_copy_(0, into, keys[rows])
        self.flat_values = values.new_zeros((total, values.shape[-1]))
        self.flat_values.index_copy_(0, into, values[rows])
        self.lens = lens

    def _rows_in_use(self) -> Tensor:
        step = torch.arange(int(self.lens.sum()), device=self.lens.device)
        first = self.lens.cumsum(0) - self.lens
        return step + (self.offsets[:-1] - first).repeat_interleave(self.lens)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Appends one token after another to every segment, growing it when it is full."""
        if self.flat_keys is None:
            return super().update(key_states, value_states, *args, **kwargs)
        new = key_states.shape[-2]
        self.seen += new
        room = self.offsets[1:] - self.offsets[:-1] - self.lens
        if int(room.min()) < new:
            spare, self.spare = self.spare, max(self.spare, new + self.spare)
            self._pack(self.flat_keys, self.flat_values, self._rows_in_use(), self.lens)
            self.spare = spare
        at = (self.offsets[:-1] + self.lens)[:, None] + torch.arange(new, device=self.lens.device)
        self.flat_keys.index_copy_(0, at.view(-1), key_states.reshape(-1, key_states.shape[-1]))
        self.flat_values.index_copy_(
            0, at.view(-1), value_states.reshape(-1, value_states.shape[-1])
        )
        self.lens = self.lens + new
        return key_states, value_states

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Attention of the newest queries [B, Hq, Sq, D] over the ragged cache -> [B, Hq, Sq, DV]."""
        assert self.flat_keys is not None
        step, total = 16, query.shape[2]
        parts = []
        for at in range(0, total, step):
            q = query[:, :, at : at + step]
            lens = self.lens - (total - at - q.shape[2])
            parts.append(
                ops.ragged_decode(
                    q, self.flat_keys, self.flat_values, self.offsets, scale=scale, lens=lens
                )[0]
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class NaclCache(DynamicCache):
    """A ``DynamicCache`` for manual loops; a press turns its full-attention layers into its own."""

    @property
    def evicted(self) -> bool:
        """Has any layer been evicted?"""
        return any(getattr(layer, "evicted", False) for layer in self.layers)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the storages behind all keys and values of a cache (views count whole)."""
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "cache_bytes"):
            total += layer.cache_bytes()
        elif getattr(layer, "is_initialized", False):
            total += sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))
    return total
