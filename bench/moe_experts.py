# SPDX-License-Identifier: Apache-2.0
"""Cases of ``moe_swiglu_mlp``: part of the family ``moe``.

A mixture's expert block, forward, and forward and backward of everything, from one token (where the weights
of the experts that are hit are read once, and little else happens) to thousands (where it is products).
Useful FLOPs: 6 T k d f, and twice as many for the gradients. Peers are transformers' implementations of
experts that run on a CPU, called through its own module; ``eager:loop`` is the fastest plain torch that we know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops

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
from .gradients import Loss, autograd, with_gradients
from .moe_batch import BF16, DTYPES, FEW, FP32, MANY, PEAK, hit, randn, routed, slots, widened

TOKENS = (1, 16, 128, 1024, 4096)
LEAVES = ("x", "gate_up", "down", "weight")
MOST_GATHERED = 2 << 30  # bytes: a copy of the weights per slot beyond it would take seconds


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    weight, index = routed(s["t"], s["n"], s["k"])
    n, d, f = s["n"], s["d"], s["f"]
    made = {
        "x": randn(s["t"], d, seed=1), "gate_up": randn(n, 2 * f, d, seed=2, scale=d**-0.5),
        "down": randn(n, d, f, seed=3, scale=f**-0.5), "grad": randn(s["t"], d, seed=4),
    }  # fmt: skip
    return Inputs(weight=weight.to(device), index=index.to(device),
                  **{name: t.to(device, dtype) for name, t in made.items()})  # fmt: skip


# -- plain torch -------------------------------------------------------------------------------------


def loop(i: Inputs) -> Tensor:
    """Slots sorted once; then expert by expert, and every token's slots summed at the end.

    ``unbind``: the gradient of ``gate_up[e]`` would be as large as that of all experts.
    """
    k = i.index.shape[1]
    order = i.index.flatten().argsort(stable=True)
    token = order.div(k, rounding_mode="floor")
    rows = i.x.index_select(0, token).split(_counts(i))
    factors = i.weight.flatten().index_select(0, order)[:, None].to(i.x.dtype)
    parts = []
    for part, gate_up, down in zip(rows, i.gate_up.unbind(0), i.down.unbind(0)):
        if part.shape[0] > 0:
            gate, up = F.linear(part, gate_up).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up, down))
    y = torch.cat(parts) * factors
    return torch.zeros_like(i.x).index_add(0, token, y)


def _counts(i: Inputs) -> list[int]:
    return torch.bincount(i.index.flatten(), minlength=i.gate_up.shape[0]).tolist()


def batched(i: Inputs) -> Tensor:
    """Every slot's matrices gathered, and one batched product of all: for very few tokens."""
    at = i.index.flatten()
    rows = i.x.repeat_interleave(i.index.shape[1], 0)[:, :, None]
    gate, up = torch.bmm(i.gate_up[at], rows).squeeze(-1).chunk(2, -1)
    y = torch.bmm(i.down[at], (F.silu(gate) * up)[:, :, None]).view(*i.index.shape, -1)
    return (y * i.weight[:, :, None].to(y.dtype)).sum(1)


# -- transformers ------------------------------------------------------------------------------------


def _gathered(s: Shape, dtype: torch.dtype) -> int:
    """Bytes of the weights that a batched form copies."""
    return slots(s) * 3 * s["d"] * s["f"] * dtype.itemsize


def transformers_block(name: str, s: Shape) -> Any:
    """Mixtral's experts as the module that transformers calls; its weights are to be set."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError:
        raise NotAvailable("transformers with an experts interface is not installed") from None
    config = MixtralConfig(hidden_size=s["d"], intermediate_size=s["f"],
                           num_local_experts=s["n"], num_experts_per_tok=s["k"])  # fmt: skip
    config._experts_implementation = name
    with torch.device("meta"):
        block = MixtralExperts(config)
    for parameter in ("gate_up_proj", "down_proj"):
        delattr(block, parameter)
    return block


def transformers_forward(name: str, s: Shape) -> Loss:
    block = transformers_block(name, s)

    def run(i: Inputs) -> Tensor:
        block.gate_up_proj, block.down_proj = i.gate_up, i.down  # plain tensors, or leaves
        return block(i.x, i.index, i.weight)

    return run


def _peer(name: str, s: Shape, dtype: torch.dtype, gradient: bool) -> Provider:
    def build(_: Inputs) -> Function:
        gathered = _gathered(s, dtype) * (2 if gradient else 1)
        if name == "batched_mm" and gathered > MOST_GATHERED:
            raise NotAvailable(f"would gather {gathered / 2**30:.1f} GiB of weights")
        forward = transformers_forward(name, s)
        return with_gradients(weighted(forward), *LEAVES) if gradient else forward

    return Provider(f"peer:transformers_{name}", "peer", build)


# -- cases -------------------------------------------------------------------------------------------


def weighted(forward: Loss) -> Loss:
    """A loss whose gradient by the block's result is ``grad``."""
    return lambda i: (forward(i) * i.grad).sum()


def gradients_agree(got: Any, want: Any, i: Inputs) -> float:
    """The loss is a sum in which nearly everything cancels: its gradients are compared."""
    return relative_error(got[1:], want[1:], i)


def ours(i: Inputs) -> Tensor:
    return ops.moe_swiglu_mlp(i.x, i.gate_up, i.down, i.index, i.weight)


def _forward_bytes(s: Shape, size: int) -> int:
    return size * (hit(s) * 3 * s["d"] * s["f"] + 2 * s["t"] * s["d"]) + 12 * slots(s)


def _gradient_bytes(s: Shape, size: int) -> int:
    """What is read for the forward, and the gradients of all experts, hit or not."""
    written = s["n"] * 3 * s["d"] * s["f"] + 2 * s["t"] * s["d"]
    return _forward_bytes(s, size) + size * written + 4 * slots(s)


def _case(base: Shape, tokens: int, dtype: torch.dtype, gradient: bool) -> Case:
    s = {"t": tokens, **base}
    small = _gathered(s, dtype) <= MOST_GATHERED / 8
    if gradient:
        providers = [autograd("tenfold", weighted(ours), *LEAVES),
                     autograd("eager:loop", weighted(loop), *LEAVES)]  # fmt: skip
    else:
        providers = [provider("tenfold", ours), provider("eager:loop", loop),
                     *([provider("eager:batched", batched)] if small else []),
                     *([compiled(batched)] if tokens == 1 else [])]  # fmt: skip
    peers = [_peer(name, s, dtype, gradient) for name in ("eager", "batched_mm", "grouped_mm")]
    defined = with_gradients(weighted(loop), *LEAVES) if gradient else loop
    return Case(
        op="moe_swiglu_mlp", variant="gradient" if gradient else "", shape=s, dtype=dtype,
        inputs=_inputs, bytes=_gradient_bytes if gradient else _forward_bytes,
        flops=lambda s: (18 if gradient else 6) * slots(s) * s["d"] * s["f"], peak=PEAK[dtype],
        traffic="copy" if gradient else "read", providers=[*providers, *peers],
        reference=lambda i: defined(widened(i)),
        agree=gradients_agree if gradient else relative_error,
        # bf16: eager forms round every product.
        tolerance=1e-4 if dtype == FP32 else 2e-2,
        quick=base is FEW and tokens == 16 and dtype == BF16 and not gradient,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for gradient in (False, True):
        for base in (FEW, MANY):
            for dtype in DTYPES:
                # 4096 tokens with gradients would take a minute each.
                for tokens in TOKENS[:-1] if gradient else TOKENS:
                    yield _case(base, tokens, dtype, gradient)
