# SPDX-License-Identifier: Apache-2.0
"""Strips of patches as tensors: what is a valid one, masks without the end, models for grey ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold.training.checks import one_of


def channels_first(image: Tensor, channels: int) -> bool:
    """Is a batch of strips [B, C, H, W], and not [B, H, W, C]?"""
    return image.shape[1] == channels and image.shape[-1] != channels


def check_strips(image: Tensor, patch: int, channels: int) -> int:
    """Patches L of a batch of strips.

    Args:
        image: [B, C, H, W] or [B, H, W, C], uint8 or floating in [0, 1]. patch, channels: of the model.

    Raises:
        ValueError: rank, channels, sides that are no multiples of the patch. Values are looked at later.
        TypeError: anything but a tensor.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"pixel_values must be a tensor, got {type(image).__name__}")
    if image.ndim != 4:
        raise ValueError(f"pixel_values must be [B, C, H, W] or [B, H, W, C], got {list(image.shape)}")  # fmt: skip
    first = channels_first(image, channels)
    if not first and image.shape[-1] != channels:
        raise ValueError(
            f"pixel_values must have the {channels} channels of the patch embedding, got {list(image.shape)}"
        )
    height, width = image.shape[2:] if first else image.shape[1:3]
    for name, size in (("height", height), ("width", width)):
        if size % patch or not size:
            raise ValueError(
                f"the {name} of pixel_values must be a multiple of the patch size {patch}, got {size}"
            )
    return (height // patch) * (width // patch)


def without_eos(mask: Tensor) -> Tensor:
    """A mask of patches [B, L] without the last valid one of each row."""
    valid = mask != 0
    at = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(valid, at, -1).amax(-1, keepdim=True)
    return valid & (at != last)


def joint_mask(
    pixel_mask: Tensor | None, text_mask: Tensor | None, patches: int, tokens: int, like: Tensor
) -> Tensor | None:
    """The mask over [patches ; tokens], bool [B, patches + tokens]; None if neither segment has one.

    Args:
        pixel_mask: [B, patches]. text_mask: [B, tokens]. like: [B, ...] on the device of the result.

    Raises:
        ValueError: a mask of another shape.
    """
    parts = []
    for name, mask, size in (
        ("patch_mask", pixel_mask, patches),
        ("attention_mask", text_mask, tokens),
    ):
        if mask is not None and tuple(mask.shape) != (like.shape[0], size):
            raise ValueError(f"{name} must be [{like.shape[0]}, {size}], got {list(mask.shape)}")
        if size:
            whole = mask is None
            parts.append(
                torch.ones(like.shape[0], size, dtype=torch.bool, device=like.device)
                if whole
                else mask != 0  # type: ignore[operator]
            )
    if pixel_mask is None and text_mask is None:
        return None
    return torch.cat(parts, 1)


@torch.no_grad()
def grey_weight(weight: Tensor, how: str = "sum") -> Tensor:
    """The patch convolution [D, C, p, p] for strips of one channel, [D, 1, p, p].

    ``"sum"`` over the input channels gives what the model gives for the grey strip with its channel repeated;
    ``"mean"``, the published code's, a share of it.
    """
    one_of("how", how, ("sum", "mean"))
    made = weight.sum(1, keepdim=True) if how == "sum" else weight.mean(1, keepdim=True)
    return made.contiguous()


def to_grey(model: Any, how: str = "sum") -> Any:
    """Makes a model's patch embedding one for strips of one channel, in place; returns the model.

    A pixel head is left alone, so this is for classifiers. ValueError if the model has one, or has one channel already.
    """
    if hasattr(model, "pixel_head"):
        raise ValueError("a model with a pixel head writes colours; to_grey is for classifiers")
    trunk = model.base_model
    embedding = trunk.embed_patches
    if embedding.num_channels == 1:
        raise ValueError("the patch embedding has one channel already")
    old = embedding.projection
    made = torch.nn.utils.skip_init(
        torch.nn.Conv2d, 1, old.out_channels, kernel_size=old.kernel_size, stride=old.stride,
        device=old.weight.device, dtype=old.weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        made.weight.copy_(grey_weight(old.weight, how))
        made.bias.copy_(old.bias)
    embedding.projection, embedding.num_channels = made, 1
    model.config.num_channels = 1
    return model
