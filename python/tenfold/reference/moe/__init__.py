# SPDX-License-Identifier: Apache-2.0
"""Definitions of the ``moe`` family, one module per group of ops."""

from tenfold.reference.moe.experts import (
    grouped_gemm,
    grouped_gemm_wgrad,
    moe_lora_swiglu_mlp,
    moe_swiglu_mlp,
)
from tenfold.reference.moe.gate import moe_gate, moe_gate_linear, moe_route
from tenfold.reference.moe.router_losses import load_balance_loss, router_seed_loss
from tenfold.reference.moe.slots import moe_combine, moe_permute, moe_sort

__all__ = [
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "load_balance_loss",
    "moe_combine",
    "moe_gate",
    "moe_gate_linear",
    "moe_lora_swiglu_mlp",
    "moe_permute",
    "moe_route",
    "moe_sort",
    "moe_swiglu_mlp",
    "router_seed_loss",
]
