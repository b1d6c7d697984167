# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ``optim``: the cases of its groups, one module each."""

from __future__ import annotations

from . import optim_adamw, optim_masks
from .case import Case


def cases() -> list[Case]:
    """All cases of the family, in the order of the table."""
    return [case for group in (optim_adamw, optim_masks) for case in group.cases()]
