"""Benchmarks of ``optim``: the cases of its groups, one module each."""

from __future__ import annotations

import importlib
import importlib.util

from .case import Case

GROUPS = ("adamw", "masks")


def cases() -> list[Case]:
    """All cases of the family, in the order of the table."""
    names = [f"{__package__}.optim_{group}" for group in GROUPS]
    modules = [importlib.import_module(n) for n in names if importlib.util.find_spec(n)]
    return [case for module in modules for case in module.cases()]
