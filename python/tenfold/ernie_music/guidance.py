# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance of a sampler: when, how much, and both velocities in one call of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def joined(text: Any, other: Any) -> tuple[Tensor | None, Tensor | None]:
    """States and masks of two batches of prompts as one, padded to the longer."""
    if text[0] is None:
        return None, None
    n = max(text[0].shape[1], other[0].shape[1])
    states, masks = (torch.cat([_padded(text[i], n), _padded(other[i], n)]) for i in (0, 1))
    return states, masks


def _padded(x: Tensor, n: int) -> Tensor:
    made = x.new_zeros(x.shape[0], n, *x.shape[2:])
    made[:, : x.shape[1]] = x
    return made


class Guidance:
    """``v = v_u + g (v_c - v_u)`` inside an interval of times.

    Args:
        scale: g, a number or [count]; 1: off. interval: (low, high), the times with guidance. rescale: share of the
            correction to the conditional velocity's deviation. plus: CFG++. count: waveforms.

    Raises:
        ValueError: what is out of range, or does not go together.
    """

    def __init__(
        self,
        scale: float | Tensor,
        interval: tuple[float, float],
        rescale: float,
        plus: bool,
        count: int,
    ) -> None:
        self.scale = torch.as_tensor(scale, dtype=torch.float32)
        if self.scale.ndim > 1 or (self.scale.ndim == 1 and len(self.scale) != count):
            raise ValueError(
                f"guidance_scale must be a number or [{count}], got {list(self.scale.shape)}"
            )
        if not bool(self.scale.isfinite().all()):
            raise ValueError(f"guidance_scale must be finite, got {self.scale.tolist()}")
        self.low, self.high = interval
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, got {interval}"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {rescale}")
        if plus and rescale:
            raise ValueError("cfg_plus_plus and guidance_rescale do not go together")
        self.rescale, self.plus = rescale, plus
        self.on = bool((self.scale != 1).any())

    def velocities(
        self, model: Any, z: Tensor, t: Tensor, time: float, text: Any, other: Any
    ) -> tuple[Tensor, Tensor | None, Any]:
        """(velocity, velocity without text or None, g) at a time; without guidance one half of the work."""
        if not self.on or not self.low <= time <= self.high:
            return model(z, t, text[0], text[1]).sample.float(), None, 1.0
        states, masks = joined(text, other)
        v, free = model(torch.cat([z, z]), t, states, masks).sample.float().chunk(2)
        scale = self.scale.to(z.device)
        if not self.rescale:
            return v.contiguous(), free.contiguous(), scale
        g = scale.view(-1, 1, 1)
        guided = free + g * (v - free)
        ratio = v.std((1, 2), keepdim=True) / guided.std((1, 2), keepdim=True).clamp_min(1e-12)
        return guided * (self.rescale * ratio + 1 - self.rescale), None, 1.0
