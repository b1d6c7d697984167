"""Benchmarks of ``attention``: the cases of its groups, one module each."""

from __future__ import annotations

import importlib
import importlib.util

from .case import Case

GROUPS = ("heads", "prefill", "decode")


def cases() -> list[Case]:
    """All cases of the family, in the order of the table."""
    names = [f"{__package__}.attention_{group}" for group in GROUPS]
    found = [n for n in names if importlib.util.find_spec(n) is not None]
    return [case for name in found for case in importlib.import_module(name).cases()]
