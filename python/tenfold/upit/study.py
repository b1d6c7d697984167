# SPDX-License-Identifier: Apache-2.0
"""UpIT against what else the same data could have been spent on, from one dense run: for the demo and the study.

All start from the dense model after S1 (or its checkpoints) and take the same post-training steps on the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tenfold.data.models import quiet_transformers
from tenfold.training.checks import one_of
from tenfold.training.loop import Progress
from tenfold.upit.families import Families, family_losses
from tenfold.upit.options import AssemblyConfig
from tenfold.upit.pipeline import Pipeline

# What is compared: name in tables.
METHODS = {
    "dense": "dense, tuned on",
    "vanilla": "vanilla upcycling",
    "btx": "UpIT's experts, random routers",
    "upit": "UpIT",
}
BASE, TUNED = "base", "dense after S1"


@dataclass
class Comparison:
    """What :func:`compare` found: losses by model and family (nats per answer token), and the mixtures' routing.

    ``load`` [L][n] and ``affinity`` [L][families][n] by method, ``curves`` of post-training, ``seconds`` by method.
    """

    families: list[str]
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    affinity: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields; of curves the losses, of stages what is not in files."""
        kept = {s: {k: v for k, v in f.items() if k not in ("curve", "buckets", "config")}
                for s, f in self.stages.items()}  # fmt: skip
        curves = {n: [{k: round(m[k], 5) for k in ("lm_loss", "balance") if k in m} for m in c]
                  for n, c in self.curves.items()}  # fmt: skip
        return vars(self) | {"stages": kept, "curves": curves}


def compare(
    recipe: Mapping[str, Any],
    out: str | Path,
    *,
    methods: Sequence[str] = tuple(METHODS),
    model: Any = None,
    tokenizer: Any = None,
    data: Families | None = None,
    device: str = "cpu",
    step: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Runs UpIT in the folder ``out`` and the other methods beside it; what is finished there is not repeated.

    Args:
        recipe, model, tokenizer, data, device: of :class:`tenfold.upit.pipeline.Pipeline`.
        methods: of ``METHODS``. step: told after every training step.

    Raises:
        ValueError: an unknown method; upcycling of whole models beside LoRA experts.
    """
    from tenfold.upit.baselines import continue_dense
    from tenfold.upit.measure import affinity, expert_load
    from tenfold.upit.post_train import post_train

    for name in methods:
        one_of("methods", name, tuple(METHODS))

    def told(progress: Progress) -> None:
        loss = progress.metrics.get("lm_loss", progress.metrics["loss"])
        step(f"{progress.stage}: loss {loss:.2f}")

    run = Pipeline(
        recipe, out, model=model, tokenizer=tokenizer, data=data, device=device, callback=told
    )
    if run.lora and set(methods) & {"vanilla", "btx"}:
        raise ValueError("vanilla and btx upcycle whole models; compare LoRA experts with dense")
    found = Comparison(list(run.data.names))

    def judged(name: str, network: Any) -> None:
        found.losses[name] = family_losses(network, run.data.tests)

    run.run("collect")
    experts = run.found("collect")["experts"]
    judged(BASE, run.expert(run.base()))
    judged(TUNED, run.expert(experts[-1]))
    settings = run.config.post
    assembly = replace(run.config.assembly, aux_coef=settings.aux_coef)
    for name in methods:
        start, title = time.perf_counter(), METHODS[name]
        work = run.out / name
        if name == "upit":
            found.stages = run.run("post-train")
            made_here = found.stages["post-train"]
            tuned, curve = run.mixture(made_here["model"]), made_here["curve"]
        else:
            source: Any = experts[-1]
            if name != "dense":
                source = work / "moe"
                if not (source / "config.json").is_file():
                    pool = run.run("expand")["expand"]["experts"] if name == "btx" else experts
                    _assembled(name, pool, source, run.config.num_experts, assembly)
            train = continue_dense if name == "dense" else post_train
            read = run.expert if name == "dense" else run.mixture
            with quiet_transformers():
                made = train(
                    read(source), run.data.train, config=settings, out=work / "tuned", callback=told
                )
            tuned = made.model if made.model is not None else read(work / "tuned")
            curve = made.curve
        judged(title, tuned)
        found.curves[title], found.seconds[title] = curve, time.perf_counter() - start
        if name != "dense":
            load = expert_load(tuned, _some(run.data.train, 256))
            found.load[title] = load.tolist()
            found.affinity[title] = affinity(tuned, run.data.tests).tolist()
        del tuned
    return found


def _assembled(
    name: str, experts: list[str], out: Path, count: int, config: AssemblyConfig
) -> None:
    from tenfold.upit.baselines import btx, upcycle

    if name == "vanilla":
        upcycle(experts[-1], out, experts=count, config=config)
    else:
        btx(experts, out, config=config)


def _some(rows: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """At most about so many rows, evenly spaced."""
    step = max(1, len(rows["input_ids"]) // count)
    return {k: v[::step] for k, v in rows.items()}
