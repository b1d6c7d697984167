"""Definitions of the ``attention`` family, one module per group; ``__all__`` is the sum of theirs."""

from tenfold.reference.attention import heads
from tenfold.reference.attention.heads import *  # noqa: F403

__all__ = [*heads.__all__]
