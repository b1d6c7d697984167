# SPDX-License-Identifier: Apache-2.0
"""Merging tensors of models: DARE, TIES, linear, spherical, and the Gram matrix of task vectors.

All take the tensors of one name from several models: same shape, dtype and device, float32, bfloat16 or
float16, any strides. Arithmetic is float32 with one rounding to the dtype; results have the same bits for any number of
threads, and those of everything but ``slerp_merge`` on every CPU. Each op has a form that ends in ``_`` and
writes into ``out`` (contiguous), which may be one of the inputs: nothing is allocated then.

Up to 64 experts. An expert of weight 0 is not read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only
from tenfold.reference.random import name_stream

__all__ = [
    "dare_merge",
    "dare_merge_",
    "delta_gram",
    "delta_gram_",
    "linear_merge",
    "linear_merge_",
    "slerp_merge",
    "slerp_merge_",
    "ties_merge",
    "ties_merge_",
]

_ops = torch.ops.tenfold

for _name in ("dare_merge", "ties_merge", "linear_merge", "slerp_merge", "delta_gram"):
    inference_only(_name)
    inference_only(_name + "_", mutates=(0,))


@torch.library.register_fake("tenfold::dare_merge")
def _(base, experts, weights, drop, seed, stream=0, *, offset=0, rescale="inv_keep",
      elect_sign=False, normalize=False, lambda_=1.0):  # fmt: skip
    return base.new_empty(base.shape)


@torch.library.register_fake("tenfold::dare_merge_")
def _(out, base, experts, weights, drop, seed, stream=0, *, offset=0, rescale="inv_keep",
      elect_sign=False, normalize=False, lambda_=1.0):  # fmt: skip
    return None


@torch.library.register_fake("tenfold::ties_merge")
def _(base, experts, weights, density, *, normalize=True, lambda_=1.0):
    return base.new_empty(base.shape)


@torch.library.register_fake("tenfold::ties_merge_")
def _(out, base, experts, weights, density, *, normalize=True, lambda_=1.0):
    return None


@torch.library.register_fake("tenfold::linear_merge")
def _(tensors, weights, *, normalize=True):
    return tensors[0].new_empty(tensors[0].shape)


@torch.library.register_fake("tenfold::linear_merge_")
def _(out, tensors, weights, *, normalize=True):
    return None


@torch.library.register_fake("tenfold::slerp_merge")
def _(v0, v1, t, *, base=None, dot_threshold=0.9995):
    return v0.new_empty(v0.shape)


@torch.library.register_fake("tenfold::slerp_merge_")
def _(out, v0, v1, t, *, base=None, dot_threshold=0.9995):
    return None


@torch.library.register_fake("tenfold::delta_gram")
def _(base, experts):
    return experts[0].new_empty((len(experts), len(experts)), dtype=torch.float64)


@torch.library.register_fake("tenfold::delta_gram_")
def _(gram, base, experts):
    return None


def _numbers(x: float | Sequence[float], count: int) -> list[float]:
    return [float(x)] * count if isinstance(x, int | float) else [float(v) for v in x]


def _some(name: str, tensors: Sequence[Tensor], argument: str = "experts") -> list[Tensor]:
    """As a list; an empty one alone would find no kernel at all."""
    if not tensors:
        raise ValueError(f"tenfold::{name}: {argument} must be 1 to 64 tensors, got 0")
    return list(tensors)


def _dare(op: Any, out: tuple[Tensor, ...], base: Tensor, experts: Sequence[Tensor],
          weights: Sequence[float], drop: float | Sequence[float], seed: int,
          stream: int | str, normalize: bool, **kwargs: Any) -> Any:  # fmt: skip
    given = [float(w) for w in weights]
    total = sum(given)
    result = call_inference(
        op, *out, base, _some("dare_merge" + "_" * len(out), experts), given, _numbers(drop, len(experts)), seed,
        name_stream(stream) if isinstance(stream, str) else stream,
        mutates=out, normalize=normalize, **kwargs,
    )  # fmt: skip
    if not normalize and abs(total - 1) > 1e-6 and not torch.compiler.is_compiling():
        warnings.warn(f"the weights of dare_merge sum to {total:.6g}, not 1", stacklevel=3)
    return result


def dare_merge(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    drop: float | Sequence[float],
    seed: int,
    stream: int | str = 0,
    *,
    offset: int = 0,
    rescale: str = "inv_keep",
    elect_sign: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Merges task vectors of which random elements are dropped and the rest is scaled up.

    ``base + lambda_ * sum_e weights[e] / (1 - drop[e]) * keep_e * (experts[e] - base)`` with independent masks
    ``keep_e`` of rate ``1 - drop[e]`` (DARE, arXiv 2311.03099). ``drop=0`` is task arithmetic; one expert of weight 1
    of which nothing is dropped comes back bit for bit.

    The masks are Philox draws at (seed, stream, number of the expert, index of the element in the whole tensor), as
    ``tenfold.reference.dare_keep`` defines them: the same for any threads, device, order of tensors and chunking.

    Args:
        base: [...] what the experts were tuned from.
        experts: of its shape. weights: one per expert, finite; a warning if they do not sum to 1 (without normalize).
        drop: rate in [0, 1), one for all or one per expert; ``1 - density`` of mergekit and PEFT.
        seed: 64 bits.
        stream: 64 bits, or the tensor's name, of which the first 8 bytes of the SHA-256 are taken.
        offset: index of the first element in its tensor, where the arguments are parts of flattened tensors.
        rescale: ``"inv_keep"`` 1 / (1 - drop); ``"none"``; ``"l1"`` or ``"l2"``: to the norm before dropping
            (mergekit: l1), which takes one more pass and no parts.
        elect_sign: signs are elected as in :func:`ties_merge` (mergekit's ``dare_ties``).
        normalize: divides by the sum of the weights (with ``elect_sign``: of those that agree).
        lambda_: scales the merged task vector.

    Returns:
        [...] contiguous, in the dtype of ``base``.

    Raises:
        ValueError: shapes, dtypes or devices differ; another number of weights or rates; ``drop``, ``rescale``,
            ``offset``; weights not finite, or of sum 0 with ``normalize``. TypeError: dtype. RuntimeError: an input
            requires grad under grad mode (inference only).
    """
    return _dare(_ops.dare_merge, (), base, experts, weights, drop, seed, stream, normalize,
                 offset=offset, rescale=rescale, elect_sign=elect_sign, lambda_=lambda_)  # fmt: skip


def dare_merge_(
    out: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    drop: float | Sequence[float],
    seed: int,
    stream: int | str = 0,
    *,
    offset: int = 0,
    rescale: str = "inv_keep",
    elect_sign: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> None:
    """:func:`dare_merge` into ``out``, which may be ``base`` or one of the experts.

    Raises:
        ValueError: also if ``out`` is not contiguous or shares a part of an input's memory.
    """
    _dare(_ops.dare_merge_, (out,), base, experts, weights, drop, seed, stream, normalize,
          offset=offset, rescale=rescale, elect_sign=elect_sign, lambda_=lambda_)  # fmt: skip


def ties_merge(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    density: float | Sequence[float],
    *,
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Trims task vectors, elects the sign of every element, and averages those that agree (arXiv 2306.01708).

    Of each ``experts[e] - base`` the ``floor(density[e] * n)`` elements of largest magnitude are kept (exactly; equal
    ones by index, the lower first; NaN is largest). Per element, the sign with the larger sum of
    ``weights * delta`` wins (+ if they balance), and the merged delta is the weighted mean over the experts with
    that sign. On the CPU one pass over the inputs of large tensors (two where out is one of them); whole tensors only.

    Args:
        base: [...]. experts: of its shape. weights: one per expert.
        density: share in [0, 1] that is kept, one for all or one per expert.
        normalize: the mean; False: the sum.
        lambda_: scales the merged delta.

    Returns:
        [...] contiguous, in the dtype of ``base``.

    Raises:
        ValueError: as :func:`dare_merge`, or ``density``. TypeError: dtype. RuntimeError: requires grad.
    """
    given = [float(w) for w in weights]
    return call_inference(_ops.ties_merge, base, _some("ties_merge", experts), given,
                          _numbers(density, len(experts)), normalize=normalize, lambda_=lambda_)  # fmt: skip


def ties_merge_(
    out: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    density: float | Sequence[float],
    *,
    normalize: bool = True,
    lambda_: float = 1.0,
) -> None:
    """:func:`ties_merge` into ``out``, which may be ``base`` or one of the experts.

    Raises:
        ValueError: also if ``out`` is not contiguous or shares a part of an input's memory.
    """
    given = [float(w) for w in weights]
    call_inference(_ops.ties_merge_, out, base, _some("ties_merge_", experts), given,
                   _numbers(density, len(experts)), mutates=(out,), normalize=normalize,
                   lambda_=lambda_)  # fmt: skip


def linear_merge(
    tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True
) -> Tensor:
    """``sum_e weights[e] * tensors[e]``, divided by the sum of the weights (model soups, arXiv 2203.05482).

    Args:
        tensors: [...] of one shape. weights: one each, finite. normalize: False leaves the weights as they are.

    Returns:
        [...] contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or counts differ; weights. TypeError: dtype. RuntimeError: requires grad.
    """
    return call_inference(
        _ops.linear_merge,
        _some("linear_merge", tensors, "tensors"),
        [float(w) for w in weights],
        normalize=normalize,
    )


def linear_merge_(
    out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True
) -> None:
    """:func:`linear_merge` into ``out``, which may be one of the tensors.

    Raises:
        ValueError: also if ``out`` is not contiguous or shares a part of an input's memory.
    """
    call_inference(_ops.linear_merge_, out, _some("linear_merge_", tensors, "tensors"), [float(w) for w in weights],
                   mutates=(out,), normalize=normalize)  # fmt: skip


def slerp_merge(
    v0: Tensor, v1: Tensor, t: float, *, base: Tensor | None = None, dot_threshold: float = 0.9995
) -> Tensor:
    """Spherical interpolation of two tensors as flat vectors (Shoemake, SIGGRAPH 1985).

    ``(sin((1 - t) a) * v0 + sin(t a) * v1) / sin a`` with a the angle between them; ``(1 - t) * v0 + t * v1`` where
    the cosine's magnitude is above ``dot_threshold``. Angle and norms are computed in float64 (16-bit tensors: sums of
    exact products, in float32 for 512 elements each). Two passes; whole tensors only.

    Args:
        v0, v1: [...] of one shape. t: in [0, 1]; 0 gives v0, 1 gives v1, exactly.
        base: [...]; then ``v - base`` is interpolated, and base added.
        dot_threshold: in [0, 1]; mergekit's default.

    Returns:
        [...] contiguous.

    Raises:
        ValueError: shapes, dtypes or devices differ; ``t``, ``dot_threshold``. TypeError: dtype. RuntimeError: requires
            grad.
    """
    return call_inference(_ops.slerp_merge, v0, v1, t, base=base, dot_threshold=dot_threshold)


def slerp_merge_(
    out: Tensor,
    v0: Tensor,
    v1: Tensor,
    t: float,
    *,
    base: Tensor | None = None,
    dot_threshold: float = 0.9995,
) -> None:
    """:func:`slerp_merge` into ``out``, which may be one of the inputs.

    Raises:
        ValueError: also if ``out`` is not contiguous or shares a part of an input's memory.
    """
    call_inference(_ops.slerp_merge_, out, v0, v1, t, mutates=(out,), base=base,
                   dot_threshold=dot_threshold)  # fmt: skip


def delta_gram(base: Tensor | None, experts: Sequence[Tensor]) -> Tensor:
    """Inner products of the experts' task vectors: ``G[j, k] = <experts[j] - base, experts[k] - base>``.

    Differences, products and sums are float64. One pass over the inputs; the same bits for any number of threads.

    Args:
        base: [...], or None: products of the tensors themselves.
        experts: up to 64, of its shape.

    Returns:
        float64 [m, m], symmetric.

    Raises:
        ValueError: shapes, dtypes, devices. TypeError: dtype. RuntimeError: requires grad.
    """
    return call_inference(_ops.delta_gram, base, _some("delta_gram", experts))


def delta_gram_(gram: Tensor, base: Tensor | None, experts: Sequence[Tensor]) -> None:
    """Adds :func:`delta_gram` to ``gram`` (float64 [m, m], contiguous): a model's sum, tensor after tensor.

    Raises:
        ValueError: also for another size of ``gram``. TypeError: ``gram`` is not float64.
    """
    call_inference(_ops.delta_gram_, gram, base, _some("delta_gram_", experts), mutates=(gram,))
