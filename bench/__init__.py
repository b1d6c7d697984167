# SPDX-License-Identifier: Apache-2.0
"""tenfold's benchmark kit; shipped in the wheel as ``tenfold._bench``.

A family's cases live in ``bench_<family>.py``. Run them with ``tenfold bench``, ``python -m bench`` or
``pytest bench/``: all three use the same harness. This module imports nothing heavy, so that
``python -m bench.gpu_status`` needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(
    families: Sequence[str] | None = None,
    quick: bool = False,
    out: str | Path = "tenfold-report/bench",
    json: bool = False,
    **options: Any,
) -> int:
    """Benchmarks ``families`` (default: all), writes JSON and HTML under ``out``; see ``runner.run``."""
    from .runner import run as run_families

    return run_families(families, quick=quick, out=out, json=json, **options)
