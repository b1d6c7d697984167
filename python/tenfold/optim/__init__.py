"""Optimisers and layers of partial fine-tuning."""

from tenfold.optim.half_linear import HalfLinear, half_linear

__all__ = ["HalfLinear", "half_linear"]
