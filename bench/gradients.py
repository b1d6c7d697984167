# SPDX-License-Identifier: Apache-2.0
"""Providers of "forward and backward": a loss and its gradients, by autograd.

The harness runs under ``no_grad``, as most ops are called; here grad mode is on, and the inputs that are
differentiated are fresh leaves at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Function, Inputs, Provider, provider

# Takes inputs; returns the loss, or a tuple that begins with it. What follows is not differentiated.
Loss = Callable[[Inputs], Any]


def with_gradients(loss: Loss, *names: str) -> Function:
    """``loss`` and its gradients by the inputs ``names``: (loss, ..., gradients)."""

    @torch.enable_grad()
    def run(i: Inputs) -> tuple[Tensor, ...]:
        leaves = {name: getattr(i, name).detach().requires_grad_() for name in names}
        made = loss(Inputs(**{**vars(i), **leaves}))
        first, *rest = (made,) if isinstance(made, Tensor) else made
        grads = torch.autograd.grad(first, list(leaves.values()))
        return first.detach(), *(x.detach() for x in rest), *grads

    return run


def pulled_back(form: Loss, *names: str) -> Function:
    """Results of ``form`` and, of their gradients ``i.upstream``, those of the inputs ``names``: one flat tuple."""

    @torch.enable_grad()
    def run(i: Inputs) -> tuple[Tensor, ...]:
        leaves = {name: getattr(i, name).detach().requires_grad_() for name in names}
        made = form(Inputs(**{**vars(i), **leaves}))
        made = (made,) if isinstance(made, Tensor) else tuple(made)
        grads = torch.autograd.grad(made, list(leaves.values()), i.upstream[: len(made)])
        return *(x.detach() for x in made), *grads

    return run


def compiled_and_pulled_back(form: Loss, *names: str, name: str = "compile") -> Provider:
    """The same with ``form``, and by it its backward, under ``torch.compile``."""

    def build(_: Inputs) -> Function:
        torch.compiler.reset()
        return pulled_back(torch.compile(form, dynamic=False), *names)

    return Provider(name, "compile", build)


def autograd(name: str, loss: Loss, *names: str, **extra: Any) -> Provider:
    """Provider of a loss that autograd differentiates."""
    return provider(name, with_gradients(loss, *names), **extra)


def compiled_gradients(loss: Loss, *names: str, **extra: Any) -> Provider:
    """The same with the loss, and by it its backward, under ``torch.compile``."""

    def build(_: Inputs) -> Function:
        torch.compiler.reset()
        return with_gradients(torch.compile(loss, dynamic=False), *names)

    return Provider("compile", "compile", build, **extra)
