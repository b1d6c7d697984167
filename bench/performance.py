# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md: every op's floor, the share of it that is reached, and who is faster where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from . import sources
from .pictures import Row, picture
from .tables import (
    Record,
    Rows,
    markdown,
    newest,
    ours_of,
    ratio_text,
    setting,
    shape_text,
    time_text,
)

COLUMNS = (
    "op",
    "largest case",
    "its floor",
    "time",
    "of ceiling",
    "all cases",
    "vs eager",
    "vs compile",
    "vs peer",
    "behind in",
)
# Of a CPU's table: what the same case takes at least on a GPU that nothing has been measured on.
PREDICTED = "floor on an H200 (predicted)"
# Its datasheet's peaks, of HBM3e and of dense products without sparsity: bytes and FLOP/s.
H200 = {"memory": 4.8e12, "fma_fp32": 67e12, "dot_bf16": 989e12}
ON_THE_HOST = frozenset({"group_heads", "allocate_heads"})  # whatever the device of their arguments
PAGE, PICTURES = Path("docs/performance.md"), Path("docs/images")


def ops_of(record: Record) -> dict[str, list[Record]]:
    """The cases of each op in which ours could be timed."""
    groups: dict[str, list[Record]] = {}
    for case in record["cases"]:
        if ours_of(case)["p50_s"] is not None:
            groups.setdefault(case["op"], []).append(case)
    return groups


def _floor_seconds(case: Record) -> float:
    ours = ours_of(case)
    return ours["share"] * ours["p50_s"]


def _short(seconds: float) -> str:
    return time_text(seconds) if seconds >= 5e-7 else "< 1 µs"


def predicted_seconds(case: Record) -> float:
    """What an H200 needs at least for a case, by the peaks of its datasheet."""
    compute = case["flops"] / H200[case["peak"]] if case["flops"] else 0.0
    return max(case["bytes"] / H200["memory"], compute)


def predicted_text(case: Record) -> str:
    """``predicted_seconds``, or that a GPU has no part in the op."""
    return "on the host" if case["op"] in ON_THE_HOST else _short(predicted_seconds(case))


def columns_of(record: Record) -> tuple[str, ...]:
    """``COLUMNS``, on a CPU with what is predicted of a GPU after its floor."""
    at = COLUMNS.index("its floor") + 1
    more = (PREDICTED,) if record["device_type"] == "cpu" else ()
    return (*COLUMNS[:at], *more, *COLUMNS[at:])


def _amount(value: float, unit: str) -> str:
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def floor_text(case: Record) -> str:
    """What a case has to move and to compute, and how long the ceiling that binds takes for it."""
    parts = [_amount(case["bytes"], "B")]
    if case["flops"]:
        parts.append(_amount(case["flops"], "FLOP"))
    if case["bound"] == "compute":
        parts.reverse()
    return f"{', '.join(parts)}: {_short(_floor_seconds(case))}"


def _case_text(case: Record) -> str:
    variant = f"{case['variant']}, " if case["variant"] else ""
    return f"{variant}{shape_text(case)}, {case['dtype']}"


def _percent(share: float) -> str:
    return "< 1 %" if share < 0.005 else f"{100 * share:.0f} %"


def _range(shares: Sequence[float]) -> str:
    ends = [_percent(min(shares)), _percent(max(shares))]
    return " to ".join(dict.fromkeys(ends))


def _spread(cases: Sequence[Record], kind: str) -> str:
    """Median of the ratios to a kind of provider, and the least in brackets."""
    ratios = [c["ratios"][kind] for c in cases if c["ratios"].get(kind)]
    if not ratios:
        return "–"
    return ratio_text(median(ratios)) + (f" ({min(ratios):.2f}×)" if len(ratios) > 1 else "")


def behind(case: Record) -> bool:
    """Is another provider faster, by what two decimals show?"""
    best = case["ratios"].get("best_other")
    return best is not None and round(best, 2) < 1


def row_of(op: str, cases: Sequence[Record], predict: bool = False) -> list[str]:
    """An op as a row of ``COLUMNS``; ``predict``: with the floor on an H200."""
    largest = max(cases, key=_floor_seconds)
    ours = ours_of(largest)
    rivals = [c for c in cases if c["ratios"].get("best_other")]
    return [
        f"`{op}`", _case_text(largest), floor_text(largest),
        *([predicted_text(largest)] if predict else []), time_text(ours["p50_s"]), _percent(ours["share"]),
        _range([ours_of(c)["share"] for c in cases]),
        *(_spread(cases, kind) for kind in ("eager", "compile", "peer")),
        f"{sum(map(behind, rivals))} of {len(rivals)}",
    ]  # fmt: skip


def losses(record: Record) -> list[str]:
    """A line for each case in which another provider is faster, the worst first."""
    found = []
    for op, cases in ops_of(record).items():
        for case in filter(behind, cases):
            others = [(p["p50_s"], name) for name, p in case["providers"].items()
                      if p["kind"] in ("eager", "compile", "peer") and p["status"] == "ok" and p["p50_s"]]  # fmt: skip
            ratio = case["ratios"]["best_other"]
            text = f"- `{op}` ({_case_text(case)}): {ratio_text(ratio)} of `{min(others)[1]}`"
            found.append((ratio, text))
    return [text for _, text in sorted(found)]


def _name(record: Record) -> str:
    beside = f"-{record['machine']}" if record["device_type"] == "cuda" else ""
    return f"performance-{record['family']}{beside}.svg"


def chosen(records: Sequence[Record], family: str) -> list[Record]:
    """The last measurement of a family on a CPU, and that on a GPU."""
    mine = [r for r in records if r["family"] == family]
    kinds = ([r for r in mine if r["device_type"] == kind] for kind in ("cpu", "cuda"))
    return [record for kind in kinds for record in newest(kind)]


def _section(record: Record) -> str:
    groups = ops_of(record)
    columns = columns_of(record)
    rows: Rows = [row_of(op, cases, PREDICTED in columns) for op, cases in groups.items()]
    worse = losses(record)
    total = sum(1 for cases in groups.values() for c in cases if c["ratios"].get("best_other"))
    said = f"Another provider is faster in {len(worse)} of {total} cases:" if worse else (
        f"No other provider is faster in any of {total} cases.")  # fmt: skip
    shown = f"{record['family']}: share of the ceiling, and ratio to the best other provider"
    picture_line = f"![{shown}](images/{_name(record)})"
    parts = [f"{setting(record)}.", picture_line, markdown(columns, rows), said]
    return "\n\n".join([*parts, "\n".join(worse)] if worse else parts)


def blocks(root: Path, load: Callable[[Path], list[Record]]) -> dict[str, Callable[[Path], str]]:
    """The generated part of each family's section."""

    def make(family: str) -> Callable[[Path], str]:
        def block(root: Path) -> str:
            parts = [_section(record) for record in chosen(load(root), family)]
            return "\n\n".join(parts) or "No measurement has been committed."

        return block

    return {f"performance-{family}": make(family) for family in sources.families(root)}


def pictures(root: Path, records: Sequence[Record]) -> dict[Path, str]:
    """The pictures that the page shows, as texts: the same bytes on every machine."""
    found = {}
    for family in sources.families(root):
        for record in chosen(records, family):
            rows = [Row(op, [(ours_of(c)["share"], c["ratios"].get("best_other"), c["dtype"]) for c in cases])
                    for op, cases in ops_of(record).items()]  # fmt: skip
            found[root / PICTURES / _name(record)] = picture(record["family"], rows)
    return found
