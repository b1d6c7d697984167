# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of what changed, the way back to the base model, and Half-Reset.

A delta holds the tensors that differ from the base (for tensors that train in part: the changed rows) and
the digest of the base, so that it cannot be put on another model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold import ops
from tenfold.hft.plan import Plan
from tenfold.training.batches import sample_digest

State = Mapping[str, Tensor]
ROWS = "#rows"  # suffix: int32 indices of the rows that a tensor of the delta has


def _state(model: nn.Module | State) -> State:
    if not isinstance(model, nn.Module):
        return model
    # Tied tensors once, as in named_parameters.
    return {n: p.detach() for n, p in model.named_parameters()} | {
        n: b for n, b in model.named_buffers()
    }


def base_digest(base: nn.Module | State) -> str:
    """Identifies a base model: a hash over samples of all its tensors."""
    import hashlib

    made = hashlib.sha256()
    for name, tensor in sorted(_state(base).items()):
        made.update(name.encode())
        sample_digest(tensor, made)
    return made.hexdigest()[:16]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters and buffers, on the CPU."""
    return {n: t.detach().to("cpu", copy=True) for n, t in _state(model).items()}


def _changes(tuned: State, base: State) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    for name, new in tuned.items():
        if name not in base or base[name].shape != new.shape or base[name].dtype != new.dtype:
            raise KeyError(f"the base model has no tensor {name} {list(new.shape)} {new.dtype}")
        # As bytes: NaN equals itself, and -0 is not 0.
        old, new = base[name].cpu().contiguous(), new.detach().cpu().contiguous()
        a, b = (t.view(torch.uint8) if t.ndim else t.view(1).view(torch.uint8) for t in (old, new))
        if torch.equal(a, b):
            continue
        if new.ndim < 2:
            yield name, new, None
            continue
        rows = (a.view(-1, a.shape[-1]) != b.view(-1, b.shape[-1])).any(1).nonzero()[:, 0]
        if len(rows) > 0.75 * (new.numel() // new.shape[-1]):
            yield name, new, None
        else:
            yield name, new.view(-1, new.shape[-1])[rows], rows.to(torch.int32)


def save_delta(
    model: nn.Module | State, base: nn.Module | State, path: str | Path, plan: Plan | None = None
) -> dict[str, Any]:
    """Writes what differs between ``model`` and ``base`` to one safetensors file.

    Returns ``{"tensors", "rows", "bytes", "base"}``: counts, and the digest of the base.
    Raises KeyError if the base has other tensors.
    """
    from safetensors.torch import save_file

    tensors, rows = {}, 0
    for name, value, index in _changes(_state(model), _state(base)):
        tensors[name] = value.contiguous().clone()
        if index is not None:
            tensors[name + ROWS] = index
            rows += 1
    digest = base_digest(base)
    meta = {"format": "tenfold.hft.delta", "base": digest}
    if plan is not None:
        meta["plan"] = json.dumps(plan.to_json())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), meta)
    total = sum(t.nbytes for t in tensors.values())
    return {"tensors": len(tensors) - rows, "rows": rows, "bytes": total, "base": digest}


@torch.no_grad()
def apply_delta(model: nn.Module, path: str | Path, check: bool = True) -> dict[str, Tensor]:
    """Puts a delta on its base model, in place; returns what was there, for :func:`restore`.

    ValueError if the model is not the delta's base (``check=False``: do it all the same).
    """
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        meta = file.metadata() or {}
        if meta.get("format") != "tenfold.hft.delta":
            raise ValueError(f"{path} is no delta checkpoint")
        if check and meta["base"] != (mine := base_digest(model)):
            raise ValueError(
                f"{path} belongs to another base model ({meta['base']}, this is {mine})"
            )
        state, undo = _state(model), {}
        keys = set(file.keys())
        for name in sorted(k for k in keys if not k.endswith(ROWS)):
            target, value = state[name], file.get_tensor(name).to(state[name].device)
            if name + ROWS in keys:
                rows = file.get_tensor(name + ROWS).long().to(target.device)
                view = target.view(-1, target.shape[-1])
                undo[name], undo[name + ROWS] = view[rows].clone(), rows.int()
                view[rows] = value
            else:
                undo[name] = target.clone()
                target.copy_(value)
    return undo


@torch.no_grad()
def restore(model: nn.Module, undo: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`apply_delta` replaced, or a :func:`snapshot` took."""
    state = _state(model)
    for name, value in undo.items():
        if name.endswith(ROWS):
            continue
        target = state[name]
        rows = undo.get(name + ROWS)
        if rows is None:
            target.copy_(value)
        else:
            target.view(-1, target.shape[-1])[rows.long()] = value.to(target.device)


@torch.no_grad()
def half_reset(tuned: nn.Module | State, base: nn.Module | State, plan: Plan) -> dict[str, Tensor]:
    """A state dict in which what the Plan freezes is the base's again and the rest is tuned.

    Raises KeyError for a Plan of another model, ValueError for shapes that differ.
    """
    new, old = _state(tuned), _state(base)
    missing = [n for n in (*plan.frozen, *plan.partial) if n not in new or n not in old]
    if missing:
        raise KeyError(f"the Plan was drawn for another model: {', '.join(missing[:3])} not in it")
    made = {n: t.detach().clone() for n, t in new.items()}
    for name in (*plan.frozen, *plan.partial):
        if made[name].shape != old[name].shape:
            raise ValueError(
                f"{name}: {list(made[name].shape)} tuned, {list(old[name].shape)} base"
            )
        part = plan.partial.get(name)
        if part is None:
            made[name].copy_(old[name])
            continue
        # The bits say what stays tuned: start from the base and copy those.
        reset = old[name].detach().to(made[name].dtype, copy=True).contiguous()
        source = made[name].contiguous()
        mask = part.mask(reset)
        shape = (-1, reset.shape[-1]) if part.kind == "row" else reset.shape
        ops.masked_copy_([reset.view(shape)], [source.view(shape)], [mask], mask_kind=part.kind)
        made[name] = reset
    return made


@torch.no_grad()
def average(
    states: Sequence[nn.Module | State], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The weighted mean of models with the same tensors (equal weights if none are given)."""
    given = [_state(s) for s in states]
    shares = [1 / len(given)] * len(given) if weights is None else list(weights)
    if not given or len(shares) != len(given):
        raise ValueError(f"{len(shares)} weights for {len(given)} models")
    made = {}
    for name, first in given[0].items():
        if not first.is_floating_point():
            made[name] = first.clone()
            continue
        total = sum(w * s[name].float() for w, s in zip(shares, given))
        made[name] = total.to(first.dtype)  # type: ignore[union-attr]
    return made
