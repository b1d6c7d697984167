# SPDX-License-Identifier: Apache-2.0
"""Cases of ``selective_logprob``: part of the family ``loss``.

The log-probability of one token per row of logits, with and without entropy, and the logits' gradient of
a weighted sum. Logits are read once and their gradient is written once; a peak far above that is what
other forms keep of the logits' size. ``peer`` forms are those of trainers: rows in a few chunks, so that
float32 copies of bfloat16 logits stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Provider, Shape, compiled, provider
from .gradients import autograd, compiled_gradients, with_gradients

DTYPES = (torch.float32, torch.bfloat16)
CHUNK = 64  # rows
SIZES = (
    {"n": 512, "v": 32000}, {"n": 512, "v": 49152}, {"n": 256, "v": 128256}, {"n": 256, "v": 256000},
)  # fmt: skip


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(s["n"], s["v"], generator=made).mul_(2)
    ids = torch.randint(s["v"], (s["n"],), generator=made)
    grad = torch.randn(s["n"], generator=made)
    return Inputs(logits=logits.to(device, dtype), ids=ids.to(device), grad=grad.to(device))


# -- forward -----------------------------------------------------------------------------------------


def gather_logsumexp(i: Inputs) -> Tensor:
    """The chosen logits less the normaliser."""
    chosen = i.logits.gather(1, i.ids[:, None])[:, 0].float()
    return chosen - i.logits.float().logsumexp(1)


def log_softmax_gather(i: Inputs) -> Tensor:
    return F.log_softmax(i.logits, 1, dtype=torch.float32).gather(1, i.ids[:, None])[:, 0]


def cross_entropy(i: Inputs) -> Tensor:
    return -F.cross_entropy(i.logits.float(), i.ids, reduction="none")


def by_chunks(form: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """A few rows at a time: what is of the logits' size stays in the cache, or small at least."""

    def run(i: Inputs) -> Any:
        parts = [
            form(Inputs(logits=logits, ids=ids))
            for logits, ids in zip(i.logits.split(CHUNK), i.ids.split(CHUNK))
        ]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return tuple(map(torch.cat, zip(*parts)))

    return run


def with_entropy(i: Inputs) -> tuple[Tensor, Tensor]:
    """One log-softmax, and its exponentials in place."""
    logp = F.log_softmax(i.logits, 1, dtype=torch.float32)
    chosen = logp.gather(1, i.ids[:, None])[:, 0]
    return chosen, -(logp.exp().mul_(logp).sum(1))


def softmax_entropy(i: Inputs) -> tuple[Tensor, Tensor]:
    """As trainers have it: softmax, normaliser, and the mean of the logits."""
    x = i.logits.float()
    lse = x.logsumexp(1)
    mean = (x.softmax(1) * x).sum(1)
    return x.gather(1, i.ids[:, None])[:, 0] - lse, lse - mean


# -- forward and backward ----------------------------------------------------------------------------


def weighted(form: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """The loss whose gradient is asked for."""
    return lambda i: torch.dot(form(i), i.grad)


def written_out(i: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and gradient by hand, in place where it can be."""
    logp = F.log_softmax(i.logits, 1, dtype=torch.float32)
    chosen = logp.gather(1, i.ids[:, None])[:, 0]
    p = logp.exp_().mul_(-i.grad[:, None])
    p.scatter_add_(1, i.ids[:, None], i.grad[:, None])
    return torch.dot(chosen, i.grad), p.to(i.logits.dtype)


def written_out_by_chunks(i: Inputs) -> tuple[Tensor, Tensor]:
    """The same, a few rows at a time into one gradient."""
    out, total = torch.empty_like(i.logits), i.grad.new_zeros(())
    for at in range(0, i.ids.shape[0], CHUNK):
        rows = slice(at, at + CHUNK)
        part, out[rows] = written_out(
            Inputs(logits=i.logits[rows], ids=i.ids[rows], grad=i.grad[rows])
        )
        total += part
    return total, out


# -- cases -------------------------------------------------------------------------------------------


def _elements(s: Shape) -> int:
    return s["n"] * s["v"]


def _wide(i: Inputs) -> Inputs:
    """In float32: float64 would be gigabytes, and it is the comparison's tolerance that counts."""
    return Inputs(**{**vars(i), "logits": i.logits.float()})


def _forward(shape: Shape, dtype: torch.dtype, entropy: bool) -> Case:
    at = slice(0, 3, 2) if entropy else 0
    whole = 4 * _elements(shape)
    if entropy:
        others = [
            provider("eager:log_softmax", with_entropy, scratch=3 * whole),
            provider("eager:chunks", by_chunks(with_entropy)),
            provider("peer:softmax", by_chunks(softmax_entropy)),
        ]
        form: Callable[[Inputs], Any] = with_entropy
    else:
        others = [
            provider("eager:logsumexp", gather_logsumexp, scratch=2 * whole),
            provider("eager:log_softmax", log_softmax_gather, scratch=2 * whole),
            provider("eager:cross_entropy", cross_entropy, scratch=2 * whole),
            provider("eager:chunks", by_chunks(gather_logsumexp)),
            provider("peer:chunks", by_chunks(log_softmax_gather)),
        ]
        form = gather_logsumexp
    return Case(
        op="selective_logprob", variant="entropy" if entropy else "", shape=shape, dtype=dtype,
        inputs=_inputs, traffic="read",
        bytes=lambda s, size: _elements(s) * size + s["n"] * (8 + 4 * (3 if entropy else 1)),
        providers=[
            provider("tenfold", lambda i: ops.selective_logprob(i.logits, i.ids)[at]), *others,
            *_compiles(shape, compiled(form, scratch=2 * whole)),
        ],
        reference=lambda i: reference.selective_logprob(_wide(i).logits, i.ids)[at],
        tolerance=1e-4, quick=_first(shape), memory=True,
    )  # fmt: skip


def _backward(shape: Shape, dtype: torch.dtype) -> Case:
    whole = 4 * _elements(shape)
    form = weighted(cross_entropy)
    return Case(
        op="selective_logprob", variant="gradient", shape=shape, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: 2 * _elements(s) * size + s["n"] * 12,
        providers=[
            autograd("tenfold", weighted(lambda i: ops.selective_logprob(i.logits, i.ids)[0]),
                     "logits"),
            provider("eager:written_out", written_out, scratch=2 * whole),
            provider("eager:chunks", written_out_by_chunks),
            autograd("peer:cross_entropy", form, "logits", scratch=3 * whole),
            autograd("peer:chunks", weighted(by_chunks(log_softmax_gather)), "logits",
                     scratch=3 * whole),
            *_compiles(shape, compiled_gradients(form, "logits", scratch=3 * whole)),
        ],
        reference=lambda i: with_gradients(weighted(log_softmax_gather), "logits")(_wide(i)),
        # bf16: one rounding of the gradient.
        tolerance=1e-4 if dtype == torch.float32 else 4e-3, quick=_first(shape), memory=True,
    )  # fmt: skip


def _first(shape: Shape) -> bool:
    return shape == SIZES[0]


def _compiles(shape: Shape, one: Provider) -> list[Provider]:
    return [one] if shape == SIZES[1] else []


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in DTYPES:
        for shape in SIZES:
            yield _forward(shape, dtype, False)
        yield _forward(SIZES[1], dtype, True)
        for shape in SIZES:
            yield _backward(shape, dtype)
