"""Faces of the ``moe`` family, one module per group of ops."""

from tenfold.ops.moe.gate import moe_gate, moe_gate_linear
from tenfold.ops.moe.router_losses import load_balance_loss, router_seed_loss
from tenfold.ops.moe.slots import moe_combine, moe_permute, moe_sort

__all__ = [
    "load_balance_loss",
    "moe_combine",
    "moe_gate",
    "moe_gate_linear",
    "moe_permute",
    "moe_sort",
    "router_seed_loss",
]
