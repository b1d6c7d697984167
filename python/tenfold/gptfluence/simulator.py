# SPDX-License-Identifier: Apache-2.0
"""The simulator: fitted to recorded runs, it predicts others from their curricula and says what examples do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.gptfluence import influence
from tenfold.gptfluence.config import SimulatorConfig
from tenfold.gptfluence.factors import make_factors
from tenfold.gptfluence.features import Features, check_together
from tenfold.gptfluence.fitting import Callback, Fit, FitRecord
from tenfold.gptfluence.ids import Id, checked, order_tensor
from tenfold.gptfluence.recurrence import DIVERGED, UNSTABLE, batches_of, simulate, stability
from tenfold.gptfluence.runs import RunSet, check_disjoint
from tenfold.training.store import write_text

FILE, WEIGHTS = "simulator.json", "simulator.safetensors"
TRAIN, TEST = "train.features.safetensors", "test.features.safetensors"
FORMAT = "tenfold-simulator-1"


@dataclass(frozen=True)
class Prediction:
    """Simulated runs.

    Attributes:
        values: float32 [R, S, Q]; [:, 0] is where they start. diverged: bool [R, Q], left 10,000 times the range
            that was fitted.
        stability: ``alpha``, the largest |alpha_1|, and ``radius``, the largest spectral radius of a step.
    """

    values: Tensor
    diverged: Tensor
    stability: Mapping[str, float]

    @property
    def final(self) -> Tensor:
        """The last values [R, Q]."""
        return self.values[:, -1]


class Simulator:
    """Predicts how a metric of test examples moves with the batches of a training run.

    Args:
        train, test: features of the examples. config: what it is; ``changes`` are fields of it.

    Raises:
        ValueError: features that do not go together (of other encoders or widths, with shared towers).
    """

    def __init__(
        self, train: Features, test: Features, config: SimulatorConfig | None = None, **changes: Any
    ) -> None:  # fmt: skip
        self.config = (config or SimulatorConfig()).with_changes(**changes)
        check_together(train, test, self.config.towers == "shared")
        self.train, self.test = train, test
        self.network = make_factors(self.config, train.width, test.width).to(train.table.dtype)
        self.metric, self.scale = "", ""
        self.range: tuple[float, float] = (0.0, 0.0)
        self.level: float = 0.0
        self.batch = 0
        self.fitted: tuple[str, ...] = ()
        self.record: FitRecord | None = None

    @property
    def trained_parameters(self) -> int:
        """How many numbers a fit changes; a frozen encoder has its own."""
        return sum(p.numel() for p in self.network.parameters())

    def rows(self, runs: RunSet) -> RunSet:
        """The runs with rows of this simulator's features in ``order``. UnknownId names an example without features."""
        if runs.metric != self.metric and self.metric:
            raise ValueError(
                f"the simulator was fitted to {self.metric!r}, the runs have {runs.metric!r}"
            )
        if self.metric and runs.scale != self.scale:
            raise ValueError(
                f"the simulator was fitted to the scale {self.scale!r}, the runs are on {runs.scale!r}"
            )
        used = runs.order[runs.order >= 0].unique().tolist()
        table = torch.full((len(runs.train_ids) + 1,), -1, dtype=torch.int32)
        table[used] = self.train.index.rows(runs.train_ids[i] for i in used).to(torch.int32)
        return replace(runs, order=table[runs.order.long()], train_ids=self.train.ids)

    def factors(
        self, tests: Iterable[Id] | None = None, train: Iterable[Id] | None = None
    ) -> Tensor:
        """[n + 1, M, Q], without gradients: of all examples or these ids. Planes 0..n-1 multiplicative, n additive."""
        rows = self.train.table if train is None else self.train.table[self.train.index.rows(train)]
        asked = self.test.table if tests is None else self.test.table[self.test.index.rows(tests)]
        with torch.no_grad():
            return self.network(rows, asked)

    def fit(
        self, runs: RunSet, validation: RunSet | None = None, *, callback: Callback | None = None, quiet: bool = True
    ) -> FitRecord:  # fmt: skip
        """Fits to recorded runs; with ``validation`` runs it keeps the best weights and stops early.

        Raises:
            ValueError: runs that are in both, another metric or scale, an order that is not below the number of
                measurements.
            UnknownId: an example without features. TrainingError: a loss that is not a number.
        """
        if validation is not None and not len(validation):
            validation = None
        if validation is not None:
            check_disjoint(runs, validation, "validation")
        self.metric, self.scale = runs.metric, runs.scale
        seen, held = self.rows(runs), None if validation is None else self.rows(validation)
        known = runs.y[runs.y.isfinite()]
        self.range, self.level = (float(known.min()), float(known.max())), float(known.mean())
        self.batch = int((batches_of(seen, self.config.sparse) >= 0).sum(-1).max())
        self.fitted = (*runs.names, *(validation.names if validation is not None else ()))
        features = (self.train.table, self.test.table[self.test.index.rows(runs.test_ids)])
        self.record = Fit(self.network, features, self.config, seen, held, callback, quiet).run()
        return self.record

    def predict(
        self, curriculum: Any, first: Tensor | None = None, *, tests: Iterable[Id] | None = None
    ) -> Prediction:  # fmt: skip
        """Simulates training runs.

        Args:
            curriculum: a ``RunSet``, of which nothing but curricula and first measurements is read; or ids of
                examples, batch after
                batch: [T][B] or [R][T][B], -1 where there is none. first: with ids, the values [Q] or [R, Q] before
                the first batch.
            tests: ids of the Q columns; default: the runs', or all.

        Returns:
            values [R, S, Q] at the measured steps, or [R, T + 1, Q] from before the first batch on. A
            RuntimeWarning says when a
            run leaves 10,000 times the fitted range, or when steps amplify (above 1.001).
        """
        if isinstance(curriculum, RunSet):
            if first is not None or tests is not None:
                raise ValueError("recorded runs have their own first values and tests")
            seen, names = self.rows(curriculum), curriculum.test_ids
            order, start = batches_of(seen, self.config.sparse), seen.y[:, 0]
        else:
            names = self.test.ids if tests is None else tuple(tests)
            order = self.order_of(curriculum)
            if first is None:
                raise ValueError("a curriculum of ids needs the first values [Q] or [R, Q]")
            start = torch.as_tensor(first, dtype=self.train.table.dtype)
            if start.shape not in ((len(names),), (len(order), len(names))):
                raise ValueError(
                    f"first must be [{len(names)}] or [{len(order)}, {len(names)}], got shape {list(start.shape)}"
                )
            start = start.expand(len(order), len(names))
        return self.simulate(order, start, self.factors(names))

    def order_of(self, curriculum: Any) -> Tensor:
        """Rows int32 [R, T, B] of ids [T][B] or [R][T][B], given as lists or an integer array; -1 is none."""
        if not isinstance(curriculum, Tensor):
            curriculum = _mapped(
                curriculum,
                lambda name: (
                    -1 if name == -1 else self.train.index.row(checked(name, "curriculum"))
                ),
            )
            order = order_tensor(curriculum, "curriculum")
        else:
            order = order_tensor(curriculum, "curriculum").long()
            used = order[order >= 0].unique().tolist()
            table = dict(zip(used, self.train.index.rows(used).tolist())) | {-1: -1}
            order = order.clone().apply_(table.__getitem__).to(torch.int32)
        return (order if order.ndim == 3 else order[None]).contiguous()

    def simulate(self, order: Tensor, first: Tensor, factors: Tensor) -> Prediction:
        """Runs by rows of features ``order`` [R, T, B], from ``first`` [R, Q]; see :meth:`predict`."""
        with torch.no_grad():
            values = simulate(factors, order, first, self.config)
            found = stability(factors, order, self.config)
        limit = DIVERGED * max(self.range[1] - self.range[0], 1e-12)
        out = (values.abs() > limit) | (~values.isfinite() & first.isfinite()[:, None])
        if self.metric and bool(out.any()):
            at = int(out.any(2).any(0).nonzero()[0])
            warnings.warn(
                f"the simulation diverges: at step {at} it left {limit:.3g}",
                RuntimeWarning,
                stacklevel=3,
            )
        elif found["radius"] > UNSTABLE:
            warnings.warn(
                f"the recurrence is unstable: the largest spectral radius of a step is "
                f"{found['radius']:.4g} > {UNSTABLE}",
                RuntimeWarning,
                stacklevel=3,
            )
        diverged = out.any(1) if self.metric else torch.zeros_like(out[:, 0])
        return Prediction(values, diverged, found)

    def attribute(
        self, train: Iterable[Id] | None = None, test: Iterable[Id] | None = None, **options: Any
    ) -> Tensor:
        """Scores [len(train), len(test)] of pairs; see :func:`tenfold.gptfluence.influence.attribute`."""
        return influence.attribute(self, train, test, **options)

    def self_influence(self, ids: Iterable[Id] | None = None, kind: str = "alpha") -> Tensor:
        """[N]: what an example does to itself; see :func:`tenfold.gptfluence.influence.self_influence`."""
        return influence.self_influence(self, ids, kind)

    def with_features(
        self, train: Features | None = None, test: Features | None = None
    ) -> Simulator:
        """The same weights over other examples, which need not have been there at the fit.

        Unseen training examples work; a warning is given for unseen test examples, for which predictions are no
        better than a
        constant in most settings (section 5 of the specification).
        """
        made = Simulator(train or self.train, test or self.test, self.config)
        for name, old, new in (
            ("training", self.train, made.train),
            ("test", self.test, made.test),
        ):
            if (old.width, old.encoder) != (new.width, new.encoder):
                raise ValueError(
                    f"the simulator's {name} features are of {old.encoder!r}, width {old.width}; got {new.encoder!r}, "
                    f"width {new.width}"
                )
        made.network.load_state_dict(self.network.state_dict())
        for name in ("metric", "scale", "range", "level", "batch", "fitted", "record"):
            setattr(made, name, getattr(self, name))
        if test is not None and set(test.ids) - set(self.test.ids):
            warnings.warn(
                "predictions for test examples that were not fitted are rarely better than a constant",
                stacklevel=2,
            )
        return made

    def save(self, folder: str | Path, features: bool = True) -> Path:
        """Writes settings and weights; with ``features``, both tables as files of their own beside them."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in self.network.state_dict().items()}, folder / WEIGHTS
        )
        if features:
            self.train.save(folder / TRAIN)
            self.test.save(folder / TEST)
        about = {
            "format": FORMAT, "config": self.config.to_json(), "metric": self.metric, "scale": self.scale,
            "range": self.range, "level": self.level, "batch": self.batch, "fitted": self.fitted,
            "record": None if self.record is None else self.record.to_json(),
            "features": {name: {"encoder": f.encoder, "width": f.width}
                         for name, f in (("train", self.train), ("test", self.test))},
        }  # fmt: skip
        write_text(folder / FILE, json.dumps(about) + "\n")
        return folder

    @classmethod
    def load(
        cls, folder: str | Path, train: Features | None = None, test: Features | None = None
    ) -> Simulator:
        """What :meth:`save` wrote, over the given features or those beside it.

        Raises ValueError if the folder has no simulator, or the features are of another encoder or width than at
        the fit.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            about = json.loads((folder / FILE).read_text())
            if about["format"] != FORMAT:
                raise KeyError("format")
        except (OSError, ValueError, KeyError):
            raise ValueError(f"{folder} has no simulator: no {FILE} of {FORMAT}") from None
        tables = {
            "train": train or Features.load(folder / TRAIN),
            "test": test or Features.load(folder / TEST),
        }
        for name, table in tables.items():
            want = about["features"][name]
            if (want["encoder"], want["width"]) != (table.encoder, table.width):
                raise ValueError(
                    f"{folder} was fitted to {name} features of {want['encoder']!r}, width {want['width']}; got "
                    f"{table.encoder!r}, width {table.width}"
                )
        made = cls(tables["train"], tables["test"], SimulatorConfig.from_json(about["config"]))
        made.network.load_state_dict(load_file(folder / WEIGHTS))
        made.metric, made.scale, made.batch = about["metric"], about["scale"], about["batch"]
        made.range, made.level, made.fitted = (
            tuple(about["range"]),
            about["level"],
            tuple(about["fitted"]),
        )
        if about["record"] is not None:
            made.record = FitRecord(**about["record"])
        return made


def _mapped(given: Any, row: Any) -> Any:
    if isinstance(given, list | tuple) or (
        hasattr(given, "__iter__") and not isinstance(given, str)
    ):
        return [_mapped(part, row) for part in given]
    return row(given)
