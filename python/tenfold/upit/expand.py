# SPDX-License-Identifier: Apache-2.0
"""S2: more experts than were saved, by a genetic algorithm: the two least similar are merged, again and again.

    E_new = base + alpha * drop(E_j - base) / (1 - p) + (1 - alpha) * drop(E_k - base) / (1 - p)

on the experts' weights (DARE, float32, one rounding); attention, norms and embeddings are merged with the same shares
and nothing dropped. Models are streamed: a few tensors are in memory. Every draw is a function of the seed and the
child's number, so a run that is killed and started again gives the same bits.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.merge import Checkpoint, merge_models, merge_states, model_gram
from tenfold.merge.sources import all_identical, check_alike, dtype_of
from tenfold.training.store import WorkFolder
from tenfold.upit import adapters
from tenfold.upit.config import ExpandConfig
from tenfold.upit.selection import child_seed, choose_pair, crossover, extended, similarities

State = Mapping[str, Tensor]
Progress = Callable[[str, int, int], None]  # what is made, how much is done, of how much


@dataclass(frozen=True)
class Child:
    """A merged expert: its number in the pool, its parents' numbers and shares, the seed of its drops."""

    number: int
    parents: tuple[int, int]
    alpha: float
    seed: int
    similarity: float | None

    @property
    def shares(self) -> tuple[float, float]:
        """Of the parents; they sum to 1."""
        return self.alpha, 1.0 - self.alpha


@dataclass
class Expansion:
    """The pool after expansion: saved experts, then children, and the Gram matrix that chose their parents."""

    experts: list[Any]
    children: list[Child]
    gram: Tensor | None

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        gram = None if self.gram is None else self.gram.tolist()
        return {"children": [asdict(c) for c in self.children], "gram": gram}


class Pool:
    """Experts of one kind, and how two of them are merged."""

    def __init__(self, base: Any, experts: Sequence[Any], config: ExpandConfig) -> None:
        self.base, self.experts, self.config = base, list(experts), config
        self.saved = len(self.experts)

    def gram(self, experts: Sequence[Any]) -> Tensor:
        """Of the vectors whose similarity counts, float64."""
        config = self.config
        origin = None if config.similarity == "weight_cosine" else self.base
        return model_gram(origin, experts, include=lambda name: config.experts_in in name)

    def check(self) -> None:
        """ValueError where experts do not fit together, or are all the same."""
        with contextlib.ExitStack() as stack:
            opened = [e if isinstance(e, Mapping) else stack.enter_context(Checkpoint(e))
                      for e in (self.base, *self.experts)]  # fmt: skip
            check_alike(opened, ["base", *(f"experts[{i}]" for i in range(self.saved))])
            if not any(self.config.experts_in in name for name in opened[0]):
                raise ValueError(f"no tensor has experts_in {self.config.experts_in!r} in its name")
            _check_dtypes(opened[0], opened[1:])
            if not self.config.allow_identical and self.saved > 1 and all_identical(opened[1:]):
                raise ValueError(IDENTICAL.format(count=self.saved))

    def recipe(self, child: Child, base: str, names: Sequence[str]) -> dict[str, Any]:
        """The merge of a child, for :mod:`tenfold.merge`."""
        config, part = self.config, self.config.experts_in

        def within(value: float) -> list[dict[str, Any]]:
            return [{"filter": part, "value": value}, {"value": 1.0}]

        scaled = {"inv_keep": True, "none": False}.get(config.rescale, config.rescale)
        return {
            "merge_method": "dare_linear", "base_model": base,
            "models": [{"model": n, "parameters": {"weight": w}} for n, w in zip(names, child.shares)],
            "parameters": {"density": within(1.0 - config.drop), "lambda": within(config.lambda_),
                           "normalize": False, "rescale": scaled, "seed": child.seed},
        }  # fmt: skip

    def add(self, child: Child) -> None:
        """Merges a child, as a state dict."""
        j, k = child.parents
        recipe = self.recipe(child, "base", ["j", "k"]) | _kinds(self.base, self.experts[0])
        models = {"base": self.base, "j": self.experts[j], "k": self.experts[k]}
        self.experts.append(
            merge_states(recipe, models, allow_identical=self.config.allow_identical)
        )


IDENTICAL = ("all {count} experts are identical: children would be, too, and a mixture of them is the dense model; "
             "allow_identical=True does it all the same")  # fmt: skip


class FolderPool(Pool):
    """Experts as folders; children are written beside each other."""

    def __init__(
        self, base: Any, experts: Sequence[Any], config: ExpandConfig, out: Path, progress: Progress | None
    ) -> None:  # fmt: skip
        super().__init__(str(base), [str(e) for e in experts], config)
        self.out, self.progress = out, progress

    def add(self, child: Child) -> None:
        """Merges a child into its folder; what an earlier run has finished stays."""
        folder = self.out / f"expert-{child.number:02d}"
        parents = [self.experts[i] for i in child.parents]
        with Checkpoint(self.base) as base, Checkpoint(parents[0]) as one:
            recipe = self.recipe(child, self.base, parents) | _kinds(base, one)
        named = folder / "mergekit_config.yml"
        whole = named.is_file() and not (folder / "run.json").exists()
        if not (whole and json.loads(named.read_text()) == recipe):
            if whole:
                shutil.rmtree(folder)

            def told(name: str, done: int, total: int) -> None:
                if self.progress is not None:
                    self.progress(folder.name, done, total)

            merge_models(recipe, folder, progress=told, allow_identical=self.config.allow_identical)
        self.experts.append(str(folder))


class AdapterPool(Pool):
    """LoRA adapters, which are small enough for memory. ``base``: the adapter before training, or None (zeros)."""

    def __init__(self, base: Any, experts: Sequence[Any], config: ExpandConfig, out: Path) -> None:
        super().__init__(base, [str(e) for e in experts], config)
        self.out = out
        loaded = [adapters.load_adapter(e) for e in self.experts]
        self.states: list[State] = [s for s, _ in loaded]
        self.settings = loaded[0][1]
        self.scale = adapters.scale_of(self.settings)
        for path, (_, settings) in zip(self.experts, loaded):
            if (settings["r"], adapters.scale_of(settings)) != (self.settings["r"], self.scale):
                own = adapters.scale_of(settings)
                raise ValueError(
                    f"adapters must have one rank and scale; {path} has rank {settings['r']}, scale {own}, "
                    f"{self.experts[0]} {self.settings['r']}, {self.scale}"
                )
        first = self.states[0]
        self.initial = ({n: torch.zeros_like(t) for n, t in first.items()} if base is None
                        else adapters.load_adapter(base)[0])  # fmt: skip

    def check(self) -> None:
        """As for models."""
        check_alike([self.initial, *self.states], ["the initial adapter", *self.experts])
        _check_dtypes(self.initial, self.states)
        if not self.config.allow_identical and self.saved > 1 and all_identical(self.states):
            raise ValueError(IDENTICAL.format(count=self.saved))

    def gram(self, experts: Sequence[Any]) -> Tensor:
        """Of the updates ``scale * B A``, or (weight_cosine) of the stored factors."""
        states = [self.states[self.experts.index(e)] for e in experts]
        if self.config.similarity == "weight_cosine":
            return adapters.factor_gram(states)
        return adapters.update_gram(states, [self.scale] * len(states))

    def add(self, child: Child) -> None:
        """Merges a child and writes its folder."""
        config = self.config
        made = adapters.merge_adapters(
            self.initial, [self.states[i] for i in child.parents], child.shares, how=config.lora_merge,
            scale=self.scale, drop=config.drop, rescale=config.rescale, lambda_=config.lambda_,
            seed=child.seed,
        )  # fmt: skip
        folder = adapters.save_adapter(self.out / f"expert-{child.number:02d}", made, self.settings)
        self.states.append(made)
        self.experts.append(str(folder))


def _kinds(base: State, expert: State) -> dict[str, str]:
    """Arithmetic and output dtype, where the experts' is not that of the base."""
    for name in sorted(expert):
        own, theirs = dtype_of(base, name), dtype_of(expert, name)
        if theirs.is_floating_point and own != theirs:
            return {"dtype": "float32", "out_dtype": str(theirs)[6:]}
    return {}


def _check_dtypes(base: State, experts: Sequence[State]) -> None:
    mixed = sorted(n for n in base if len({dtype_of(e, n) for e in experts}) > 1)
    if mixed:
        raise ValueError(f"the experts have different dtypes at {', '.join(mixed[:3])}")
    narrow = (torch.float16, torch.bfloat16)
    for name in sorted(base):
        own, theirs = dtype_of(base, name), dtype_of(experts[0], name)
        if own != theirs and own in narrow and theirs in narrow:
            warnings.warn(
                f"the experts are {str(theirs)[6:]} and the base is {str(own)[6:]}: merged in float32, "
                "written in the dtype of the experts",
                stacklevel=4,
            )
            return


def grow(
    pool: Pool,
    to: int,
    children: list[Child],
    gram: Tensor | None,
    keep: Callable[[list[Child], Tensor | None], None] = lambda children, gram: None,
) -> Expansion:
    """Adds children to a pool until it has ``to`` experts; ``keep`` is told after each."""
    config = pool.config
    blind = config.similarity == "none"
    for child in children:  # an earlier run's
        pool.add(child)
    if gram is None and not blind and to > pool.saved:
        gram = pool.gram(pool.experts)
        keep(children, gram)
    while len(pool.experts) < to:
        number = len(pool.experts)
        pair = choose_pair(
            gram, similarity=config.similarity, policy=config.policy, originals=pool.saved,
            used=[c.parents for c in children], count=number, seed=config.seed,
        )  # fmt: skip
        alike = None if gram is None else similarities(gram, config.similarity)[pair[0]][pair[1]]
        child = Child(number, pair, crossover(number, config.seed, config.alpha),
                      child_seed(number, config.seed), alike)  # fmt: skip
        pool.add(child)
        children.append(child)
        if gram is not None:
            # One pass over the pool; of all products, the new row is kept.
            gram = extended(gram, pool.gram(pool.experts)[-1])
        keep(children, gram)
    return Expansion(list(pool.experts), children, gram)


def _fingerprint(path: Any) -> list[Any]:
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    return [
        str(folder.resolve()),
        [[f.name, s.st_size, s.st_mtime_ns] for f in files for s in [f.stat()]],
    ]


@torch.no_grad()
def expand(
    base: str | Path | State | None,
    experts: Sequence[str | Path | State],
    out: str | Path | None = None,
    config: ExpandConfig | None = None,
    *,
    progress: Progress | None = None,
    **changes: Any,
) -> Expansion:
    """Merges experts into ``config.to`` of them.

    Args:
        base: what they were tuned from: a folder with safetensors, or a state dict. Of LoRA experts the adapter before
            training (its B is 0); None: zeros.
        experts: folders of models, of PEFT adapters, or state dicts (the children are state dicts, then).
        out: folder of the children, ``expert-NN``; a run that was killed goes on there with the same call.
        config: settings; ``changes`` are fields of it. progress: told how many bytes of a child are written.

    Returns:
        All experts, saved ones first, and how children were made.

    Raises:
        ValueError: fewer experts wanted than given (both numbers), experts that do not fit together (the first three
            tensors), identical experts, a folder of another run. TypeError: quantised experts.
    """
    config = replace(config or ExpandConfig(), **changes)
    to = config.to or len(experts)
    if to < 2 or to < len(experts):
        raise ValueError(
            f"to must be at least 2 and the number of experts, got {to} and {len(experts)}"
        )
    if len(experts) < 2 and to > len(experts):
        raise ValueError(f"merging {to} experts needs two parents, got {len(experts)}")
    if any(isinstance(e, Mapping) for e in experts):
        if base is None:
            raise ValueError("experts that are state dicts need the base's")
        pool = Pool(base, experts, config)
        pool.check()
        return grow(pool, to, [], None)
    if out is None:
        raise ValueError("children of experts in folders need the folder out")
    work = WorkFolder(out)
    lora = [adapters.is_adapter(e) for e in experts]
    if any(lora) and not all(lora):
        raise ValueError("experts must all be models or all be LoRA adapters")
    if base is None and not any(lora):
        raise ValueError("experts need the base that they were tuned from")
    pool = (AdapterPool(base, experts, config, work.path) if all(lora)
            else FolderPool(base, experts, config, work.path, progress))  # fmt: skip
    pool.check()
    inputs = [_fingerprint(p) for p in (base, *experts) if p is not None]
    work.claim({"config": asdict(config), "inputs": inputs})
    found = work.load("expand") or {"children": [], "gram": None}
    children = [Child(**(c | {"parents": tuple(c["parents"])})) for c in found["children"]]
    gram = None if found["gram"] is None else torch.tensor(found["gram"], dtype=torch.float64)

    def keep(made: list[Child], grown: Tensor | None) -> None:
        work.save("expand", Expansion([], made, grown).to_json())

    return grow(pool, to, children, gram, keep)
