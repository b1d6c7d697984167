# SPDX-License-Identifier: Apache-2.0
"""Head operations of DHA (arXiv 2406.06567): fuse, compare, group and allocate heads.

Notation: H heads, d head dim, m model width, N groups of g = H / N heads. A head's projection is
``w[h]`` [d, m], a slice of an nn.Linear weight; m = 1 serves for biases. ``groups`` [N, g] holds every
head exactly once, int32 or int64. ``w`` is float32, bfloat16 or float16, ``omega`` float32 (the
master copy); sums are float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import call_inference, inference_only

__all__ = [
    "allocate_heads",
    "collapse_heads",
    "fuse_heads",
    "fuse_heads_backward",
    "fusion_mse",
    "fusion_mse_backward",
    "group_heads",
    "head_cka",
]

_ops = torch.ops.tenfold


@torch.library.register_fake("tenfold::fuse_heads")
def _(w, omega, groups):
    return w.new_empty((*groups.shape, *w.shape[1:]))


@torch.library.register_fake("tenfold::fuse_heads_backward")
def _(dout, w, omega, groups, *, need_dw=True, need_domega=True):
    dw = w.new_empty(w.shape if need_dw else (0,))
    return dw, w.new_empty(omega.shape if need_domega else (0,), dtype=torch.float32)


@torch.library.register_fake("tenfold::collapse_heads")
def _(w, omega, groups):
    return w.new_empty((groups.shape[0], *w.shape[1:]))


@torch.library.register_fake("tenfold::fusion_mse")
def _(omega):
    return omega.new_empty(omega.shape[:1])


@torch.library.register_fake("tenfold::fusion_mse_backward")
def _(dout, omega):
    return omega.new_empty(omega.shape)


@torch.library.register_fake("tenfold::head_cka")
def _(w, *, center=False):
    return w.new_empty((w.shape[0], w.shape[0]), dtype=torch.float32)


@torch.library.register_fake("tenfold::group_heads")
def _(dist, n_groups, solver="swap", restarts=20, seed=0):
    return dist.new_empty((n_groups, dist.shape[0] // n_groups), dtype=torch.int32)


@torch.library.register_fake("tenfold::allocate_heads")
def _(cost, sizes, budget):
    return cost.new_empty(cost.shape[:1], dtype=torch.int32)


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _fuse_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    need_dw, need_domega, _ = ctx.needs_input_grad
    dw, domega = _ops.fuse_heads_backward(
        dout, *ctx.saved_tensors, need_dw=need_dw, need_domega=need_domega
    )
    return dw if need_dw else None, domega if need_domega else None, None


def _mse_backward(ctx: Any, dout: Tensor) -> Tensor:
    return _ops.fusion_mse_backward(dout, *ctx.saved_tensors)


torch.library.register_autograd("tenfold::fuse_heads", _fuse_backward, setup_context=_save_all)
torch.library.register_autograd("tenfold::fusion_mse", _mse_backward, setup_context=_save_all)
for _name in (
    "fuse_heads_backward", "collapse_heads", "fusion_mse_backward", "head_cka", "group_heads",
    "allocate_heads",
):  # fmt: skip
    inference_only(_name)


def fuse_heads(w: Tensor, omega: Tensor, groups: Tensor) -> Tensor:
    """Every head its own mixture of the heads of its group, per dimension (DHA section 3.1).

    ``out[n, h, i] = sum_j omega[n, h, j, i] * w[groups[n, j], i]``. With ``omega[n, h, j] = (h == j)``
    it returns ``w``, regrouped. Linear, so before RoPE it equals mixing the keys or values themselves.

    Args:
        w: head projections [H, d, m]; any strides with contiguous rows are read in place.
        omega: fusion operators [N, g, g, d] float32; ``[N, g, g, 1].expand(..., d)`` for scalar ones.
        groups: [N, g], a partition of the heads. A whole layer is one group: ``arange(H)[None]``.

    Returns:
        [N, g, d, m], contiguous, dtype of ``w``. Differentiable once in ``w`` and ``omega``.

    Raises:
        ValueError: shapes or devices that do not fit, a head twice. TypeError: unsupported dtype.
        IndexError: a head out of range. CUDA does not read ``groups`` beforehand: a head out of range
            counts as a row of zeros, and a head twice leaves ``w.grad`` undefined.
    """
    return call(_ops.fuse_heads, w, omega, groups)


def fuse_heads_backward(
    dout: Tensor,
    w: Tensor,
    omega: Tensor,
    groups: Tensor,
    *,
    need_dw: bool = True,
    need_domega: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`fuse_heads`; its backward calls this.

    ``dw[groups[n, j], i] = sum_h omega[n, h, j, i] * dout[n, h, i]`` and
    ``domega[n, h, j, i] = sum over m of dout[n, h, i] * w[groups[n, j], i]``, in one pass.

    Args:
        dout: [N, g, d, m], dtype of ``w``. Others as in :func:`fuse_heads`.
        need_dw, need_domega: False saves that part; its result is then an empty tensor.

    Returns:
        dw [H, d, m], dtype of ``w``, and domega [N, g, g, d] float32.

    Raises:
        ValueError, TypeError, IndexError: as :func:`fuse_heads`.
    """
    return call_inference(
        _ops.fuse_heads_backward, dout, w, omega, groups, need_dw=need_dw, need_domega=need_domega
    )


def collapse_heads(w: Tensor, omega: Tensor, groups: Tensor) -> Tensor:
    """One head per group: the mean of its fused heads (DHA section 3.6). Inference only.

    ``out[n, i] = sum_j mean_h(omega[n, h, j, i]) * w[groups[n, j], i]``. Exact where the rows of
    ``omega`` have become equal; with ``omega = 1 / g`` it is mean pooling of each group.

    Args:
        w, omega, groups: as in :func:`fuse_heads`.

    Returns:
        [N, d, m], contiguous, dtype of ``w``.

    Raises:
        ValueError, TypeError, IndexError: as :func:`fuse_heads`.
    """
    return call_inference(_ops.collapse_heads, w, omega, groups)


def fusion_mse(omega: Tensor) -> Tensor:
    """How far apart the fused heads of each group are (DHA section 3.5).

    ``mse[n] = mean over pairs h < h', j and i of (omega[n, h, j, i] - omega[n, h', j, i])^2``, by the closed
    form: O(N g g d). At identity it is 2 / g; a group of one head gives 0.

    Args:
        omega: [N, g, g, d] float32. All groups of one size, of all layers, fit in one call.

    Returns:
        [N] float32. Differentiable once.

    Raises:
        ValueError: shape. TypeError: dtype.
    """
    return call(_ops.fusion_mse, omega)


def fusion_mse_backward(dout: Tensor, omega: Tensor) -> Tensor:
    """Gradient of :func:`fusion_mse`; its backward calls this.

    ``domega[n, h, j, i] = dout[n] * 4 / ((g - 1) g d) * (omega[n, h, j, i] - mean over h)``.

    Args:
        dout: [N] float32.
        omega: [N, g, g, d] float32.

    Returns:
        domega [N, g, g, d] float32, contiguous.

    Raises:
        ValueError: shapes or devices. TypeError: dtypes.
    """
    return call_inference(_ops.fusion_mse_backward, dout, omega)


def head_cka(w: Tensor, *, center: bool = False) -> Tensor:
    """Linear-kernel similarity of every two heads (DHA section 3.0). Inference only.

    ``CKA(X, Y) = ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` of ``X = w[a]^T``, ``Y = w[b]^T`` [m, d]. It is 1 for
    equal heads, also after a rotation or scaling of either, and near d / m for unrelated ones. A
    diagnostic: heads of high similarity need not fuse well.

    Args:
        w: head projections [H, d, m]; any strides with contiguous rows are read in place.
        center: subtract each column's mean first (the paper does not).

    Returns:
        [H, H] float32, symmetric. A head of zeros gives NaN.

    Raises:
        ValueError: shape. TypeError: dtype.
    """
    return call_inference(_ops.head_cka, w, center=center)


def group_heads(
    dist: Tensor, n_groups: int, solver: str = "swap", restarts: int = 20, seed: int = 0
) -> Tensor:
    """Partition of the heads into groups of equal size with near heads together (DHA section 3.3).

    It makes the sum of distances inside groups small. Runs on the CPU: tables on another device are
    copied there, and the result back (which synchronises).

    Args:
        dist: distances [H, H], float32 or float64, finite; ``(dist + dist^T) / 2`` counts, the diagonal
            does not.
        n_groups: N, divides H.
        solver: ``"swap"``: descent by the best swap of two heads, from the contiguous partition and
            ``restarts - 1`` random ones; never worse than contiguous. ``"paper_sa"``: the paper's 110
            annealing steps from a random partition, with the sign put right. ``"contiguous"``: GQA's.
        restarts: starts of ``"swap"``; the others run once.
        seed: of the random numbers (Philox); the result is a function of the arguments.

    Returns:
        groups [N, g] int32: heads of a group ascending, groups by their first head.

    Raises:
        ValueError: shape, ``n_groups``, ``solver``, ``restarts``, or a distance that is not finite.
        TypeError: dtype.
    """
    groups = call_inference(_ops.group_heads, dist.cpu(), n_groups, solver, restarts, seed)
    return groups.to(dist.device)


def allocate_heads(cost: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Heads of each (layer, key or value) under a total budget, by the exact knapsack (DHA section 3.4).

    Minimises the sum of costs under ``sum of heads <= budget``. Equal costs: the most heads in all. Runs
    on the CPU: tables on another device are copied there, and the result back.

    Args:
        cost: [C, K], float32 or float64: what component c loses with its k-th size; +inf forbids it.
        sizes: the numbers of heads, [K] for all components or [C, K], int32 or int64, each >= 1.
        budget: heads in all.

    Returns:
        [C] int32, an allowed size for each component.

    Raises:
        ValueError: shapes, a NaN, a component without an allowed size, or a budget below the least
            possible number of heads (the message says which). TypeError: dtype.
    """
    chosen = call_inference(_ops.allocate_heads, cost.cpu(), sizes.cpu(), budget)
    return chosen.to(cost.device)
