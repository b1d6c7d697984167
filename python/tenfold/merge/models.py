# SPDX-License-Identifier: Apache-2.0
"""The merge of whole models, tensor by tensor, in the order of their names."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold._load import call
from tenfold.merge.checkpoint import Checkpoint, Planned, Progress, write_shards
from tenfold.merge.recipe import Recipe, load_recipe
from tenfold.merge.sources import (
    State,
    all_identical,
    check_alike,
    dtype_of,
    release,
    same_bytes,
    shape_of,
    work_dtypes,
)
from tenfold.reference.random import name_stream
from tenfold.training.store import WorkFolder, write_text

_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
_FIRST = ("embed", "wte", "wpe")  # in the names of what comes before the layers
_COPIED = (".json", ".txt", ".model", ".jinja")
_RECIPE = "mergekit_config.yml"
_RUN = "run.json"


class Depths:
    """Where the tensors of a model lie, from 0 (first layer, embeddings) to 1 (last layer, and the head)."""

    def __init__(self, names: Iterable[str]) -> None:
        found = [int(m[1]) for n in names if (m := _LAYER.search(n))]
        self.last = max(found, default=0)

    def __call__(self, name: str) -> float:
        """Of one tensor."""
        layer = _LAYER.search(name)
        if layer:
            return int(layer[1]) / max(1, self.last)
        return 0.0 if any(part in name for part in _FIRST) else 1.0


class Merge:
    """A recipe with its models: what it makes, and each tensor of that."""

    def __init__(
        self, recipe: Recipe, base: State | None, experts: Sequence[State], allow_identical: bool
    ) -> None:
        self.recipe, self.base, self.experts = recipe, base, list(experts)
        states: list[State] = [*self.experts] if base is None else [base, *self.experts]
        labels = [s.model for s in recipe.models]
        check_alike(states, labels if base is None else [f"base_model {recipe.base}", *labels])
        self.states = states
        self.dtypes = work_dtypes(base, self.experts, recipe.dtype)
        self.depth = Depths(experts[0])
        if len(experts) > 1 and not allow_identical and all_identical(self.experts):
            raise ValueError(
                f"all models are identical ({', '.join(labels[:3])}): merging them gives the same model; "
                "allow_identical=True does it all the same"
            )
        for name in experts[0]:
            self.settings(name)  # a missing weight shows now, not after an hour
        most = max((torch.Size(shape_of(states[0], n)).numel() * d.itemsize
                    for n, (d, _) in self.dtypes.items()), default=0)  # fmt: skip
        self._buffer = torch.empty(most, dtype=torch.uint8)

    def planned(self) -> list[Planned]:
        """All tensors, by name."""
        return [
            Planned(n, self._written(n), shape_of(self.states[0], n)) for n in sorted(self.dtypes)
        ]

    def _written(self, name: str) -> torch.dtype:
        dtype = self.dtypes[name][1]
        return self.recipe.out_dtype or dtype if dtype.is_floating_point else dtype

    def settings(self, name: str) -> dict[str, Any]:
        """The parameters of a tensor's merge."""
        r, depth = self.recipe, self.depth(name)

        def each(key: str) -> list[float]:
            return [float(r.value(key, name, depth, s)) for s in r.models]

        def of_all(key: str) -> Any:
            return r.value(key, name, depth)

        if r.method == "slerp":
            return {"t": float(of_all("t"))}
        made: dict[str, Any] = {"weights": each("weight"), "normalize": bool(of_all("normalize"))}
        if r.method != "linear":
            made["lambda_"] = float(of_all("lambda"))
        if r.method == "ties":
            made["density"] = each("density")
        if r.method.startswith("dare"):
            density = each("density")
            wrong = [d for d in density if not 0 < d <= 1]
            if wrong:
                raise ValueError(
                    f"recipe: density must be in (0, 1] for {r.method}, got {wrong[0]}"
                )
            scaled = of_all("rescale")
            made["drop"] = [1 - d for d in density]
            made["seed"] = int(of_all("seed"))
            made["rescale"] = (
                scaled if isinstance(scaled, str) else ("inv_keep" if scaled else "none")
            )
        return made

    def tensor(self, name: str) -> Tensor:
        """The merged tensor; valid until the next one."""
        dtype = self.dtypes[name][0]
        if not dtype.is_floating_point:
            return self._copied(name)
        shape = shape_of(self.states[0], name)
        count = torch.Size(shape).numel() * dtype.itemsize
        out = self._buffer[:count].view(dtype).view(shape)
        experts = [e[name].to(dtype) for e in self.experts]
        base = None if self.base is None else self.base[name].to(dtype)
        self._merge(out, name, base, experts)
        del experts, base
        release(self.states, name)
        return out.to(self._written(name))

    def _copied(self, name: str) -> Tensor:
        first = self.states[0][name]
        if not all(same_bytes(first, s[name]) for s in self.states[1:]):
            raise ValueError(f"{name} ({first.dtype}) is no weight and differs between the models")
        return first.contiguous()

    def _merge(self, out: Tensor, name: str, base: Tensor | None, experts: list[Tensor]) -> None:
        method, set_to = self.recipe.method, self.settings(name)
        if method == "linear":
            ops.linear_merge_(out, experts, **set_to)
        elif method == "slerp":
            # A base that is one of the two only says which is the first.
            apart = self.recipe.base not in (None, *(s.model for s in self.recipe.models))
            ops.slerp_merge_(out, *experts, base=base if apart else None, **set_to)
        else:
            assert base is not None  # load_recipe saw to it
            weights = set_to.pop("weights")
            if method == "ties":
                ops.ties_merge_(out, base, experts, weights, **set_to)
                return
            drop, seed = set_to.pop("drop", [0.0] * len(experts)), set_to.pop("seed", 0)
            call(torch.ops.tenfold.dare_merge_, out, base, experts, weights, drop, seed,
                 name_stream(name), elect_sign=method == "dare_ties", **set_to)  # fmt: skip


@torch.no_grad()
def merge_states(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    models: Mapping[str, State],
    *,
    allow_identical: bool = False,
) -> dict[str, Tensor]:
    """Merges state dicts; ``models`` has those that the recipe names.

    Raises:
        KeyError: a model is not there. ValueError, TypeError: as :func:`merge_models`.
    """
    made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    base = None if made.base is None else models[made.base]
    merge = Merge(made, base, [models[s.model] for s in made.models], allow_identical)
    return {p.name: merge.tensor(p.name).clone() for p in merge.planned()}


def _identity(recipe: Recipe, inputs: Sequence[Checkpoint], most: int) -> dict[str, Any]:
    files = {
        str(c.path.resolve()): [[f.name, s.st_size, s.st_mtime_ns]
                                for f in c.files() for s in [f.stat()]] for c in inputs
    }  # fmt: skip
    return {"recipe": dict(recipe.source), "inputs": files, "max_shard_bytes": most}


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _copy_small_files(source: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Configuration and tokenizer, with the dtype that was written."""
    for file in sorted(source.iterdir() if source.is_dir() else []):
        if file.suffix in _COPIED and not file.name.endswith((".index.json", _RUN)):
            shutil.copyfile(file, out / file.name)
    config = _config(source)
    if config and dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        write_text(
            out / "config.json", json.dumps({**config, key: str(dtype)[6:]}, indent=2) + "\n"
        )


@torch.no_grad()
def merge_models(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    allow_identical: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Merges model folders into the folder ``out``, which ``from_pretrained`` loads.

    One tensor of each model is in use at a time. Shards appear when they are complete; a merge that was interrupted
    and is started again goes on after them. Configuration and tokenizer come from base_model (without one: from the
    first model). Random drops depend on the recipe's seed and a tensor's name only.

    Args:
        recipe: see :mod:`tenfold.merge.recipe`. Models are local folders.
        max_shard_bytes: size of an output file, but for a larger tensor.
        progress: called after every tensor with its name, the bytes done, and those in all.

    Returns:
        ``out``.

    Raises:
        ValueError: the recipe; models with other tensors, shapes or dtypes (the first three are named); identical
            models; ``out`` holds another model, or an unfinished merge of something else. TypeError: quantised models.
            FileNotFoundError: no model there.
    """
    made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path(out).expanduser()
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    if not (folder / _RUN).exists() and any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds a model already; give another folder, or remove it")
    with contextlib.ExitStack() as stack:
        paths = [made.base, *(s.model for s in made.models)]
        opened = {p: stack.enter_context(Checkpoint(p)) for p in paths if p is not None}
        for source in opened.values():
            if folder.resolve() == source.path.resolve():
                raise ValueError(f"out must not be one of the models, got {folder}")
            if "quantization_config" in _config(source.path):
                raise TypeError(f"{source.path} is quantised (its config.json has quantization_config); "
                                "dequantise it first")  # fmt: skip
        base = None if made.base is None else opened[made.base]
        merge = Merge(made, base, [opened[s.model] for s in made.models], allow_identical)
        work = WorkFolder(folder)
        work.claim(_identity(made, list(opened.values()), max_shard_bytes))
        planned = merge.planned()
        write_shards(
            folder, planned, max_shard_bytes, lambda tensor: merge.tensor(tensor.name), progress
        )
        written = {t.dtype for t in planned if t.dtype.is_floating_point}
        first = base if base is not None else opened[made.models[0].model]
        _copy_small_files(first.path, folder, written.pop() if len(written) == 1 else None)
        write_text(folder / _RECIPE, json.dumps(dict(made.source), indent=2) + "\n")  # JSON is YAML
        work.release()
    return folder


def _opened(stack: contextlib.ExitStack, model: State | str | Path) -> State:
    return stack.enter_context(Checkpoint(model)) if isinstance(model, str | Path) else model


@torch.no_grad()
def model_gram(
    base: State | str | Path | None,
    experts: Sequence[State | str | Path],
    *,
    include: Callable[[str], bool] | None = None,
) -> Tensor:
    """Inner products of the task vectors of whole models, in one pass: float64 [m, m].

    Args:
        base, experts: folders or state dicts; without base, products of the weights themselves.
        include: by its name, does a tensor count; default: all of floating point.

    Raises:
        ValueError: other tensors or shapes. TypeError: quantised models. FileNotFoundError: no model there.
    """
    with contextlib.ExitStack() as stack:
        states = [_opened(stack, e) for e in experts]
        origin = None if base is None else _opened(stack, base)
        every = states if origin is None else [origin, *states]
        labels = [f"experts[{i}]" for i in range(len(states))]
        check_alike(every, labels if origin is None else ["base", *labels])
        gram = torch.zeros(len(states), len(states), dtype=torch.float64)
        for name in sorted(states[0]):
            kinds = {dtype_of(s, name) for s in every}
            if not any(k.is_floating_point for k in kinds) or (include and not include(name)):
                continue
            dtype = kinds.pop() if len(kinds) == 1 else torch.float32
            dtype = torch.float32 if dtype == torch.float64 else dtype
            ops.delta_gram_(
                gram,
                None if origin is None else origin[name].to(dtype),
                [s[name].to(dtype) for s in states],
            )
            release(every, name)
        return gram
