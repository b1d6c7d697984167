# SPDX-License-Identifier: Apache-2.0
"""Which key and value head each query head reads: one pair of maps per layer, and what follows from them.

A layer with H query heads has ``key_heads`` key heads and ``value_heads`` value heads (DHA, arXiv
2406.06567, section 2). Query head h attends with key head ``key_head_map[h]`` and mixes the values of
head ``value_head_map[h]``. MHA (identity maps) and GQA (``h // (H / N)``, twice) are special cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

FIELDS = ("key_heads", "value_heads", "key_head_map", "value_head_map")


@dataclass(frozen=True)
class Component:
    """Query, key and value heads of one layer that share keys or values with each other only."""

    query_heads: tuple[int, ...]
    key_heads: tuple[int, ...]
    value_heads: tuple[int, ...]


@dataclass(frozen=True)
class HeadLayout:
    """Head counts and maps of every layer; checked when it is made.

    Attributes:
        num_heads: query heads H, the same in all layers.
        key_heads, value_heads: head counts per layer, 1..H.
        key_head_map, value_head_map: per layer, the head of each query head [H]. A head that no query
            head reads is allowed.

    Raises:
        ValueError: a count or a map entry out of range, a map of the wrong length, an entry that is
            no integer: names the layer, the position and the value.
    """

    num_heads: int
    key_heads: tuple[int, ...]
    value_heads: tuple[int, ...]
    key_head_map: tuple[tuple[int, ...], ...]
    value_head_map: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        _check_int("num_heads", self.num_heads, "")
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be >= 1, got {self.num_heads}")
        for counts, maps in (FIELDS[0::2], FIELDS[1::2]):
            object.__setattr__(self, counts, self._counts(counts))
            object.__setattr__(self, maps, self._maps(maps, counts))
        if len(self.key_heads) != len(self.value_heads):
            raise ValueError(
                f"key_heads has {len(self.key_heads)} layers, value_heads {len(self.value_heads)}"
            )

    def _counts(self, name: str) -> tuple[int, ...]:
        counts = tuple(getattr(self, name))
        for layer, count in enumerate(counts):
            _check_int(name, count, f" at layer {layer}")
            if not 1 <= count <= self.num_heads:
                raise ValueError(
                    f"{name} must be in [1, {self.num_heads}], got {count} at layer {layer}"
                )
        return tuple(int(count) for count in counts)

    def _maps(self, name: str, counts_name: str) -> tuple[tuple[int, ...], ...]:
        counts, maps = getattr(self, counts_name), tuple(getattr(self, name))
        if len(maps) != len(counts):
            raise ValueError(f"{name} has {len(maps)} layers, {counts_name} has {len(counts)}")
        checked = []
        for layer, (count, entries) in enumerate(zip(counts, maps)):
            row = _as_list(name, entries, layer)
            if len(row) != self.num_heads:
                raise ValueError(
                    f"{name} of layer {layer} must have one entry per query head "
                    f"({self.num_heads}), got {len(row)}"
                )
            for position, entry in enumerate(row):
                _check_int(name, entry, f" at layer {layer}, position {position}")
                if not 0 <= entry < count:
                    raise ValueError(
                        f"{name} must be in [0, {count}) ({counts_name}), got {entry} at layer "
                        f"{layer}, position {position}"
                    )
            checked.append(tuple(int(entry) for entry in row))
        return tuple(checked)

    # -- makers ----------------------------------------------------------------------------------

    @classmethod
    def identity(cls, num_layers: int, num_heads: int) -> HeadLayout:
        """MHA: every query head has a key and a value head of its own."""
        return cls.gqa(num_layers, num_heads, num_heads)

    @classmethod
    def gqa(cls, num_layers: int, num_heads: int, kv_heads: int | Sequence[int]) -> HeadLayout:
        """Grouped maps ``h // (H / N)`` for keys and values; ``kv_heads`` N of all or of each layer.

        Raises ValueError if N does not divide H.
        """
        counts = [kv_heads] * num_layers if isinstance(kv_heads, int) else list(kv_heads)
        maps = [grouped_map(num_heads, int(n), layer) for layer, n in enumerate(counts)]
        return cls(num_heads, tuple(counts), tuple(counts), tuple(maps), tuple(maps))

    @classmethod
    def from_maps(
        cls, key_head_map: Sequence[Sequence[int]], value_head_map: Sequence[Sequence[int]]
    ) -> HeadLayout:
        """A layout from its maps alone: each layer has as many heads as its largest entry says."""
        maps = [
            [_as_list(name, row, layer) for layer, row in enumerate(rows)]
            for name, rows in zip(FIELDS[2:], (key_head_map, value_head_map))
        ]
        if not maps[0] or not maps[0][0]:
            raise ValueError("key_head_map must have at least one layer with one query head")
        key_heads, value_heads = ([max(row, default=0) + 1 for row in rows] for rows in maps)
        key_map, value_map = (tuple(map(tuple, rows)) for rows in maps)
        return cls(len(maps[0][0]), tuple(key_heads), tuple(value_heads), key_map, value_map)

    @classmethod
    def from_config(cls, config: Any) -> HeadLayout:
        """The layout of a transformers config: its own maps, or the grouped ones of MHA and GQA."""
        heads = config.num_attention_heads
        if getattr(config, "key_head_map", None) is not None:
            return cls(heads, *(getattr(config, name) for name in FIELDS))
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls.gqa(config.num_hidden_layers, heads, kv_heads)

    def config_fields(self) -> dict[str, Any]:
        """The four fields as plain lists, as a config stores them."""
        return {
            "key_heads": list(self.key_heads),
            "value_heads": list(self.value_heads),
            "key_head_map": [list(row) for row in self.key_head_map],
            "value_head_map": [list(row) for row in self.value_head_map],
        }

    # -- sizes -----------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.key_heads)

    @property
    def total_heads(self) -> int:
        """Key plus value heads over all layers: what a budget counts."""
        return sum(self.key_heads) + sum(self.value_heads)

    @property
    def ratio(self) -> float:
        """Key and value heads as a share of those of MHA, ``total_heads / (layers * 2H)``."""
        return self.total_heads / (2 * self.num_heads * self.num_layers)

    def kv_bytes_per_token(
        self, head_dim: int, itemsize: int = 2, value_dim: int | None = None
    ) -> int:
        """Cache bytes of one token over all layers, ``sum (HK * D + HV * DV) * itemsize``."""
        value_dim = head_dim if value_dim is None else value_dim
        return (sum(self.key_heads) * head_dim + sum(self.value_heads) * value_dim) * itemsize

    # -- structure -------------------------------------------------------------------------------

    def components(self, layer: int) -> list[Component]:
        """Connected components of the graph key heads - query heads - value heads of a layer.

        Token eviction can keep a set of tokens of its own for each of them, not for less. Heads that
        nobody reads go with the first component. Ordered by the lowest query head.
        """
        kmap, vmap = self.key_head_map[layer], self.value_head_map[layer]
        label = list(range(self.num_heads))  # lowest query head known to share with this one
        changed = True
        while changed:
            changed = False
            for owners in (kmap, vmap):
                least: dict[int, int] = {}
                for head, owner in enumerate(owners):
                    least[owner] = min(least.get(owner, self.num_heads), label[head])
                merged = [least[owner] for owner in owners]
                changed |= merged != label
                label = merged
        parts = []
        for root in sorted(set(label)):
            heads = [h for h in range(self.num_heads) if label[h] == root]
            parts.append([heads, {kmap[h] for h in heads}, {vmap[h] for h in heads}])
        parts[0][1] = set(parts[0][1]) | (set(range(self.key_heads[layer])) - set(kmap))
        parts[0][2] = set(parts[0][2]) | (set(range(self.value_heads[layer])) - set(vmap))
        return [Component(*(tuple(sorted(part)) for part in each)) for each in parts]

    def component_of_heads(self, layer: int) -> tuple[list[int], list[int], list[int]]:
        """The component of each query head [H], key head [HK] and value head [HV]."""
        out = [0] * self.num_heads, [0] * self.key_heads[layer], [0] * self.value_heads[layer]
        for index, part in enumerate(self.components(layer)):
            for row, heads in zip(out, (part.query_heads, part.key_heads, part.value_heads)):
                for head in heads:
                    row[head] = index
        return out

    def is_equal(self, layer: int) -> bool:
        """Do keys and values share in the same groups of query heads?"""
        return _groups(self.key_head_map[layer]) == _groups(self.value_head_map[layer])

    def is_nested(self, layer: int) -> bool:
        """Is every key group a union of value groups, or every value group one of key groups?"""
        pairs = set(zip(self.key_head_map[layer], self.value_head_map[layer]))
        used = len(set(self.key_head_map[layer])), len(set(self.value_head_map[layer]))
        return len(pairs) == max(used)

    def is_sorted(self, layer: int) -> bool:
        """Do query heads that share a key head stand next to each other, in its order?"""
        kmap = self.key_head_map[layer]
        return all(a <= b for a, b in itertools.pairwise(kmap))

    def is_gqa(self, layer: int) -> bool:
        """Are the maps exactly those of grouped-query attention, ``h // (H / N)``?"""
        count = self.key_heads[layer]
        if self.num_heads % count or count != self.value_heads[layer]:
            return False
        want = grouped_map(self.num_heads, count)
        return self.key_head_map[layer] == want == self.value_head_map[layer]

    # -- permutation -----------------------------------------------------------------------------

    def sort_order(self) -> list[list[int]]:
        """Per layer, the query heads in the order that sorts the key map, then the value map."""
        return [
            sorted(range(self.num_heads), key=lambda h: (kmap[h], vmap[h]))
            for kmap, vmap in zip(self.key_head_map, self.value_head_map)
        ]

    def permuted(self, order: Sequence[Sequence[int]]) -> HeadLayout:
        """The layout whose query head i is head ``order[layer][i]`` of this one.

        Raises ValueError if a layer's order is no permutation of its query heads.
        """
        _check_order(order, self.num_layers, self.num_heads)
        maps = (
            tuple(tuple(row[h] for h in heads) for row, heads in zip(rows, order))
            for rows in (self.key_head_map, self.value_head_map)
        )
        return HeadLayout(self.num_heads, self.key_heads, self.value_heads, *maps)


def grouped_map(num_heads: int, kv_heads: int, layer: int | None = None) -> tuple[int, ...]:
    """``h // (H / N)``. Raises ValueError if N does not divide H."""
    if kv_heads < 1 or num_heads % kv_heads:
        where = "" if layer is None else f" at layer {layer}"
        raise ValueError(f"kv_heads must divide the {num_heads} query heads, got {kv_heads}{where}")
    return tuple(h // (num_heads // kv_heads) for h in range(num_heads))


def expanded(weight: Tensor, heads: Iterable[int], dim: int) -> Tensor:
    """Rows [H * D, ...] of ``weight`` [N * D, ...], head ``heads[h]`` for query head h."""
    rows = weight.view(-1, dim, *weight.shape[1:])
    index = torch.tensor(list(heads), device=weight.device)
    return rows.index_select(0, index).reshape(-1, *weight.shape[1:])


@torch.no_grad()
def permute_query_heads(model: nn.Module, order: Sequence[Sequence[int]]) -> None:
    """Reorders the query heads of a DHA model in place; its function stays the same.

    Moves rows of ``q_proj`` (and bias), columns of ``o_proj``, and the entries of both maps, in the
    layers and in the config. ``order[layer][i]`` is the old head that becomes head i.

    Raises:
        ValueError: an order that is no permutation. TypeError: not a DHA model.
    """
    config = model.config
    if getattr(config, "key_head_map", None) is None:
        raise TypeError(f"{type(model).__name__} has no key_head_map; supported: DHA models")
    layout = HeadLayout.from_config(config).permuted(order)
    for attention in (m for m in model.modules() if hasattr(m, "key_map")):
        heads = order[attention.layer_idx]
        dim = attention.head_dim
        attention.q_proj.weight.copy_(expanded(attention.q_proj.weight, heads, dim))
        if attention.q_proj.bias is not None:
            attention.q_proj.bias.copy_(expanded(attention.q_proj.bias, heads, dim))
        out = attention.o_proj.weight
        out.copy_(expanded(out.t(), heads, dim).t())
        attention.set_maps(
            layout.key_head_map[attention.layer_idx], layout.value_head_map[attention.layer_idx]
        )
    for name, value in layout.config_fields().items():
        setattr(config, name, value)


def sort_query_heads(model: nn.Module) -> list[list[int]]:
    """Sorts the query heads of a DHA model by key head, then value head; its function stays the same.

    Kernels then see the query heads of a key head side by side. Returns the order per layer: entry i
    is the old head that became head i. Raises TypeError if the model has no maps.
    """
    if getattr(model.config, "key_head_map", None) is None:
        raise TypeError(f"{type(model).__name__} has no key_head_map; supported: DHA models")
    order = HeadLayout.from_config(model.config).sort_order()
    permute_query_heads(model, order)
    return order


def _check_int(name: str, value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be integers, got {value!r}{where}")


def _as_list(name: str, entries: Any, layer: int) -> list:
    if isinstance(entries, Tensor):
        if entries.dim() != 1 or entries.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} of layer {layer} must be a 1-D int32 or int64 tensor or a list, got "
                f"{entries.dtype} {list(entries.shape)}"
            )
        return entries.tolist()
    if isinstance(entries, (str, bytes)) or not isinstance(entries, Iterable):
        raise ValueError(f"{name} of layer {layer} must be a list of integers, got {entries!r}")
    return list(entries)


def _check_order(order: Sequence[Sequence[int]], layers: int, heads: int) -> None:
    if len(order) != layers:
        raise ValueError(f"order has {len(order)} layers, the model {layers}")
    for layer, row in enumerate(order):
        if sorted(row) != list(range(heads)):
            raise ValueError(
                f"order of layer {layer} must be a permutation of 0..{heads - 1}, got {list(row)}"
            )


def _groups(owners: Sequence[int]) -> set[frozenset[int]]:
    groups: dict[int, set[int]] = {}
    for head, owner in enumerate(owners):
        groups.setdefault(owner, set()).add(head)
    return {frozenset(group) for group in groups.values()}
