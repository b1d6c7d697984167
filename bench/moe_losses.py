# SPDX-License-Identifier: Apache-2.0
"""Cases of what routers are trained with: part of the family ``moe``.

Both losses with their gradients. ``load_balance_loss`` takes the counts that routing has made anyway;
transformers' own finds the experts again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Function, Inputs, NotAvailable, Provider, Shape
from .gradients import autograd, compiled_gradients, with_gradients
from .moe_batch import BF16, DTYPES, FP32, counts_of, logits_of, randn

ROUTER = {"n": 64, "k": 8}
TOKENS = (512, 16384)


# -- load_balance_loss -------------------------------------------------------------------------------


def _balance_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    counts = counts_of(s["t"], s["n"], s["k"])
    return Inputs(logits=logits_of(s["t"], s["n"]).to(device, dtype), counts=counts.to(device))


def balance(i: Inputs) -> Tensor:
    p = i.logits.softmax(-1, dtype=torch.float32).mean(0)
    return p.shape[0] / i.logits.shape[0] * torch.dot(p, i.counts.to(p.dtype))


def _transformers(k: int) -> Provider:
    def build(i: Inputs) -> Function:
        try:
            from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
        except ImportError:
            raise NotAvailable("transformers is not installed") from None
        n = i.logits.shape[1]
        return with_gradients(lambda i: load_balancing_loss_func((i.logits,), n, k), "logits")

    return Provider("peer:transformers", "peer", build)


def _balance_case(tokens: int, dtype: torch.dtype) -> Case:
    s = {"t": tokens, **ROUTER}
    k = s["k"]

    def ours(i: Inputs) -> Tensor:
        return ops.load_balance_loss(i.logits, i.counts, None, k, "tokens")

    def defined(i: Inputs) -> Tensor:
        return reference.load_balance_loss(i.logits, i.counts, None, k, "tokens")

    return Case(
        op="load_balance_loss", variant="gradient", shape=s, dtype=dtype, inputs=_balance_inputs,
        bytes=lambda s, size: 2 * size * s["t"] * s["n"],
        providers=[autograd("tenfold", ours, "logits"), autograd("eager", balance, "logits"),
                   _transformers(k),
                   *([compiled_gradients(balance, "logits")] if dtype == FP32 else [])],
        reference=with_gradients(defined, "logits"),
        # bf16: in transformers' loss softmax and choice are of bfloat16, and ties are broken otherwise.
        tolerance=1e-4 if dtype == FP32 else 3e-2, quick=tokens == TOKENS[0] and dtype == FP32,
    )  # fmt: skip


# -- router_seed_loss --------------------------------------------------------------------------------


def _seed_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    h, r = randn(s["t"], s["d"], seed=1), randn(s["d"], seed=2, scale=0.02)
    return Inputs(h=h.to(device, dtype), r=r.to(device, dtype))


def seed_loss(i: Inputs) -> Tensor:
    return F.softplus(-(i.h @ i.r).float()).mean()


def seed_loss_bce(i: Inputs) -> Tensor:
    """As it is first written."""
    z = (i.h @ i.r).float()
    return F.binary_cross_entropy_with_logits(z, torch.ones_like(z))


def _seed_case(tokens: int, dtype: torch.dtype, frozen: bool) -> Case:
    """``frozen``: the expert is not trained, only its routing vector."""
    names = ("r",) if frozen else ("h", "r")

    def ours(i: Inputs) -> Tensor:
        return ops.router_seed_loss(i.h, i.r)

    return Case(
        op="router_seed_loss", variant="frozen" if frozen else "gradient",
        shape={"t": tokens, "d": 2048}, dtype=dtype, inputs=_seed_inputs,
        traffic="read" if frozen else "copy",
        bytes=lambda s, size: (1 if frozen else 2) * size * s["t"] * s["d"],
        providers=[autograd("tenfold", ours, *names), autograd("eager:softplus", seed_loss, *names),
                   autograd("eager:bce", seed_loss_bce, *names)],
        reference=with_gradients(lambda i: reference.router_seed_loss(i.h, i.r), *names),
        tolerance=1e-4 if dtype == FP32 else 1e-2,
        quick=tokens == TOKENS[0] and dtype == BF16 and not frozen,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in DTYPES:
        for tokens in TOKENS:
            yield _balance_case(tokens, dtype)
            yield _seed_case(tokens, dtype, frozen=False)
        yield _seed_case(TOKENS[1], dtype, frozen=True)
