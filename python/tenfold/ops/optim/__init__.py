"""Faces of the ``optim`` family, one module per group of ops."""

from tenfold.ops.optim.adamw import masked_adamw_, masked_adamw_8bit_

__all__ = ["masked_adamw_", "masked_adamw_8bit_"]
