# SPDX-License-Identifier: Apache-2.0
"""Cache layers that stay right after eviction: positions, masks, padding, and memory really freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tenfold import ops
from tenfold.nacl.heads import SharedSets


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
        self.position_shift: Tensor | None = None  # [B], true position minus slot (re-rotation)
        self.lengths: Tensor | None = None  # [B], of the prompts that were evicted
        self.appended = 0  # tokens since the last eviction
        self.shared: SharedSets | None = None  # of decoupled heads (DHA)

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

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(keys after the update, position of the first of them if they were the latest)."""
        if isinstance(query_length, Tensor):  # transformers 5.2: the positions of the queries
            query_length = query_length.shape[0]
        return self.physical + query_length, self.seen - self.physical

    def cache_bytes(self) -> int:
        """Bytes of the storages behind keys and values."""
        if not self.is_initialized:
            return 0
        return sum(t.untyped_storage().nbytes() for t in (self.keys, self.values))

    def shrink(
        self,
        idx: Tensor,
        new_lens: Tensor,
        inv_freq: Tensor | None,
        kv_start: Tensor | None,
        lens: Tensor,
    ) -> None:
        """Keeps the tokens ``idx`` [B, H, C] only, in fresh tensors; the full ones are freed.

        With decoupled heads ``idx`` is [B, N, C], one set per component of the maps (``shared``).
        Rows that keep fewer than C stand at the right end: what is appended follows on them directly,
        so that every row's valid slots stay one run. ``lens`` [B]: tokens of each row before.
        """
        width = idx.shape[-1]
        slot = torch.arange(width, device=idx.device)
        empty = width - new_lens.to(torch.int64)  # free slots at the start of each row
        self.valid = None
        if bool((empty > 0).any()):
            self.valid = slot >= empty[:, None]
            from_left = (slot - empty[:, None])[:, None].expand_as(idx)
            idx = torch.where(from_left >= 0, idx.gather(-1, from_left.clamp(min=0)), -1)
        if inv_freq is not None:
            if self.position_shift is None:  # the next token of a row has its length as position
                self.position_shift = lens.to(idx.device, torch.int64) - width
            else:  # keys stand at their slots already
                self.position_shift = self.position_shift + (self.physical - width)
                kv_start = None
        gather = ops.kv_gather if self.shared is None else self.shared.gather
        self.keys, self.values = gather(
            self.keys, self.values, idx, inv_freq=inv_freq, kv_start=kv_start
        )
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

    def _take_rows(self, rows: Tensor) -> None:
        """Everything that belongs to the sequences ``rows``, in that order."""
        for name in ("keys", "values", "valid", "kept", "position_shift", "lengths"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, rows.to(value.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders sequences (beam search)."""
        if self.is_initialized:
            self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences ``indices`` only."""
        if self.is_initialized:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self._take_rows(rows[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        if self.is_initialized:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self._take_rows(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens: ``-tokens_to_remove``, or all but so many if it is positive.

        (transformers counts the first way from 5.2x on, the second way before.)

        Raises RuntimeError if that reaches tokens from before an eviction that was not keeping all of
        them: which ones the slots hold differs from head to head then.
        """
        if not self.is_initialized:
            return
        count = self.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        count = max(count, 0)
        before = count - self.appended  # tokens to remove that an eviction has seen
        if self.evicted and before > 0 and not self._newest_kept(before):
            raise RuntimeError(
                f"cannot remove {count} tokens: {before} of them are from before the eviction, which did "
                "not keep every one of the newest; protect more recent tokens (protect_ratio)"
            )
        self._drop_newest(count)
        self.seen -= count
        self.appended = max(self.appended - count, 0)

    def _newest_kept(self, count: int) -> bool:
        assert self.kept is not None
        newest = torch.arange(self.seen - self.appended - count, self.seen - self.appended)
        held = self.kept[..., -count:]
        return held.shape[-1] == count and bool((held == newest.to(held.device)).all())

    def _drop_newest(self, count: int) -> None:
        left = self.physical - count
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        if self.valid is not None:
            self.valid = self.valid[:, : self.physical]
        if self.kept is not None:
            self.kept = self.kept[..., : self.physical]


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
        self,
        idx: Tensor,
        new_lens: Tensor,
        inv_freq: Tensor | None,
        kv_start: Tensor | None,
        lens: Tensor,
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
        self.appended += new
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

    def _take_rows(self, rows: Tensor) -> None:
        """Everything that belongs to the sequences ``rows``, in that order."""
        super()._take_rows(rows)
        if self.flat_keys is None:
            return
        head = torch.arange(self.heads, device=self.lens.device)
        segment = (rows.to(head.device)[:, None] * self.heads + head).view(-1)
        lens = self.lens[segment]
        step = torch.arange(int(lens.sum()), device=lens.device)
        start = self.offsets[:-1][segment] - (lens.cumsum(0) - lens)
        self._pack(self.flat_keys, self.flat_values, step + start.repeat_interleave(lens), lens)

    def _newest_kept(self, count: int) -> bool:
        return False  # heads differ in where their newest tokens stand

    def _drop_newest(self, count: int) -> None:
        if self.flat_keys is None:
            super()._drop_newest(count)
        else:
            self.lens = self.lens - count

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
