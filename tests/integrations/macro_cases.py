# SPDX-License-Identifier: Apache-2.0
"""Batches and definitions that the tests of the macro-action adapters share."""

import torch

# gamma, lambda
DISCOUNTS = [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.5, 0.0), (0.0, 0.7)]


def batch(rows: int = 5, width: int = 13, holes: bool = False, dtype=torch.float32):
    """Token rewards (a score at the last valid token), values, mask [B, R]; garbage where masked.

    The first row is full, the second has one valid token.
    """
    gen = torch.Generator().manual_seed(7)
    lengths = [width, 1, *torch.randint(2, width, (rows - 2,), generator=gen).tolist()]
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    last = torch.tensor(lengths) - 1
    if holes:
        hole = torch.rand(rows, width, generator=gen) < 0.35
        hole[:, 0] = False
        hole[torch.arange(rows), last] = False
        mask &= ~hole
    rewards = 0.1 * torch.randn(rows, width, generator=gen, dtype=torch.float64)
    rewards[torch.arange(rows), last] += torch.randn(rows, generator=gen, dtype=torch.float64)
    values = torch.randn(rows, width, generator=gen, dtype=torch.float64)
    return rewards.to(dtype), values.to(dtype), mask


def left(*tensors, mask):
    """The same with their padding on the left, and the mask."""
    move = mask.shape[1] - mask.sum(1)
    return [torch.stack([row.roll(int(k)) for row, k in zip(x, move)]) for x in (*tensors, mask)]


def by_hand(rewards, values, mask, gamma, lam, n):
    """Macro advantages and returns in float64: runs of n valid tokens, mean value, summed reward."""
    adv, ret = (
        torch.zeros(mask.shape, dtype=torch.float64),
        torch.zeros(mask.shape, dtype=torch.float64),
    )
    for b in range(len(mask)):
        places = mask[b].nonzero()[:, 0].tolist()
        runs = [places[i : i + n] for i in range(0, len(places), n)]
        later = ahead = 0.0
        for run in reversed(runs):
            value = values[b, run].double().mean().item()
            step = rewards[b, run].double().sum().item() + gamma * ahead - value
            later = step + gamma * lam * later
            adv[b, run], ret[b, run] = later, later + value
            ahead = value
    return adv, ret


def whitened(x, mask):
    """TRL's and verl's: mean and Bessel-corrected variance of the valid tokens; 0 where masked."""
    valid = x[mask].double()
    return torch.where(mask, (x.double() - valid.mean()) * (valid.var() + 1e-8).rsqrt(), 0)
