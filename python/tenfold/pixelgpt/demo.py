# SPDX-License-Identifier: Apache-2.0
"""PixelGPT on packaged text: pre-training on pixels and on tokens, and a task in scripts that neither saw.

Two small models of the same size: one reads strips of rendered text and regresses the next patch, the other reads
tokens. Then both learn to tell languages apart, in scripts of the pre-training and in others. A demo of one seed:
docs/methods/pixelgpt.md has a study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.pixelgpt import report, small
from tenfold.pixelgpt.classifier import classifier_of
from tenfold.pixelgpt.finetuning import finetune
from tenfold.pixelgpt.pretraining import pretrain
from tenfold.pixelgpt.record import FineTuneRecord, PretrainRecord
from tenfold.pixelgpt.texts import language_task
from tenfold.pixelgpt.train_config import FineTuneConfig, PretrainConfig
from tenfold.report import Headline, Page, Speedup, TextTable, speedup
from tenfold.training.loop import Progress

# Languages to tell apart: in scripts of the pre-training, and in scripts that it never saw.
SEEN, UNSEEN = ("de", "fr", "es", "ru", "el"), ("hy", "ka", "he", "ar")
VARIANTS = {"pixelgpt": "pixel", "textgpt": "text"}
PRETRAIN: dict[str, Any] = {"steps": 320, "batch_size": 16, "length": 48, "eval_every": 80,
                            "checkpoint_every": 10_000, "learning_rate": 2e-3}  # fmt: skip
FINETUNE: dict[str, Any] = {"steps": 150, "batch_size": 32, "length": 24, "eval_every": 50,
                            "checkpoint_every": 10_000}  # fmt: skip
SIZE, PER_LANGUAGE, LINES, TESTS, TELL = "tiny", 80, 100, 30, 20
STEPS = 2 + len(VARIANTS) * (PRETRAIN["steps"] // TELL + 2)
COLUMNS = report.PRETRAIN_COLUMNS
TUNE_COLUMNS = ("model", "reads", "languages told apart, %", "in seen scripts, %", "in unseen scripts, %")  # fmt: skip
SPEED_COLUMNS = ("op", "against", "times as fast", "largest difference")


@dataclass
class Demo:
    """What the demo found; ``apart``: the kernel's gradient from PyTorch's, as a share of its largest number."""

    records: dict[str, PretrainRecord] = field(default_factory=dict)
    tuned: dict[str, FineTuneRecord] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    setting: str = ""
    speed: Speedup | None = None
    apart: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {"setting": self.setting,
                "pretraining": {n: r.to_json() | {"curve": []} for n, r in self.records.items()},
                "finetuning": {n: r.to_json() | {"curve": []} for n, r in self.tuned.items()}}  # fmt: skip


def plain_patch_mse(pred: Tensor, image: Tensor, mask: Tensor, patch: int, eps: float) -> Tensor:
    """:func:`tenfold.ops.patch_mse` of normalised patches in plain PyTorch.

    pred [B, L, C p^2], image [B, C, p, p L], mask bool [B, L]: the mean over what the mask counts of the next patches.
    """
    y = image.float().unflatten(3, (-1, patch)).permute(0, 3, 2, 4, 1).flatten(2) / 255
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + eps).sqrt()
    each = (pred[:, :-1] - y[:, 1:]).square().mean(-1)
    return (each * mask[:, 1:]).sum() / mask[:, 1:].sum()


def patch_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Speedup, float]:
    """(the loss of predicted patches with its gradient against plain PyTorch's, how far the gradients are apart).

    The predictions are the model's, of a batch of strips.
    """
    with torch.no_grad():
        pred = model(**batch).patches
    pred = pred.detach().clone().requires_grad_()
    image, mask = batch["pixel_values"], batch["patch_mask"]
    patch, eps = model.config.patch_size, model.config.norm_pix_eps

    def ours() -> Tensor:
        return torch.autograd.grad(ops.patch_mse(pred, image, mask, patch, True, eps)[0], pred)[0]

    def theirs() -> Tensor:
        return torch.autograd.grad(plain_patch_mse(pred, image, mask, patch, eps), pred)[0]

    right = theirs()
    apart = float((ours() - right).abs().max() / right.abs().max())
    return speedup("patch_mse", "patches and their loss in PyTorch", ours, theirs), apart


def run_demo(step: Callable[[str], None] = lambda text: None, seed: int = 0) -> Demo:
    """Runs it; ``step`` is told after each piece. ``seed``: of weights and of the order of the data."""
    corpus = small.packaged_corpus(per_language=PER_LANGUAGE)
    step("documents")
    found = Demo()
    spec, train, test = language_task(SEEN + UNSEEN, train=LINES, test=TESTS)
    tests = {"seen": [e for e in test if e.language in SEEN], "unseen": [e for e in test if e.language in UNSEEN],
             "all": test}  # fmt: skip
    for variant, modality in VARIANTS.items():
        config = PretrainConfig.from_preset("small", variant=variant, seed=seed, **PRETRAIN)
        streams, held = corpus.streams(config)
        model = small.model_for(corpus, SIZE, seed=seed)

        def told(p: Progress) -> None:
            if p.step % TELL == 0:
                step(f"pre-training, step {p.step}: loss {p.metrics['loss']:.3f}")

        record = pretrain(model, streams, config, held_out=held, callback=told)
        name = report.title_of(record)
        found.records[name] = record
        found.pictures |= small.pictures(model, held)
        step(f"{name} is trained")
        if modality == "pixel":
            found.speed, found.apart = patch_loss(
                model, held.batch("pixel", range(config.batch_size))
            )
            step(str(found.speed))
        tuned = classifier_of(model, spec.num_labels)
        found.tuned[name] = finetune(
            tuned, spec, train, (), FineTuneConfig.from_preset("small", modality=modality, seed=seed, **FINETUNE),
            processor=corpus.processor, tokenizer=corpus.tokenizer, tests=tests,
        )  # fmt: skip
        step(f"{name} tells languages apart")
    pixels = next(iter(found.records.values()))
    found.setting = (
        f"{pixels.parameters / 1e6:.1f}M parameters, {len(corpus.train)} documents in {', '.join(small.LANGUAGES)}; "
        f"{PRETRAIN['steps']} steps of {PRETRAIN['batch_size']} strips of {PRETRAIN['length']} patches, or rows of as "
        f"many tokens (vocabulary {len(corpus.tokenizer)}); then {FINETUNE['steps']} steps on {len(train)} lines. "
        f"{torch.get_num_threads()} threads, one seed."
    )
    return found


def table_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    return report.pretrain_rows(demo.records)


def tune_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``TUNE_COLUMNS``."""
    return [
        [n, r.config["modality"], *(f"{100 * r.scores[s]['accuracy']:.0f}" for s in ("all", "seen", "unseen"))]
        for n, r in demo.tuned.items()
    ]  # fmt: skip


def speed_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SPEED_COLUMNS``."""
    assert demo.speed is not None
    s = demo.speed
    return [[s.op, s.against, f"{s.ratio:.1f}", f"{demo.apart:.1e}"]]


def headline(found: Demo) -> Headline:
    """Its line of the table of all methods."""
    assert found.speed is not None
    record = next(r for r in found.records.values() if r.baselines)
    tuned = next(r for r in found.tuned.values() if r.config["modality"] == "pixel")
    loss, mean = record.validation[-1]["pixel/npp"], record.baselines["mean"]
    apart = 100 * tuned.scores["unseen"]["accuracy"]
    return Headline(
        f"{record.parameters / 1e6:.1f}M on pixels, {record.rows['pixel']} strips in {len(small.LANGUAGES)} languages",
        f"next patch MSE {loss:.3f}, mean patch {mean:.3f}; unseen scripts {apart:.0f} % right",
        found.speed,
    )


def tables(found: Demo) -> list[TextTable]:
    """What the terminal shows."""
    return [
        TextTable("Held-out losses, pixels and tokens", COLUMNS, table_rows(found)),
        TextTable("Which language is it?", TUNE_COLUMNS, tune_rows(found)),
        TextTable("The loss of a batch of strips", SPEED_COLUMNS, speed_rows(found)),
    ]


def add_demo_section(demo: Demo, page: Page) -> None:
    """PixelGPT's part of the report page."""
    page.section("PixelGPT: text as pixels")
    page.text(
        "A strip of 16 x 16 patches of rendered text is read from left to right; the model regresses the pixels of the "
        "next patch. There is no vocabulary, so no script is out of it."
    )
    page.text(demo.setting, soft=True)
    report.add_pretraining(page, demo.records, demo.pictures)
    page.heading("Which language is it?")
    page.text(
        f"Both models learn to tell {', '.join(SEEN)} (scripts of the pre-training) and {', '.join(UNSEEN)} (scripts "
        "that it never saw) apart, from the same lines."
    )
    page.table(TUNE_COLUMNS, tune_rows(demo))
    page.heading("The loss on these kernels, and in plain PyTorch")
    page.text(
        "With its gradient, on a batch of held-out strips and the model's predictions.", soft=True
    )
    page.table(SPEED_COLUMNS, speed_rows(demo))
