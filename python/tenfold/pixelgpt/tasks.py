# SPDX-License-Identifier: Apache-2.0
"""Classification tasks: the GLUE and XNLI layouts, own files, and names on the hub; read into one form.

An example is one text or two, and a label: a class, or a number for regression. Files are tab-separated with a header
(GLUE's and XNLI's own, by column name), or JSON lines; hub names need the package ``datasets``.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.training.checks import one_of
from tenfold.training.metrics import METRICS


@dataclass(frozen=True)
class Example:
    """``text`` and, in tasks about pairs, ``other``; ``label`` a class's number or a score."""

    text: str
    other: str | None = None
    label: float = 0
    language: str = ""


@dataclass(frozen=True)
class TaskSpec:
    """What a task is.

    Attributes:
        name. first, second: names of the columns of the texts that are tried in turn (no ``second``: one text).
        labels: names of the classes, by number; empty: a regression.
        label: names of the label's column. metric: one of ``METRICS``. hub: (repository, configuration).
        header: False where files have none; then columns are named by their number.
        pretokenized: texts have spaces before punctuation, which rendering should not show.
    """

    name: str
    first: tuple[str, ...] = ("text", "sentence")
    second: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    metric: str = "accuracy"
    hub: tuple[str, str | None] | None = None
    header: bool = True
    pretokenized: bool = False

    def __post_init__(self) -> None:
        one_of("metric", self.metric, tuple(METRICS))

    @property
    def num_labels(self) -> int:
        """Classes; 1 for a regression."""
        return len(self.labels) or 1


_NLI = ("entailment", "neutral", "contradiction")
_PAIR = (("sentence1", "#1 String", "premise"), ("sentence2", "#2 String", "hypothesis"))
_QUESTIONS = (("question1",), ("question2",))
_ENTAILS = ("entailment", "not_entailment")


def _glue(name: str, **rest: Any) -> TaskSpec:
    return TaskSpec(name, hub=("nyu-mll/glue", name), pretokenized=True, **rest)


TASKS: dict[str, TaskSpec] = {
    t.name: t
    for t in (
        _glue("mnli", first=_PAIR[0], second=_PAIR[1], labels=_NLI, label=("gold_label", "label")),
        _glue("qqp", first=_QUESTIONS[0], second=_QUESTIONS[1], labels=("not_duplicate", "duplicate"),
              label=("is_duplicate", "label"), metric="f1"),
        _glue("qnli", first=("question",), second=("sentence",), labels=_ENTAILS),
        _glue("sst2", first=("sentence",), labels=("negative", "positive")),
        _glue("cola", first=("3", "sentence"), labels=("unacceptable", "acceptable"), label=("1", "label"),
              metric="matthews", header=False),
        _glue("stsb", first=_PAIR[0], second=_PAIR[1], label=("score", "label"), metric="spearman"),
        _glue("mrpc", first=_PAIR[0], second=_PAIR[1], labels=("not_equivalent", "equivalent"),
              label=("Quality", "label"), metric="f1"),
        _glue("rte", first=_PAIR[0], second=_PAIR[1], labels=_ENTAILS),
        _glue("wnli", first=_PAIR[0], second=_PAIR[1], labels=("not_entailment", "entailment")),
        TaskSpec("xnli", _PAIR[0], _PAIR[1], _NLI, ("gold_label", "label"), hub=("facebook/xnli", None)),
    )
}  # fmt: skip
XNLI_LANGUAGES = ("en", "fr", "es", "el", "de", "bg", "ru", "tr", "ar", "vi", "th", "zh", "hi", "sw", "ur")  # fmt: skip

_BEFORE = re.compile(r" (n't|'s|'m|'re|'ve|'ll|'d|[.,:;?!%)\]}])(?=\s|$)", re.IGNORECASE)
_AFTER = re.compile(r"(^|\s)([(\[{$]) ")


def detokenized(text: str) -> str:
    """A text as it is printed: without the spaces that tokenised corpora put before punctuation and clitics.

    PIXEL's recipe for rendering GLUE; section 3.8 of the method's specification.
    """
    text = re.sub(r"`` ", '"', text)
    text = re.sub(r" ''", '"', text)
    text = _BEFORE.sub(r"\1", text)
    text = _AFTER.sub(r"\1\2", text)
    return re.sub(r"\s+", " ", text).strip()


def _column(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}: no column {' or '.join(names)}; there are: {', '.join(row)}")


def _label(value: Any, spec: TaskSpec, where: str) -> float:
    if not spec.labels:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}: the label of {spec.name} is a number, got {value!r}"
            ) from None
    if isinstance(value, str) and value in spec.labels:
        return spec.labels.index(value)
    # XNLI's own files say "contradictory".
    if value == "contradictory" and "contradiction" in spec.labels:
        return spec.labels.index("contradiction")
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or not 0 <= number < len(spec.labels) or str(number) != str(value).strip():  # fmt: skip
        raise ValueError(
            f"{where}: a label of {spec.name} is one of {', '.join(spec.labels)} or its number, got {value!r}"
        )
    return number


def example_of(row: Mapping[str, Any], spec: TaskSpec, where: str = "row") -> Example | None:
    """An example from a row by column names; None for one without a gold label ("-" or -1).

    Raises ValueError, naming ``where``, for missing columns and unknown labels.
    """
    value = _column(row, spec.label, where)
    if value in ("-", -1, "-1") and spec.labels:
        return None
    other = str(_column(row, spec.second, where)) if spec.second else None
    return Example(
        str(_column(row, spec.first, where)), other, _label(value, spec, where), str(row.get("language") or "")
    )  # fmt: skip


def _tsv(path: Path, header: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names: list[str] | None = None
        for number, row in enumerate(reader, 1):
            if header and names is None:
                names = [n.lstrip("\ufeff") for n in row]
                continue
            if not row:
                continue
            keys = names or [str(i) for i in range(len(row))]
            if len(row) < len(keys):
                raise ValueError(
                    f"{path}, line {number}: {len(row)} columns, the header has {len(keys)}"
                )
            yield number, dict(zip(keys, row))


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        yield number, row


def read_examples(
    source: str | Path, spec: TaskSpec, *, split: str = "train", languages: Sequence[str] = (),
) -> list[Example]:  # fmt: skip
    """Examples of a file, or of the task's data set on the hub.

    Args:
        source: a ``.tsv``, ``.jsonl`` or ``.json`` (lines) file; a folder that has ``<split>.tsv`` or ``.jsonl``
            (GLUE's layout; ``validation`` is also looked for as ``dev``); or ``"hub"``, or a hub name.
        spec: of the task. split: which part. languages: only these, where rows have a language (XNLI).

    Raises:
        ValueError: rows that do not fit the task, by file and line; no example. FileNotFoundError.
        ModuleNotFoundError: a hub name without the package ``datasets``.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = _in_folder(path, split)
    rows: Iterable[tuple[int, Mapping[str, Any]]]
    if path.suffix in (".tsv", ".jsonl", ".json"):
        if not path.is_file():
            raise FileNotFoundError(f"no file at {str(path)!r}")
        rows = _tsv(path, spec.header) if path.suffix == ".tsv" else _jsonl(path)
    else:
        rows = enumerate(_hub(str(source), spec, split, languages))
    found = []
    for number, row in rows:
        made = example_of(row, spec, f"{source}, line {number}")
        if made is not None and (not languages or not made.language or made.language in languages):
            found.append(made)
    if not found:
        raise ValueError(f"{source} has no example of {spec.name}")
    return found


def _in_folder(folder: Path, split: str) -> Path:
    names = {"validation": ("validation", "dev", "dev_matched")}.get(split, (split,))
    for name in names:
        for suffix in (".tsv", ".jsonl"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    raise FileNotFoundError(f"{str(folder)!r} has no {' or '.join(names)} as .tsv or .jsonl")


def hub_rows(name: str, part: str | None, **options: Any) -> Iterable[Mapping[str, Any]]:
    """Rows of a data set on the hub; ``options`` are those of ``datasets.load_dataset``.

    Raises ModuleNotFoundError, with the command that installs it, without the package ``datasets``.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ModuleNotFoundError(
            f"{name!r} is no file; names on the hub need datasets: `pip install datasets`"
        )
    from datasets import load_dataset

    return load_dataset(name, part, **options)


def _hub(
    name: str, spec: TaskSpec, split: str, languages: Sequence[str]
) -> Iterator[dict[str, Any]]:
    repository, configuration = (spec.hub or (name, None)) if name == "hub" else (name, None)
    if name == "hub" and spec.hub is None:
        raise ValueError(f"task {spec.name!r} has no name on the hub; give a file or a name")
    if name == "hub" and spec.name == "mnli" and split == "validation":
        split = "validation_matched"
    parts = languages if spec.name == "xnli" and languages else [configuration]
    for part in parts:
        for row in hub_rows(repository, part, split=split):
            yield dict(row) | ({"language": part} if spec.name == "xnli" and part else {})


def printed(examples: Iterable[Example]) -> list[Example]:
    """Examples with :func:`detokenized` texts."""
    return [
        Example(detokenized(e.text), None if e.other is None else detokenized(e.other), e.label,
                e.language)
        for e in examples
    ]  # fmt: skip
