# SPDX-License-Identifier: Apache-2.0
"""Reading runs in the published layout (section 2 of the specification).

A folder per run: ``train_samples_id.json``, JSON lines ``{"step", "samples_id"}``; ``all_<metric>_trajectory.out``,
JSON lines
``{"id", "loss_trajectory": [{"step", "loss"}, ..]}``, whose value key is ``loss`` for every metric. Samples: JSON
lines ``{"id", "input", "context"}``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.gptfluence.ids import Id, checked
from tenfold.gptfluence.runs import Run

ORDER = "train_samples_id.json"
SCALES = {"loss": "nats", "bleu": "0-100", "rougeL": "0-1"}


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file. ValueError names file and line of what is no object."""
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            if not isinstance(given, dict):
                raise TypeError
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number}: no JSON object") from None
        yield number, given


def read_reference(folder: str | Path, metric: str = "loss", scale: str | None = None) -> Run:
    """One run in the published layout.

    Args:
        metric: of ``all_<metric>_trajectory.out``. scale: default: nats, 0-100 for bleu, 0-1 for rougeL.

    Raises ValueError, naming run and test, for trajectories that are short, not increasing, not all at the same
    steps or not at steps of the curriculum.
    """
    folder = Path(folder)
    where = f"run {folder.name!r}"
    steps, train_ids, order = _curriculum(folder / ORDER, where)
    trajectories = _trajectories(folder / f"all_{metric}_trajectory.out", where)
    tests = list(trajectories)
    at = [s for s, _ in trajectories[tests[0]]]
    for test, points in trajectories.items():
        own = [s for s, _ in points]
        falls = [b for a, b in itertools.pairwise(own) if b <= a]
        if len(own) < 2 or falls:
            what = (
                f"steps must increase, but {falls[0]} does not"
                if falls
                else f"needs 2 steps, has {len(own)}"
            )
            raise ValueError(f"{where}, test {test!r}: the trajectory {what}")
        if own != at:
            raise ValueError(
                f"{where}, test {test!r}: measured at other steps than test {tests[0]!r}"
            )
    if at[0] < steps[0]:
        # Measured before the first batch.
        steps, order = [at[0], *steps], torch.nn.functional.pad(order, (0, 0, 1, 0), value=-1)
    row = {step: i for i, step in enumerate(steps)}
    lost = [s for s in at if s not in row]
    if lost:
        raise ValueError(
            f"{where}, test {tests[0]!r}: measured at step {lost[0]}, which the curriculum does not have"
        )
    values = torch.tensor([[v for _, v in trajectories[t]] for t in tests]).T.contiguous()
    scales = {metric: SCALES.get(metric, "") if scale is None else scale}
    return Run(
        folder.name,
        order,
        torch.tensor([row[s] for s in at]),
        {metric: values},
        tuple(train_ids),
        tuple(tests),
        scales,
    )


def _curriculum(path: Path, where: str) -> tuple[list[int], list[Id], Tensor]:
    batches: list[tuple[int, list[Id]]] = []
    for number, given in json_lines(path):
        try:
            batches.append((int(given["step"]), [checked(i, where) for i in given["samples_id"]]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: needs step and samples_id") from None
    steps = [s for s, _ in batches]
    if not steps or any(b != a + 1 for a, b in itertools.pairwise(steps)):
        raise ValueError(
            f"{where}: the curriculum's steps must follow each other, got {steps[:8]} ..."
        )
    row: dict[Id, int] = {}
    rows = [[row.setdefault(i, len(row)) for i in ids] for _, ids in batches]
    width = max(map(len, rows))
    return steps, list(row), torch.tensor([r + [-1] * (width - len(r)) for r in rows])


def _trajectories(path: Path, where: str) -> dict[Id, list[tuple[int, float]]]:
    found: dict[Id, list[tuple[int, float]]] = {}
    for number, given in json_lines(path):
        try:
            name = checked(given["id"], where)
            points = [(int(p["step"]), float(p["loss"])) for p in given["loss_trajectory"]]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}, line {number}: needs id and loss_trajectory of step and loss"
            ) from None
        if name in found:
            raise ValueError(f"{where}, test {name!r}: has two trajectories")
        found[name] = points
    if not found:
        raise ValueError(f"{path} has no trajectories")
    return found


def read_samples(path: str | Path) -> dict[Id, dict[str, str]]:
    """Examples by id: ``prompt``, ``answer`` and ``text`` (both).

    Lines have ``id`` with ``input`` (prompt and target) and ``context`` (prompt), as published, or with ``prompt``
    and ``answer``; ``group``
    is kept where it is there. Without ``id``, an example's is its number. ValueError names file and line.
    """
    found: dict[Id, dict[str, str]] = {}
    for number, given in json_lines(path):
        name = checked(given.get("id", len(found)), str(path))
        if name in found:
            raise ValueError(f"{path}, line {number}: the id {name!r} comes twice")
        try:
            if "input" in given:
                prompt, text = str(given.get("context", "")), str(given["input"])
                answer = text.removeprefix(prompt)
                if prompt and answer == text:
                    raise ValueError(f"{path}, line {number}: input does not begin with context")
            else:
                prompt, answer = str(given["prompt"]), str(given["answer"])
                text = prompt + answer
        except KeyError as error:
            raise ValueError(
                f"{path}, line {number}: needs {error.args[0]!r}, or input and context"
            ) from None
        found[name] = {"prompt": prompt, "answer": answer, "text": text}
        if "group" in given:
            found[name]["group"] = str(given["group"])
    if not found:
        raise ValueError(f"{path} has no examples")
    return found
