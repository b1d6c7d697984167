# SPDX-License-Identifier: Apache-2.0
"""What the tests of the family ``corruption`` share."""

import contextlib
import random

import numpy as np
import torch

import tenfold
from tenfold import ops, reference
from tenfold.testing import forced_isa, on, poisoned_memory

FIRST, COUNT, EOS, PAD = 250099, 100, 1, 0  # mT5's sentinels and special tokens
MANY = 2000  # sentinels, for masks of many spans


def every_isa(device):
    if device.type == "cpu":
        return map(forced_isa, tenfold.cpu_capabilities())
    return [contextlib.nullcontext()]


def exact(name, args, device, **kwargs):
    """The op equals its definition, on every ISA, in poisoned memory; the latter's result."""
    want = getattr(reference, name)(*args, **kwargs)
    for isa in every_isa(device):
        with isa, poisoned_memory():
            got = getattr(ops, name)(*on(device, list(args)), **kwargs)
        for g, w in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
            assert g.dtype == w.dtype and g.device.type == device.type
            assert torch.equal(g.cpu(), w), name
    return want


def rows(lengths, width, dtype=torch.int64, seed=0):
    """Raw tokens [B, width] of rows, PAD and EOS among them; sentinels and tokens below 0 beyond their lengths."""
    made = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, FIRST - MANY, (len(lengths), width), generator=made)
    special = torch.rand(tokens.shape, generator=made) < 0.1
    tokens = torch.where(special, tokens % 2, tokens)
    junk = torch.tensor([FIRST, -7, EOS])[torch.randint(0, 3, tokens.shape, generator=made)]
    inside = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return torch.where(inside, tokens, junk).to(dtype), torch.tensor(lengths)


def masks(lengths, width, seed=0):
    """Masks of all kinds: of spans, rolled, dense, none, all, beginning and ending either way."""
    made = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(lengths), width, generator=made) < torch.rand(
        len(lengths), 1, generator=made
    )
    drawn = ops.span_mask(torch.tensor(lengths), width, 0.3, 2.0, seed, 0, True)
    kinds = [mask, drawn, torch.zeros_like(mask), torch.ones_like(mask), ~drawn]
    return torch.stack([kinds[i % len(kinds)][i] for i in range(len(lengths))])


def published_mask(n, density, mean_span, shuffled):
    """The random spans of the published procedure (T5, ``random_spans_noise_mask``), written anew in NumPy.

    ``shuffled`` permutes a list of zeros and ones.
    """
    if density == 0:
        return np.zeros(n, bool)
    size = max(n, 2)
    noise = int(np.round(np.float32(size) * np.float32(density)))
    noise = min(max(noise, 1), size - 1)
    spans = max(int(np.round(np.float32(noise) / np.float32(mean_span))), 1)

    def segments(items, count):
        first = np.concatenate([[0], shuffled([int(i < count - 1) for i in range(items - 1)])])
        return np.bincount(np.cumsum(first).astype(int))

    both = np.stack([segments(size - noise, spans), segments(noise, spans)], axis=1).reshape(-1)
    starts = np.zeros(size, int)
    starts[np.cumsum(both)[:-1]] = 1
    return (np.cumsum(starts) % 2 == 1)[:n]


def published_sides(tokens, mask, first=FIRST, eos=EOS):
    """Inputs and targets of the published procedure (T5, ``noise_span_to_unique_sentinel`` and its counterpart)."""

    def marked(noise):
        before = np.concatenate([[False], noise[:-1]])
        sentinel = first + 1 - np.cumsum(noise & ~before)
        return [*np.where(noise & ~before, sentinel, tokens)[~(noise & before)].tolist(), eos]

    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    return marked(mask), marked(~mask)


def shuffler(seed):
    made = random.Random(seed)
    return lambda values: made.sample(values, len(values))
