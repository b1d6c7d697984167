# SPDX-License-Identifier: Apache-2.0
"""The diffusion in continuous time: schedule, times of training, noise of a row, the loss (section 3.1)."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from tenfold.training.checks import one_of

SAMPLERS = ("uniform", "sobol")


def vdiff_operations(kernels: str) -> ModuleType:
    """Where noising, loss and steps come from: ``tenfold.ops``, or their definitions in PyTorch."""
    if kernels == "tenfold":
        from tenfold import ops

        return ops
    from tenfold import reference

    return reference


def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s): ``cos(pi t / 2)`` and ``sin(pi t / 2)`` in the precision of t."""
    return torch.cos(t * (math.pi / 2)), torch.sin(t * (math.pi / 2))


def warped(t: Tensor, warp: str = "none") -> Tensor:
    """Times of the ``"crash"`` schedule: ``(2 / pi) atan2(q, sqrt(1 - q^2))`` with ``q = sin^2(pi t / 2)``."""
    one_of("time_warp", warp, ("none", "crash"))
    if warp == "none":
        return t
    q = torch.sin(t * (math.pi / 2)) ** 2
    return torch.atan2(q, (1 - q * q).clamp_min(0).sqrt()) * (2 / math.pi)


def row_seed(seed: int, *parts: int) -> np.random.Generator:
    """A generator that depends on nothing but these numbers."""
    return np.random.default_rng([seed, *parts])


def draw_times(
    seed: int, step: int, size: int, sampler: str = "uniform", warp: str = "none"
) -> Tensor:
    """Training times float32 [size] in [0, 1] of a step; the same for the same arguments.

    ``"sobol"``: a scrambled one-dimensional Sobol sequence that runs through all steps, so that any stretch of it is
    spread evenly.
    """
    one_of("time_sampler", sampler, SAMPLERS)
    if sampler == "uniform":
        t = torch.from_numpy(row_seed(seed, 0, step).random(size, dtype=np.float32))
    else:
        engine = torch.quasirandom.SobolEngine(1, scramble=True, seed=seed)
        engine.fast_forward(step * size)
        t = engine.draw(size, dtype=torch.float64)[:, 0].float()
    return warped(t, warp)


def row_noise(x0: Tensor, rows: Tensor, seed: int, step: int, kernels: str = "tenfold") -> Tensor:
    """Noise float32 of the rows of a step: that of a row does not depend on its batch, rank or device.

    Args:
        x0: [B, C, L], whose shape and device it has. rows: int64 [B] on the CPU, numbers in the step's whole batch.
    """
    ops = vdiff_operations(kernels)
    noise = torch.empty_like(x0, memory_format=torch.contiguous_format)
    one = torch.ones(1, device=x0.device)
    for i, row in enumerate(rows.tolist()):
        # At t = 1 the noisy waveform is the noise.
        ops.vdiff_noise_rng_(noise[i : i + 1], None, x0[i : i + 1], one, seed, (step << 24) | row)
    return noise
