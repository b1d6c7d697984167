"""Optimisers over tenfold's kernels, for parameters that train whole, in part or not at all."""

from tenfold.optim.active import check_optimizer, switch_optimizer
from tenfold.optim.adamw import MaskedAdamW

__all__ = ["MaskedAdamW", "check_optimizer", "switch_optimizer"]
