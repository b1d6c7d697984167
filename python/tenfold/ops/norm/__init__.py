# SPDX-License-Identifier: Apache-2.0
"""Faces of the ``norm`` family, one module per group of ops."""

from tenfold.ops.norm.gated import gated_gelu, gated_gelu_, swiglu, swiglu_
from tenfold.ops.norm.group import gn1_gelu, gn1_gelu_
from tenfold.ops.norm.rms import rms_norm, rms_norm_

__all__ = [
    "gated_gelu",
    "gated_gelu_",
    "gn1_gelu",
    "gn1_gelu_",
    "rms_norm",
    "rms_norm_",
    "swiglu",
    "swiglu_",
]
