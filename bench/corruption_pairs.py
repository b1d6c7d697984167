# SPDX-License-Identifier: Apache-2.0
"""Cases of ``pair_pack`` and ``shift_right``: part of the family ``corruption``.

Translation pairs with a prompt of 8 tokens: sources of 200 tokens and targets of 100 on average, some too long. Bytes:
tokens read, both sides written; of ``shift_right`` labels read and written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider

EOS, PAD, IGNORE = 1, 0, -100
PROMPT, MOST = 8, (256, 128)
SMALL, FULL = {"b": 8}, {"b": 256}


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)

    def ragged(low: int, high: int) -> tuple[Tensor, Tensor]:
        sizes = torch.randint(low, high + 1, (s["b"],), generator=made)
        values = torch.randint(2, 250000, (int(sizes.sum()),), generator=made)
        return values.to(device, dtype), torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(device)

    source, target, prefix = ragged(100, 300), ragged(50, 150), ragged(PROMPT, PROMPT)
    labels = torch.randint(2, 250000, (s["b"], MOST[1]), generator=made)
    labels[:, -9:] = IGNORE
    return Inputs(source=source[0], source_at=source[1], target=target[0], target_at=target[1], prefix=prefix[0],
                  prefix_at=prefix[1], labels=labels.to(device, dtype))  # fmt: skip


def _args(i: Inputs) -> tuple[Any, ...]:
    return i.source, i.source_at, i.target, i.target_at, i.prefix, i.prefix_at, EOS, PAD, *MOST


def by_row(i: Inputs) -> tuple[Tensor, ...]:
    """A row after the other, as collators do it."""
    b = len(i.source_at) - 1
    at = [x.tolist() for x in (i.source_at, i.target_at, i.prefix_at)]
    inputs = i.source.new_full((b, MOST[0]), PAD)
    targets = i.source.new_full((b, MOST[1]), IGNORE)
    sizes = []
    for row in range(b):
        (s0, s1), (t0, t1), (p0, p1) = ((a[row], a[row + 1]) for a in at)
        n = min(s1 - s0, MOST[0] - 1 - (p1 - p0))
        m = min(t1 - t0, MOST[1] - 1)
        inputs[row, : p1 - p0] = i.prefix[p0:p1]
        inputs[row, p1 - p0 : p1 - p0 + n] = i.source[s0 : s0 + n]
        inputs[row, p1 - p0 + n] = EOS
        targets[row, :m] = i.target[t0 : t0 + m]
        targets[row, m] = EOS
        sizes.append((p1 - p0 + n + 1, m + 1, s1 - s0 - n, t1 - t0 - m))
    made = torch.tensor(sizes, dtype=torch.int32, device=inputs.device)
    return (
        inputs,
        made[:, 0].contiguous(),
        targets,
        made[:, 1].contiguous(),
        made[:, 2:].contiguous(),
    )


def gathered(i: Inputs) -> tuple[Tensor, ...]:
    """All rows at once: where each column comes from."""
    size, want, given = (x.diff() for x in (i.source_at, i.target_at, i.prefix_at))
    n, m = torch.minimum(size, MOST[0] - 1 - given), want.clamp(max=MOST[1] - 1)
    at = torch.arange(MOST[0], device=n.device)[None]
    before, end = given[:, None], (given + n)[:, None]
    prefix = i.prefix[(i.prefix_at[:-1, None] + at).clamp(max=i.prefix.numel() - 1)]
    source = i.source[(i.source_at[:-1, None] + at - before).clamp(0, i.source.numel() - 1)]
    inputs = torch.where(at < before, prefix, source)
    inputs = torch.where(at == end, EOS, torch.where(at > end, PAD, inputs))
    at, end = at[:, : MOST[1]], m[:, None]
    targets = i.target[(i.target_at[:-1, None] + at).clamp(max=i.target.numel() - 1)]
    targets = torch.where(at == end, EOS, torch.where(at > end, IGNORE, targets))
    return (
        inputs,
        (given + n + 1).int(),
        targets,
        (m + 1).int(),
        torch.stack([size - n, want - m], 1).int(),
    )


def _pack(s: Shape, dtype: torch.dtype) -> Case:
    return Case(
        op="pair_pack", shape=s, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: s["b"] * (200 + 100 + PROMPT + sum(MOST)) * size,
        providers=[provider("tenfold", lambda i: ops.pair_pack(*_args(i), target_pad_id=IGNORE)),
                   provider("eager", gathered), provider("eager:by_row", by_row, graph=False), compiled(gathered)],
        reference=lambda i: reference.pair_pack(*_args(i), target_pad_id=IGNORE), tolerance=0.0, quick=s == SMALL,
    )  # fmt: skip


def shifted(i: Inputs) -> Tensor:
    """As T5's models of transformers do it."""
    out = i.labels.new_zeros(i.labels.shape)
    out[:, 1:] = i.labels[:, :-1]
    return out.masked_fill_(out == IGNORE, PAD)


def _shift(s: Shape, dtype: torch.dtype) -> Case:
    return Case(
        op="shift_right", shape=s, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: 2 * s["b"] * MOST[1] * size,
        providers=[provider("tenfold", lambda i: ops.shift_right(i.labels)), provider("eager", shifted),
                   compiled(shifted)],
        reference=lambda i: reference.shift_right(i.labels), tolerance=0.0, quick=s == SMALL,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for s in (SMALL, FULL):
        for dtype in (torch.int64, torch.int32):
            yield _pack(s, dtype)
            yield _shift(s, dtype)
