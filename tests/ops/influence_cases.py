# SPDX-License-Identifier: Apache-2.0
"""What the tests of the family ``influence`` share: runs, and the comparison with a definition."""

import torch
from moe_cases import every_isa

from tenfold import ops, reference
from tenfold.testing import PlainSums, assert_close_to_ref, on, poisoned_memory


class Runs:
    """R runs of T steps of B out of M training examples, Q test examples, order n: what the ops take."""

    def __init__(self, shape, dtype=torch.float32, seed=0):
        r, t, b, m, q, n = shape
        made = torch.Generator().manual_seed(seed + sum(shape))

        def randn(*size):
            return torch.randn(size, generator=made, dtype=torch.float64)

        self.factors = (0.4 * randn(n + 1, m, q) / max(b * n, 1)).to(dtype)
        order = torch.randint(0, max(m, 1), (r, t, b), generator=made, dtype=torch.int32)
        order[torch.rand(r, t, b, generator=made) < (0.2 if m else 2.0)] = -1
        if m and order.numel():
            order[..., -1] = order[..., 0]  # twice in a batch
            order[-1, t // 2] = -1  # nobody
        self.order = order
        real = torch.float64 if dtype == torch.float64 else torch.float32
        self.y0, self.y = randn(r, n, q).to(real), randn(r, t, q).to(real)
        self.mask = torch.rand(r, t, q, generator=made) < 0.8
        self.lengths = torch.randint(0, t + 1, (r,), generator=made)


def _cast(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _run(function, given, wrt, upstream):
    """Result and gradients of the arguments named in ``wrt``."""
    given = {k: x.detach().clone().requires_grad_() if k in wrt else x for k, x in given.items()}
    out = function(**given)
    if not wrt:
        return out, ()
    leaves = [given[k] for k in wrt]
    if not out.requires_grad:  # a definition of nothing
        return out, [torch.zeros_like(x) for x in leaves]
    return out.detach(), torch.autograd.grad(out, leaves, upstream.to(out), materialize_grads=True)


def agree(name, given, device, wrt=(), plain=None):
    """The op gives what its definition does in float64, gradients of ``wrt`` too, on every ISA.

    ``plain``: another form of the definition, of matrix products, that the kernel's rounding is compared with.
    """
    definition = getattr(reference, name)
    exact = {k: _cast(x, torch.float64) for k, x in given.items()}
    shape = definition(**exact).shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    want, exact_grads = _run(definition, exact, wrt, upstream)
    low, low_grads = _run(plain or definition, given, wrt, upstream)
    if plain is not None:
        with (
            PlainSums()
        ):  # its result does not depend on whose BLAS it is; gradients on both sides do
            low = plain(**given)
    for isa in every_isa(device):
        with isa, poisoned_memory():
            got, grads = _run(getattr(ops, name), on(device, given), wrt, upstream.to(device))
        assert got.dtype == torch.float32
        assert_close_to_ref(got.cpu(), want, low, what=name)
        for k, g, e, p in zip(wrt, grads, exact_grads, low_grads):
            assert g.dtype == given[k].dtype and g.shape == given[k].shape
            assert_close_to_ref(g.cpu(), e, p, what=f"gradient of {k}")
    return got
