# SPDX-License-Identifier: Apache-2.0
"""A parameter's mask as the kernels take it, whole or cut for one rank's shard of a DTensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold import ops

KINDS = ("none", "row", "col", "block", "element")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def is_dense(tensor: Tensor) -> bool:
    """Do its elements fill a block of memory, each once?"""
    return torch.ops.aten.is_non_overlapping_and_dense(tensor)


def as_stored(values: Tensor, like: Tensor) -> Tensor:
    """``values``, of the shape of ``like``, flat in the storage order of ``like``."""
    if like.is_contiguous():
        return values.contiguous().view(-1)
    made = torch.empty_like(like, dtype=values.dtype)
    made.copy_(values)
    return made.as_strided((made.numel(),), (1,))


@dataclass(frozen=True)
class Mask:
    """Packed bits (uint8) over the units of a tensor. Row masks see it as [numel / last, last]."""

    packed: Tensor
    kind: str
    block: int = 256

    def units(self, tensor: Tensor) -> int:
        """How many bits a tensor needs."""
        n, last = tensor.numel(), tensor.shape[-1] if tensor.ndim else 1
        if self.kind == "row":
            return n // max(1, last)
        if self.kind == "col":
            return last
        return n if self.kind == "element" else -(-n // self.block)

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor in the shape for which the kernels read this mask."""
        if self.kind == "row" and tensor.ndim > 2:
            return tensor.view(-1, tensor.shape[-1])
        return tensor

    def elements(self, tensor: Tensor) -> Tensor:
        """bool [numel] in storage order: which elements train."""
        bits = ops.unpack_mask(self.packed, self.units(tensor))
        n = tensor.numel()
        if self.kind == "row":
            return bits.repeat_interleave(tensor.shape[-1])
        if self.kind == "col":
            return bits.repeat(n // max(1, tensor.shape[-1]))
        return bits if self.kind == "element" else bits.repeat_interleave(self.block)[:n]

    def count(self, tensor: Tensor) -> int:
        """How many elements train."""
        bits = int(ops.mask_popcount(self.packed))
        if self.kind == "element":
            return bits
        units = self.units(tensor)
        if self.kind in ("row", "col"):
            return bits * (tensor.numel() // max(1, units))
        tail = tensor.numel() - (units - 1) * self.block
        last = units and bool(ops.unpack_mask(self.packed, units)[-1])
        return bits * self.block - (self.block - tail if last else 0)

    def shard(self, parameter: Tensor) -> Mask:
        """What this rank needs of the mask of a DTensor (sharded along dimension 0, or not at all)."""
        if not hasattr(parameter, "to_local"):
            return self
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if tuple(shape) == tuple(parameter.shape):
            return self
        if any(offset[1:]) or tuple(shape[1:]) != tuple(parameter.shape[1:]):
            raise ValueError(
                f"masks of DTensors sharded along other dimensions than 0 are not supported, got "
                f"{list(shape)} of {list(parameter.shape)}"
            )
        if self.kind == "col":
            return self
        whole = torch.empty(parameter.shape, device="meta")
        inner = whole.numel() // max(1, parameter.shape[0])
        if self.kind == "row":
            inner //= max(1, parameter.shape[-1])
            bits = ops.unpack_mask(self.packed, self.units(whole))
        else:  # blocks need not begin where a shard does
            bits = self.elements(whole.new_empty(whole.shape, device="meta"))
        start = offset[0] * inner if shape[0] else 0
        part = bits[start : start + shape[0] * inner]
        return Mask(ops.pack_mask(part), self.kind if self.kind == "row" else "element", self.block)


def make_mask(value: Any, kind: str, block: int, parameter: Tensor, name: str) -> Mask | None:
    """A mask from what the user gave: bool bits, packed bytes, or a (mask, kind) pair; None for none.

    ValueError, with both shapes, if it does not fit.
    """
    if isinstance(value, tuple):
        value, kind = value
    if value is None or kind == "none":
        return None
    if kind not in KINDS:
        raise ValueError(f"mask_kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if block < 32 or block & (block - 1):
        raise ValueError(f"block_size must be a power of two >= 32, got {block}")
    if kind in ("row", "col") and parameter.ndim < 2:
        raise ValueError(
            f"mask_kind={kind!r} needs a parameter of 2 or more dimensions, {name} has "
            f"{list(parameter.shape)}"
        )
    if not isinstance(value, Tensor) or value.dtype not in (torch.bool, torch.uint8):
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the mask of {name} must be bool, or packed uint8, got {what}")
    if value.device != parameter.device:
        raise ValueError(
            f"the mask of {name} is on {value.device}, the parameter on {parameter.device}"
        )
    made = Mask(value, kind, block)
    units = made.units(parameter)
    if value.dtype == torch.uint8:
        if value.ndim != 1 or value.numel() != (units + 7) // 8:
            raise ValueError(
                f"the packed {kind} mask of {name} must be [{(units + 7) // 8}] for a parameter "
                f"{list(parameter.shape)}, got {list(value.shape)}"
            )
        return Mask(value.contiguous(), kind, block)
    if value.numel() != units or (
        kind == "element" and value.ndim != 1 and value.shape != parameter.shape
    ):
        raise ValueError(
            f"the {kind} mask of {name} must have {units} bits for a parameter "
            f"{list(parameter.shape)}, got {list(value.shape)}"
        )
    if kind == "element" and value.shape == parameter.shape and not hasattr(parameter, "to_local"):
        value = as_stored(value, parameter)
    return Mask(ops.pack_mask(value), kind, block)


def collect_masks(
    masks: Any, kind: Any, block: int, parameters: Sequence[Tensor]
) -> dict[Tensor, Mask]:
    """The masks of an optimiser's parameters, from a mapping or a list in their order."""
    if masks is None:
        return {}
    if isinstance(masks, Mapping):
        known = {id(p) for p in parameters}
        strange = [k for k in masks if id(k) not in known]
        if strange:
            raise ValueError(
                f"masks: {len(strange)} keys are not parameters of this optimizer; keys are the "
                "parameters themselves"
            )
        pairs: Iterable[tuple[Tensor, Any]] = masks.items()
    else:
        values = list(masks)
        if len(values) != len(parameters):
            raise ValueError(f"masks: {len(values)} entries for {len(parameters)} parameters")
        pairs = zip(parameters, values)
    made = {}
    for at, (parameter, value) in enumerate(pairs):
        one = kind.get(parameter, "element") if isinstance(kind, Mapping) else kind
        mask = make_mask(value, one, block, parameter, f"parameter {at}")
        if mask is not None:
            made[parameter] = mask.shard(parameter)
    return made
