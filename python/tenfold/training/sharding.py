# SPDX-License-Identifier: Apache-2.0
"""FSDP2 for the training loop: weights, gradients and optimiser states in shards, on CPUs (gloo) and GPUs alike.

torch's ``fully_shard`` on each repeated block and on what is left over, asked for by accelerate's own settings
(``accelerate launch`` with ``fsdp_version: 2``, or ``ACCELERATE_USE_FSDP=true FSDP_VERSION=2 torchrun ...``), but
without accelerate's wrapper, which is for accelerators only and which losses that read weights outside of a forward
cannot use. Here a step's whole computation runs inside the outermost forward, and :meth:`Sharded.whole` makes the
module for a while, or for good, the ordinary one that it was before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tenfold.optim.masks import local

_ON = ("1", "true", "yes", "on", "y", "t")
# Settings of accelerate that would change what is computed or held, and what there is instead.
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "use MaskedAdamW's offload, LoRA or 8-bit states where a method has them",
    "FSDP_ACTIVATION_CHECKPOINTING": "use the method's gradient_checkpointing",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "every rank loads the model (fsdp_cpu_ram_efficient_loading: false)",
}
_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
                  "_forward_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
                "_load_state_dict_post_hooks")  # fmt: skip


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in _ON


def asked() -> bool:
    """Do accelerate's settings ask for FSDP2? ValueError for those that cannot be had."""
    if not _on("ACCELERATE_USE_FSDP"):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"accelerate is configured for FSDP version {version}, and trainers shard models by FSDP2: set "
            "fsdp_version: 2 (FSDP_VERSION=2), or launch without FSDP"
        )
    for name, instead in _REFUSED.items():
        if _on(name):
            raise ValueError(f"{name}=true is not supported with FSDP2: {instead}")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if policy not in ("TRANSFORMER_BASED_WRAP", "NO_WRAP"):
        raise ValueError(
            f"FSDP_AUTO_WRAP_POLICY must be TRANSFORMER_BASED_WRAP or NO_WRAP, got {policy!r}"
        )
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise ValueError(
            "FSDP_IGNORED_MODULES is not supported with FSDP2: all weights are sharded"
        )
    return True


@contextlib.contextmanager
def unasked() -> Iterator[None]:
    """Inside, accelerate does not see that FSDP is asked for: it would wrap the model itself."""
    before = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["ACCELERATE_USE_FSDP"] = before


def shard_by(accelerator: Any, precision: str) -> None:
    """Remembers that ``accelerator`` shards models over all of its ranks. ValueError for a precision that cannot be."""
    if precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision must be 'no' or 'bf16' with FSDP2, got {precision!r}: fp16 and fp8 scale gradients by "
            "what one rank sees"
        )
    from torch.distributed.device_mesh import init_device_mesh

    accelerator.tenfold_mesh = init_device_mesh(
        accelerator.device.type, (accelerator.num_processes,)
    )


def mesh_of(accelerator: Any) -> Any | None:
    """The ranks over which ``accelerator`` shards models; None if it does not."""
    return getattr(accelerator, "tenfold_mesh", None)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank (all must call); any other tensor as it is."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks that are gathered one at a time, in order.

    Those that ``FSDP_TRANSFORMER_CLS_TO_WRAP`` names; else those that transformers' models must not split; else the
    elements of the largest ``nn.ModuleList``. A block that shares weights with the rest of the module is none.
    """
    if os.environ.get("FSDP_AUTO_WRAP_POLICY") == "NO_WRAP":
        return []
    names = {n for n in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if n}
    if not names:
        for part in module.modules():
            names |= set(getattr(part, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[int] = set()
    for part in module.modules():
        if type(part).__name__ in names and id(part) not in inside:
            found.append(part)
            inside |= {id(m) for m in part.modules()}
    if not found:
        lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
        largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=())
        found = list(largest)
    owners: dict[int, int] = {}
    for part in module.modules():
        for p in part.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    made = []
    for block in found:
        own: dict[int, int] = {}
        for part in block.modules():
            for p in part.parameters(recurse=False):
                own[id(p)] = own.get(id(p), 0) + 1
        if own and all(owners[i] == n for i, n in own.items()):
            made.append(block)
    return made


@dataclass
class _Slot:
    """A place in a module that holds a parameter: the whole one, which is empty while there are shards."""

    owner: nn.Module
    name: str
    whole: nn.Parameter


class Sharded(nn.Module):
    """A module in shards, in place: while this lives, its parameters are DTensors along dimension 0.

    Args:
        module: on any device; what rank 0 has counts. mesh: of the ranks. precision: ``"no"`` or ``"bf16"``, of
            accelerate's autocast around the module's forward.
        apart: submodules whose outputs are used outside of their block's: they stay gathered from forward to backward.

    Raises:
        ValueError: parameters of several dtypes train in one block.
    """

    def __init__(
        self, module: nn.Module, mesh: Any, precision: str = "no", apart: Iterable[nn.Module] = ()
    ) -> None:  # fmt: skip
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        self.module, self.mesh = module, mesh
        blocks = blocks_of(module)
        _check(module, blocks)
        self._slots = [
            _Slot(m, n, p) for m in module.modules() for n, p in m.named_parameters(recurse=False)
        ]
        # fully_shard has no scalars: these are whole on every rank, and their gradients are averaged here.
        scalars = {s.whole for s in self._slots if s.whole.ndim == 0}
        self.scalars = list(scalars)
        self._align()
        self._kept = [(m, type(m), set(m.__dict__)) for m in module.modules()]
        before = self._hooks(_FORWARD_HOOKS)
        self._state_hooks = self._hooks(_STATE_HOOKS)
        later = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in _ON
        common = {"mesh": mesh, "ignored_params": scalars}
        self.units: list[Any] = [
            fully_shard(m, reshard_after_forward=False, **common) for m in apart
        ]
        self.units += [fully_shard(m, reshard_after_forward=later, **common) for m in blocks]
        # Losses read heads and embeddings after the module's own forward: they stay until the backward is over.
        self.units.append(fully_shard(self, reshard_after_forward=False, **common))
        self._forward_hooks_of = _new(before, self._hooks(_FORWARD_HOOKS))
        self._classes = [(m, old, type(m)) for m, old, _ in self._kept if type(m) is not old]
        for slot in self._slots:
            self._empty(slot)
        self._cast = None if precision == "no" else (self.module.__dict__.get("forward"),)
        if self._cast is not None:
            self._autocast(precision)

    def _align(self) -> None:
        """All ranks have what rank 0 has, as with DDP; shards of different models would be none of them."""
        with torch.no_grad():
            tensors = {id(s.whole): s.whole for s in self._slots} | {
                id(b): b for b in self.module.buffers()
            }
            for tensor in tensors.values():
                if not tensor.is_contiguous():
                    tensor.data = tensor.data.contiguous()
                if tensor.device.type != self.mesh.device_type:
                    tensor.data = tensor.data.to(self.mesh.device_type)
                if tensor.numel():
                    raw = tensor.data.view(-1)
                    dist.broadcast(raw.view(torch.uint8) if raw.dtype == torch.bool else raw, 0)

    def _autocast(self, precision: str) -> None:
        from accelerate.utils import convert_outputs_to_fp32

        # As accelerate's own preparation of a model.
        cast = torch.autocast(
            self.mesh.device_type, getattr(torch, {"bf16": "bfloat16"}[precision])
        )
        self.module.forward = convert_outputs_to_fp32(cast(self.module.forward))  # type: ignore[method-assign]

    def _hooks(self, names: Iterable[str]) -> dict[tuple[int, str], dict[Any, Any]]:
        return {(i, n): dict(getattr(m, n)) for i, (m, *_) in enumerate(self._kept) for n in names}

    # -- a step ----------------------------------------------------------------------------------

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(module, *args)``, with what is not in a block gathered until the backward is over."""
        return function(self.module, *args)

    def finish_backward(self) -> None:
        """Averages the gradients that are not in shards; call it once after the last backward of a step."""
        for p in self.scalars:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= self.mesh.size()

    def changed(self) -> None:
        """Other parameters train from now on."""
        _check(self.module, self.units[:-1])
        for unit in self.units:  # what dtype gradients have is looked up again
            unit.unshard()
            unit.reshard()

    # -- whole weights ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The module as an ordinary one, with all of its weights on every rank; all ranks must enter.

        What is done to the weights inside is kept, if all ranks do the same.
        """
        taken = self._open()
        try:
            yield self.module
        finally:
            self._close(*taken)

    @torch.no_grad()
    def _open(self) -> tuple[list[Any], list[Any], list[Any]]:
        for unit in self.units:
            unit.reshard()
        shards, seen = [], set[int]()
        for slot in self._slots:
            shard: Any = slot.owner._parameters[slot.name]
            shards.append(shard)
            if shard is slot.whole:
                continue
            if id(slot.whole) not in seen:
                seen.add(id(slot.whole))
                slot.whole.data = shard.full_tensor().contiguous()
                slot.whole.requires_grad_(shard.requires_grad)
            slot.owner._parameters[slot.name] = slot.whole
        for module, old, _ in self._classes:
            module.__class__ = old
        hooks = [*self._forward_hooks_of, *_new(self._state_hooks, self._hooks(_STATE_HOOKS))]
        for (i, name), key, _ in hooks:
            getattr(self._kept[i][0], name).pop(key, None)
        # FSDP2's notes hold process groups, which cannot be copied or saved.
        notes = [
            (module, name, module.__dict__.pop(name))
            for module, _, names in self._kept
            for name in set(module.__dict__) - names
            if "fsdp" in name or "composable" in name
        ]
        return shards, hooks, notes

    @torch.no_grad()
    def _close(self, shards: list[Any], hooks: list[Any], notes: list[Any]) -> None:
        from torch.distributed.tensor import distribute_tensor

        for slot, shard in zip(self._slots, shards):
            if shard is slot.whole:
                continue
            slot.owner._parameters[slot.name] = shard
            if slot.whole.numel() or not shard.numel():
                mine = distribute_tensor(
                    slot.whole.data, self.mesh, shard.placements, src_data_rank=None
                )
                shard.to_local().copy_(mine.to_local())
                shard.requires_grad_(slot.whole.requires_grad)
                self._empty(slot)
        for module, name, note in notes:
            module.__dict__[name] = note
        for module, _, new in self._classes:
            module.__class__ = new
        for (i, name), key, hook in hooks:
            held = getattr(self._kept[i][0], name)
            held[key] = hook
            if name == "_forward_pre_hooks":  # they gather: before others, as they were
                held.move_to_end(key, last=False)

    def _empty(self, slot: _Slot) -> None:
        """Frees the memory of the whole parameter, but for what is not sharded."""
        if slot.owner._parameters[slot.name] is not slot.whole:
            slot.whole.grad = None
            slot.whole.data = slot.whole.data.new_empty(0)

    def undo(self) -> None:
        """The module is an ordinary one again, for good; all ranks must call. This must not be used any more."""
        from torch.distributed import _composable_state

        self._open()
        for module, *_ in self._kept:
            _composable_state._module_state_mapping.pop(module, None)
        if self._cast is not None:
            del self.module.__dict__["forward"]
            if self._cast[0] is not None:
                self.module.__dict__["forward"] = self._cast[0]
        self.units = []

    # -- checkpoints -----------------------------------------------------------------------------

    def save(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Writes this rank's shards of weights and states into a folder that all ranks share."""
        state = {
            "ranks": self.mesh.size(),
            "model": {k: _packed(v) for k, v in self.module.state_dict().items()},
            "optimizer": _packed(optimizer.state_dict()),
        }
        torch.save(state, folder / _file(dist.get_rank()))

    @torch.no_grad()
    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Reads what :meth:`save` wrote. ValueError if it is of another number of ranks."""
        file, ranks = folder / _file(dist.get_rank()), self.mesh.size()
        there = len(list(folder.glob(_file("*"))))
        if there != ranks:
            raise ValueError(
                f"{folder} is a checkpoint of {there} sharded ranks, and there are {ranks}: go on with as many"
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
        own = self.module.state_dict()
        for name, value in state["model"].items():
            held = own[name]
            local(held).copy_(value["local"] if isinstance(value, dict) else value)
        optimizer.load_state_dict(_unpacked(state["optimizer"], self.mesh))


def _file(rank: Any) -> str:
    return f"shards-{rank}.pt"


def _new(before: dict[tuple[int, str], dict[Any, Any]], after: Any) -> list[Any]:
    """(place, key, hook) of what ``after`` has and ``before`` has not."""
    return [
        (place, key, hook)
        for place, hooks in after.items()
        for key, hook in hooks.items()
        if key not in before[place]
    ]


def _check(module: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """ValueError where parameters of several dtypes train in one block, or outside of all."""
    inside: set[int] = set()
    groups = []
    for block in blocks:
        named = [p for p in block.parameters() if id(p) not in inside]
        groups.append((type(block).__name__, named))
        inside |= {id(p) for p in named}
    groups.append(("the rest", [p for p in module.parameters() if id(p) not in inside]))
    for name, parameters in groups:
        kinds = sorted({str(p.dtype)[6:] for p in parameters if p.requires_grad and p.ndim})
        if len(kinds) > 1:
            raise ValueError(
                f"FSDP2 needs one dtype of what trains in a block, got {' and '.join(kinds)} in {name}; cast the "
                "model, or run without FSDP2"
            )


def _packed(value: Any) -> Any:
    """A state with this rank's part of every DTensor in its place."""
    if hasattr(value, "to_local"):
        dims = [getattr(p, "dim", -1) for p in value.placements]
        return {"local": value.to_local().detach().clone(), "sharded": dims, "shape": list(value.shape),
                "stride": list(value.stride())}  # fmt: skip
    if isinstance(value, dict):
        return {k: _packed(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_packed(v) for v in value)
    return value.detach().clone() if isinstance(value, Tensor) else value


def _unpacked(value: Any, mesh: Any) -> Any:
    if isinstance(value, dict) and "sharded" in value:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        places = [Replicate() if d < 0 else Shard(d) for d in value["sharded"]]
        local = value["local"].to(mesh.device_type)
        return DTensor.from_local(
            local, mesh, places, run_check=False, shape=torch.Size(value["shape"]), stride=tuple(value["stride"])
        )  # fmt: skip
    if isinstance(value, dict):
        return {k: _unpacked(v, mesh) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unpacked(v, mesh) for v in value)
    return value


# -- what loops call, sharded or not -----------------------------------------------------------------


def whole(model: Any) -> Any:
    """A context in which a model that loops have prepared has all of its weights on every rank."""
    return model.whole() if isinstance(model, Sharded) else contextlib.nullcontext()


def computed(model: Any, function: Callable[..., Any], *args: Any) -> Any:
    """``function(model, *args)``; of a sharded model inside of its outermost forward."""
    return model(function, *args) if isinstance(model, Sharded) else function(model, *args)


def unsynced(accelerator: Any, model: Any) -> Any:
    """For all micro-batches but the last: DDP adds gradients up first.

    Shards are summed over ranks every time: no rank has to hold the gradient of all weights.
    """
    return contextlib.nullcontext() if isinstance(model, Sharded) else accelerator.no_sync(model)


def most(count: int, device: torch.device) -> int:
    """The largest of all ranks' counts: sharded forwards are collectives, of which ranks make equally many."""
    value = torch.tensor(count, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
