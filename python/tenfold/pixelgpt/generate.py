# SPDX-License-Identifier: Apache-2.0
"""Patches written by a model: a loop with a KV cache, and the teacher-forced view of what it expects next.

With normalised targets a prediction has neither brightness nor contrast; ``denorm`` says where they come from:

* ``"context"``: mean and deviation of the last real patch of text before it;
* ``"target"``: of the true next patch, which only a reconstruction has;
* ``"minmax"``: each patch is stretched to [0, 1], for display;
* ``"none"``: the prediction is in [0, 1] already (``norm_pix_loss=False``), recommended for models meant to generate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.integrations import transformers as hf
from tenfold.pixelgpt.images import channels_first, check_strips
from tenfold.pixelgpt.model import CACHE
from tenfold.training.checks import one_of

DENORM = ("context", "minmax", "none")
_BLACK = 0.25  # mean brightness below which a patch is an end


def patch_values(image: Tensor, patch: int) -> Tensor:
    """Patches float32 [B, L, P] in [0, 1] of strips, in the order (row, column, channel)."""
    return ops.patchify_u8(image, patch, layout="rcc", dtype=torch.float32)


def to_strips(patches: Tensor, patch: int) -> Tensor:
    """Strips uint8 [B, C, p, p * L] of patches [B, L, P] in [0, 1]; what is outside is clipped."""
    return ops.unpatchify(patches, patch, patch, patch * patches.shape[-2])


def denormalised(
    predicted: Tensor, how: str, like: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Predictions [..., P] as patches in [0, 1].

    Args:
        how: ``"context"`` or ``"target"`` with ``like`` [..., P], patches whose mean and deviation are taken;
            ``"minmax"``; ``"none"``.
    """
    predicted = predicted.float()
    if how == "minmax":
        low, high = predicted.amin(-1, keepdim=True), predicted.amax(-1, keepdim=True)
        return (predicted - low) / (high - low).clamp(min=eps)
    if how == "none":
        return predicted.clamp(0, 1)
    assert like is not None
    std = (like.var(-1, keepdim=True) + eps).sqrt()
    return (predicted * std + like.mean(-1, keepdim=True)).clamp(0, 1)


def _denorm_of(config: Any, how: str | None, allowed: tuple[str, ...]) -> str:
    if how is None:
        return allowed[0] if config.norm_pix_loss else "none"
    one_of("denorm", how, allowed)
    if how in ("context", "target") and not config.norm_pix_loss:
        raise ValueError(
            f"denorm={how!r} is for models with norm_pix_loss; this one's patches are in [0, 1] already"
        )
    return how


def _at_the_end(image: Tensor, mask: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Patches [B, L, P] and mask with the valid ones of each row at its end."""
    values, valid = patch_values(image, patch), mask != 0
    length = valid.shape[1]
    shift = length - valid.sum(1, keepdim=True)
    at = torch.arange(length, device=values.device) - shift
    moved = values.gather(1, at.clamp(min=0)[..., None].expand_as(values))
    return torch.where((at >= 0)[..., None], moved, 1.0), at >= 0


@torch.no_grad()
def generate_patches(
    model: Any,
    pixel_values: Tensor,
    patch_mask: Tensor | None = None,
    *,
    steps: int = 16,
    denorm: str | None = None,
    until_black: bool = False,
) -> Tensor:
    """Goes on with strips, patch by patch; each prediction is the next input.

    Args:
        model: a :class:`~tenfold.pixelgpt.PixelGPTForCausalLM`.
        pixel_values: strips of one row of patches, as the model takes them.
        patch_mask: [B, L], 1 for the patches to go on from, at the beginning of each row: without the black
            one that ends a text. Default: all.
        steps: patches to write. denorm: see the module; default ``"context"``, or ``"none"`` without ``norm_pix_loss``.
        until_black: stop when every row has written a black patch. Never with ``norm_pix_loss``: there black and white
            have the same target.

    Returns:
        The new patches as strips uint8 [B, C, p, p * n], n <= steps.

    Raises:
        ValueError: settings, strips of several rows, an empty row, more positions than the model has.

    Source:
        Section 3.9 of the method's specification.
    """
    config = model.config
    how = _denorm_of(config, denorm, DENORM)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if until_black and config.norm_pix_loss:
        raise ValueError(
            "until_black needs a model without norm_pix_loss: normalised, black looks like white"
        )
    length = check_strips(pixel_values, config.patch_size, config.num_channels)
    first = channels_first(pixel_values, config.num_channels)
    if pixel_values.shape[2 if first else 1] != config.patch_size:
        raise ValueError(f"strips must be one row of patches, got {list(pixel_values.shape)}")
    if patch_mask is None:
        patch_mask = torch.ones(len(pixel_values), length, dtype=torch.bool, device=pixel_values.device)  # fmt: skip
    if not bool((patch_mask != 0).any(1).all()):
        raise ValueError("a row of patch_mask has no patch to go on from")
    if length + steps - 1 > config.max_position_embeddings:
        raise ValueError(f"{length} patches and {steps} more are longer than the model's "
                         f"{config.max_position_embeddings} positions")  # fmt: skip
    trunk, embed = model.model, model.model.embed_patches
    values, mask = _at_the_end(pixel_values, patch_mask, config.patch_size)
    context, dtype = values[:, -1], embed.projection.weight.dtype
    written: list[Tensor] = []
    cache: Any = None
    inputs = values
    for _ in range(steps):
        made = trunk(
            inputs_embeds=embed.embed(embed.reordered(inputs).to(dtype)), attention_mask=mask,
            use_cache=True, **({} if cache is None else {hf.cache_name(trunk): cache}),
        )  # fmt: skip
        cache = made[CACHE]
        predicted = model.pixel_head(made.last_hidden_state[:, -1])
        patch = denormalised(predicted, how, context, config.norm_pix_eps)
        written.append(patch)
        if until_black and all(bool((p < _BLACK).any()) for p in torch.stack(written).mean(-1).T):
            break
        inputs = patch[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return to_strips(torch.stack(written, 1), config.patch_size)


@torch.no_grad()
def reconstruct(
    model: Any, pixel_values: Tensor, patch_mask: Tensor, *, denorm: str | None = None
) -> Tensor:
    """What a model expects at every patch, given the true ones before it: strips uint8 [B, C, p, p * L].

    The first patch, which nothing predicts, is the true one; padding is white.

    Args:
        denorm: ``"target"`` (default with ``norm_pix_loss``), ``"context"`` (of the patch before), ``"minmax"`` or
            ``"none"``.
    """
    config = model.config
    how = _denorm_of(config, denorm, ("target", *DENORM))
    true = patch_values(pixel_values, config.patch_size)
    made = model(pixel_values=pixel_values, patch_mask=patch_mask, use_cache=False)  # fmt: skip
    like = true[:, 1:] if how == "target" else true[:, :-1]
    expected = denormalised(made.patches[:, :-1], how, like, config.norm_pix_eps)
    whole = torch.cat([true[:, :1], expected], 1)
    valid = (patch_mask != 0)[..., None]
    return to_strips(torch.where(valid, whole, 1.0), config.patch_size)
