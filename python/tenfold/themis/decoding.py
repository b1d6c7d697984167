# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens that grow at their own pace, with their keys and values.

A row's cache begins at column 0 and grows by what is fed to it, one token or many; rows of one batch may be of any
lengths. What a row may see is said by a mask of positions, so there is no padding between its tokens, and nothing is
moved: a row waits for its tool while others go on, takes the observation in one forward, and shares a prefix by copy.

    keys, values [R, H, room, D] per layer        row r has columns 0 .. length[r] - 1; the last column is a bin
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tenfold.integrations import transformers as hf
from tenfold.rlhf.trunks import model_inputs, plain_face, trunk_of

_MASKED = ("sdpa", "eager")  # attention that takes any mask
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


class Rows(Protocol):
    """What the tool loop decodes with. ``tokens[r]`` are those of row r that were fed.

    A model may bring its own: a method ``make_rows(count)``.
    """

    tokens: list[list[int]]
    rewards: list[list[float]]

    def feed(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> Tensor:
        """Appends tokens to some rows; logits [n, V] after the last token of each."""

    def share(self, source: int, target: int, length: int) -> None:
        """Gives the empty row ``target`` the first tokens of ``source``, or leaves it as it is."""

    def crop(self, row: int, length: int) -> None:
        """Forgets a row's tokens from ``length`` on."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows; those kept are numbered anew, in this order."""


class _Heads:
    """What both kinds of rows do with hidden states, and their tokens."""

    def __init__(self, model: Any, count: int) -> None:
        self.model = plain_face(model)
        self.trunk = trunk_of(self.model)
        self.device = next(self.model.parameters()).device
        self._cache_name = hf.cache_name(self.trunk)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        # The value head's output at every token: a reward is the last of them, or their mean.
        self.rewards: list[list[float]] = [[] for _ in range(count)]

    def _hidden(self, ids: Tensor, cache: Any, **inputs: Any) -> Tensor:
        return self.trunk(
            ids, use_cache=True, **{self._cache_name: cache}, **inputs
        ).last_hidden_state

    def _read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]], hidden: Tensor) -> Tensor:
        """Stores tokens and values of chunks, whose hidden states are [n, k, H]; logits after each."""
        head = getattr(self.model, "score", None)
        if head is not None:
            w = head.weight[0]
            found = (hidden.float() @ w.float()).tolist()
        else:
            found = [[float("nan")] * hidden.shape[1]] * len(rows)
        for row, chunk, values in zip(rows, chunks, found):
            self.tokens[row] += chunk
            self.rewards[row] += values[: len(chunk)]
        last = torch.tensor([len(c) - 1 for c in chunks], device=hidden.device)
        hidden = hidden[torch.arange(len(rows), device=hidden.device), last]
        if hasattr(self.model, "lm_logits"):
            return self.model.lm_logits(hidden)
        return self.model.get_output_embeddings()(hidden)

    def _copy(self, source: int, target: int, length: int) -> None:
        self.tokens[target] = self.tokens[source][:length]
        self.rewards[target] = self.rewards[source][:length]


class _Plan:
    """Where the tokens of one forward go, for all layers."""

    rows: Tensor | None  # [n]: which rows; None for all of them
    columns: Tensor  # [n, k]
    width: int  # columns that the longest row has afterwards
    count: int  # of rows
    room: int


class _RowsLayer(DynamicLayer):
    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers for all rows. Zeros: what no row may see must not be NaN either."""
        for name, x in (("keys", key_states), ("values", value_states)):
            shape = (self.plan.count, x.shape[1], self.plan.room, x.shape[3])
            setattr(self, name, x.new_zeros(shape))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Puts new tokens into their columns; returns all columns of the rows of this forward."""
        plan = self.plan
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = torch.arange(plan.count, device=key_states.device) if plan.rows is None else plan.rows
        made = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[at[:, None], :, plan.columns] = new.transpose(1, 2)
            made.append(
                kept[:, :, : plan.width] if plan.rows is None else kept[plan.rows, :, : plan.width]
            )
        return made[0], made[1]

    def grow(self, room: int) -> None:
        """More columns; the bin stays the last."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], room, old.shape[3])
            new[:, :, : old.shape[2] - 1] = old[:, :, :-1]
            setattr(self, name, new)


class AttentionRows(_Heads):
    """Rows of a model all of whose layers are full or sliding-window attention."""

    def __init__(self, model: Any, count: int, room: int = 256) -> None:
        super().__init__(model, count)
        self.plan = _Plan()
        self.plan.count, self.plan.room = count, room
        self.config = self.model.config.get_text_config()
        self.cache = DynamicCache(config=self.model.config)
        self.cache.layers = [_RowsLayer(self.plan) for _ in self.cache.layers]

    def feed(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> Tensor:
        """Appends tokens to some rows; logits [n, V] after the last token of each."""
        given: dict[int, Sequence[int]] = dict(zip(rows, chunks))
        single = max(map(len, chunks)) == 1
        # For one token each it costs less to carry rows that have none along than to pick the others out.
        every = len(rows) == self.plan.count or (single and 2 * len(rows) >= self.plan.count)
        order = range(self.plan.count) if every else rows
        parts = [given.get(r, ()) for r in order]
        k, size = max(map(len, parts)), len(parts)
        ids = torch.zeros(size, k, dtype=torch.int64)
        for i, part in enumerate(parts):
            ids[i, : len(part)] = torch.tensor(list(part), dtype=torch.int64)
        before = torch.tensor([len(self.tokens[r]) for r in order])[:, None]
        new = torch.tensor([len(p) for p in parts])[:, None]
        width = int((before + new).max())
        self._make_room(width + 1)
        steps = torch.arange(k)[None]
        positions = before + steps
        plan = self.plan
        plan.columns = torch.where(steps < new, positions, plan.room - 1).to(self.device)
        plan.rows = None if every else torch.tensor(list(order), device=self.device)
        plan.width = width
        # What is no token sees column 0 and is seen by none; its result is not used.
        positions = torch.where(steps < new, positions, 0).to(self.device)
        masks = self._masks(positions, width)
        hidden = self._hidden(
            ids.to(self.device), self.cache, position_ids=positions, attention_mask=masks
        )
        if list(order) != list(rows):
            hidden = hidden[torch.tensor(list(rows), device=self.device)]
        return self._read(rows, chunks, hidden)

    def _masks(self, positions: Tensor, width: int) -> Any:
        """Additive or boolean masks [n, 1, k, width], by type of layer where the model has several."""
        columns = torch.arange(width, device=positions.device)
        see = columns <= positions[..., None]
        window = getattr(self.config, "sliding_window", None)
        types = set(getattr(self.config, "layer_types", None) or ())
        near = see if window is None else see & (columns > positions[..., None] - window)
        dtype = next(self.model.parameters()).dtype
        full, sliding = (hf.as_mask(self.model, m[:, None], dtype) for m in (see, near))
        if len(types) > 1:
            return {"full_attention": full, "sliding_attention": sliding}
        # Models that know no types of layers have a window in all of them, or none.
        return full if types == {"full_attention"} else sliding

    def _make_room(self, room: int) -> None:
        if room <= self.plan.room:
            return
        self.plan.room = room + room // 2
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.grow(self.plan.room)

    def share(self, source: int, target: int, length: int) -> None:
        """Gives the empty row ``target`` the first tokens of ``source``."""
        length = min(length, len(self.tokens[source]))
        for layer in self.cache.layers:
            for kept in (layer.keys, layer.values):
                kept[target, :, :length] = kept[source, :, :length]
        self._copy(source, target, length)

    def crop(self, row: int, length: int) -> None:
        """Forgets a row's tokens from ``length`` on."""
        end = len(self.tokens[row])
        for layer in self.cache.layers if length < end else ():
            # What is hidden counts with weight 0, and 0 times infinity would be in every row that comes here.
            layer.keys[row, :, length:end] = layer.values[row, :, length:end] = 0
        del self.tokens[row][length:], self.rewards[row][length:]

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows; those kept are numbered anew, in this order."""
        at = torch.tensor(list(rows), device=self.device)
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[at], layer.values[at]
        self.tokens = [self.tokens[r] for r in rows]
        self.rewards = [self.rewards[r] for r in rows]
        self.plan.count = len(rows)


class SingleRows(_Heads):
    """Rows of any model, each read alone: recurrent layers, and attention without masks, know no other way."""

    def __init__(self, model: Any, count: int) -> None:
        super().__init__(model, count)
        self.caches: list[Any] = [None] * count

    def feed(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> Tensor:
        """Appends tokens to some rows; logits [n, V] after the last token of each."""
        made = []
        for row, chunk in zip(rows, chunks):
            known = self.tokens[row]
            again = known if self.caches[row] is None else []  # of a row that was cut
            if self.caches[row] is None:
                self.caches[row] = DynamicCache(config=self.model.config)
            ids = torch.tensor([[*again, *chunk]], device=self.device)
            mask = torch.ones(1, len(known) + len(chunk), dtype=torch.int64, device=self.device)
            inputs = model_inputs(self.trunk, ids, mask)
            if "position_ids" in inputs:
                inputs["position_ids"] = inputs["position_ids"][:, -ids.shape[1] :]
            hidden = self._hidden(inputs.pop("input_ids"), self.caches[row], **inputs)
            made.append(self._read([row], [chunk], hidden[:, len(again) :]))
        return torch.cat(made)

    def share(self, source: int, target: int, length: int) -> None:
        """Gives the empty row ``target`` the first tokens of ``source``, if it has no others."""
        if length == len(self.tokens[source]) and self.caches[source] is not None:
            self.caches[target] = copy.deepcopy(self.caches[source])
            self._copy(source, target, length)

    def crop(self, row: int, length: int) -> None:
        """Forgets a row's tokens from ``length`` on."""
        if length < len(self.tokens[row]):
            self.caches[row] = None
        del self.tokens[row][length:], self.rewards[row][length:]

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows; those kept are numbered anew, in this order."""
        for name in ("caches", "tokens", "rewards"):
            setattr(self, name, [getattr(self, name)[r] for r in rows])


def make_rows(model: Any, count: int) -> Rows:
    """Empty rows of a causal LM, or of what has a method ``make_rows``."""
    if hasattr(model, "make_rows"):
        return model.make_rows(count)
    face = plain_face(model)
    layers = DynamicCache(config=face.config).layers
    plain = bool(layers) and all(type(x) in _PLAIN for x in layers)
    masks = getattr(face.config, "_attn_implementation", None) in _MASKED
    one = torch.zeros(1, 1, dtype=torch.int64)
    counts = "position_ids" in model_inputs(trunk_of(face), one, one)
    return (AttentionRows if plain and masks and counts else SingleRows)(model, count)
