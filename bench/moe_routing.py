# SPDX-License-Identifier: Apache-2.0
"""Cases of the router and of sorted slots: part of the family ``moe``.

``moe_gate`` alone and, as a router is used, with ``moe_sort`` (``moe_route``); ``moe_gate_linear``, which makes the
logits as well; ``moe_permute`` and ``moe_combine``. Eager forms are those of transformers' routers, in as few steps as
torch allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Function, Inputs, Shape, compiled, provider
from .gradients import autograd, with_gradients
from .moe_batch import BF16, DTYPES, FP32, logits_of, randn, routed, slots

ROUTERS = ({"n": 8, "k": 2}, {"n": 64, "k": 8})
TOKENS = (64, 4096, 65536)
WIDTH = 1024


def _logits(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return Inputs(logits=logits_of(s["t"], s["n"]).to(device, dtype))


# -- moe_gate, moe_sort ------------------------------------------------------------------------------


def gate(i: Inputs, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, and a softmax of these alone."""
    top, index = i.logits.topk(k)
    return top.softmax(-1, dtype=torch.float32), index


def gate_of_softmax(i: Inputs, k: int) -> tuple[Tensor, Tensor]:
    """As transformers' routers have it."""
    p, index = i.logits.softmax(-1, dtype=torch.float32).topk(k)
    return p / p.sum(-1, keepdim=True), index


def sort(index: Tensor, n: int) -> tuple[Tensor, ...]:
    """order, inverse, counts and offsets."""
    flat = index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=n)
    ends = counts.cumsum(0)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return order, inverse, counts, F.pad(ends, (1, 0))


def sort_by_keys(index: Tensor, n: int) -> tuple[Tensor, ...]:
    """The same with one sort of keys of expert and slot, which torch sorts faster than it sorts stably."""
    flat = index.flatten()
    at = torch.arange(flat.shape[0], device=flat.device)
    order = torch.sort(flat * flat.shape[0] + at).values.remainder_(flat.shape[0])
    offsets = torch.searchsorted(flat[order], torch.arange(n + 1, device=flat.device))
    inverse = torch.empty_like(order)
    inverse[order] = at
    return order, inverse, offsets.diff(), offsets


def _as_int32(made: Any) -> Any:
    return tuple(t if t.is_floating_point() else t.int() for t in made)


def _both(gates: Any, sorts: Any, s: Shape) -> Function:
    def run(i: Inputs) -> tuple[Tensor, ...]:
        weight, index = gates(i, s["k"])
        return weight, index, *sorts(index, s["n"])

    return run


def _gate_case(s: Shape, dtype: torch.dtype, sorting: bool) -> Case:
    k, n = s["k"], s["n"]
    if sorting:

        def ours(i: Inputs) -> Any:
            return ops.moe_route(i.logits, k)

        forms = {"eager:topk": _both(gate, sort, s), "eager:softmax": _both(gate_of_softmax, sort, s),
                 "eager:keys": _both(gate, sort_by_keys, s)}  # fmt: skip
    else:

        def ours(i: Inputs) -> Any:
            return ops.moe_gate(i.logits, k)

        forms = {"eager:topk": lambda i: gate(i, k), "eager:softmax": lambda i: gate_of_softmax(i, k)}  # fmt: skip
    defined = _both(lambda i, k: reference.moe_gate(i.logits, k), reference.moe_sort, s)
    compiles = sorting and s["t"] == TOKENS[1] and dtype == FP32
    return Case(
        op="moe_route" if sorting else "moe_gate", shape=s, dtype=dtype, inputs=_logits,
        bytes=lambda s, size: size * s["t"] * n + (8 + 8 * sorting) * slots(s),
        providers=[
            provider("tenfold", ours), *(provider(name, form) for name, form in forms.items()),
            *([compiled(forms["eager:topk"])] if compiles else []),
        ],
        reference=lambda i: _as_int32(defined(i))[: 6 if sorting else 2],
        # bf16: equal logits, of which torch takes any.
        agree=_tied if dtype == BF16 else _exact,
        tolerance=1e-5, quick=dtype == FP32 and ((s["t"] == TOKENS[0] and n == 64) or not sorting),
    )  # fmt: skip


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _exact(got: Any, want: Any, _: Inputs) -> float:
    same = all(torch.equal(a.to(b.dtype), b) for a, b in zip(got[1:], want[1:], strict=True))
    return _relative(got[0], want[0]) if same else float("inf")


def _tied(got: Any, want: Any, i: Inputs) -> float:
    """Chosen logits are the same, and weights; which of equal logits they belong to is left open."""
    chosen = [i.logits.gather(1, made[1].long()).sort(-1).values for made in (got, want)]
    return _relative(got[0], want[0]) if torch.equal(*chosen) else float("inf")


def _sort_case(s: Shape) -> Case:
    n = s["n"]

    def inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        return Inputs(index=routed(s["t"], s["n"], s["k"])[1].to(device, dtype))

    return Case(
        op="moe_sort", shape=s, dtype=torch.int32, inputs=inputs,
        bytes=lambda s, size: 12 * slots(s),
        providers=[
            provider("tenfold", lambda i: ops.moe_sort(i.index, n)),
            provider("eager:argsort", lambda i: sort(i.index, n)),
            provider("eager:keys", lambda i: sort_by_keys(i.index.long(), n)),
        ],
        reference=lambda i: reference.moe_sort(i.index, n), tolerance=0.0,
        quick=s["t"] == TOKENS[0] and n == 64,
    )  # fmt: skip


# -- moe_gate_linear ---------------------------------------------------------------------------------


def _router_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    x = randn(s["t"], s["d"], seed=1)
    w = randn(s["n"], s["d"], seed=2, scale=s["d"] ** -0.5)
    grad = randn(s["t"], s["k"], seed=3)
    x = _decided(x.to(dtype), w, s["k"])
    return Inputs(x=x.to(device), w=w.to(device), grad=grad.to(device))


def _decided(x: Tensor, w: Tensor, k: int) -> Tensor:
    """Tokens whose choices no rounding can change: two gradients would be compared of different experts."""
    best = (x.double() @ w.double().T).topk(min(k + 1, w.shape[0])).values
    close = (best[:, :-1] - best[:, 1:]).amin(-1) < 1e-4
    rows = torch.arange(x.shape[0])
    rows[close] = rows[~close][: int(close.sum())]
    return x[rows]


def router(i: Inputs, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The product in float32: routing is decided by small differences."""
    logits = F.linear(i.x.float(), i.w)
    return logits, *gate(Inputs(logits=logits), k)


def _router_agrees(got: Any, want: Any, _: Inputs) -> float:
    """Logits and weights; two logits may differ by less than a product's rounding."""
    return max(_relative(got[0], want[0]), _relative(got[1], want[1]))


def _router_case(s: Shape, dtype: torch.dtype) -> Case:
    k = s["k"]
    return Case(
        op="moe_gate_linear", shape=s, dtype=dtype, inputs=_router_inputs, peak="fma_fp32",
        bytes=lambda s, size: s["t"] * (size * s["d"] + 4 * s["n"] + 8 * k) + 4 * s["n"] * s["d"],
        flops=lambda s: 2 * s["t"] * s["n"] * s["d"],
        providers=[
            provider("tenfold", lambda i: ops.moe_gate_linear(i.x, i.w, k)),
            provider("eager", lambda i: router(i, k)),
        ],
        reference=lambda i: reference.moe_gate_linear(i.x, i.w, k), agree=_router_agrees,
        tolerance=1e-4, quick=s["t"] == TOKENS[0] and dtype == BF16 and s["n"] == 64,
    )  # fmt: skip


def _router_gradient(s: Shape, dtype: torch.dtype) -> Case:
    k = s["k"]

    def loss(form: Any) -> Any:
        return lambda i: (form(i)[1] * i.grad).sum()

    ours = loss(lambda i: ops.moe_gate_linear(i.x, i.w, k))
    defined = with_gradients(loss(lambda i: reference.moe_gate_linear(i.x, i.w, k)), "x", "w")
    return Case(
        op="moe_gate_linear", variant="gradient", shape=s, dtype=dtype, inputs=_router_inputs,
        bytes=lambda s, size: 2 * s["t"] * size * s["d"] + 8 * s["n"] * s["d"],
        flops=lambda s: 6 * s["t"] * s["n"] * s["d"], peak="fma_fp32",
        providers=[
            autograd("tenfold", ours, "x", "w"),
            autograd("eager", loss(lambda i: router(i, k)), "x", "w"),
        ],
        reference=defined, agree=lambda got, want, i: max(map(_relative, got[1:], want[1:])),
        tolerance=1e-4 if dtype == FP32 else 1e-2,
    )  # fmt: skip


# -- rows --------------------------------------------------------------------------------------------


def _row_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    weight, index = routed(s["t"], s["n"], s["k"])
    order, inverse, *_ = reference.moe_sort(index, s["n"])
    x, y = randn(s["t"], s["d"], seed=1), randn(slots(s), s["d"], seed=2)
    return Inputs(x=x.to(device, dtype), y=y.to(device, dtype), weight=weight.to(device),
                  order=order.to(device), inverse=inverse.to(device))  # fmt: skip


def _permute_case(s: Shape, dtype: torch.dtype) -> Case:
    k = s["k"]
    return Case(
        op="moe_permute", shape=s, dtype=dtype, inputs=_row_inputs,
        bytes=lambda s, size: size * s["d"] * (s["t"] + slots(s)) + 4 * slots(s),
        providers=[
            provider("tenfold", lambda i: ops.moe_permute(i.x, i.order, k)),
            provider("eager:select", lambda i: i.x.index_select(0, i.order.div(
                k, rounding_mode="floor"))),
            provider("eager:index", lambda i: i.x[i.order // k]),
            provider("clone", lambda i: i.y.clone(), "bound"),
        ],
        reference=lambda i: reference.moe_permute(i.x, i.order, k), tolerance=0.0,
        quick=s["t"] == 128 and dtype == BF16,
    )  # fmt: skip


def combine(i: Inputs) -> Tensor:
    """Rows of slots, times weights, added up in float32."""
    rows = i.y.index_select(0, i.inverse).view(*i.weight.shape, -1)
    return (rows * i.weight[:, :, None]).sum(1).to(i.y.dtype)


def combine_by_products(i: Inputs) -> Tensor:
    """The sum as a product of a row of weights with a token's rows."""
    rows = i.y.index_select(0, i.inverse).view(*i.weight.shape, -1)
    return torch.bmm(i.weight[:, None].to(i.y.dtype), rows).squeeze(1)


def combine_by_adding(i: Inputs) -> Tensor:
    out = i.y.new_zeros(i.weight.shape[0], i.y.shape[1])
    weight = i.weight.flatten()[i.order][:, None].to(i.y.dtype)
    return out.index_add_(0, i.order.div(i.weight.shape[1], rounding_mode="floor"), i.y * weight)


def _combine_case(s: Shape, dtype: torch.dtype) -> Case:
    return Case(
        op="moe_combine", shape=s, dtype=dtype, inputs=_row_inputs,
        bytes=lambda s, size: size * s["d"] * (s["t"] + slots(s)) + 8 * slots(s),
        providers=[
            provider("tenfold", lambda i: ops.moe_combine(i.y, i.weight, i.inverse)),
            provider("eager:sum", combine), provider("eager:bmm", combine_by_products),
            provider("eager:index_add", combine_by_adding),
            *([compiled(combine)] if s["t"] == 4096 and s["n"] == 8 else []),
        ],
        reference=lambda i: reference.moe_combine(i.y, i.weight, i.inverse),
        tolerance=1e-5 if dtype == FP32 else 1e-2, quick=s["t"] == 128 and dtype == BF16,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for router_size in ROUTERS:
        for tokens in TOKENS:
            for dtype in DTYPES:
                yield _gate_case({"t": tokens, **router_size}, dtype, sorting=True)
            yield _sort_case({"t": tokens, **router_size})
    for dtype in DTYPES:
        yield _gate_case({"t": TOKENS[1], **ROUTERS[1]}, dtype, sorting=False)
        for tokens in TOKENS[:2]:
            yield _router_case({"t": tokens, **ROUTERS[1], "d": WIDTH}, dtype)
        yield _router_gradient({"t": TOKENS[1], **ROUTERS[1], "d": WIDTH}, dtype)
    for dtype in DTYPES:
        for s in ({"t": 128, **ROUTERS[1]}, {"t": 4096, **ROUTERS[0]}):
            yield _permute_case({**s, "d": WIDTH}, dtype)
            yield _combine_case({**s, "d": WIDTH}, dtype)
