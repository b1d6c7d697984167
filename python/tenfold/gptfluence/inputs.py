# SPDX-License-Identifier: Apache-2.0
"""What the command line reads and writes: folders of recorded runs with their texts, curricula, first values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.gptfluence.features import Features
from tenfold.gptfluence.ids import Id, checked
from tenfold.gptfluence.reference_format import json_lines, read_reference, read_samples
from tenfold.gptfluence.runs import RunSet, read_runs
from tenfold.training.store import write_text

RUNS, TRAIN, TESTS = "runs", "train.jsonl", "tests.jsonl"
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Recorded:
    """Recorded runs, and the texts of their examples and tests by id."""

    runs: RunSet
    train: dict[Id, dict[str, str]]
    tests: dict[Id, dict[str, str]]

    def features(self, encoder: Any) -> tuple[Features, Features]:
        """Features of the examples and tests that the runs have. ValueError for one without a text."""
        made = []
        for what, ids, samples in (
            ("example", self.runs.train_ids, self.train),
            ("test", self.runs.test_ids, self.tests),
        ):
            lost = [i for i in ids if i not in samples]
            if lost:
                raise ValueError(f"there is no text for the {what} {lost[0]!r} of the runs")
            made.append(Features.of_texts(ids, [samples[i]["text"] for i in ids], encoder))
        return made[0], made[1]


def read_recorded(
    folder: str | Path, metric: str | None = None, *, missing: str = "raise", published: bool = False,
    train: str | Path | None = None, tests: str | Path | None = None,
) -> Recorded:  # fmt: skip
    """A folder of ``tenfold gptfluence record``: ``runs/``, ``train.jsonl``, ``tests.jsonl``.

    ``published``: a folder of runs in the published layout. train, tests: files of texts elsewhere.
    """
    folder = Path(folder)
    if published:
        found = [
            read_reference(p.parent, metric or "loss")
            for p in sorted(folder.glob("*/train_samples_id.json"))
        ]
        if not found:
            raise ValueError(f"{folder} has no runs in the published layout")
    else:
        found = read_runs(folder / RUNS if (folder / RUNS).is_dir() else folder)
    texts = [
        read_samples(given or folder / name) for given, name in ((train, TRAIN), (tests, TESTS))
    ]
    runs = RunSet.of(found, metric or _only(found), missing=missing)
    return Recorded(runs, texts[0], texts[1])


def _only(found: Sequence[Any]) -> str:
    names = list(found[0].values)
    return "loss" if "loss" in names else names[0]


def write_samples(samples: Mapping[Id, Mapping[str, str]], path: Path) -> None:
    """Texts by id as JSON lines, as :func:`read_samples` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": name, **{k: v for k, v in s.items() if k != "text"}}, ensure_ascii=False)
        for name, s in samples.items()
    ]
    write_text(path, "\n".join(lines) + "\n")


def read_curriculum(path: str | Path) -> list[list[Id]]:
    """Batches of ids: JSON lines with ``samples_id``. ValueError names file and line."""
    made = []
    for number, given in json_lines(path):
        ids = given.get("samples_id")
        if not isinstance(ids, list):
            raise ValueError(f"{path}, line {number}: needs samples_id, a list")
        made.append([checked(i, f"{path}, line {number}") for i in ids])
    if not made:
        raise ValueError(f"{path} has no batches")
    return made


def read_values(path: str | Path, tests: Iterable[Id]) -> Tensor:
    """The values [Q] of tests: a JSON object, test -> number. ValueError names a test that is not there."""
    try:
        given = json.loads(Path(path).read_text())
        return torch.tensor([float(given[str(t)]) for t in tests])
    except KeyError as error:
        raise ValueError(f"{path} has no value of test {error.args[0]!r}") from None
    except (ValueError, TypeError):
        raise ValueError(f"{path} must be a JSON object, test -> number") from None


def id_of(text: str, known: Iterable[Id]) -> Id:
    """An id as it was typed: a string, or the integer that it is. UnknownId for none that is known."""
    from tenfold.gptfluence.ids import UnknownId

    for name in known:
        if str(name) == text:
            return name
    raise UnknownId(f"there is no example or test {text!r}")
