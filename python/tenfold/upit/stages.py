# SPDX-License-Identifier: Apache-2.0
"""The stages of a run, as functions of it: each returns what it found, as JSON can hold it.

What they need of each other they read in the run's folder, so that any of them can be the first of a process.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tenfold.merge import Checkpoint
from tenfold.training.loop import Metrics, Progress, progress_bar
from tenfold.training.store import WorkFolder
from tenfold.upit import collect as tuning
from tenfold.upit.adapters import load_adapter, save_adapter, scale_of
from tenfold.upit.checkpoints import full_state, pick_checkpoints, save_dense
from tenfold.upit.expand import Child
from tenfold.upit.expand import expand as merge_experts
from tenfold.upit.families import shares
from tenfold.upit.gates import prompt_gates, random_gates
from tenfold.upit.recipe import PROMPTED
from tenfold.upit.seeds import assign_buckets, mean_nll, sample_rows, select

if TYPE_CHECKING:
    from tenfold.upit.pipeline import Pipeline

Found = dict[str, Any]


def collect(run: Pipeline) -> Found:
    """S1: tunes, or takes what is there."""
    config, recipe, base = run.config, run.recipe, run.base()
    folder, initial = run.out / "collect", None
    if recipe.experts:
        every = [Path(s.model).expanduser() for s in recipe.experts]
        absent = [str(p) for p in every if not p.is_dir()]
        if absent:
            raise FileNotFoundError(f"no expert's folder at {absent[0]!r}")
    else:
        every = tuning.collect(
            run.expert(base), run.data.train, folder, config.collect, tokenizer=run.tokenizer_if_any,
            lora=config.lora if run.lora else None, callback=run.callback, quiet=run.quiet,
        )  # fmt: skip
        initial = str(folder / tuning.INITIAL) if run.lora else None
    chosen = pick_checkpoints(every, config.num_experts, config.collect.pick, config.collect.keep)
    return {"base": str(base), "initial": initial, "checkpoints": [str(p) for p in every],
            "experts": [str(p) for p in chosen]}  # fmt: skip


def expand(run: Pipeline) -> Found:
    """S2: merges saved experts until there are n."""
    before, config = run.found("collect"), run.config
    with progress_bar("expand", 100, 0, not run.quiet) as advance:
        shown = 0

        def told(name: str, done: int, total: int) -> None:
            nonlocal shown
            while shown < 100 * done // max(1, total):
                advance({})
                shown += 1
            shown = 0 if done == total else shown

        made = merge_experts(
            before["initial"] if run.lora else before["base"], before["experts"], run.out / "expand",
            replace(config.expand, to=config.num_experts), progress=told,
        )  # fmt: skip
    experts = [str(e) for e in made.experts]
    return made.to_json() | {"experts": experts, "saved": len(before["experts"])}


def seeds(run: Pipeline) -> Found:
    """S3: scores a sample of the data under every expert, and deals it out."""
    config, experts, data = run.config.seeds, run.found("expand")["experts"], run.data
    index = sample_rows(data.train["labels"], config.fraction, config.seed)
    rows, folder = select(data.train, index), WorkFolder(run.out / "seeds")
    names = [f"nll-{i:02d}" for i in range(len(experts))]
    with progress_bar("seeds", len(experts), 0, not run.quiet) as advance:
        for i, name in enumerate(names):
            if run.mine(i) and folder.load(name) is None:
                folder.save(
                    name, mean_nll(run.expert(experts[i]), rows, config.batch_size).tolist()
                )
            advance({})
    run.wait(*(folder.path / f"{n}.json" for n in names))
    nll = torch.tensor([folder.load(n) for n in names], dtype=torch.float32).T
    buckets = assign_buckets(nll, config.assign, config.min_bucket, config.capacity, config.seed)
    chosen = [[index[r] for r in bucket] for bucket in buckets]
    families = [shares(data.family, c, len(data.names)) for c in chosen]
    return {"samples": len(index), "buckets": chosen, "families": families,
            "mean_nll": nll.mean(0).tolist()}  # fmt: skip


def route(run: Pipeline) -> Found:
    """S4: a routing vector for every expert and layer."""
    experts, folder = run.found("expand")["experts"], WorkFolder(run.out / "route")
    vectors = str(folder.path / "routers.safetensors")
    if run.recipe.gate_mode != "seed":
        if run.main:
            folder.save("routers", {}, {"routers": _gates(run, len(experts))})
        run.wait(folder.path / "routers.json")
        return {"routers": vectors, "experts": experts}
    names = [f"router-{i:02d}" for i in range(len(experts))]
    for i, name in enumerate(names):
        if run.mine(i) and folder.load(name) is None:
            folder.save(name, *_routed(run, i, experts[i], folder.path))
    run.wait(*(folder.path / f"{n}.json" for n in names))
    rows = torch.stack([folder.load_tensors(n)["router"] for n in names])
    if run.main:
        folder.save("routers", {}, {"routers": rows})
    run.wait(folder.path / "routers.json")
    results = [folder.load(n) or {} for n in names]
    return {"routers": vectors, "experts": [r["expert"] for r in results],
            "curves": [r["curve"] for r in results], "norms": rows.norm(dim=-1).mean(1).tolist()}  # fmt: skip


def _routed(run: Pipeline, i: int, path: str, out: Path) -> tuple[Found, dict[str, Tensor]]:
    from tenfold.upit.router import equal_steps, train_router

    settings, rows, buckets = run.config.router, run.data.train, run.found("seeds")["buckets"]
    others = [r for j, b in enumerate(buckets) if j != i for r in b]
    model, curve = run.expert(path), list[Metrics]()

    def told(progress: Progress) -> None:
        curve.append(progress.metrics)
        if run.callback is not None:
            run.callback(progress)

    vectors, trained = train_router(
        model, select(rows, buckets[i]), config=settings, seed=run.config.seed * 1009 + i,
        steps=equal_steps([len(b) for b in buckets], settings), quiet=run.quiet, callback=told,
        negatives=select(rows, others) if settings.negatives else None,
    )  # fmt: skip
    if trained is not None:
        path = _saved(run, model, path, out / f"expert-{i:02d}")
    return {"expert": path, "curve": [curve[0], curve[-1]]}, {"router": vectors}


def _saved(run: Pipeline, model: Any, source: str, folder: Path) -> str:
    """An expert as it is after its router's training, in the dtype that it had."""
    shutil.rmtree(folder, ignore_errors=True)
    if run.lora:
        old, settings = load_adapter(source)
        temporary = folder.with_name(f".{folder.name}.peft")
        model.save_pretrained(temporary)
        state, _ = load_adapter(temporary)
        shutil.rmtree(temporary)
        save_adapter(folder, {n: t.to(old[n].dtype) for n, t in state.items()}, settings)
    else:
        with Checkpoint(source) as held:
            kinds = [held.dtype(n) for n in held]
        dtype = next(k for k in kinds if k is not None and k.is_floating_point)
        save_dense(model, full_state(model, dtype), folder, run.tokenizer_if_any)
    return str(folder)


def _gates(run: Pipeline, count: int) -> Tensor:
    recipe, config = run.recipe, run.config
    model = run.expert(run.base())
    if recipe.gate_mode not in PROMPTED:
        size = model.config
        return random_gates(
            count, size.num_hidden_layers, size.hidden_size, recipe.gate_mode, config.seed
        )
    kept = run.found("collect")["experts"]
    sources = [s for p in kept for s in recipe.experts if str(Path(s.model).expanduser()) == p]
    children = [
        Child(**(c | {"parents": tuple(c["parents"])})) for c in run.found("expand")["children"]
    ]
    return prompt_gates(model, run.tokenizer, sources, recipe.gate_mode, children)


def assemble(run: Pipeline) -> Found:
    """S5: the mixture."""
    from safetensors.torch import load_file

    found, config, out = run.found("route"), run.config, run.out / "moe"
    routers = load_file(found["routers"])["routers"]
    if run.lora:
        from tenfold.upit.lora_model import add_lora_experts, save_lora_experts

        loaded = [load_adapter(e) for e in found["experts"]]
        rank = loaded[0][1]["r"]
        settings = replace(config.lora, rank=rank, alpha=rank * scale_of(loaded[0][1]))
        model = add_lora_experts(
            run.expert(run.base()), settings, adapters=[state for state, _ in loaded],
            routers=routers if settings.routing == "block" else None,
        )  # fmt: skip
        save_lora_experts(model, out)
        return {"model": str(out), "settings": asdict(settings)}
    from tenfold.upit.assemble import assemble as write_mixture

    assembly = replace(
        config.assembly, saved=run.found("expand")["saved"], aux_coef=config.post.aux_coef
    )
    base = run.base() if assembly.rest == "base" else None
    write_mixture(found["experts"], routers, out, config=assembly, base=base)
    return {"model": str(out), "settings": asdict(assembly)}


def post_train(run: Pipeline) -> Found:
    """S6: trains the mixture on the same data."""
    from tenfold.upit.post_train import post_train as train

    out = run.out / "tuned"
    made = train(run.mixture(run.found("assemble")["model"]), run.data.train, config=run.config.post, out=out,
                 callback=run.callback, quiet=run.quiet)  # fmt: skip
    if run.main and hasattr(run.tokenizer_if_any, "save_pretrained"):
        run.tokenizer_if_any.save_pretrained(out)
    return made.to_json() | {"model": str(out)}


def report(run: Pipeline) -> Found:
    """Losses by family, load and affinity of the experts."""
    from tenfold.upit.summary import summarize

    return summarize(run)


# By name, in their order. Those that only the first of several processes runs:
STAGES = {"collect": collect, "expand": expand, "seeds": seeds, "route": route, "assemble": assemble,
          "post-train": post_train, "report": report}  # fmt: skip
ALONE = ("expand", "assemble", "report")
