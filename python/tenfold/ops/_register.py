# SPDX-License-Identifier: Apache-2.0
"""The refusal to differentiate, shared by all inference-only ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tenfold._load import call

# torch.library.register_autograd does not take ops with keyword-only tensors (their schemas are
# API), so the refusal is an Autograd kernel of its own, kept alive by this library object.
_library = torch.library.Library("tenfold", "IMPL")


def _requires_grad(value: Any) -> bool:
    if isinstance(value, list | tuple):  # possibly of a thousand tensors: one fast loop
        return any(getattr(x, "requires_grad", False) for x in value)
    return isinstance(value, Tensor) and value.requires_grad


def inference_only(name: str, mutates: tuple[int, ...] = ()) -> None:
    """Makes ``tenfold::name`` raise as soon as an input requires grad under grad mode.

    ``mutates`` are the positions of the tensors, or lists of them, that the op writes: their version counters are
    bumped, so that autograd notices if one was saved for a backward elsewhere.
    """
    op = getattr(torch.ops.tenfold, name).default

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(map(_requires_grad, (*args, *kwargs.values()))):
            raise RuntimeError(
                f"tenfold::{name} is inference only: an input requires grad under grad "
                "mode. Call it under torch.no_grad() or detach its inputs."
            )
        with torch._C._AutoDispatchBelowAutograd():
            result = op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)
        for at in mutates:
            if at < len(args) and args[at] is not None:  # else a list that was left out
                torch.autograd.graph.increment_version(args[at])
        return result

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def call_inference(
    op: Any, *args: Any, mutates: tuple[Tensor | list[Tensor], ...] = (), **kwargs: Any
) -> Any:
    """``call`` of an op of :func:`inference_only`, past its Autograd kernel where that has nothing to refuse.

    Entering Python from the dispatcher costs about 4 us: as much as a tenth of a small op. ``mutates`` are
    the tensors, or lists of them, that the op writes.
    """
    if (
        torch.compiler.is_compiling()  # first: Dynamo cannot trace the last question
        or (torch.is_grad_enabled() and any(map(_requires_grad, (*args, *kwargs.values()))))
        or torch.is_inference_mode_enabled()
    ):
        return call(op, *args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        result = call(op, *args, **kwargs)
    for tensor in mutates:
        torch.autograd.graph.increment_version(tensor)
    return result


def differentiable(
    name: str,
    save: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    forward: Callable[..., Any] | None = None,
) -> None:
    """Autograd of an op with keyword-only tensors, which ``register_autograd`` does not take.

    ``save(ctx, args, kwargs, result)`` keeps what ``backward(ctx, *grads)`` needs; that returns one
    gradient per positional argument. Keyword arguments have none. ``forward(ctx, needed, args, kwargs)``
    takes the op's place where gradients of the ``needed`` arguments (a tuple of bool) will be asked for.
    """
    op = getattr(torch.ops.tenfold, name).default

    def below(keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, kwargs: dict[str, Any], *args: Any) -> Any:
            if forward is None:
                result = below(keyset, args, kwargs)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    result = forward(ctx, ctx.needs_input_grad[2:], args, kwargs)
            ctx.set_materialize_grads(False)
            save(ctx, args, kwargs, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (None, None, *backward(ctx, *grads))

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return Function.apply(keyset, kwargs, *args)
        return below(keyset, args, kwargs)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def differentiable_by(
    name: str, function: type[torch.autograd.Function], tensors: tuple[int, ...] = (0,)
) -> Callable[..., Any]:
    """Autograd of an op in the arguments at ``tensors`` by ``function``, whose forward takes these, others, kwargs.

    Returns what calls the op: the same, without the dispatcher's way into Python (about 8 us). (Each
    argument of ``apply`` costs half a microsecond, so the others are one.) Those at ``tensors`` are positional.
    """
    op = getattr(torch.ops.tenfold, name).default
    first = tensors == (0,)

    def wanted(args: tuple[Any, ...]) -> bool:
        if first:
            return _is_grad_enabled() and _requires_grad(args[0])
        return _is_grad_enabled() and any(_requires_grad(args[i]) for i in tensors)

    def apply(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if first:
            return function.apply(args[0], args[1:], kwargs)
        others = tuple(x for i, x in enumerate(args) if i not in tensors)
        return function.apply(*(args[i] for i in tensors), others, kwargs)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if wanted(args):
            return apply(args, kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    _library.impl(name, kernel, "Autograd", with_keyset=True)

    def face(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # first: Dynamo cannot trace the question after the next
            return op(*args, **kwargs)
        if wanted(args):
            return apply(args, kwargs)
        if torch.is_inference_mode_enabled():
            return op(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    return face


is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


def no_gradient(*tensors: Tensor | None) -> bool:
    """Whether an op of these can be called by way of one that has no Autograd kernel: nothing is traced or recorded.

    Of ops that take a few microseconds: entering Python from the dispatcher takes as much, keeping it out half of one.
    """
    if _is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    return not is_compiling()


# What keeps an op's Autograd kernel out, where no_gradient has said that it has nothing to do.
below_autograd = torch._C._AutoDispatchBelowAutograd


def written(*tensors: Tensor) -> None:
    """After an op without an Autograd kernel: autograd notices if one of these was saved for a backward elsewhere."""
    for x in tensors:
        if not x.is_inference():  # else it has no version
            torch._C._increment_version((x,))


# Whether the backward now running may be followed by another, which needs what this one saved.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def is_done(grad: Tensor, made: Tensor) -> bool:
    """What the forward ``made`` is the gradient for a loss's ``grad``: of 1, and nobody else will ask for it."""
    return (
        type(grad) is type(made) is Tensor
        and grad.is_cpu  # (asked by its device's name, 6 us in a backward)
        and not torch._C._len_torch_dispatch_stack()  # under a mode it may be traced
        and not _keeps_graph()
        and grad.item() == 1.0
    )


def autocast_floats(name: str, keep: tuple[int, ...] = ()) -> None:
    """Under autocast all floating tensors of the op are cast to the autocast dtype, as torch does
    for ``scaled_dot_product_attention``; not the positional ones at ``keep``.
    """
    op = getattr(torch.ops.tenfold, name).default

    def register(device: str, key: str) -> None:
        def cast(x: Any) -> Any:
            floating = isinstance(x, Tensor) and x.is_floating_point() and x.device.type == device
            return x.to(torch.get_autocast_dtype(device)) if floating else x

        def kernel(*args: Any, **kwargs: Any) -> Any:
            with torch.amp.autocast(device, enabled=False):
                positional = (x if i in keep else cast(x) for i, x in enumerate(args))
                return op(*positional, **{n: cast(x) for n, x in kwargs.items()})

        _library.impl(name, kernel, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")
