# SPDX-License-Identifier: Apache-2.0
"""UpIT on a byte-level model that is trained here: four experts, two per token, against two others, in two minutes.

A small Llama over bytes learns Python's documentation, then four families of questions and answers. Three checkpoints
of that tuning and one merged from them become the experts. One seed and few steps: a demo, not a study;
docs/methods/upit.md has one.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.data.models import quiet_transformers
from tenfold.report import Card, Headline, Page, Speedup, TextTable, png_bytes, speedup
from tenfold.training import tiny
from tenfold.training.parents import trained
from tenfold.training.tasks import byte_encoder, make_tasks
from tenfold.training.threads import threads_text
from tenfold.upit import summary
from tenfold.upit.families import Families
from tenfold.upit.study import BASE, METHODS, TUNED, Comparison, compare

LENGTH, END, TRAIN, TEST = 128, 0, 160, 32
NAMES = ("docstring", "german", "licence", "topic")
PARENT_STEPS, TELL, LAYERS, HEADS = 80, 10, 4, 4
DEPTH = 3  # layers of the demo itself; ``LAYERS`` are those of a study
COMPARED = ("dense", "vanilla", "upit")
RECIPE: dict[str, Any] = {
    "base_model": "bytes", "preset": "small", "num_experts": 4, "experts_per_token": 2,
    "collect": {"epochs": 2.0, "save_every": 0.25, "keep": 3, "learning_rate": 2e-3, "dtype": "float32"},
    "seeds": {"fraction": 0.1, "assign": "relative"}, "router": {"normalize": "unit"},
    "post": {"epochs": 1.0, "learning_rate": 1e-3},
}  # fmt: skip
BATCH = 16
EPOCH = len(NAMES) * TRAIN // BATCH


def data_of(
    names: tuple[str, ...] = NAMES, train: int = TRAIN, test: int = TEST, seed: int = 0
) -> Families:
    """Rows of bytes by family."""
    made = make_tasks(names, byte_encoder, LENGTH, END, END, train=train, test=test, seed=seed)
    return Families.of({t.name: (t.train, t.test) for t in made})  # type: ignore[dict-item]


def parent(
    steps: int = PARENT_STEPS, layers: int = LAYERS, heads: int = HEADS, seed: int = 0,
    told: Callable[[int, float], None] | None = None,
) -> Any:  # fmt: skip
    """A byte-level Llama that has read Python's documentation."""
    stream, _ = tiny.split(tiny.byte_stream())

    def rows(stage: str, at: int, size: int) -> Tensor:
        made = torch.Generator().manual_seed(seed * 1_000_003 + at)
        return tiny.text_rows(stream, size, made, LENGTH)

    return tiny.train(
        tiny.make_model(seed, layers, heads), rows, steps, batch_size=BATCH, callback=told
    )


def _cached_parent(step: Callable[[str], None]) -> Any:
    """:func:`parent`, trained once, then from the cache."""

    def train(model: Any) -> dict[str, float]:
        losses: list[float] = []

        def told(at: int, loss: float) -> None:
            losses.append(loss)
            if at % TELL == 0:
                step(f"learning text: loss {loss:.2f}")

        model.load_state_dict(parent(PARENT_STEPS, DEPTH, HEADS, told=told).state_dict())
        return {"loss": statistics.fmean(losses[-TELL:])}

    text = bytes(tiny.byte_stream().tolist())
    settings = {"steps": PARENT_STEPS, "layers": DEPTH, "heads": HEADS, "batch": BATCH, "length": LENGTH,
                "text": hashlib.sha256(text).hexdigest()}  # fmt: skip
    return trained("upit", settings, tiny.make_model(0, DEPTH, HEADS), train)[0]


@dataclass
class Experts:
    """Forward and backward of all layers' experts on rows of this run, ours and transformers'.

    ``tokens``: of the rows. ``gap``: largest difference of outputs and of gradients for the inputs, as a share of
    the largest value.
    """

    speed: Speedup
    tokens: int
    layers: int
    gap: float


@dataclass
class Demo:
    """What the demo found."""

    found: Comparison
    experts: Experts
    model: str = ""
    setting: str = ""

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        kept = {k: v for k, v in self.found.to_json().items() if k != "curves"}
        return {"setting": self.setting, "experts": asdict(self.experts)} | kept


def _steps() -> int:
    from tenfold.upit.config import UpITConfig
    from tenfold.upit.options import RouterConfig
    from tenfold.upit.router import equal_steps

    groups = {k: v for k, v in RECIPE.items() if k != "base_model"}
    config = UpITConfig.make(**groups)
    samples = round(config.seeds.fraction * len(NAMES) * TRAIN)
    router: RouterConfig = config.router
    each = equal_steps([samples / config.num_experts] * config.num_experts, router)  # type: ignore[list-item]
    tuning = round(EPOCH * (config.collect.epochs + len(COMPARED) * config.post.epochs))
    return PARENT_STEPS // TELL + tuning + config.num_experts * each + 1


STEPS = _steps()


def _expert_calls(model: Any, rows: dict[str, Tensor]) -> list[tuple[Any, tuple[Tensor, ...]]]:
    """(experts, hidden states, index and weights that they got) of every layer in a forward of some rows."""
    from tenfold.upit.mixture import mixture_layers

    calls: list[tuple[Any, tuple[Tensor, ...]]] = []

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        calls.append((module, tuple(t.detach().clone() for t in args)))

    hooks = [layer.experts.register_forward_pre_hook(keep) for layer in mixture_layers(model)]
    try:
        with torch.no_grad():
            model(**{k: v for k, v in rows.items() if k != "labels"}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def measure_experts(folder: str | Path, rows: dict[str, Tensor]) -> Experts:
    """Times a mixture's experts: ``ops.moe_swiglu_mlp`` against the implementation that transformers chooses.

    Args:
        folder: of the mixture. rows: ``input_ids`` [R, S], ``attention_mask``: whose hidden states they get.
    """
    from transformers import AutoModelForCausalLM

    from tenfold.upit.loading import load
    from tenfold.upit.mixture import mixture_layers

    with quiet_transformers():
        model = load(folder, dtype=torch.float32).eval()
        stock = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    calls = _expert_calls(model, rows)
    theirs = [layer.experts for layer in mixture_layers(stock)]

    def work(modules: list[Any]) -> list[Tensor]:
        made = []
        for module, (_, (hidden, *routing)) in zip(modules, calls):
            x = hidden.clone().requires_grad_()
            out = module(x, *routing)
            out.backward(hidden)
            module.zero_grad()
            made += [out.detach(), x.grad]
        return made

    def ours() -> list[Tensor]:
        return work([module for module, _ in calls])

    def plain() -> list[Tensor]:
        return work(theirs)

    gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(), plain()))
    chosen = stock.get_experts_implementation()[""]
    speed = speedup("moe_swiglu_mlp", f"transformers' experts ({chosen})", ours, plain, rounds=15)
    return Experts(speed, calls[0][1][0].shape[0], len(calls), gap)


def run_demo(step: Callable[[str], None] = lambda text: None, seed: int = 0) -> Demo:
    """Runs everything.

    Args:
        step: told after each piece; of the parent only where it is not in the cache.
        seed: of the families' training rows and of all stages; the parent is the same for all.
    """
    model = _cached_parent(step)
    data = data_of(seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            RECIPE | {"seed": seed}, folder, methods=COMPARED, model=model, data=data, step=step
        )
        rows = {k: v[:BATCH] for k, v in data.train.items()}
        experts = measure_experts(found.stages["post-train"]["model"], rows)
        step("experts timed")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    name = f"byte-level Llama ({size:.1f}M parameters)"
    setting = (f"A {name}, {DEPTH} layers: {PARENT_STEPS} steps on Python's documentation, then {len(NAMES)} "
               f"families of {TRAIN} rows: {RECIPE['collect']['epochs']:g} epochs of dense tuning, and "
               f"{RECIPE['post']['epochs']:g} more of each method; {BATCH} rows of up to {LENGTH} bytes per step, "
               f"float32, {threads_text()}, one seed.")  # fmt: skip
    return Demo(found, experts, name, setting)


COLUMNS = tuple(summary.loss_columns(NAMES))
EXPERTS_COLUMNS = (
    "experts, forward and backward",
    "op",
    "against",
    "speed-up",
    "largest difference",
)


def table_rows(demo: Demo) -> list[list[str]]:
    """The rows of the table, for ``COLUMNS``."""
    return summary.loss_rows(demo.found.losses, NAMES)


def experts_rows(found: Experts) -> list[list[str]]:
    """Rows for ``EXPERTS_COLUMNS``."""
    what = f"all {found.layers} layers, {found.tokens:,} tokens"
    return [[what, *found.speed.cells, f"{found.gap:.1e}"]]


def headline(found: Demo) -> Headline:
    """UpIT's line in the demo's table."""
    losses = found.found.losses
    ours, dense, vanilla = (losses[METHODS[m]]["mean"] for m in ("upit", "dense", "vanilla"))
    return Headline(
        f"{found.model}, {RECIPE['num_experts']} experts, {len(found.found.families)} families",
        f"loss {ours:.3f}; dense tuned on {dense:.3f}, vanilla upcycling {vanilla:.3f}",
        found.experts.speed,
    )


def tables(found: Demo) -> list[TextTable]:
    """What the demo shows on a terminal."""
    count, each = RECIPE["num_experts"], RECIPE["experts_per_token"]
    return [
        TextTable(
            f"Loss per answer byte; {count} experts, {each} per byte", COLUMNS, table_rows(found)
        ),
        TextTable("A layer's experts", EXPERTS_COLUMNS, experts_rows(found.experts)),
    ]


def add_demo_section(demo: Demo, page: Page) -> None:
    """UpIT's part of the report page."""
    from tenfold.upit import report

    found, name = demo.found, METHODS["upit"]
    page.section("UpIT: checkpoints of one tuning become a mixture of experts")
    titles = [METHODS[m] for m in COMPARED]
    speed = demo.experts.speed
    page.cards([
        *(Card(f"{found.losses[t]['mean']:.3f}", t, "loss, mean of the families") for t in titles),
        Card(speed.times, "faster experts", f"than {speed.against}"),
    ])  # fmt: skip
    page.text(
        f"Losses are nats per answer byte of rows that nothing was trained on. {BASE}: before instruction tuning; "
        f"{TUNED}: what all others go on from, with the same steps on the same rows."
    )
    page.text(demo.setting, soft=True)
    rows = table_rows(demo)
    best = min(range(len(rows)), key=lambda i: float(rows[i][-1]))
    page.table(COLUMNS, rows, [best])
    page.image(png_bytes(summary.losses_plot(found.losses, NAMES)), "Loss of test rows by family.")
    page.table(EXPERTS_COLUMNS, experts_rows(demo.experts))
    page.text(
        "The experts of the finished mixture on a batch of this run, by ops.moe_swiglu_mlp and as transformers runs "
        "them. The difference is that of outputs and gradients, as a share of the largest.",
        soft=True,
    )
    page.heading("Where the experts come from")
    page.table(summary.CHILD_COLUMNS, summary.child_rows(found.stages["expand"]["children"]))
    page.image(
        png_bytes(summary.buckets_plot(found.stages["seeds"]["families"], NAMES)),
        "What each expert's router was seeded with.", 560,
    )  # fmt: skip
    load, who = (torch.tensor(x[name], dtype=torch.float64) for x in (found.load, found.affinity))
    report.add_experts(page, load, who, NAMES, "UpIT's experts")
    shares = {t: torch.tensor(a, dtype=torch.float64) for t, a in found.affinity.items()}
    page.image(
        png_bytes(report.specialisation_plot(shares)),
        "How far families differ in their choice of experts.",
        560,
    )
