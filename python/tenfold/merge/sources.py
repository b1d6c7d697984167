# SPDX-License-Identifier: Apache-2.0
"""The models of a merge side by side: do they fit together, and in which dtype are they merged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tenfold.merge.checkpoint import Checkpoint

State = Mapping[str, Tensor]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_COPIED = (torch.int64, torch.int32, torch.bool)  # buffers: positions, masks


def dtype_of(state: State, name: str) -> torch.dtype:
    """Without reading a tensor of a checkpoint. TypeError for what is not merged."""
    found = state.dtype(name) if isinstance(state, Checkpoint) else state[name].dtype
    if found not in (*FLOATS, torch.float64, *_COPIED):
        where = f"{state.path}: " if isinstance(state, Checkpoint) else ""
        kind = state.entries[name].dtype if isinstance(state, Checkpoint) else found
        raise TypeError(
            f"{where}{name} has dtype {kind}: quantised weights cannot be merged; dequantise the model first"
        )
    return found  # type: ignore[return-value]


def shape_of(state: State, name: str) -> tuple[int, ...]:
    """Without reading a tensor of a checkpoint."""
    return state.shape(name) if isinstance(state, Checkpoint) else tuple(state[name].shape)


def _first(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def check_alike(states: Sequence[State], labels: Sequence[str]) -> None:
    """ValueError, naming the first three tensors, unless all have the tensors and shapes of the first."""
    first, label = states[0], labels[0]
    for state, other in zip(states[1:], labels[1:]):
        missing, extra = set(first) - set(state), set(state) - set(first)
        if missing:
            raise ValueError(f"{other} lacks tensors of {label}: {_first(missing)}")
        if extra:
            raise ValueError(f"{other} has tensors that {label} lacks: {_first(extra)}")
        wrong = {n for n in first if shape_of(first, n) != shape_of(state, n)}
        if wrong:
            n = min(wrong)
            raise ValueError(
                f"shapes differ between {label} and {other}: {_first(wrong)} ({n}: "
                f"{list(shape_of(first, n))} and {list(shape_of(state, n))})"
            )


def work_dtypes(
    base: State | None, experts: Sequence[State], dtype: torch.dtype | None
) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """For each tensor, what it is merged in and what it is written in.

    ``dtype`` decides if it is given. Else experts must have one dtype (ValueError); where base has another one
    the merge is float32, written in that of base, with a warning.
    """
    made, converted, mixed = {}, set(), set()
    for name in experts[0]:
        kinds = {dtype_of(e, name) for e in experts}
        own = dtype_of(base if base is not None else experts[0], name)
        if dtype is not None and own.is_floating_point:
            made[name] = dtype, dtype
            continue
        if len(kinds) > 1:
            mixed.add(name)
            continue
        if torch.float64 in (own, *kinds):
            raise TypeError(
                f"{name} is float64; set the recipe's dtype (float32, bfloat16 or float16)"
            )
        if own not in kinds:
            converted.add(name)
            made[name] = torch.float32, own
        else:
            made[name] = own, own
    if mixed:
        raise ValueError(
            f"the models have different dtypes at {_first(mixed)}; set the recipe's dtype to convert them"
        )
    if converted:
        warnings.warn(
            f"the models and the base have different dtypes at {_first(converted)}: merged in float32, written "
            "in that of the base; set the recipe's dtype to choose",
            stacklevel=4,
        )
    return made


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaN equals itself, and -0 is not 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def release(states: Sequence[State | None], name: str) -> None:
    """Gives the pages of a tensor of all checkpoints back."""
    for state in states:
        if isinstance(state, Checkpoint):
            state.release(name)


def all_identical(states: Sequence[State]) -> bool:
    """Are all tensors of all states equal; reads until the first difference."""
    for name in sorted(states[0]):
        first = states[0][name]
        same = all(same_bytes(first, s[name]) for s in states[1:])
        del first
        release(states, name)
        if not same:
            return False
    return True
