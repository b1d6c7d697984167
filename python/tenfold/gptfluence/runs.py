# SPDX-License-Identifier: Apache-2.0
"""Recorded runs: which examples were in each batch, and what became of every test example.

On disk a run is a folder (``Recorder`` writes it):

    run.json             what the folder is of: ids of the tests, names and scales of the metrics, interval, ``about``
    curves.safetensors   order int64 [T, B]: numbers of training examples, -1 where a batch is padded
                         steps int64 [S]: rows of ``order`` after whose update was measured
                         metric/NAME float32 [S, Q]: what was measured; NaN where a test was left out
    curves.json          train_ids (number -> id), how many rows of the above are valid, whether the run is over

``curves.json`` is written last and is what counts: longer tensors beside it are of a recorder that was killed.
A run that was measured before its first update has an empty batch (all -1) as row 0 of ``order``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.gptfluence.ids import Id, IdIndex, order_tensor, widened
from tenfold.training.checks import one_of
from tenfold.training.store import WorkFolder

FORMAT = "tenfold-dynamics-1"
MISSING = ("raise", "mask")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: for messages. order: int32 [T, B], rows of ``train_ids``, -1: no example. steps: int64 [S], increasing
            rows of
            ``order`` after which was measured. values: by metric, float32 [S, Q].
        train_ids, test_ids: what the rows and columns are. scales: by metric, its unit or range (``"nats"``,
        ``"0-100"``).
        about: anything else, as JSON can hold it.

    Raises:
        ValueError: fewer than two measurements, steps that do not increase or have no batch, shapes that do not fit.
    """

    name: str
    order: Tensor
    steps: Tensor
    values: Mapping[str, Tensor]
    train_ids: tuple[Id, ...]
    test_ids: tuple[Id, ...]
    scales: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"run {self.name!r}"
        order = order_tensor(self.order, f"{where}: order")
        if order.ndim != 2:
            raise ValueError(f"{where}: order must be [T, B], got shape {list(order.shape)}")
        object.__setattr__(self, "order", order)
        for name in ("train_ids", "test_ids"):
            object.__setattr__(self, name, IdIndex(getattr(self, name), f"{where}: {name}").ids)
        if order.numel() and int(order.max()) >= len(self.train_ids):
            raise ValueError(
                f"{where}: order has example {int(order.max())}, train_ids only {len(self.train_ids)}"
            )
        self._check_steps(where)
        for metric, values in self.values.items():
            want = (len(self.steps), len(self.test_ids))
            if tuple(values.shape) != want:
                raise ValueError(
                    f"{where}: {metric} must be [S, Q] = {list(want)}, got shape {list(values.shape)}"
                )

    def _check_steps(self, where: str) -> None:
        if len(self.steps) < 2:
            raise ValueError(
                f"{where}: a trajectory needs at least 2 measurements, got {len(self.steps)}"
            )
        falls = (self.steps[1:] <= self.steps[:-1]).nonzero().flatten().tolist()
        if falls:
            at = falls[0]
            raise ValueError(
                f"{where}: steps must increase, but {int(self.steps[at])} is followed by {int(self.steps[at + 1])}"
            )
        if int(self.steps[0]) < 0 or int(self.steps[-1]) >= len(self.order):
            raise ValueError(
                f"{where}: steps {int(self.steps[0])} to {int(self.steps[-1])} are not all of the curriculum's "
                f"{len(self.order)} steps"
            )

    def scale(self, metric: str) -> str:
        """The metric's scale; ValueError with the names if it was not recorded."""
        if metric not in self.values:
            raise ValueError(
                f"run {self.name!r} has no metric {metric!r}; it has: {', '.join(self.values)}"
            )
        return self.scales.get(metric, "")


def read_run(folder: str | Path) -> Run:
    """The run in a folder. ValueError if there is none, or it has not been measured twice yet."""
    store = WorkFolder(folder, main=False)
    try:
        identity = json.loads((store.path / "run.json").read_text())
        state = store.load("curves")
        if identity["format"] != FORMAT or state is None:
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder} is no recorded run: it has no run.json and curves.json of {FORMAT}"
        ) from None
    tensors = store.load_tensors("curves")
    batches, points = state["batches"], state["points"]
    values = {m: tensors[f"metric/{m}"][:points] for m in identity["metrics"]}
    return Run(
        Path(folder).name, tensors["order"][:batches], tensors["steps"][:points], values, tuple(state["train_ids"]),
        tuple(identity["tests"]), identity["metrics"], identity.get("about", {}),
    )  # fmt: skip


def read_runs(folder: str | Path) -> list[Run]:
    """All runs in the folders of a folder, by name. ValueError if there are none."""
    found = [read_run(p.parent) for p in sorted(Path(folder).glob("*/curves.json"))]
    if not found:
        raise ValueError(f"{folder} has no recorded runs")
    return found


@dataclass(frozen=True)
class RunSet:
    """Runs of one metric, over the same tests, as tensors.

    Attributes:
        names: of the R runs. metric, scale.
        order: int32 [R, T, B], rows of ``train_ids``. steps: int64 [S]. y: float32 [R, S, Q], NaN where nothing was
        measured.
    """

    names: tuple[str, ...]
    metric: str
    scale: str
    order: Tensor
    steps: Tensor
    y: Tensor
    train_ids: tuple[Id, ...]
    test_ids: tuple[Id, ...]

    @classmethod
    def of(
        cls, runs: Sequence[Run], metric: str | None = None, *, train_ids: Iterable[Id] | None = None,
        missing: str = "raise", pad: bool = False,
    ) -> RunSet:  # fmt: skip
        """Joins runs.

        Args:
            metric: the one to take; default: the only one that there is.
            train_ids: the rows of ``order``; default: all ids of the runs, in the order in which they come.
            missing: ``"raise"``, or ``"mask"``: measurements that are not finite are NaN, and count nowhere.
            pad: runs of different lengths are padded with empty batches and missing measurements (``missing="mask"``).

        Raises:
            ValueError: no runs, two of one name, another metric, scale or tests, lengths that differ without
                ``pad``, values that are not finite.
            UnknownId: an example that ``train_ids`` does not have.
        """
        one_of("missing", missing, MISSING)
        if pad and missing != "mask":
            raise ValueError('runs can be padded only with missing="mask"')
        runs = list(runs)
        if not runs:
            raise ValueError("there are no runs")
        name = _metric(runs, metric)
        tests = runs[0].test_ids
        for run in runs:
            if run.scale(name) != runs[0].scale(name):
                raise ValueError(
                    f"{name} is on the scale {run.scale(name)!r} in run {run.name!r} and on {runs[0].scale(name)!r} in "
                    f"run {runs[0].name!r}; they cannot be mixed"
                )
            if run.test_ids != tests:
                raise ValueError(f"run {run.name!r} has other tests than run {runs[0].name!r}")
        _check_names([r.name for r in runs])
        index = IdIndex(train_ids if train_ids is not None else _union(runs), "training examples")
        steps, points = _shared_steps(runs, pad), max(len(r.steps) for r in runs)
        length, width = max(len(r.order) for r in runs), max(r.order.shape[1] for r in runs)
        if pad:
            # A padded point needs a row of its own.
            length = max(length, int(steps[-1]) + 1)
        elif len({len(r.order) for r in runs}) > 1:
            raise ValueError(
                f"runs have {sorted({len(r.order) for r in runs})} steps; pass pad=True"
            )
        order = torch.stack([_joined(r, index, length, width) for r in runs])
        y = torch.full((len(runs), points, len(tests)), torch.nan)
        for at, run in enumerate(runs):
            y[at, : len(run.steps)] = _finite(run, name, missing)
        return cls(
            tuple(r.name for r in runs),
            name,
            runs[0].scale(name),
            order,
            steps,
            y,
            index.ids,
            tests,
        )

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Iterable[int]) -> RunSet:
        """Some of the runs, by number."""
        at = list(rows)
        return replace(
            self, names=tuple(self.names[i] for i in at), order=self.order[at], y=self.y[at]
        )

    def tests(self, rows: Iterable[int]) -> RunSet:
        """Some of the tests, by number."""
        at = list(rows)
        return replace(self, test_ids=tuple(self.test_ids[i] for i in at), y=self.y[:, :, at])

    def split(self, validation: int = 2, test: int = 5) -> tuple[RunSet, RunSet, RunSet]:
        """(training, validation, test) runs: the last ``test`` runs, before them ``validation``, and the rest."""
        rest = len(self) - validation - test
        if rest < 1 or validation < 0 or test < 0:
            raise ValueError(
                f"{len(self)} runs cannot give {validation} for validation, {test} for tests and any to fit"
            )
        return (
            self.take(range(rest)),
            self.take(range(rest, rest + validation)),
            self.take(range(rest + validation, len(self))),
        )

    def blocks(self) -> Tensor:
        """All examples between two measurements as one batch: int32 [R, S - 1, K * B], -1 in places that are empty."""
        first, *later = self.steps.tolist()
        parts = []
        for end in later:
            part = self.order[:, first + 1 : end + 1]
            parts.append(part.reshape(len(self), (end - first) * self.order.shape[2]))
            first = end
        width = max(p.shape[1] for p in parts)
        return torch.stack([widened(p, width) for p in parts], 1).contiguous()

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Sparse recording as published (section 3.5 of the specification): every step of a block is a sample.

        Returns (order int32 [R, N, B]: the batch of each step after the first measurement, block int64 [N]: which two
        measurements it stands between).
        """
        first = int(self.steps[0])
        at = torch.arange(first + 1, int(self.steps[-1]) + 1)
        return self.order[:, at].contiguous(), torch.searchsorted(self.steps, at) - 1

    @property
    def dense(self) -> bool:
        """Was every step measured?"""
        return bool((self.steps[1:] - self.steps[:-1] == 1).all())


def check_disjoint(train: RunSet, other: RunSet, what: str) -> None:
    """ValueError if a run is in both, by name or by all that it holds."""
    both = sorted(set(train.names) & set(other.names))
    for i, name in enumerate(train.names):
        for j, second in enumerate(other.names):
            same = (
                train.y.shape[1:] == other.y.shape[1:]
                and train.order.shape[1:] == other.order.shape[1:]
            )
            if (
                same
                and torch.equal(train.order[i], other.order[j])
                and torch.equal(train.y[i], other.y[j])
            ):
                both.append(f"{name} = {second}")
    if both:
        raise ValueError(f"training and {what} runs overlap: {', '.join(both)}")


def _metric(runs: list[Run], metric: str | None) -> str:
    if metric is not None:
        return metric
    if len(runs[0].values) != 1:
        raise ValueError(f"say which metric: {', '.join(runs[0].values)}")
    return next(iter(runs[0].values))


def _check_names(names: list[str]) -> None:
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ValueError(f"two runs are named {sorted(twice)[0]!r}")


def _union(runs: list[Run]) -> list[Id]:
    return list(dict.fromkeys(i for r in runs for i in r.train_ids))


def _shared_steps(runs: list[Run], pad: bool) -> Tensor:
    longest = max((r.steps for r in runs), key=len)
    for run in runs:
        same = torch.equal(run.steps, longest[: len(run.steps)])
        if not same or (not pad and len(run.steps) < len(longest)):
            raise ValueError(
                f"run {run.name!r} was measured after {len(run.steps)} steps ({int(run.steps[0])} to "
                f"{int(run.steps[-1])}), another after {len(longest)} "
                f"({int(longest[0])} to {int(longest[-1])}); all runs "
                "of a set need the same" + ("" if pad else ", or pad=True where some are shorter")
            )
    return longest


def _joined(run: Run, index: IdIndex, length: int, width: int) -> Tensor:
    used = run.order[run.order >= 0].unique().tolist()
    table = torch.full((len(run.train_ids) + 1,), -1, dtype=torch.int32)
    for row in used:
        table[row] = index.row(run.train_ids[row])
    # Row -1 of the table, its last, is -1.
    order = widened(table[run.order.long()], width)
    return torch.nn.functional.pad(order, (0, 0, 0, length - len(order)), value=-1)


def _finite(run: Run, metric: str, missing: str) -> Tensor:
    values = run.values[metric].float()
    bad = (~values.isfinite()).nonzero()
    if not len(bad):
        return values
    if missing == "raise":
        step, test = bad[0].tolist()
        raise ValueError(
            f"run {run.name!r}: {metric} of test {run.test_ids[test]!r} is {float(values[step, test])} at step "
            f'{int(run.steps[step])}; missing="mask" leaves such measurements out'
        )
    return values.masked_fill(~values.isfinite(), torch.nan)
