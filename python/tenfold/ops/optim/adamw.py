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


@torch.library.register_fake("tenfold::masked_adamw_")
def _(*args: Any, **kwargs: Any) -> None:
    return None


inference_only("masked_adamw_", mutates=(0, 2, 3, 4, 6))


def masked_adamw_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors,
    masks: Masks, max_exp_avg_sqs: Tensors = (), prefixes: Masks = (), *, mask_kind: str,
    lr: Tensor, beta1: float, beta2: float, weight_decay: float, eps: float,
    maximize: bool = False, amsgrad: bool = False, grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None, clip_coef: Tensor | None = None,
    stochastic_round: bool = False, seed: int = 0, mask_scope: str = "all", block_size: int = 256,
    tensor_ids: Sequence[int] = (),
) -> None:  # fmt: skip
    p, g, m, v, s, vmax = (
        list(x) for x in (params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs)
    )
    call_inference(
        _op, p, g, m, v, s, list(masks), vmax, list(prefixes), mutates=(p, m, v, s, vmax),
        mask_kind=mask_kind, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
        maximize=maximize, amsgrad=amsgrad, grad_scale=grad_scale, found_inf=found_inf,
        clip_coef=clip_coef, stochastic_round=stochastic_round, seed=seed, mask_scope=mask_scope,
        block_size=block_size, tensor_ids=list(tensor_ids),
    )  # fmt: skip
