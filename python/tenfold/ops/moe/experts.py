# SPDX-License-Identifier: Apache-2.0
"""Expert blocks of a mixture, and the grouped products they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import _library, call_inference, differentiable, inference_only

__all__ = ["grouped_gemm", "grouped_gemm_wgrad", "moe_lora_swiglu_mlp", "moe_swiglu_mlp"]

_ops = torch.ops.tenfold

for _name in ("grouped_gemm_wgrad", "moe_swiglu_mlp_train", "moe_swiglu_mlp_backward",
              "moe_lora_experts_train", "moe_lora_experts_backward"):  # fmt: skip
    inference_only(_name)


@torch.library.register_fake("tenfold::grouped_gemm")
def _(a, w, offsets, trans_w=True, gather=None):
    rows = a.shape[0] if gather is None else gather.shape[0]
    return a.new_empty((rows, w.shape[1 if trans_w else 2]))


@torch.library.register_fake("tenfold::grouped_gemm_wgrad")
def _(dy, a, offsets, gather=None):
    return a.new_empty((offsets.shape[0] - 1, dy.shape[1], a.shape[1]))


@torch.library.register_fake("tenfold::moe_swiglu_mlp")
def _(x, gate_up, down, index, weight, *, allow_sentinel=False):
    return x.new_empty(x.shape)


@torch.library.register_fake("tenfold::moe_swiglu_mlp_train")
def _(x, gate_up, down, index, weight, *, allow_sentinel=False):
    slots = index.shape[0] * index.shape[1]
    return x.new_empty(x.shape), x.new_empty((slots, 2 * down.shape[2]))


def _wanted(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if some else (0,)) for t, some in zip(tensors, wanted))


@torch.library.register_fake("tenfold::moe_swiglu_mlp_backward")
def _(grad_out, x, gate_up, down, index, weight, hidden, of_x, of_gate_up, of_down, of_weight, *,
      allow_sentinel=False):  # fmt: skip
    return _wanted((x, gate_up, down, weight), (of_x, of_gate_up, of_down, of_weight))


@torch.library.register_fake("tenfold::moe_lora_experts")
def _(x, wg, wu, wd, a_gate, a_up, a_down, b_gate, b_up, b_down, scale, index, weight, *,
      allow_sentinel=False):  # fmt: skip
    return x.new_empty(x.shape)


@torch.library.register_fake("tenfold::moe_lora_experts_train")
def _(x, wg, wu, wd, a_gate, a_up, a_down, b_gate, b_up, b_down, scale, index, weight, *,
      allow_sentinel=False):  # fmt: skip
    slots = index.shape[0] * index.shape[1]
    return (x.new_empty(x.shape), x.new_empty((slots, 2 * wg.shape[0])),
            x.new_empty((slots, 2 * a_gate.shape[1])))  # fmt: skip


@torch.library.register_fake("tenfold::moe_lora_experts_backward")
def _(grad_out, x, wg, wu, wd, a_gate, a_up, a_down, b_gate, b_up, b_down, scale, index, weight,
      hidden, low, wanted, *, allow_sentinel=False):  # fmt: skip
    tensors = (x, wg, wu, wd, a_gate, a_up, a_down, b_gate, b_up, b_down, weight)
    return _wanted(tensors, [bool(wanted >> i & 1) for i in range(len(tensors))])


def _grouped_args(a, w, offsets, trans_w=True, gather=None):
    return (a, w, offsets, gather), trans_w


def _save_grouped(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    tensors, ctx.trans_w = _grouped_args(*args, **kwargs)
    ctx.save_for_backward(*tensors)
    ctx.inputs = len(args)


def _backward_grouped(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    a, w, offsets, gather = ctx.saved_tensors
    of_a, of_w = ctx.needs_input_grad[2:4]
    made: list[Tensor | None] = [None] * ctx.inputs
    if grad is None:
        return tuple(made)
    if of_a:
        rows = _ops.grouped_gemm(grad, w, offsets, not ctx.trans_w)
        if gather is not None:
            sums, at = a.new_zeros(a.shape, dtype=torch.float32), gather.long()
            if a.is_cuda:  # where index_add_ has no order, and this one sorts
                sums.index_put_((at,), rows.float(), accumulate=True)
            else:
                sums.index_add_(0, at, rows.float())
            rows = sums.to(a.dtype)
        made[0] = rows
    if of_w and ctx.trans_w:
        made[1] = _ops.grouped_gemm_wgrad(grad, a, offsets, gather)
    elif of_w:
        rows = a if gather is None else a.index_select(0, gather)
        made[1] = _ops.grouped_gemm_wgrad(rows, grad, offsets)
    return tuple(made)


differentiable("grouped_gemm", _save_grouped, _backward_grouped)


def _forward_experts(ctx: Any, needed: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    out, *ctx.made = _ops.moe_swiglu_mlp_train(*args, **kwargs)
    return out


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    made, ctx.made = ctx.made, None
    ctx.others = tuple(None if isinstance(x, Tensor) else x for x in args)
    ctx.save_for_backward(*(x for x in args if isinstance(x, Tensor)), *made)
    ctx.options = kwargs


def _backward_experts(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 5
    of_x, of_gate_up, of_down, _, of_weight = ctx.needs_input_grad[2:]
    made = _ops.moe_swiglu_mlp_backward(grad, *ctx.saved_tensors, of_x, of_gate_up, of_down,
                                        of_weight, **ctx.options)  # fmt: skip
    x, gate_up, down, weight = (t if some else None for t, some in
                                zip(made, (of_x, of_gate_up, of_down, of_weight)))  # fmt: skip
    return x, gate_up, down, None, weight


differentiable("moe_swiglu_mlp", _save, _backward_experts, _forward_experts)


def _forward_lora(ctx: Any, needed: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    out, *ctx.made = _ops.moe_lora_experts_train(*args, **kwargs)
    return out


def _backward_lora(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 13
    *inputs, index, weight, hidden, low = ctx.saved_tensors
    needs = ctx.needs_input_grad[2:]
    wanted = [*needs[:10], needs[12]]
    made = _ops.moe_lora_experts_backward(
        grad, *inputs, ctx.others[10], index, weight, hidden, low,
        sum(some << i for i, some in enumerate(wanted)), **ctx.options,
    )  # fmt: skip
    *grads, of_weight = (t if some else None for t, some in zip(made, wanted))
    return *grads, None, None, of_weight


differentiable("moe_lora_experts", _save, _backward_lora, _forward_lora)


@torch.library.register_fake("tenfold::moe_lora_swiglu_mlp")
def _(x, wg, wu, wd, lora_a, lora_b, scale, index, weight, *, allow_sentinel=False):
    return x.new_empty(x.shape)


def _lora(keyset: Any, x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, lora_a: Any, lora_b: Any,
          *others: Any, **options: Any) -> Tensor:  # fmt: skip
    """Autograd of lists: that of the op without them."""
    if len(lora_a) == len(lora_b) == 3:
        return _ops.moe_lora_experts(x, wg, wu, wd, *lora_a, *lora_b, *others, **options)
    with torch._C._AutoDispatchBelowAutograd():  # refuses
        return _ops.moe_lora_swiglu_mlp(x, wg, wu, wd, lora_a, lora_b, *others, **options)


_library.impl("moe_lora_swiglu_mlp", _lora, "Autograd", with_keyset=True)


def _routed(op: str, x: Tensor, index: Tensor, weight: Tensor, *matrices: Tensor) -> Any:
    """x as [T, d], index and weight as [T, k] (weight in float32), and what autocast makes of floats."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, *matrices = (t.to(dtype) for t in (x, *matrices))  # type: ignore[assignment]
    if weight.is_floating_point() and weight.dtype != torch.float32:
        weight = weight.float()
    if x.dim() in (0, 2):  # checked by the op
        return x, index, weight, *matrices
    for name, t in (("index", index), ("weight", weight)):
        if t.shape[:-1] != x.shape[:-1]:
            raise RuntimeError(f"tenfold::{op}: {name} must be {[*x.shape[:-1], 'k']} to match x "
                               f"{list(x.shape)}, got {list(t.shape)}")  # fmt: skip
    rows = x.shape[:-1].numel()
    return *(t.reshape(rows, t.shape[-1]) for t in (x, index, weight)), *matrices


def grouped_gemm(
    a: Tensor, w: Tensor, offsets: Tensor, trans_w: bool = True, gather: Tensor | None = None
) -> Tensor:
    """Rows [offsets[i], offsets[i + 1]) of ``a`` times ``w[i].T``, or ``w[i]``: one product per group, in one call.

    Args:
        a: [R, K], float32, bfloat16 or float16; rows contiguous (else copied).
        w: [n, N, K], or [n, K, N] with ``trans_w=False``; dtype of ``a``, any strides but the last.
        offsets: int32 or int64 [n + 1], from 0, not decreasing, up to S at most.
        gather: int32 or int64 [S]: row s of the product takes ``a[gather[s]]``; else S = R.

    Returns:
        [S, N], dtype of ``a``; rows that no group has are 0. Differentiable in ``a`` and ``w``. Sums are
        float32 and rounded once. A group of few rows reads its matrix once, unpacked.

    Raises:
        ValueError: shapes, dtypes that differ, offsets. TypeError: dtypes. RuntimeError: devices. IndexError:
        ``offsets`` or ``gather`` not integers, ``gather`` out of range (values on the CPU only).

    Source:
        UpIT (arXiv 2410.01610), section 7 of the method's specification.
    """
    return call(_ops.grouped_gemm, a, w, offsets, trans_w, gather)


def grouped_gemm_wgrad(
    dy: Tensor, a: Tensor, offsets: Tensor, gather: Tensor | None = None
) -> Tensor:
    """Weight gradients of :func:`grouped_gemm`: ``dy[rows].T @ a[rows]`` of each group's rows.

    Args:
        dy: [S, N], float32, bfloat16 or float16.
        a: [R, K], dtype of ``dy``; with ``gather`` [S] row s is ``a[gather[s]]``, else R = S.
        offsets: int32 or int64 [n + 1], as in :func:`grouped_gemm`.

    Returns:
        [n, N, K], exactly 0 for a group without rows. Not differentiable. Every element is summed by one
        thread, in the order of the rows.

    Raises:
        As :func:`grouped_gemm`.
    """
    return call_inference(_ops.grouped_gemm_wgrad, dy, a, offsets, gather)


def moe_swiglu_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, *,
    allow_sentinel: bool = False,
) -> Tensor:  # fmt: skip
    """A mixture's expert block: the sum over j of ``weight[t, j] * down[e] @ (silu(g) * u)``.

    With e = ``index[t, j]`` and [g, u] = ``gate_up[e] @ x[t]``.

    Args:
        x: [..., d], float32, bfloat16 or float16; under autocast cast to its dtype, like the matrices.
        gate_up: [n, 2 f, d], rows of gate first (transformers' order). down: [n, d, f]. Dtype of ``x``.
        index: int32 or int64 [..., k]: experts of a token. One named twice counts twice.
        weight: floating [..., k], used as float32.
        allow_sentinel: an index of n or above names nobody: its slot is skipped and adds 0 (expert
            parallelism); else it is an error.

    Returns:
        Like ``x``. Differentiable in ``x``, ``gate_up``, ``down`` and ``weight``: gradients of an expert
        without tokens are exactly 0, and those of tensors that do not require them are not made. For
        the backward only pre-activations are kept, [S, 2 f] of S = T k slots; the results of experts
        are never stored. A token's slots are summed in their order, in float32.

    Raises:
        ValueError: shapes of x and matrices, dtypes that differ. TypeError: dtypes. RuntimeError: index and weight
        whose shapes do not fit, devices. IndexError: an index not integer, or (on the CPU) out of range.

    Source:
        UpIT (arXiv 2410.01610), sections 3 and 7 of the method's specification.
    """
    rows, i, w, *matrices = _routed("moe_swiglu_mlp", x, index, weight, gate_up, down)
    out = call(_ops.moe_swiglu_mlp, rows, *matrices, i, w, allow_sentinel=allow_sentinel)
    return out.view(x.shape)


def moe_lora_swiglu_mlp(
    x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor], scale: float, index: Tensor, weight: Tensor, *,
    allow_sentinel: bool = False,
) -> Tensor:  # fmt: skip
    """:func:`moe_swiglu_mlp` of experts that are LoRA pairs on one shared block: ``W + scale * B[e] @ A[e]``.

    For gate, up and down each. The products with the shared block are made once per token instead of once
    per slot: down is linear.

    Args:
        x, index, weight, allow_sentinel: as there.
        wg, wu: [f, d]. wd: [d, f]. Dtype of ``x``.
        lora_a: three of [n, r, in], of gate, up (in = d) and down (in = f).
        lora_b: three of [n, out, r] (out = f, f, d).

    Returns:
        Like ``x``. Differentiable in everything but ``scale`` and ``index``; gradients of the shared block
        are made only if it requires them.

    Raises:
        As :func:`moe_swiglu_mlp`.

    Source:
        UpIT (arXiv 2410.01610), sections 3 (S7) and 7 of the method's specification.
    """
    rows, i, w, *parts = _routed("moe_lora_swiglu_mlp", x, index, weight, wg, wu, wd, *lora_a,
                                 *lora_b)  # fmt: skip
    a, b = parts[3 : 3 + len(lora_a)], parts[3 + len(lora_a) :]
    out = call(_ops.moe_lora_swiglu_mlp, rows, *parts[:3], a, b, scale, i, w,
               allow_sentinel=allow_sentinel)  # fmt: skip
    return out.view(x.shape)
