# SPDX-License-Identifier: Apache-2.0
"""Training and test rows by family: packaged tasks, JSON-lines files, or the caller's own rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.upit.recipe import DataSpec

Rows = dict[str, Tensor]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Families:
    """Rows [R, S] of all families: ``train`` of all together, with the family of each, ``tests`` by family."""

    names: tuple[str, ...]
    train: Rows
    family: Tensor
    tests: Mapping[str, Rows]

    @classmethod
    def of(cls, given: Mapping[str, tuple[Rows, Rows]]) -> Families:
        """From (training rows, test rows) by name."""
        if not given:
            raise ValueError("data must have at least one family")
        parts = [train for train, _ in given.values()]
        train = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        sizes = torch.tensor([len(p["input_ids"]) for p in parts])
        family = torch.repeat_interleave(torch.arange(len(parts)), sizes)
        return cls(tuple(given), train, family, {n: test for n, (_, test) in given.items()})


def read_pairs(file: str | Path) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of a JSON-lines file. ValueError names the line that is none."""
    found = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            found.append((str(given["prompt"]), str(given["answer"])))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file}, line {number}: needs an object with prompt, answer"
            ) from None
    return found


def load_families(
    spec: DataSpec, encode: Encode, length: int, end: int | None, pad: int = 0, seed: int = 0
) -> Families:
    """The families of a recipe's ``data``; test rows are the same for every seed.

    Raises:
        ValueError: an unknown task, a file that is not rows, too few rows.
    """
    from tenfold.training import tasks

    made: dict[str, tuple[Rows, Rows]] = {}
    packaged = tasks.make_tasks(spec.tasks, encode, length, end, pad, train=spec.train, test=spec.test,
                                seed=seed)  # fmt: skip
    for task in packaged:
        made[task.name] = (task.train, task.test)
    for name, file in spec.files:
        if name in made:
            raise ValueError(f"data has the family {name!r} twice")
        found = read_pairs(file)
        if len(found) <= spec.test:
            raise ValueError(
                f"{file} has {len(found)} rows, and {spec.test} are held out for the test (data.test)"
            )
        held, rest = found[: spec.test], found[spec.test :]
        random.Random(f"{seed}:{name}").shuffle(rest)
        train, test = (
            tasks.rows_of_pairs(p, encode, length, end, pad) for p in (rest[: spec.train], held)
        )
        made[name] = (train, test)
    return Families.of(made)


@torch.inference_mode()
def family_losses(model: Any, tests: Mapping[str, Rows], batch_size: int = 16) -> dict[str, float]:
    """Mean loss (nats) per answer token of each family, and ``mean`` over families."""
    from tenfold.training.scoring import score

    found = {n: -score(model, dict(rows), batch_size)["log_prob"] for n, rows in tests.items()}
    return found | {"mean": sum(found.values()) / len(found)}


def shares(family: Tensor, index: Sequence[int], count: int) -> list[float]:
    """Share of each family among some training rows."""
    found = torch.bincount(family[torch.as_tensor(index, dtype=torch.int64)], minlength=count)
    return (found / max(1, len(index))).tolist()
