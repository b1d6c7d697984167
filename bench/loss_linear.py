# SPDX-License-Identifier: Apache-2.0
"""Cases of ``linear_cross_entropy`` and ``linear_logprob``: part of the family ``loss``.

Hidden states times a head, and from there to the loss and both gradients, or to log-probabilities. Useful
FLOPs are those of the products: 2 N H V for logits, and as many for each gradient; rows that do not count
need none. Sizes: SmolLM2's head, and a Llama-like one of width 2048.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops

from .case import Case, Function, Inputs, NotAvailable, Provider, Shape, compiled, provider
from .gradients import autograd, compiled_gradients, with_gradients
from .loss_logprob import with_entropy

FP32, BF16 = torch.float32, torch.bfloat16
PEAK = {FP32: "fma_fp32", BF16: "dot_bf16"}
CHUNK = 128  # rows
SMOLLM2 = {"n": 512, "h": 576, "v": 49152}
SIZES = ({**SMOLLM2, "n": 256}, SMOLLM2, {"n": 512, "h": 2048, "v": 32000})
IGNORED = -100
BOTH, FROZEN = ("hidden", "weight"), ("hidden",)


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device, half: bool = False) -> Inputs:
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(s["n"], s["h"], generator=made)
    weight = torch.randn(s["v"], s["h"], generator=made).mul_(2 / s["h"] ** 0.5)
    target = torch.randint(s["v"], (s["n"],), generator=made)
    if half:  # the prompts' rows: the first half of each of a few sequences
        target.view(8, -1)[:, : s["n"] // 16] = IGNORED
    grad = torch.randn(s["n"], generator=made)
    return Inputs(hidden=hidden.to(device, dtype), weight=weight.to(device, dtype),
                  target=target.to(device), grad=grad.to(device))  # fmt: skip


# -- linear_cross_entropy ----------------------------------------------------------------------------


def cross_entropy(i: Inputs) -> Tensor:
    """All logits, then their loss."""
    return F.cross_entropy(F.linear(i.hidden, i.weight).float(), i.target)


def _logits_gradient(i: Inputs, rows: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Sum of the losses of some rows, and the gradient of their logits; ``num`` divides both."""
    at = i.target[rows, None]
    logp = F.log_softmax(F.linear(i.hidden[rows], i.weight), 1, dtype=torch.float32)
    loss = -logp.gather(1, at).sum() / num
    p = logp.exp_()
    p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))
    return loss, p.div_(num).to(i.hidden.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, in place where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def written_out(frozen: bool, half: bool, chunk: int | None = None) -> Function:
    """Only rows that count, whole or a few at a time; the gradients come with the forward."""

    def run(i: Inputs) -> tuple[Tensor, ...]:
        rows = torch.arange(i.target.shape[0], device=i.target.device)
        if half:  # waits for a GPU
            rows = rows[i.target != IGNORED]
        num = rows.shape[0]
        d_hidden = torch.zeros_like(i.hidden)
        if chunk is None:
            loss, p = _logits_gradient(i, rows, num)
            d_hidden[rows] = p @ i.weight
            return (loss, d_hidden) if frozen else (loss, d_hidden, p.T @ i.hidden[rows])
        loss = d_hidden.new_zeros((), dtype=torch.float32)
        d_weight = None if frozen else torch.zeros_like(i.weight, dtype=torch.float32)
        for part in rows.split(chunk):
            one, p = _logits_gradient(i, part, num)
            loss += one
            d_hidden[part] = p @ i.weight
            if d_weight is not None:
                add_product(d_weight, p.T, i.hidden[part])
        return (loss, d_hidden) if d_weight is None else (loss, d_hidden, d_weight.to(p.dtype))

    return run


def torchs(options: bool, names: tuple[str, ...]) -> Provider:
    """torch's own op, which came with torch 2.13; ``options``: its form in chunks of rows.

    Its chunks are those of ``eager:chunks``: what it chooses by itself took twenty times as long.
    """
    name = "peer:torch_chunks" if options else "peer:torch"

    def build(_: Inputs) -> Function:
        if not hasattr(F, "linear_cross_entropy"):
            raise NotAvailable("torch has no linear_cross_entropy before 2.13")
        about = {}
        if options:
            about["options"] = torch.nn.LinearCrossEntropyOptions(
                batch_chunk_size=CHUNK, acc_policy="accurate"
            )
        return with_gradients(
            lambda i: F.linear_cross_entropy(i.hidden, i.weight, i.target, **about), *names
        )

    return Provider(name, "peer", build)


def _reference(names: tuple[str, ...]) -> Function:
    """In float32: what is compared are products of hundreds, with tolerances far above."""

    def run(i: Inputs) -> Any:
        wide = Inputs(hidden=i.hidden.float(), weight=i.weight.float(), target=i.target)
        return with_gradients(cross_entropy, *names)(wide)

    return run


def _counted(s: Shape, half: bool) -> int:
    return s["n"] // 2 if half else s["n"]


def _loss_case(shape: Shape, dtype: torch.dtype, variant: str = "") -> Case:
    half, frozen = variant == "half", variant == "frozen"
    names = FROZEN if frozen else BOTH
    whole = 4 * shape["n"] * shape["v"]

    def ours(i: Inputs) -> Tensor:
        return ops.linear_cross_entropy(i.hidden, i.weight, i.target)[0]

    return Case(
        op="linear_cross_entropy", variant=variant, shape=shape, dtype=dtype,
        inputs=lambda s, t, where: _inputs(s, t, where, half),
        bytes=lambda s, size: size * (
            2 * _counted(s, half) * s["h"] + (1 if frozen else 2) * s["v"] * s["h"]) + 8 * s["n"],
        flops=lambda s: (4 if frozen else 6) * _counted(s, half) * s["h"] * s["v"],
        peak=PEAK[dtype],
        providers=[
            autograd("tenfold", ours, *names),
            provider("eager:written_out", written_out(frozen, half), scratch=2 * whole,
                     graph=not half),
            provider("eager:chunks", written_out(frozen, half, CHUNK), graph=not half),
            autograd("peer:cross_entropy", cross_entropy, *names, scratch=3 * whole),
            torchs(False, names), torchs(True, names),
            *([compiled_gradients(cross_entropy, *names, scratch=3 * whole)]
              if shape == SMOLLM2 and not variant else []),
        ],
        reference=_reference(names),
        # bf16: logits' gradients are rounded before the last products.
        tolerance=1e-4 if dtype == FP32 else 2e-2, quick=shape == SIZES[0], memory=True,
    )  # fmt: skip


# -- linear_logprob ----------------------------------------------------------------------------------


def logprob(i: Inputs) -> tuple[Tensor, Tensor]:
    """All logits, then log-probability and entropy."""
    return with_entropy(Inputs(logits=F.linear(i.hidden, i.weight), ids=i.target))


def logprob_by_chunks(i: Inputs) -> tuple[Tensor, ...]:
    parts = [
        logprob(Inputs(hidden=hidden, weight=i.weight, target=target))
        for hidden, target in zip(i.hidden.split(CHUNK), i.target.split(CHUNK))
    ]
    return tuple(map(torch.cat, zip(*parts)))


def _logprob_loss(i: Inputs) -> Tensor:
    logp = F.log_softmax(F.linear(i.hidden, i.weight), 1, dtype=torch.float32)
    return torch.dot(logp.gather(1, i.target[:, None])[:, 0], i.grad)


def logprob_written_out(i: Inputs) -> tuple[Tensor, ...]:
    """Loss and both gradients by hand, some rows at a time."""
    loss, d_hidden = i.grad.new_zeros(()), torch.empty_like(i.hidden)
    d_weight = torch.zeros_like(i.weight, dtype=torch.float32)
    for at in range(0, i.hidden.shape[0], CHUNK):
        rows = slice(at, at + CHUNK)
        hidden, ids, grad = i.hidden[rows], i.target[rows, None], i.grad[rows, None]
        logp = F.log_softmax(F.linear(hidden, i.weight), 1, dtype=torch.float32)
        loss += torch.dot(logp.gather(1, ids)[:, 0], grad[:, 0])
        p = logp.exp_().mul_(-grad).scatter_add_(1, ids, grad).to(hidden.dtype)
        d_hidden[rows] = p @ i.weight
        add_product(d_weight, p.T, hidden)
    return loss, d_hidden, d_weight.to(i.weight.dtype)


def _logprob_case(dtype: torch.dtype) -> Case:
    whole = 4 * SMOLLM2["n"] * SMOLLM2["v"]
    return Case(
        op="linear_logprob", shape=SMOLLM2, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: size * s["h"] * (s["n"] + s["v"]) + 16 * s["n"],
        flops=lambda s: 2 * s["n"] * s["h"] * s["v"], peak=PEAK[dtype],
        providers=[
            provider("tenfold", lambda i: ops.linear_logprob(i.hidden, i.weight, i.target)),
            provider("eager:linear", logprob, scratch=3 * whole),
            provider("eager:chunks", logprob_by_chunks),
            compiled(logprob, scratch=3 * whole),
        ],
        reference=lambda i: logprob(
            Inputs(hidden=i.hidden.float(), weight=i.weight.float(), target=i.target)),
        # bf16: eager forms round the logits.
        tolerance=1e-4 if dtype == FP32 else 1e-2, quick=dtype == BF16, memory=True,
    )  # fmt: skip


def _logprob_gradient(dtype: torch.dtype) -> Case:
    whole = 4 * SMOLLM2["n"] * SMOLLM2["v"]

    def ours(i: Inputs) -> Tensor:
        return torch.dot(ops.linear_logprob(i.hidden, i.weight, i.target)[0], i.grad)

    def defined(i: Inputs) -> Any:
        wide = Inputs(**{**vars(i), "hidden": i.hidden.float(), "weight": i.weight.float()})
        return with_gradients(_logprob_loss, *BOTH)(wide)

    return Case(
        op="linear_logprob", variant="gradient", shape=SMOLLM2, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: 2 * size * s["h"] * (s["n"] + s["v"]) + 12 * s["n"],
        flops=lambda s: 6 * s["n"] * s["h"] * s["v"], peak=PEAK[dtype],
        providers=[
            autograd("tenfold", ours, *BOTH), provider("eager:chunks", logprob_written_out),
            autograd("peer:log_softmax", _logprob_loss, *BOTH, scratch=3 * whole),
        ],
        reference=defined, tolerance=1e-4 if dtype == FP32 else 2e-2, memory=True,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in (FP32, BF16):
        for shape in SIZES:
            yield _loss_case(shape, dtype)
        yield _loss_case(SMOLLM2, dtype, "half")
        yield _loss_case(SMOLLM2, dtype, "frozen")
        yield _logprob_case(dtype)
        yield _logprob_gradient(dtype)
