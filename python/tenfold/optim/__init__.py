# SPDX-License-Identifier: Apache-2.0
"""Optimisers and layers over tenfold's kernels, for parameters that train whole, in part or not at all."""

from tenfold.optim.active import check_optimizer, switch_optimizer
from tenfold.optim.adamw import MaskedAdamW
from tenfold.optim.half_linear import HalfLinear, half_linear
from tenfold.reference.optim import dynamic_code

__all__ = [
    "HalfLinear",
    "MaskedAdamW",
    "check_optimizer",
    "dynamic_code",
    "half_linear",
    "switch_optimizer",
]
