# SPDX-License-Identifier: Apache-2.0
"""Cases of ``t5_attention``: forward, forward in training, forward with backward, and a step of decoding.

``mt5-base`` is 12 heads of 64 in 8 sequences, ``mt5-small`` 6 heads. The peer is transformers' own T5 path:
``compute_bias`` into [1, H, Lq, Lk], then ``scaled_dot_product_attention`` with it as a mask; ``bias`` of the forward
is made in the call, as the first layer of a stack does. FLOPs are the useful ones: 4 Lq Lk D a head, 2.5 times that
for the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from tenfold import ops, reference

from .case import (
    Case,
    Function,
    Inputs,
    NotAvailable,
    Provider,
    Shape,
    compiled,
    provider,
    relative_error,
)

DTYPES = (torch.float32, torch.bfloat16)
PEAK = {torch.float32: "fma_fp32", torch.bfloat16: "dot_bf16"}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
MODELS = {"mt5-base": 12, "mt5-small": 6}


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)

    def randn(length: int, std: float = 1.0) -> Tensor:  # as projections leave them
        x = torch.randn(s["b"], length, s["h"], s["d"], generator=made) * std
        return x.to(device, dtype).transpose(1, 2)

    i = Inputs(
        q=randn(s["lq"], s["d"] ** -0.5), k=randn(s["lk"]), v=randn(s["lk"]), dout=randn(s["lq"])
    )
    i.table = torch.randn(32, s["h"], generator=made).to(device)
    i.place = s["lk"] - s["lq"]  # 0: an encoder
    return i


def _bytes(s: Shape, size: int) -> int:
    return s["b"] * s["h"] * s["d"] * size * (2 * s["lq"] + 2 * s["lk"])


def _flops(s: Shape) -> int:
    return 4 * s["b"] * s["h"] * s["d"] * s["lq"] * s["lk"]


def _ours(i: Inputs, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    encoder = i.place == 0
    return ops.t5_attention(
        q, k, v, table, bidirectional=encoder, causal=not encoder, q_offset=i.place
    )[0]


def _bias(i: Inputs, table: Tensor) -> Tensor:
    """transformers' ``compute_bias``."""
    try:
        from transformers.models.t5.modeling_t5 import T5Attention
    except ImportError as error:
        raise NotAvailable(str(error)) from error
    key = torch.arange(i.k.shape[2], device=table.device)
    query = torch.arange(i.q.shape[2], device=table.device)[:, None] + i.place
    bucket = T5Attention._relative_position_bucket(key - query, bidirectional=i.place == 0)
    return F.embedding(bucket, table).permute(2, 0, 1)[None]


def _sdpa(i: Inputs, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    bias = _bias(i, table.to(q.dtype))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def _matmul(i: Inputs, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT + _bias(i, table.to(q.dtype)), -1)
    return weights @ v


def _flex(i: Inputs, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    bias = _bias(i, table.to(q.dtype))[0].contiguous()

    def add(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return score + bias[h, row, key]

    return flex_attention(q, k, v, score_mod=add, scale=1.0)


Form = Callable[[Inputs, Tensor, Tensor, Tensor, Tensor], Tensor]


def _forward(form: Form) -> Function:
    def call(i: Inputs) -> Tensor:
        with torch.no_grad():
            return form(i, i.q, i.k, i.v, i.table)

    return call


def _in_training(form: Form) -> Function:
    """The forward where the table is trained: SDPA takes no fused kernel then."""

    @torch.enable_grad()
    def call(i: Inputs) -> Tensor:
        return form(i, *(x.detach().requires_grad_() for x in (i.q, i.k, i.v, i.table))).detach()

    return call


def _trained(form: Form) -> Function:
    """Forward and backward, to the table."""

    @torch.enable_grad()
    def call(i: Inputs) -> Any:
        leaves = [x.detach().requires_grad_() for x in (i.q, i.k, i.v, i.table)]
        return torch.autograd.grad(form(i, *leaves), leaves, i.dout)

    return call


def _pulled_back(name: str, kind: str, form: Form, **extra: Any) -> Provider:
    """The backward alone, of a forward that has been."""

    def build(i: Inputs) -> Function:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (i.q, i.k, i.v, i.table)]
            out = form(i, *leaves)
        return lambda now: torch.autograd.grad(out, leaves, now.dout, retain_graph=True)

    return Provider(name, kind, build, **extra)


def _defined(i: Inputs) -> Tensor:
    encoder = i.place == 0
    rows = (x.float() for x in (i.q, i.k, i.v))
    return reference.t5_attention(
        *rows, i.table, bidirectional=encoder, causal=not encoder, q_offset=i.place
    )[0]


def _defined_gradients(i: Inputs) -> Any:
    rows = [x.float() for x in (i.dout, i.q, i.k, i.v)]
    nothing = torch.empty(0)
    return reference.t5_attention_backward(*rows, i.table, None, nothing, nothing)


def _rows_agree(got: Any, want: Any, _: Inputs) -> float:
    """Of dq, dk and dv: in bf16 the others add up the gradient of the table in bf16, which is off by a fifth."""
    return relative_error(got[:3], want[:3])


WAYS = {"forward": _forward, "forward in training": _in_training, "forward+backward": _trained}


def _case(model: str, s: Shape, dtype: torch.dtype, way: str = "forward") -> Case:
    wrap, trains = WAYS[way], way == "forward+backward"
    size = dtype.itemsize
    scores = s["b"] * s["h"] * s["lq"] * s["lk"] * size
    agree = {"agree": _rows_agree} if trains else {}
    scratch = (1 if way == "forward" else 4) * scores
    providers = [
        provider("tenfold", wrap(_ours)),
        provider("peer:transformers-sdpa", wrap(_sdpa), scratch=scratch, **agree),
        provider("eager:matmul", wrap(_matmul), scratch=4 * scores, **agree),
    ]
    if way == "forward":
        providers.append(compiled(_forward(_matmul), scratch=3 * scores))
        if s["lq"] > 1:
            flex = _forward(_flex)
            providers.append(compiled(flex, name="peer:flex_attention", scratch=scores))
    return Case(
        op="t5_attention", variant=f"{model} {way}",
        shape=s, dtype=dtype, inputs=_inputs,
        bytes=(lambda s, n: 4 * _bytes(s, n)) if trains else _bytes,
        flops=(lambda s: 7 * _flops(s) // 2) if trains else _flops,
        peak=PEAK[dtype], providers=providers,
        reference=_defined_gradients if trains else _defined,
        tolerance=TOLERANCE[dtype] * (2 if trains else 1),
        quick=model == "mt5-small" and s["lk"] == 512,
        traffic="read" if s["lq"] == 1 else "copy",
    )  # fmt: skip


def _backward_case(model: str, s: Shape, dtype: torch.dtype) -> Case:
    scores = 4 * s["b"] * s["h"] * s["lq"] * s["lk"] * dtype.itemsize
    return Case(
        op="t5_attention_backward", variant=model, shape=s, dtype=dtype, inputs=_inputs,
        bytes=lambda s, n: 3 * _bytes(s, n), flops=lambda s: 5 * _flops(s) // 2, peak=PEAK[dtype],
        providers=[
            _pulled_back("tenfold", "tenfold", _ours),
            _pulled_back("peer:transformers-sdpa", "peer", _sdpa, scratch=scores, agree=_rows_agree),
            _pulled_back("eager:matmul", "eager", _matmul, scratch=scores, agree=_rows_agree),
        ],
        reference=_defined_gradients, tolerance=2 * TOLERANCE[dtype],
        quick=model == "mt5-small" and s["lk"] == 512,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Encoders of two lengths, forward, backward and trained; one new token against a cache."""
    for dtype in DTYPES:
        for model, heads in MODELS.items():
            for length in (512, 1024):
                shape = {"b": 8, "h": heads, "d": 64, "lq": length, "lk": length}
                for way in WAYS:
                    yield _case(model, shape, dtype, way)
                yield _backward_case(model, shape, dtype)
        for length in (512, 1024):
            yield _case("mt5-base", {"b": 8, "h": 12, "d": 64, "lq": 1, "lk": length}, dtype)
