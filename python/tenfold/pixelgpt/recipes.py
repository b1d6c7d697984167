# SPDX-License-Identifier: Apache-2.0
"""The published fine-tuning settings by task, variant and modality (section 4 of the method's specification)."""

from __future__ import annotations

from typing import Any

from tenfold.training.checks import one_of

# Of a task: steps of warm-up, steps between evaluations, most steps of a pair run.
_RHYTHM: dict[str, tuple[int, int, int]] = {
    "mnli": (100, 500, 15_000), "qqp": (100, 500, 15_000), "qnli": (100, 250, 8_000), "sst2": (100, 250, 8_000),
    "cola": (10, 50, 2_000), "stsb": (10, 50, 2_000), "mrpc": (10, 50, 2_000), "rte": (10, 50, 2_000),
    "wnli": (10, 5, 250), "xnli": (100, 500, 15_000),
}  # fmt: skip
_CELLS = (
    "textgpt/text",
    "pixelgpt/pixel",
    "monogpt/text",
    "monogpt/pixel",
    "dualgpt/text",
    "dualgpt/pixel",
)
# batch / learning rate in 1e-5 / steps, in the order of _CELLS. Where the paper searched a grid: its first point.
_PUBLISHED: dict[str, tuple[tuple[int, int, int], ...]] = {
    "mnli": ((64, 3, 15000), (64, 5, 15000), (64, 5, 15000), (64, 5, 15000), (64, 5, 8000), (256, 1, 15000)),
    "qqp": ((64, 3, 15000), (256, 5, 15000), (256, 5, 15000), (256, 3, 15000), (256, 5, 15000), (256, 5, 15000)),
    "qnli": ((64, 5, 8000), (64, 5, 8000), (64, 5, 8000), (256, 1, 8000), (64, 5, 8000), (64, 3, 8000)),
    "sst2": ((64, 3, 8000), (32, 5, 8000), (256, 5, 8000), (256, 5, 8000), (64, 1, 8000), (256, 5, 8000)),
    "cola": ((32, 1, 2000), (256, 3, 2000), (64, 1, 500), (64, 1, 2000), (512, 3, 500), (256, 5, 2000)),
    "stsb": ((64, 5, 2000), (256, 5, 500), (32, 5, 2000), (256, 3, 2000), (64, 3, 2000), (64, 5, 2000)),
    "mrpc": ((32, 5, 2000), (32, 5, 2000), (64, 5, 500), (256, 3, 500), (64, 3, 2000), (64, 5, 250)),
    "rte": ((64, 1, 2000), (32, 3, 2000), (32, 5, 2000), (64, 3, 500), (32, 5, 500), (64, 1, 250)),
    "wnli": ((32, 3, 250), (16, 1, 250), (16, 1, 250), (16, 1, 250), (16, 1, 250), (16, 1, 250)),
}  # fmt: skip
RATES = (1e-5, 3e-5, 5e-5, 1e-4)


def grid(task: str, modality: str) -> list[dict[str, Any]]:
    """The points that the paper searched for pair runs (and XNLI on pixels): batch sizes times learning rates."""
    one_of("task", task, tuple(_RHYTHM))
    if task == "xnli":
        sizes: tuple[int, ...] = (256, 512)
    else:
        sizes = (64, 128, 256, 512) if _RHYTHM[task][2] >= 8_000 else (32, 64, 128, 256, 512)
    steps = 30_000 if task == "xnli" and modality == "pair" else _RHYTHM[task][2]
    return [{"batch_size": b, "learning_rate": r, "steps": steps} for b in sizes for r in RATES]


def recipe(task: str, variant: str, modality: str) -> dict[str, Any]:
    """Fields of :class:`~tenfold.pixelgpt.train_config.FineTuneConfig` for a task of GLUE or XNLI.

    A cell for which the paper searched a grid has the grid's first point; :func:`grid` has all of it.

    Raises ValueError for an unknown task, or a modality that the variant was not trained on.
    """
    one_of("task", task, tuple(_RHYTHM))
    warmup, every, _ = _RHYTHM[task]
    length = 256 if task == "xnli" else 512 if modality == "pair" else 768
    made: dict[str, Any] = {
        "warmup_steps": warmup,
        "eval_every": every,
        "length": length,
        "modality": modality,
    }
    if modality == "pair":
        one_of("variant of pair runs", variant, ("monogpt", "dualgpt"))
        return made | grid(task, modality)[0]
    cell = f"{variant}/{modality}"
    one_of("variant/modality", cell, _CELLS)
    if task == "xnli":
        point = {"batch_size": 64, "learning_rate": 5e-5, "steps": 15_000}
        return made | (point if modality == "text" else grid(task, modality)[0])
    batch, rate, steps = _PUBLISHED[task][_CELLS.index(cell)]
    return made | {"batch_size": batch, "learning_rate": float(f"{rate}e-5"), "steps": steps}
