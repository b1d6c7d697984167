# SPDX-License-Identifier: Apache-2.0
"""GPU ledger: is each family's CUDA code the code that was last proven on an H200?

    python -m bench.gpu_status          kv_eviction verified | stale | never

*verified*: ``bench/results/h200/<family>.json`` says that tests, sanitizer and benchmarks passed on
sources with today's hash. *stale*: they passed on other sources. *never*: there is no such result.
Results of an H100 are a machine of their own: where there are any, ``(h100 verified)`` or
``(h100 stale)`` follows. ``bench/gpu.py`` writes the results. Standard library only: it runs where
nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # python bench/gpu_status.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from bench.sources import cuda_hash, families, repository_root
else:
    from .sources import cuda_hash, families, repository_root


MACHINES = ("h200", "h100")  # the ledger's, and others that count for themselves


def status(root: Path, family: str, results: Path | None = None, machine: str = "h200") -> str:
    """``verified``, ``stale`` or ``never``."""
    path = (results or root / "bench" / "results") / machine / f"{family}.json"
    if not path.is_file():
        return "never"
    try:
        recorded = json.loads(path.read_text(encoding="utf-8")).get("verified_cuda_hash")
    except (json.JSONDecodeError, AttributeError):
        raise SystemExit(f"{path} is not a result file; remove it or restore it") from None
    if not recorded:
        return "never"
    return "verified" if recorded == cuda_hash(root, family) else "stale"


def others(root: Path, family: str) -> dict[str, str]:
    """Machines beside the H200 that have a proven result, and its status."""
    found = {m: status(root, family, machine=m) for m in MACHINES[1:]}
    return {m: state for m, state in found.items() if state != "never"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_status", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--root", type=Path, default=repository_root(), help="repository root")
    root = parser.parse_args(arguments).root
    if root is None or not (root / "csrc").is_dir():
        print("the GPU ledger needs the source tree (csrc/); run it in a checkout", file=sys.stderr)
        return 2
    for family in families(root):
        beside = "".join(f" ({m} {state})" for m, state in others(root, family).items())
        print(f"{family} {status(root, family)}{beside}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
