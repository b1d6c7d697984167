# SPDX-License-Identifier: Apache-2.0
"""What the tests of the family ``diffusion`` and of ``gn1_gelu`` share."""

import torch

from tenfold.testing import on

# Below, at and above vectors; more than a span of a task.
SHAPES = [(2, 1, 1), (1, 3, 5), (3, 2, 33), (2, 2, 64), (2, 3, 127), (1, 2, 9001)]


def signals(shape, dtype=torch.float32, count=2, device="cpu"):
    """Normal values, the same for every dtype but for rounding."""
    return on(device, [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(count)])


def times(batch, dtype=torch.float32, device="cpu"):
    """[batch] in [0, 1]: both ends are among the first."""
    t = torch.rand(batch, dtype=torch.float64)
    t[: min(batch, 2)] = torch.tensor([1.0, 0.0])[: min(batch, 2)].double()
    return t.to(dtype).to(device)
