# SPDX-License-Identifier: Apache-2.0
"""What the tests of the family ``moe`` share: every ISA, and the comparison with a definition."""

import contextlib
import functools

import torch

import tenfold
from tenfold import ops, reference
from tenfold.testing import PlainSums, assert_close_to_ref, forced_isa, on, poisoned_memory


def every_isa(device):
    """A context for each instruction set of the CPU, or one for another device."""
    if device.type != "cpu":
        return [contextlib.nullcontext()]
    return [forced_isa(name) for name in tenfold.cpu_capabilities()]


def rand(*shape, dtype=torch.float32, seed=0, scale=1.0):
    made = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=made) * scale).to(dtype)


def _outputs(result):
    return result if isinstance(result, tuple) else (result,)


def _upstream(outputs):
    """Gradients of the outputs that have any, the same numbers on every side."""
    return [rand(*x.shape, dtype=x.dtype, seed=7 + i) if x.is_floating_point() and x.requires_grad
            else None for i, x in enumerate(outputs)]  # fmt: skip


def _gradients(outputs, upstream, inputs):
    pairs = [(x, g.to(x)) for x, g in zip(outputs, upstream) if g is not None]
    outputs, upstream = zip(*pairs)
    return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def _side(function, args, wrt):
    args = [x.clone().requires_grad_() if i in wrt else x for i, x in enumerate(args)]
    return _outputs(function(*args)), [args[i] for i in wrt]


def _exact(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def agree(name, args, device, wrt=(), plain_sums=False, **kwargs):
    """The op gives what its definition does in float64, gradients of the arguments ``wrt`` too, on every ISA.

    ``plain_sums``: the plain side's products are sums in order.
    """
    face, definition = (
        functools.partial(getattr(module, name), **kwargs) for module in (ops, reference)
    )
    want, exact_inputs = _side(definition, [_exact(x) for x in args], wrt)
    with PlainSums() if plain_sums else contextlib.nullcontext():
        simple, plain_inputs = _side(definition, args, wrt)
    for isa in every_isa(device):
        with isa, poisoned_memory():
            got, inputs = _side(face, on(device, list(args)), wrt)
            upstream = _upstream(got)
            mine = _gradients(got, upstream, inputs) if wrt else ()
        assert len(got) == len(want)
        for g, w, s in zip(got, want, simple):
            if g.is_floating_point():
                assert_close_to_ref(g.detach().cpu(), w.detach(), s.detach())
            else:
                assert torch.equal(g.cpu(), w.to(g.dtype))
        if not wrt:
            continue
        exact = _gradients(want, upstream, exact_inputs)
        plain = _gradients(simple, upstream, plain_inputs)
        for m, e, p, x in zip(mine, exact, plain, inputs):
            assert m.dtype == x.dtype and m.shape == x.shape
            assert_close_to_ref(m.cpu(), e, p)
