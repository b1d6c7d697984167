# SPDX-License-Identifier: Apache-2.0
"""Cases of ``last_token_reward`` and ``pairwise_logsigmoid``: part of the family ``loss``.

Rewards of traces of half to all of the width, by the last token and by the mean, with gradients of the hidden
states and the head: that of the hidden states is as large as they are, and mostly zeros. Losses of pairs, plain and
as TRL's reward trainer has them, with a margin and a center.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops

from .case import Case, Inputs, Shape, compiled, provider
from .gradients import autograd, compiled_gradients, with_gradients

FP32, BF16 = torch.float32, torch.bfloat16
SIZES = ({"n": 16, "s": 512, "h": 576}, {"n": 16, "s": 512, "h": 4096})
PAIRS = ({"b": 64}, {"b": 4096})
CENTER = 0.01


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(s["n"], s["s"], s["h"], generator=made)
    length = torch.randint(s["s"] // 2, s["s"] + 1, (s["n"], 1), generator=made)
    head = torch.randn(s["h"], generator=made).div_(s["h"] ** 0.5)
    mask = torch.arange(s["s"]) < length
    return Inputs(
        hidden=hidden.to(device, dtype), mask=mask.to(device), head=head.to(device, dtype)
    )


def _counted(s: Shape) -> int:
    return s["n"] * s["s"] * 3 // 4


def last_by_index(i: Inputs) -> Tensor:
    """The last column of the mask, one row of hidden states, a product."""
    n, width = i.mask.shape
    at = (i.mask * torch.arange(1, width + 1, device=i.mask.device)).argmax(1)
    rows = i.hidden[torch.arange(n, device=i.mask.device), at]
    return torch.mv(rows.float(), i.head.float())


def last_by_gather(i: Inputs) -> Tensor:
    """Right padding only: lengths are sums."""
    at = (i.mask.sum(1) - 1)[:, None, None].expand(-1, 1, i.hidden.shape[2])
    return torch.mv(i.hidden.gather(1, at)[:, 0].float(), i.head.float())


def mean_by_product(i: Inputs) -> Tensor:
    """The mask as a row of a matrix."""
    sums = torch.bmm(i.mask[:, None].to(i.hidden.dtype), i.hidden)[:, 0]
    return torch.mv(sums.float() / i.mask.sum(1, keepdim=True), i.head.float())


def mean_by_token(i: Inputs) -> Tensor:
    """Every token's reward, then their mean."""
    each = torch.matmul(i.hidden, i.head).float()
    return (each * i.mask).sum(1) / i.mask.sum(1)


FORMS = {
    "last": {"eager:index": last_by_index, "eager:gather": last_by_gather},
    "mean": {"eager:product": mean_by_product, "eager:token": mean_by_token},
}


def _reward_case(s: Shape, dtype: torch.dtype, pool: str, gradient: bool) -> Case:
    def ours(i: Inputs) -> Tensor:
        return ops.last_token_reward(i.hidden, i.mask, i.head, pool)

    def summed(form: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
        return lambda i: form(i).square().sum()

    forms, names = FORMS[pool], ("hidden", "head")
    plain = next(iter(forms.values()))
    compiles = s == SIZES[0] and dtype == BF16
    if gradient:
        providers = [autograd("tenfold", summed(ours), *names),
                     *(autograd(name, summed(form), *names) for name, form in forms.items()),
                     *([compiled_gradients(summed(plain), *names)] if compiles else [])]  # fmt: skip
    else:
        providers = [provider("tenfold", ours), *(provider(n, form) for n, form in forms.items()),
                     *([compiled(plain)] if compiles else [])]  # fmt: skip

    def wide(i: Inputs) -> Inputs:
        return Inputs(hidden=i.hidden.float(), mask=i.mask, head=i.head.float())

    def defined(i: Inputs) -> Any:
        return with_gradients(summed(plain), *names)(wide(i)) if gradient else plain(wide(i))

    def traffic(s: Shape, size: int) -> int:
        read = s["n"] if pool == "last" else _counted(s)
        return size * s["h"] * (read + (s["n"] * s["s"] if gradient else 0))

    return Case(
        op="last_token_reward", variant=f"{pool} gradient" if gradient else pool, shape=s, dtype=dtype,
        inputs=_inputs, bytes=traffic, traffic="copy" if gradient else "read", providers=providers,
        reference=defined, tolerance=1e-4 if dtype == FP32 else 2e-2, memory=gradient,
        quick=compiles and not gradient,
    )  # fmt: skip


def _pair_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    pos, neg, margin = torch.randn(3, s["b"], generator=made).mul_(3).to(device, dtype)
    return Inputs(pos=pos, neg=neg, margin=margin)


def softplus(i: Inputs) -> Tensor:
    return F.softplus(i.neg - i.pos).mean()


def logsigmoid(i: Inputs) -> Tensor:
    return -F.logsigmoid(i.pos - i.neg).mean()


def softplus_trl(i: Inputs) -> Tensor:
    return F.softplus(i.neg - i.pos + i.margin).mean() + CENTER * (i.pos + i.neg).square().mean()


def logsigmoid_trl(i: Inputs) -> Tensor:
    """As TRL's trainer writes it."""
    loss = -F.logsigmoid(i.pos - i.neg - i.margin).mean()
    return loss + CENTER * torch.mean((i.pos + i.neg) ** 2)


def _pair_case(s: Shape, trl: bool) -> Case:
    def ours(i: Inputs) -> Tensor:
        more = (i.margin, CENTER) if trl else ()
        return ops.pairwise_logsigmoid(i.pos, i.neg, *more)[0]

    soft, peer = (softplus_trl, logsigmoid_trl) if trl else (softplus, logsigmoid)
    names = ("pos", "neg")
    return Case(
        op="pairwise_logsigmoid", variant="trl gradient" if trl else "gradient", shape=s, dtype=FP32,
        inputs=_pair_inputs, bytes=lambda s, size: size * s["b"] * (5 if trl else 4),
        providers=[
            autograd("tenfold", ours, *names), autograd("eager:softplus", soft, *names),
            autograd("peer:logsigmoid", peer, *names),
            *([compiled_gradients(soft, *names)] if s == PAIRS[0] else []),
        ],
        reference=with_gradients(soft, *names), quick=trl and s == PAIRS[0],
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for gradient in (False, True):
        for dtype in (FP32, BF16):
            for s in SIZES:
                for pool in ("last", "mean"):
                    yield _reward_case(s, dtype, pool, gradient)
    for s in PAIRS:
        for trl in (False, True):
            yield _pair_case(s, trl)
