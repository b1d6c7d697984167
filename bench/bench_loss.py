# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ``loss``: the cases of its groups, one module each."""

from __future__ import annotations

import importlib

from .case import Case

GROUPS = ("logprob", "linear", "sequence", "weighted", "traces", "classes", "reward")


def cases() -> list[Case]:
    """All cases of the family, in the order of the table."""
    modules = [importlib.import_module(f"{__package__}.loss_{group}") for group in GROUPS]
    return [case for module in modules for case in module.cases()]
