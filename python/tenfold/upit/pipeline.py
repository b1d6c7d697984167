# SPDX-License-Identifier: Apache-2.0
"""UpIT end to end in one folder: a finished stage is not repeated, an interrupted one goes on where it was.

    base/             the dense model that everything starts from
    collect/          S1: checkpoint-STEP
    expand/           S2: expert-NN, the merged ones
    seeds/            S3: the loss of every sample under every expert
    route/            S4: router-NN, and the experts that were trained with them
    moe/              S5: the mixture, a stock Mixtral (LoRA experts: the dense model and its adapters)
    tuned/            S6: the same after post-training
    report/           losses by family, load and affinity of the experts
    stages/           STAGE.json: what each stage found; written when it is complete

With several processes (torchrun) tuning is data-parallel, experts are scored and routers trained side by side, and the
first process does the rest.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tenfold.data.models import quiet_transformers
from tenfold.training.batches import sample_digest
from tenfold.training.loop import Callback
from tenfold.training.store import WorkFolder
from tenfold.upit.checkpoints import full_state, load_expert, save_dense
from tenfold.upit.families import Families, load_families
from tenfold.upit.recipe import DataSpec, Recipe, load_recipe
from tenfold.upit.stages import ALONE, STAGES

Tell = Callable[[str, str], None]  # stage, what it found


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a recipe has."""
    left_out = set()
    if recipe.gate_mode != "seed":
        left_out.add("seeds")
    if not recipe.post or recipe.data is None:
        left_out.add("post-train")
    if recipe.data is None:
        left_out.add("report")
    return tuple(s for s in STAGES if s not in left_out)


class Pipeline:
    """One run of a recipe in a folder.

    Args:
        recipe: a recipe, its file, or its fields. out: the run's folder.
        model, tokenizer, data: instead of what the recipe names.
        device: of the models. quiet: no progress bars. tell: told what a finished stage found.
        callback: told after every training step.

    Raises:
        ValueError: the recipe; no data where routers or the model are to be trained; a folder of another run.
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, Any] | str | Path,
        out: str | Path,
        *,
        model: Any = None,
        tokenizer: Any = None,
        data: Families | None = None,
        device: str | torch.device = "cpu",
        quiet: bool = True,
        tell: Tell = lambda stage, text: None,
        callback: Callback | None = None,
    ) -> None:
        made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        if data is not None and made.data is None:
            made = replace(made, data=DataSpec())
        self.recipe, self.config, self.out = made, made.config, Path(out)
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device, self.quiet = torch.device(device), quiet or not self.main
        self.tell, self.callback = tell, callback
        if made.data is None and (made.gate_mode == "seed" or not made.experts):
            what = "gate_mode 'seed'" if made.experts else "tuning a dense model"
            raise ValueError(f"recipe: {what} needs data (tasks or files)")
        self._model, self._tokenizer, self._data = model, tokenizer, data
        self.work = WorkFolder(self.out / "stages", self.main)
        self.stages = stages_of(made)

    def claim(self) -> None:
        """Makes the folder this run's."""
        digest = None
        if self.recipe.data is not None:
            made = hashlib.sha256()
            for value in self.data.train.values():
                sample_digest(value, made)
            digest = made.hexdigest()[:16]
        source = {k: v for k, v in self.recipe.source.items() if k not in ("data",)}
        self.work.claim({"recipe": source, "settings": self.config.to_json(), "data": digest})
        self.wait(self.work.path / "run.json")

    def wait(self, *files: Path) -> None:
        """Until other processes have written these files."""
        while not all(f.exists() for f in files):
            time.sleep(0.05)

    # What stages share.

    @property
    def lora(self) -> bool:
        """Are experts LoRA adapters?"""
        return self.config.variant == "lora"

    @property
    def tokenizer(self) -> Any:
        """Of the base model."""
        if self._tokenizer is None:
            self._load()
        return self._tokenizer

    @property
    def tokenizer_if_any(self) -> Any:
        """Likewise, None where the caller's model and data came without one."""
        return self._tokenizer if self._model is not None else self.tokenizer

    @property
    def data(self) -> Families:
        """Training and test rows."""
        if self._data is None:
            assert self.recipe.data is not None
            tokenizer = self.tokenizer
            from tenfold.training.tasks import encoder

            end = tokenizer.eos_token_id
            self._data = load_families(
                self.recipe.data, encoder(tokenizer), self.config.collect.sequence_length, end, end or 0,
                self.config.seed,
            )  # fmt: skip
        return self._data

    def _load(self) -> None:
        from tenfold.data import load_model

        model, tokenizer = load_model(self.recipe.base)
        self._model = self._model or model
        self._tokenizer = self._tokenizer or tokenizer

    def base(self) -> Path:
        """The folder of the dense model."""
        named, folder = Path(self.recipe.base).expanduser(), self.out / "base"
        if self.recipe.experts and self._model is None and named.is_dir():
            return named
        if self.main and not folder.is_dir():
            if self._model is None:
                self._load()
            model = self._model
            self.out.mkdir(parents=True, exist_ok=True)
            save_dense(
                model, full_state(model, next(model.parameters()).dtype), folder, self._tokenizer
            )
        self.wait(folder)
        return folder

    def expert(self, path: Any) -> Any:
        """An expert as a dense model on this process's device."""
        return load_expert(path, self.base(), torch.float32, self.device)

    def found(self, stage: str) -> Any:
        """What a finished stage found."""
        return self.work.load(stage)

    def mine(self, number: int) -> bool:
        """Is an expert this process's?"""
        return number % self.ranks == self.rank

    def mixture(self, folder: str | Path) -> Any:
        """A mixture of this run, loaded in float32."""
        from tenfold.upit.loading import load
        from tenfold.upit.lora_model import load_lora_experts

        if self.lora:
            return load_lora_experts(self.expert(self.base()), folder)
        with quiet_transformers():
            return load(folder, dtype=torch.float32).to(self.device).eval()

    # Running.

    def run(self, until: str | None = None) -> dict[str, Any]:
        """Runs all stages up to ``until`` that are not finished; returns what each found."""
        until = until or self.stages[-1]
        if until not in self.stages:
            raise ValueError(f"this recipe has no stage {until!r}; it has {', '.join(self.stages)}")
        self.claim()
        for stage in self.stages[: self.stages.index(until) + 1]:
            if self.found(stage) is not None:
                continue
            if self.main or stage not in ALONE:
                with quiet_transformers():  # there are bars already
                    made = STAGES[stage](self)
                self.work.save(stage, made)
                if self.main:
                    self.tell(stage, _said(stage, made))
            self.wait(self.work.path / f"{stage}.json")
        return {s: self.found(s) for s in self.stages if self.found(s) is not None}


def _said(stage: str, found: dict[str, Any]) -> str:
    """A finished stage in a few words."""
    if stage == "collect":
        return f"{len(found['experts'])} of {len(found['checkpoints'])} checkpoints are experts"
    if stage == "expand":
        return f"{len(found['children'])} experts merged, {len(found['experts'])} in all"
    if stage == "seeds":
        return f"{found['samples']} samples in buckets of {', '.join(str(len(b)) for b in found['buckets'])}"
    if stage == "route":
        return f"routers of {len(found['experts'])} experts"
    return str(found.get("page") or found.get("model", ""))


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    until: str | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Runs a recipe in a folder, up to the stage ``until``; arguments are those of :class:`Pipeline`.

    Returns:
        What each stage found, by name: paths, buckets, losses.
    """
    return Pipeline(recipe, out, **kwargs).run(until)
