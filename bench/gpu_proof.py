# SPDX-License-Identifier: Apache-2.0
"""What proves CUDA kernels: records of steps, their union over several commands, and the verdict.

A step (``tests``, one per sanitizer tool, ``bench``) leaves ``<out>/steps/<name>.json``. Steps and
benchmark records count together if they ran the same CUDA sources and the same ``_ops.so`` on the same
model of GPU. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
TOOLS = ("memcheck", "racecheck", "synccheck")
PROOF = ("tests", *TOOLS)
# pytest's -k for the sanitizer: every kernel and dtype, without torch.compile, the largest output, and
# all but one of each of the longest rows.
SMALL = "not (standing_checks or large_output or 4099) or (4099 and kwargs0)"
# Never under the sanitizer: there each tensor is an allocation, which a capture forbids.
CAPTURES = "cuda_graph"
STOPPED = 124
# pytest's last line, with and without -q: "12 passed, 3 skipped in 4.00s".
_SUMMARY = re.compile(r"^=*\s?((?:\d+ [a-z]+(?:, )?)+) in \d", re.MULTILINE)


def counts(text: str) -> dict[str, int]:
    """``passed``, ``skipped``, ... of the last pytest summary in ``text``; empty if there is none."""
    found = _SUMMARY.findall(text)
    return {word: int(n) for n, word in re.findall(r"(\d+) ([a-z]+)", found[-1])} if found else {}


def write_step(out: Path, step: Record) -> Path:
    path = out / "steps" / f"{step['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(step, indent=1) + "\n", encoding="utf-8")
    return path


def read_steps(folders: Iterable[Path]) -> list[Record]:
    """All steps under ``folders``, oldest first."""
    paths = [p for folder in folders for p in sorted((folder / "steps").glob("*.json"))]
    return sorted((json.loads(p.read_text(encoding="utf-8")) for p in paths), key=_time)


def _time(step: Record) -> str:
    return str(step["time"])


def usable(
    steps: Iterable[Record], family: str, cuda_hash: str, ops_sha256: str, device: str
) -> tuple[dict[str, Record], list[str]]:
    """The newest usable step of each name, and why the others do not count."""
    wanted = {"cuda_hash": cuda_hash, "ops_sha256": ops_sha256, "device": device}
    kept: dict[str, Record] = {}
    refused = []
    for step in steps:
        mine = {**step, "cuda_hash": step["cuda_hash"].get(family)}
        differs = [key for key, value in wanted.items() if mine.get(key) != value]
        if differs:
            refused.append(f"{step['name']} of {step['time']}: another {', '.join(differs)}")
        else:
            kept[step["name"]] = mine
    return kept, refused


def read_records(
    folders: Iterable[Path], family: str, cuda_hash: str, ops_sha256: str, device: str
) -> list[Record]:
    """Usable benchmark records under ``folders``; of a stopped run, what it saved before it ended."""
    found = []
    for folder in folders:
        for path in sorted(folder.glob(f"*/{family}.json*")):
            if path.name not in (f"{family}.json", f"{family}.json.partial"):
                continue
            record = json.loads(path.read_text(encoding="utf-8"))
            env = record["environment"]
            mine = (record["cuda_sources"], env.get("ops_sha256"), env["device"])
            if mine == (cuda_hash, ops_sha256, device):
                found.append(record)
    return found


def merge_records(records: Sequence[Record]) -> Record | None:
    """One record of several runs: a case's newest numbers, the highest ceilings, shares of those.

    Quick runs count only if there is no other.
    """
    chosen = [r for r in records if not r["quick"]] or list(records)
    if not chosen:
        return None
    chosen = sorted(chosen, key=lambda r: str(r.get("time", r["date"])))
    merged: Record = json.loads(json.dumps(chosen[-1]))
    cases = {c["name"]: c for r in chosen for c in json.loads(json.dumps(r["cases"]))}
    every = merged.get("all_cases") or list(cases)
    merged["cases"] = [cases[n] for n in [*every, *cases] if n in cases]
    merged["cases"] = list({c["name"]: c for c in merged["cases"]}.values())
    merged["partial"] = any(n not in cases for n in every)
    merged["void"] = next((r["void"] for r in chosen if r["void"]), "")
    for other in chosen:
        for name, entry in other["ceilings"].items():
            if entry["value"] > merged["ceilings"][name]["value"]:
                merged["ceilings"][name] = entry
    if len(chosen) > 1:
        merged["merged_runs"] = len(chosen)
        for case in merged["cases"]:
            _rescale(case, merged["ceilings"])
    return merged


def _rescale(case: Record, ceilings: Record) -> None:
    floor = case["bytes"] / (ceilings[case.get("traffic", "copy")]["value"] * 1e9)
    if case["peak"]:
        floor = max(floor, case["flops"] / (ceilings[case["peak"]]["value"] * 1e9))
    for found in case["providers"].values():
        if found["p50_s"]:
            found["share"] = floor / found["p50_s"]


def doubts(steps: dict[str, Record], record: Record | None, wrong: Sequence[str]) -> list[str]:
    """Why the kernels are not proven; empty if they are. ``wrong``: what the benchmarks found so."""
    found = []
    for name in PROOF:
        step = steps.get(name)
        if step is None:
            found.append(f"{name}: has not run")
        elif step["status"] != 0:
            found.append(f"{name}: {step.get('note') or 'status {}'.format(step['status'])}")
        elif not step["passed"]:
            found.append(f"{name}: no test passed")
        elif name == "tests" and step["skipped"]:
            found.append(f"{name}: {step['skipped']} skipped")
        elif name in TOOLS and step["selection"] not in (SMALL, ""):
            found.append(f"{name}: ran a selection only ({step['selection']})")
    if record is None:
        found.append("bench: there is no record")
    for name, step in steps.items():  # a stopped benchmark is not a wrong one
        if name.startswith("bench") and step["status"] not in (0, STOPPED):
            found.append(f"{name}: status {step['status']}")
    return [*found, *wrong]
