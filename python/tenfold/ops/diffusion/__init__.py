# SPDX-License-Identifier: Apache-2.0
"""Faces of the ``diffusion`` family, one module per group of ops."""

from tenfold.ops.diffusion.planes import conv1d_planes
from tenfold.ops.diffusion.resample import fir_down2, fir_down2_, fir_up2_cat, fir_up2_cat_
from tenfold.ops.diffusion.steps import vdiff_step, vdiff_step_
from tenfold.ops.diffusion.velocity import (
    vdiff_loss,
    vdiff_noise,
    vdiff_noise_,
    vdiff_noise_rng,
    vdiff_noise_rng_,
)

__all__ = [
    "conv1d_planes",
    "fir_down2",
    "fir_down2_",
    "fir_up2_cat",
    "fir_up2_cat_",
    "vdiff_loss",
    "vdiff_noise",
    "vdiff_noise_",
    "vdiff_noise_rng",
    "vdiff_noise_rng_",
    "vdiff_step",
    "vdiff_step_",
]
