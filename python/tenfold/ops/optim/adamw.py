# SPDX-License-Identifier: Apache-2.0
"""AdamW steps that leave frozen elements alone: ``masked_adamw_`` and its 8-bit form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

Tensors = Sequence[Tensor]
Masks = Sequence[Tensor | None]

_op = torch.ops.tenfold.masked_adamw_.default
_op_8bit = torch.ops.tenfold.masked_adamw_8bit_.default


@torch.library.register_fake("tenfold::masked_adamw_")
def _(*args: Any, **kwargs: Any) -> None:
    return None


@torch.library.register_fake("tenfold::masked_adamw_8bit_")
def _(*args: Any, **kwargs: Any) -> None:
    return None


inference_only("masked_adamw_", mutates=(0, 2, 3, 4, 6))
inference_only("masked_adamw_8bit_", mutates=(0, 2, 3, 4, 6, 7))


def masked_adamw_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors,
    masks: Masks, max_exp_avg_sqs: Tensors = (), prefixes: Masks = (), *, mask_kind: str,
    lr: Tensor, beta1: float, beta2: float, weight_decay: float, eps: float,
    maximize: bool = False, amsgrad: bool = False, grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None, clip_coef: Tensor | None = None,
    stochastic_round: bool = False, seed: int = 0, mask_scope: str = "all", block_size: int = 256,
    tensor_ids: Sequence[int] = (),
) -> None:  # fmt: skip
    """One AdamW step over a list of tensors, in place, on their trained elements only.

    With ``t`` the step after its increment, ``g = (maximize ? -g : g) / grad_scale * clip_coef``::

        p = p * (1 - lr * weight_decay)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p = p - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)

    in float32, in the order and with the roundings of ``torch.optim.AdamW(fused=True)``, whose bits these
    are. A frozen element keeps the bits of p, m and v, whatever its gradient; no weight decay either.
    Results do not depend on the number of threads.

    Args:
        params: float32, bfloat16 or float16, any shape, dense, all on one device; dtypes may differ.
        grads: of the dtype, shape and strides of the parameters; not written.
        exp_avgs, exp_avg_sqs: float32 or bfloat16 (or float16 with float16 parameters), the same dtype
            for both; dense with the shape and strides of the parameters, or compact (``prefixes``).
        steps: float32, one element each, on the device of the parameters. Each advances by 1.
        masks: packed bits (``pack_mask``), one tensor or None (everything trains) per parameter; or
            empty. A set bit trains its unit.
        max_exp_avg_sqs: with ``amsgrad``, like ``exp_avg_sqs``.
        prefixes: ``mask_prefix(masks[i])`` makes the states of tensor i compact: they hold the trained
            elements only, in storage order. Or None, or empty.
        mask_kind: what a bit stands for: ``"row"`` (an index of the first dimension), ``"col"`` (of the
            last one), ``"block"`` (``block_size`` elements in storage order), ``"element"``;
            ``"none"`` if no mask is given. Rows and columns need contiguous tensors of 2 dimensions
            or more.
        lr: 0-d, any floating dtype, on the CPU or the device of the parameters.
        grad_scale, found_inf, clip_coef: float32, one element, on the device of the parameters.
            ``found_inf`` other than 0: nothing is written, no step advances.
        stochastic_round: bfloat16 parameters are rounded up or down at random, with the chance of the
            distance (float32 ones are left as they are). The 16 random bits of element i are the
            (i % 8)-th half of the Philox4x32-10 words with counter ``(i // 8, tensor id, t)`` (the first
            one 64 bits) and key ``seed``.
        mask_scope: ``"all"``, or ``"param_only"``: m and v of frozen elements are updated too (not with
            compact states).
        block_size: of ``mask_kind="block"``; a power of two, at least 32.
        tensor_ids: of the tensors in the random numbers; default: their positions in the list.

    Raises:
        ValueError: lengths of lists, shapes, strides, devices, masks that do not fit, hyperparameters
            out of range (with torch's wording), ``stochastic_round`` with float16.
        TypeError: dtypes. RuntimeError: dtypes of p and g, or of m and v, that differ; an input that
            requires grad under grad mode. Nothing has been written then.

    Note:
        Not differentiable. Reads and writes what the trained elements occupy: frozen rows and blocks move
        no memory; single frozen elements share sectors with trained ones.

    Source:
        HFT (arXiv 2404.18466), update of the trained part; AdamW (arXiv 1711.05101).
    """
    p, g, m, v, s, most = (
        list(x) for x in (params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs)
    )
    call_inference(
        _op, p, g, m, v, s, list(masks), most, list(prefixes), mutates=(p, m, v, s, most),
        mask_kind=mask_kind, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
        maximize=maximize, amsgrad=amsgrad, grad_scale=grad_scale, found_inf=found_inf,
        clip_coef=clip_coef, stochastic_round=stochastic_round, seed=seed, mask_scope=mask_scope,
        block_size=block_size, tensor_ids=list(tensor_ids),
    )  # fmt: skip


def masked_adamw_8bit_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors,
    masks: Masks, absmax1: Tensors, absmax2: Tensors, code1: Tensor, code2: Tensor, *,
    mask_kind: str, lr: Tensor, beta1: float, beta2: float, weight_decay: float, eps: float,
    maximize: bool = False, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None, stochastic_round: bool = False, seed: int = 0,
    block_size: int = 256, tensor_ids: Sequence[int] = (),
) -> None:  # fmt: skip
    """:func:`masked_adamw_` on moments of 8 bits: codes, and one float32 absmax per 256 elements.

    A moment is ``code[q] * absmax`` before the update. After it, absmax is the largest magnitude among the
    trained elements of the block, and q the code nearest to ``value / absmax`` (ties to the lower code;
    absmax 0: the code nearest to 0; NaN: absmax becomes NaN).

    A frozen element keeps its codes; but where it shares a block with trained ones, these codes stand for
    other values afterwards, because the block has one absmax. A block without trained elements keeps its
    absmax and is not read.

    Args:
        exp_avgs, exp_avg_sqs: uint8 codes of the shape and strides of the parameters; blocks of 256
            lie along the storage, the last one may be shorter.
        absmax1, absmax2: float32 ``[ceil(n / 256)]`` per tensor, of ``exp_avgs`` and ``exp_avg_sqs``.
        code1, code2: float32 [256], sorted and finite; of m (signed) and v (not negative). For example
            `tenfold.optim.dynamic_code(True)` and `(False)`.

    The other arguments, and what is raised, are those of :func:`masked_adamw_`; ``block_size`` is that of
    the mask.

    Source:
        HFT (arXiv 2404.18466), section 3.5 of the method's specification; blockwise dynamic
        quantisation: arXiv 2110.02861.
    """
    p, g, m, v, s, a1, a2 = (
        list(x) for x in (params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2)
    )
    call_inference(
        _op_8bit, p, g, m, v, s, list(masks), a1, a2, code1, code2, mutates=(p, m, v, s, a1, a2),
        mask_kind=mask_kind, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
        maximize=maximize, grad_scale=grad_scale, found_inf=found_inf, clip_coef=clip_coef,
        stochastic_round=stochastic_round, seed=seed, block_size=block_size,
        tensor_ids=list(tensor_ids),
    )  # fmt: skip
