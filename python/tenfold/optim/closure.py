# SPDX-License-Identifier: Apache-2.0
"""What every optimiser's step begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What ``closure`` gives, which evaluates a model again with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
