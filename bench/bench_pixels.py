# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ``pixels``: the cases of its groups, one module each."""

from __future__ import annotations

import importlib

from .case import Case

GROUPS = ("patches", "mse")


def cases() -> list[Case]:
    """All cases of the family, in the order of the table."""
    modules = [importlib.import_module(f"{__package__}.pixels_{group}") for group in GROUPS]
    return [case for module in modules for case in module.cases()]
