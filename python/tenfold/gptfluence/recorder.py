# SPDX-License-Identifier: Apache-2.0
"""Recording a run: which examples were in each batch, and what every step did to the tests.

with Recorder("runs/000", tests, [LossMetric(rows)]) as recorder:
    recorder.begin(model)
    for batch in batches:
        ...                                   # forward, backward, optimizer.step()
        recorder.step(model, batch["ids"])    # ids of the examples in it, over all ranks
    recorder.finish(model)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tenfold.gptfluence.ids import Id, IdIndex, checked
from tenfold.gptfluence.metrics import Metric
from tenfold.gptfluence.runs import FORMAT
from tenfold.training.checks import integers
from tenfold.training.loop import is_main_process, kept_random_state
from tenfold.training.store import WorkFolder


class Recorder:
    """Measures tests after steps and keeps the curriculum; on any number of ranks, which share the tests.

    Args:
        folder: of the run; see :mod:`tenfold.gptfluence.runs` for what is in it. tests: ids of the Q tests.
        metrics: what is measured; see :mod:`tenfold.gptfluence.metrics`.
        every: steps between measurements; the first and the last state are always measured.
        initial: measure before the first step, too. Without it, the first batch cannot be learnt from (as published).
        subset: so many tests per measurement, others at each (None: all); the first and last measure all. Read with
        ``missing="mask"``.
        seed: of these choices. about: kept with the run. flush: measurements between writes to disk.

    Attributes:
        seconds: ``evaluation``, in the metrics; ``recording``, in the rest of this class.

    Raises ValueError for a folder of another recorder, two metrics of one name.
    """

    def __init__(
        self,
        folder: str | Path,
        tests: Iterable[Id],
        metrics: Sequence[Metric],
        *,
        every: int = 1,
        initial: bool = True,
        subset: int | None = None,
        seed: int = 0,
        about: Mapping[str, Any] | None = None,
        flush: int = 50,
    ) -> None:
        self.every, self.initial, self.subset, self.seed, self.flush_every = (
            every,
            initial,
            subset,
            seed,
            flush,
        )
        integers(self, {"every": 1, "subset": 1, "seed": 0, "flush_every": 1}, ("subset",))
        self.tests = IdIndex(tests, "tests").ids
        self.metrics = list(metrics)
        self.scales: dict[str, str] = {}
        for metric in self.metrics:
            twice = set(self.scales) & set(metric.scales)
            if twice:
                raise ValueError(f"two metrics are named {sorted(twice)[0]!r}")
            self.scales |= metric.scales
        if not self.tests or not self.scales:
            raise ValueError("a recorder needs tests and metrics")
        self.path = Path(folder)
        self._identity = {
            "format": FORMAT,
            "tests": list(self.tests),
            "metrics": self.scales,
            "every": every,
            "initial": initial,
            "subset": subset,
            "seed": seed,
            "about": dict(about or {}),
        }
        self.seconds = {"evaluation": 0.0, "recording": 0.0}
        self._clear()

    def _clear(self) -> None:
        self._order: list[list[int]] = []
        self._train: dict[Id, int] = {}
        self._steps: list[int] = []
        self._values: dict[str, list[Tensor]] = {name: [] for name in self.scales}
        self._written = 0
        self.finished = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Writes what there is, also after an error."""
        if self._order:
            self.flush()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start, inside = time.perf_counter(), self.seconds["evaluation"]
        try:
            yield
        finally:
            evaluated = self.seconds["evaluation"] - inside
            self.seconds["recording"] += time.perf_counter() - start - evaluated

    def begin(self, model: nn.Module, step: int = 0) -> None:
        """Starts, or goes on after ``step`` steps: later ones, of a run that was killed, are dropped.

        Raises ValueError if the folder is another run's, holds a finished one (at step 0), or fewer steps than
        ``step``.
        """
        with self._timed():
            # Which rank this is may be known only now.
            self.store = WorkFolder(self.path, is_main_process())
            self.store.claim(self._identity)
            self._read(step)
            if dist_on():
                # All ranks have read the folder before one writes to it.
                dist.barrier()
            if not self._order and self.initial:
                self._order.append([])
                self._measure(model, range(len(self.tests)))

    def _read(self, step: int) -> None:
        state = self.store.load("curves")
        self._clear()
        rows = step + self.initial if step else 0
        found = 0 if state is None else state["batches"]
        if state is not None and not step and state["finished"]:
            raise ValueError(
                f"{self.store.path} holds a finished run; give another folder, or remove this one"
            )
        if found < rows:
            raise ValueError(
                f"{self.store.path} has {max(0, found - self.initial)} recorded steps, "
                f"fewer than the {step} to go on from"
            )
        if state is None or not rows:
            return
        tensors = self.store.load_tensors("curves")
        self._order = [[i for i in batch if i >= 0] for batch in tensors["order"][:rows].tolist()]
        used = max((i for batch in self._order for i in batch), default=-1) + 1
        self._train = {name: row for row, name in enumerate(state["train_ids"][:used])}
        points = [s for s in tensors["steps"][: state["points"]].tolist() if s < rows]
        # The last step of a run that was thought over is measured out of turn.
        kept = [i for i, s in enumerate(points) if s % self.every == 0]
        self._steps = [points[i] for i in kept]
        self._values = {m: [tensors[f"metric/{m}"][i] for i in kept] for m in self.scales}

    def step(self, model: nn.Module, ids: Iterable[Id]) -> None:
        """A step was made on the examples ``ids``, of all ranks together. Measures if it is due."""
        with self._timed():
            if self.initial and not self._order:
                raise ValueError("call begin before the first step")
            names = [checked(i, "training examples") for i in ids]
            self._order.append([self._train.setdefault(n, len(self._train)) for n in names])
            row = len(self._order) - 1
            if row % self.every == 0:
                self._measure(model, self._due(row))
                if len(self._steps) - self._written >= self.flush_every:
                    self.flush()

    def finish(self, model: nn.Module) -> None:
        """The run is over: measures what the last state lacks, and writes everything."""
        with self._timed():
            row = len(self._order) - 1
            if row < 0:
                raise ValueError("there is nothing to finish: no step was recorded")
            if self._steps and self._steps[-1] == row:
                seen = [values[-1].isfinite() for values in self._values.values()]
                # Tests that this state has no values of: left out, or not finite, which is found again.
                missing = (~torch.stack(seen).any(0)).nonzero().flatten().tolist()
                if missing and self.subset is not None:
                    self._measure(model, missing)
            else:
                self._measure(model, range(len(self.tests)))
            self.finished = True
            self.flush()

    def _due(self, row: int) -> Sequence[int]:
        if self.subset is None or not self._steps or self.subset >= len(self.tests):
            return range(len(self.tests))
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
        return sorted(torch.randperm(len(self.tests), generator=draw)[: self.subset].tolist())

    def _measure(self, model: nn.Module, tests: Sequence[int]) -> None:
        row = len(self._order) - 1
        start = time.perf_counter()
        found = measured(model, self.metrics, list(tests))
        self.seconds["evaluation"] += time.perf_counter() - start
        again = bool(self._steps) and self._steps[-1] == row
        if not again:
            self._steps.append(row)
        at = torch.tensor(list(tests))
        for name, values in self._values.items():
            if not again:
                values.append(torch.full((len(self.tests),), torch.nan))
            values[-1][at] = found[name]

    def flush(self) -> None:
        """Writes all that was recorded; only rank 0 does."""
        width = max(1, max(map(len, self._order)))
        order = torch.tensor([batch + [-1] * (width - len(batch)) for batch in self._order])
        tensors = {"order": order, "steps": torch.tensor(self._steps, dtype=torch.int64)}
        for name, values in self._values.items():
            tensors[f"metric/{name}"] = (
                torch.stack(values) if values else torch.empty(0, len(self.tests))
            )
        state = {
            "train_ids": list(self._train),
            "batches": len(self._order),
            "points": len(self._steps),
            "finished": self.finished,
        }
        self.store.save("curves", state, tensors)
        self._written = len(self._steps)


def dist_on() -> bool:
    """Is this one of several ranks?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def measured(model: nn.Module, metrics: Sequence[Metric], tests: list[int]) -> dict[str, Tensor]:
    """Values float32 [len(tests)] by metric: the model in eval mode, nothing of the run's state or randomness touched.

    Several ranks share the tests, and all have all values. Each calls the model equally often, as sharded models
    need it.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist_on() else (0, 1)
    mine = tests[rank::ranks]
    # A rank that has one fewer repeats one, so that no rank waits in a collective of a sharded model.
    while len(mine) < -(-len(tests) // ranks):
        mine.append(tests[0])
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), kept_random_state():
            found: dict[str, Tensor] = {}
            for metric in metrics:
                for name, values in metric(model, mine).items():
                    if values.shape != (len(mine),):
                        raise ValueError(
                            f"the metric {name!r} must give [{len(mine)}], got shape {list(values.shape)}"
                        )
                    found[name] = values.float().cpu()
    finally:
        for module, mode in modes:
            module.training = mode
    if ranks == 1:
        return found
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, found)
    whole = {name: torch.empty(len(tests)) for name in found}
    for other, part in enumerate(parts):
        count = len(tests[other::ranks])
        for name, values in part.items():
            whole[name][other::ranks] = values[:count]
    return whole
