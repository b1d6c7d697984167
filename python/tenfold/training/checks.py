# SPDX-License-Identifier: Apache-2.0
"""Checks that the methods' settings share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any


def positive(name: str, value: float) -> None:
    """ValueError unless ``value`` is a positive number."""
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"{name} must be a positive number, got {value}")


def not_negative(name: str, value: float) -> None:
    """ValueError unless ``value`` is a number >= 0."""
    if not value >= 0 or not math.isfinite(value):
        raise ValueError(f"{name} must be a number >= 0, got {value}")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """ValueError, with the choices, unless ``value`` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def integers(settings: Any, least: Mapping[str, int], optional: tuple[str, ...] = ()) -> None:
    """TypeError or ValueError unless these settings are integers of at least so much."""
    for name, low in least.items():
        value = getattr(settings, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < low:
            raise ValueError(f"{name} must be >= {low}, got {value}")
