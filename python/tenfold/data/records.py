# SPDX-License-Identifier: Apache-2.0
"""Records of users' files: JSON Lines, JSON, CSV, TSV, and pairs of files whose lines belong together."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


def _open(path: Path) -> TextIO:
    # newline="": csv wants line ends as they are, and a text's own carriage returns are text.
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a file, one at a time.

    Args:
        path: ``.jsonl`` (an object per line), ``.json`` (a list of objects, or an object per line), ``.csv`` or
            ``.tsv`` (names in the first line); each also with ``.gz``.

    Raises:
        ValueError: another suffix, or, with file and line, something that is not a record.
    """
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: records are read from files {', '.join(SUFFIXES)} (or with .gz), got {suffix!r}"
        )
    with _open(path) as file:
        if suffix in (".csv", ".tsv"):
            yield from _table(path, file, "," if suffix == ".csv" else "\t")
        elif suffix == ".json" and file.read(1).strip() in ("[", ""):
            file.seek(0)
            yield from _list(path, file)
        else:
            file.seek(0)
            yield from _lines(path, file)


def _table(path: Path, file: TextIO, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # source files are longer than the default of 128 KiB
    reader = csv.DictReader(file, delimiter=delimiter)
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, line {reader.line_num}: {len(reader.fieldnames or ())} fields are named, this line has "
                "another number of them"
            )
        yield row


def _list(path: Path, file: TextIO) -> Iterator[dict[str, Any]]:
    try:
        found = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    for number, record in enumerate(found):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: element {number} is {type(record).__name__}, not an object")
        yield record


def _lines(path: Path, file: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error.msg}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: {type(record).__name__}, not an object")
        yield record


def read_parallel(first: str | Path, second: str | Path) -> Iterator[tuple[str, str]]:
    """Lines of two files that belong together, without their line ends.

    Raises ValueError if one file has more lines.
    """
    with _open(Path(first)) as a, _open(Path(second)) as b:
        number = 0
        while True:
            x, y = a.readline(), b.readline()
            number += 1
            if not x and not y:
                return
            if not x or not y:
                raise ValueError(f"{first} and {second}: only one of them has a line {number}")
            yield x.rstrip("\r\n"), y.rstrip("\r\n")
