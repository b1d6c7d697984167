# SPDX-License-Identifier: Apache-2.0
"""What all generated tables share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Rows = list[list[str]]
RESULTS = Path("bench/results")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first three columns are text, the others numbers."""
    rule = ["---" if i < 3 else "---:" for i in range(len(columns))]
    lines = [columns, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ours_of(case: Record) -> Record:
    """What tenfold's own provider took."""
    return next(p for p in case["providers"].values() if p["kind"] == "tenfold")


def time_text(seconds: float) -> str:
    """Milliseconds, or microseconds below one of them."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def ratio_text(value: float | None) -> str:
    """Times as fast, or a dash."""
    return "–" if value is None else f"{value:.2f}×"


def shape_text(case: Record) -> str:
    """Short text of a case's shape, e.g. ``Hq 32, Hkv 8, D 128, L 4096, W 40``."""
    names = {"hq": "Hq", "hkv": "Hkv", "h": "H", "d": "D", "l": "L", "w": "W", "c": "C"}
    text = ", ".join(f"{names.get(k, k)} {v}" for k, v in case["shape"].items())
    return f"{text} (ragged)" if "ragged" in case["variant"] else text


def setting(record: Record) -> str:
    """Where and with what a record was measured, in one sentence."""
    env, top = record["environment"], record["ceilings"]
    peaks = ", ".join(f"{k} {v['value']:.0f} {v['unit']}" for k, v in top.items())
    commit = (record.get("commit") or "unknown")[:10]
    threads = "" if record["device_type"] == "cuda" else f", {env['threads']} threads, {env['isa']}"
    limits = "".join(f", {k}={v}" for k, v in env.get("limits", {}).items())
    return (
        f"{env['device']}{threads}, torch {env['versions']['torch']}{limits}, commit {commit}, "
        f"{record['date']}; ceilings measured in the same run: {peaks}"
    )


def newest(records: Sequence[Record]) -> list[Record]:
    """The last measured record of every family, in the order of their names."""
    found = {r["family"]: r for r in sorted(records, key=lambda r: (r["date"], r["time"]))}
    return [found[name] for name in sorted(found)]
