"""Faces of the ``attention`` family, one module per group; ``__all__`` is the sum of theirs."""

from tenfold.ops.attention import heads
from tenfold.ops.attention.heads import *  # noqa: F403

__all__ = [*heads.__all__]
