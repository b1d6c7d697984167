"""The refusal to differentiate, shared by all inference-only ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call

# torch.library.register_autograd does not take ops with keyword-only tensors (their schemas are
# API), so the refusal is an Autograd kernel of its own, kept alive by this library object.
_library = torch.library.Library("tenfold", "IMPL")


def inference_only(name: str, mutates: tuple[int, ...] = ()) -> None:
    """Makes ``tenfold::name`` raise as soon as an input requires grad under grad mode.

    ``mutates`` are the positions of the arguments that the op writes: their version counters are
    bumped, so that autograd notices if one was saved for a backward elsewhere.
    """
    op = getattr(torch.ops.tenfold, name).default

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"tenfold::{name} is inference only: an input requires grad under grad "
                        "mode. Call it under torch.no_grad() or detach its inputs."
                    )
        with torch._C._AutoDispatchBelowAutograd():
            result = op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)
        for at in mutates:
            torch.autograd.graph.increment_version(args[at])
        return result

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def call_inference(op: Any, *args: Any, mutates: tuple[Tensor, ...] = (), **kwargs: Any) -> Any:
    """``call`` of an op of :func:`inference_only`, past its Autograd kernel if grad mode is off.

    That kernel has nothing to refuse then, and entering Python from the dispatcher costs about 4 us:
    as much as a tenth of a small op. ``mutates`` are the tensors that the op writes.
    """
    if (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch.compiler.is_compiling()
    ):
        return call(op, *args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        result = call(op, *args, **kwargs)
    for tensor in mutates:
        torch.autograd.graph.increment_version(tensor)
    return result
