# SPDX-License-Identifier: Apache-2.0
"""The mean squared error of predicted patches, without their targets in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import (
    _keeps_graph,
    call_inference,
    differentiable_by,
    inference_only,
    is_done,
)

_ops = torch.ops.tenfold
_ORDER = ("image", "mask", "patch", "norm_pix", "eps", "shift", "denom")
_NARROW = {torch.int8: torch.int32, torch.int16: torch.int32, torch.float16: torch.float32,
           torch.bfloat16: torch.float32}  # fmt: skip

for _name in ("patch_mse_forward", "patch_mse_backward"):
    inference_only(_name)
for _name in ("patch_mse_", "patch_mse_backward_"):
    inference_only(_name, mutates=(0,))


def _real(pred: Tensor) -> torch.dtype:
    return torch.float64 if pred.dtype == torch.float64 else torch.float32


def _losses_like(pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((), pred.shape[:-1], ())
    loss, per_patch, denom = (pred.new_empty(s, dtype=_real(pred)) for s in shapes)
    return loss, per_patch, denom


@torch.library.register_fake("tenfold::patch_mse")
def _(pred, *args, **kwargs):
    return _losses_like(pred)


@torch.library.register_fake("tenfold::patch_mse_")
def _(pred, *args, **kwargs):
    return _losses_like(pred)


@torch.library.register_fake("tenfold::patch_mse_forward")
def _(pred, *args, **kwargs):
    return *_losses_like(pred), pred.new_empty(pred.shape)


@torch.library.register_fake("tenfold::patch_mse_backward")
def _(grad_loss, pred, *args, **kwargs):
    return pred.new_empty(pred.shape)


@torch.library.register_fake("tenfold::patch_mse_backward_")
def _(grad, *args, **kwargs):
    return None


def _plain(*tensors: Tensor) -> bool:
    """Nobody traces or wraps them."""
    return all(type(t) is Tensor for t in tensors) and not torch._C._len_torch_dispatch_stack()


class _Mse(torch.autograd.Function):
    """The forward makes the gradient for a loss's gradient of 1 in the same pass.

    The backward asks the kernel for the one that is wanted: it is that one, or it is made anew in its place, from
    pred and pixels, rounded once. Nothing waits for a GPU. If the graph is kept, what the forward made stays.
    """

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        named = {**dict(zip(_ORDER, others)), **kwargs}
        made: tuple[Tensor, ...] = ()
        with torch._C._AutoDispatchBelowAutograd():
            if _plain(pred):
                loss, per_patch, denom, *made = _ops.patch_mse_forward.default(
                    pred, *others, **kwargs
                )
            else:
                loss, per_patch, denom = _ops.patch_mse.default(pred, *others, **kwargs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pred, named["image"], named["mask"], denom, *made)
        ctx.rest = tuple(named[name] for name in ("patch", "norm_pix", "eps", "shift"))
        ctx.channels = named.get("channels", "auto")
        ctx.mark_non_differentiable(per_patch, denom)
        return loss, per_patch, denom

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, _per_patch: Any, _denom: Any
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("tenfold::patch_mse is differentiable once, not with create_graph")
        if grad is None:
            return None, None, None
        *inputs, denom = ctx.saved_tensors[:4]
        args = (grad, *inputs, denom, *ctx.rest)
        made = ctx.saved_tensors[4:]
        if made and is_done(grad, made[0]):
            return made[0], None, None
        if made and _plain(grad) and not _keeps_graph():
            call_inference(_ops.patch_mse_backward_.default, *made, *args, mutates=made, channels=ctx.channels,
                           made=True)  # fmt: skip
            return made[0], None, None
        return (
            call_inference(_ops.patch_mse_backward.default, *args, channels=ctx.channels),
            None,
            None,
        )


_mse = differentiable_by("patch_mse", _Mse)


def _constants(
    op: str, pred: Tensor, image: Tensor, mask: Tensor, denom: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Image, mask and denom as the kernels take them; none of them may want a gradient."""
    if torch.is_grad_enabled():
        for name, x in (("image", image), ("mask", mask), ("denom", denom)):
            if isinstance(x, Tensor) and x.requires_grad:
                raise RuntimeError(
                    f"tenfold::{op} is differentiable in pred only, and {name} requires grad: detach it"
                )
    if pred.dtype == torch.float64 and image.dtype in (torch.float16, torch.bfloat16):
        image = image.float()
    mask = mask.to(_NARROW.get(mask.dtype, mask.dtype))
    if isinstance(denom, Tensor):
        return image, mask, denom.to(_real(pred))
    if denom is not None:
        return image, mask, torch.full((), denom, dtype=_real(pred), device=pred.device)
    return image, mask, None


def patch_mse(
    pred: Tensor, image: Tensor, mask: Tensor, patch: int = 16, norm_pix: bool = True, eps: float = 1e-6,
    shift: int = 1, denom: Tensor | float | None = None, *, channels: str = "auto", validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Next patch prediction: the mean of ``l_i = mean_k (pred_ik - y_(i + shift),k)^2``, weighted by ``m_(i + shift)``.

    The targets y, patches of the image in the order ``"rcc"``, are never in memory; with ``shift=0`` and the mask of
    a masked autoencoder it is the loss of ViT-MAE and PIXEL.

    Args:
        pred: [..., L, P]; float32, bfloat16 or float16 (float64 on the CPU, beside uint8 or float32 images). Slices
            and other views with contiguous rows are read where they are. Of it the loss is differentiable, once.
        image: the pixels, as of :func:`patchify_u8`.
        mask: [..., L], bool, integers or floats: what every *target* patch weighs, finite and at least 0. Position i
            counts ``mask[..., i + shift]``; the last ``shift`` positions have no target.
        patch, channels, validate: as of :func:`patchify_u8`.
        norm_pix, eps: whether targets are normalised by patch.
        shift: 1 for next patch prediction, 0 for the same patch, at least 0.
        denom: what the weighted sum is divided by, in place of the sum of weights: one number, of all processes and
            of all batches that are accumulated. 0: loss and gradient are 0.

    Returns:
        (loss, per_patch, denom): 0-d float32; float32 [..., L], l_i, and 0 where the weight is 0 or there is no
        target; 0-d float32, what was divided by. The last two have no gradient. (float64 if pred is.)

    What weighs nothing is not read: it has no influence and gradient 0, even where pred holds NaN. NaN and infinities
    that count make the loss NaN or infinite. Without any weight loss and gradient are 0. Sums are in float32 within
    a patch and in float64 over patches, in an order that depends on neither threads nor launch shape.

    Raises:
        ValueError: shapes, devices, values; image dtype. TypeError: dtypes of pred and mask. RuntimeError: image,
        mask or denom require grad.

    Source:
        PixelGPT (arXiv 2404.10710), section 3.5 of the method's specification; masked autoencoders (arXiv 2111.06377).
    """
    image, mask, divisor = _constants("patch_mse", pred, image, mask, denom)
    return call(_mse, pred, image, mask, patch, norm_pix, eps, shift, divisor, channels=channels,
                validate=validate)  # fmt: skip


def patch_mse_(
    pred: Tensor, image: Tensor, mask: Tensor, patch: int = 16, norm_pix: bool = True, eps: float = 1e-6,
    shift: int = 1, denom: Tensor | float | None = None, *, channels: str = "auto", validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`patch_mse` that leaves its gradient in ``pred``: the least memory and traffic that training can have.

    For loops without autograd over the loss: ``loss, *_ = patch_mse_(pred.detach(), ...)``, then
    ``hidden.backward(...)`` or ``torch.autograd.backward(pred, pred.detach())`` for a pred that nothing saved.

    Raises:
        ValueError: also if rows of pred are not contiguous or its elements overlap. RuntimeError: pred requires grad.
    """
    image, mask, divisor = _constants("patch_mse_", pred, image, mask, denom)
    return call_inference(_ops.patch_mse_.default, pred, image, mask, patch, norm_pix, eps, shift, divisor,
                          mutates=(pred,), channels=channels, validate=validate)  # fmt: skip


def patch_mse_backward(
    grad_loss: Tensor, pred: Tensor, image: Tensor, mask: Tensor, denom: Tensor, patch: int = 16, norm_pix: bool = True,
    eps: float = 1e-6, shift: int = 1, *, channels: str = "auto",
) -> Tensor:  # fmt: skip
    """Gradient of :func:`patch_mse` by pred: ``2 grad_loss m_(i + shift) (pred - y) / (P denom)``; 0 without target.

    Args:
        grad_loss: one number, float32 (float64 if pred is).
        denom: what :func:`patch_mse` returned.
        pred, image, mask, patch, norm_pix, eps, shift, channels: as they were there.

    Returns:
        Contiguous, of the shape and dtype of pred; computed in float32 and rounded once.

    Raises:
        As :func:`patch_mse`; values of weights and pixels are not looked at.
    """
    image, mask, divisor = _constants("patch_mse_backward", pred, image, mask, denom)
    return call_inference(_ops.patch_mse_backward.default, grad_loss, pred, image, mask, divisor, patch, norm_pix, eps,
                          shift, channels=channels)  # fmt: skip


def patch_mse_backward_(
    grad: Tensor, grad_loss: Tensor, pred: Tensor, image: Tensor, mask: Tensor, denom: Tensor, patch: int = 16,
    norm_pix: bool = True, eps: float = 1e-6, shift: int = 1, *, channels: str = "auto", made: bool = False,
) -> None:  # fmt: skip
    """:func:`patch_mse_backward` into ``grad``, contiguous, of the dtype of pred; it may be pred itself.

    Args:
        made: ``grad`` holds the gradient for ``grad_loss = 1`` already: where that is what is asked for, nothing is
            done. (The number is looked at on the device.)

    Raises:
        ValueError: also if ``grad`` is not contiguous or shares a part of another input's memory.
    """
    image, mask, divisor = _constants("patch_mse_backward_", pred, image, mask, denom)
    call_inference(_ops.patch_mse_backward_.default, grad, grad_loss, pred, image, mask, divisor, patch, norm_pix, eps,
                   shift, mutates=(grad,), channels=channels, made=made)  # fmt: skip
