"""Faces of the family ``moe``."""

from tenfold.ops.moe.experts import (
    grouped_gemm,
    grouped_gemm_wgrad,
    moe_lora_swiglu_mlp,
    moe_swiglu_mlp,
)

__all__ = ["grouped_gemm", "grouped_gemm_wgrad", "moe_lora_swiglu_mlp", "moe_swiglu_mlp"]
