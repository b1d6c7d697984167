# SPDX-License-Identifier: Apache-2.0
"""Pairs of texts for translation, and readers of users' files in the layouts of the field's data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tenfold.data.records import read_parallel, read_records


@dataclasses.dataclass(frozen=True)
class Pair:
    """A source and a target with the names of their languages; ``origin`` says where it is from."""

    source: str
    target: str
    source_language: str
    target_language: str
    origin: str = ""

    @property
    def name(self) -> str:
        """``English-Python``, the name of the pair's corpus."""
        return f"{self.source_language}-{self.target_language}"

    def turned(self) -> Pair:
        """The same pair in the other direction."""
        return Pair(
            self.target, self.source, self.target_language, self.source_language, self.origin
        )


class PairRows(Sequence):
    """Pairs as a map-style dataset of dicts, as ``PivotTranslationCollator`` takes them.

    Attributes:
        skipped: pairs with an empty side, which are left out.

    Args:
        strict: ValueError for such a pair instead.
    """

    def __init__(self, pairs: Sequence[Pair], *, strict: bool = False) -> None:
        self.pairs = [p for p in pairs if p.source.strip() and p.target.strip()]
        self.skipped = len(pairs) - len(self.pairs)
        if strict and self.skipped:
            number = next(i for i, p in enumerate(pairs) if not (p.source.strip() and p.target.strip()))  # fmt: skip
            raise ValueError(f"pair {number} has an empty source or target: {pairs[number]}")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [dataclasses.asdict(p) for p in self.pairs[number]]
        return dataclasses.asdict(self.pairs[number])


# Layout -> (fields of the source, fields of the target): the first one that a record has, and that is not empty.
LAYOUTS = {
    "codesearchnet": (("docstring", "docstring_tokens"), ("code", "code_tokens")),
    "conala": (("rewritten_intent", "intent"), ("snippet",)),
    "pairs": (("source",), ("target",)),
}


def read_pairs(
    path: str | Path, source_language: str, target_language: str, *, layout: str = "pairs",
    source_field: str | None = None, target_field: str | None = None,
) -> Iterator[Pair]:  # fmt: skip
    """Pairs of a JSON Lines, JSON, CSV or TSV file.

    Args:
        path: see ``tenfold.data.records.read_records``.
        layout: ``codesearchnet`` (``docstring`` -> ``code``; for summaries turn the pairs), ``conala`` (CoNaLa and
            MCoNaLa: ``rewritten_intent``, else ``intent`` -> ``snippet``), ``pairs`` (``source`` -> ``target``).
        source_field, target_field: other names. Lists of tokens are joined by spaces.

    Raises:
        ValueError: an unknown layout; with file and number, a record without one of the fields.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    sources, targets = LAYOUTS[layout]
    wanted = ((source_field,) if source_field else sources, (target_field,) if target_field else targets)  # fmt: skip
    for number, record in enumerate(read_records(path)):
        source, target = (_field(path, number, record, names) for names in wanted)
        yield Pair(source, target, source_language, target_language, f"{path}:{number}")


def _field(path: str | Path, number: int, record: dict[str, Any], names: Sequence[str]) -> str:
    there = [record[n] for n in names if record.get(n) is not None]
    if not there:
        raise ValueError(
            f"{path}: record {number} has no field {' or '.join(names)}; it has {', '.join(record)}"
        )
    value = next((v for v in there if v), there[0])
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def read_bugs2fix(buggy: str | Path, fixed: str | Path, language: str = "Java") -> Iterator[Pair]:
    """Pairs of Bugs2Fix: two files, a function per line (``train.buggy-fixed.buggy``, ``train.buggy-fixed.fixed``).

    Both languages are ``language``. Raises ValueError if one file has more lines.
    """
    for number, (before, after) in enumerate(read_parallel(buggy, fixed)):
        yield Pair(before, after, language, language, f"{buggy}:{number}")
