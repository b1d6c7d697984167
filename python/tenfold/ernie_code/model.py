# SPDX-License-Identifier: Apache-2.0
"""ERNIE-Code's model: transformers' ``MT5ForConditionalGeneration`` with an untied head, on tenfold's ops.

transformers 5 ties input table and head of every T5 that is made from a configuration, and leaves them apart only where
a checkpoint has two tables that differ. ERNIE-Code's (and mT5's) are two: everything here ends in a check that they do
not share memory.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.data.models import quiet_transformers
from tenfold.ernie_code.config import model_config
from tenfold.training.checks import one_of

KERNELS = ("tenfold", "stock")
ON_TIED = ("untie", "error")
PARAMETERS = 582_390_528  # of ernie-code-560m


def is_tied(model: Any) -> bool:
    """Do input table and head share memory?"""
    a, b = model.shared.weight, model.lm_head.weight
    if a is b:
        return True
    if "meta" in (a.device.type, b.device.type):
        return False  # there is no memory to share
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def check_untied(model: Any) -> None:
    """Raises RuntimeError where :func:`is_tied`."""
    if is_tied(model):
        raise RuntimeError(
            "the head shares its memory with the input table (transformers ties every T5 that is made from a "
            "configuration); ERNIE-Code's head is its own: call tenfold.ernie_code.untie_head(model)"
        )


def untie_head(model: Any, *, fresh_std: float | None = None) -> None:
    """Gives a model a head of its own: a copy of the input table, or a fresh one of that standard deviation.

    The configuration says so too, so that ``resize_token_embeddings`` and ``tie_weights`` leave it alone.
    """
    if is_tied(model):
        weight = model.lm_head.weight.detach()
        made = (
            weight.clone() if fresh_std is None else torch.empty_like(weight).normal_(std=fresh_std)
        )
        model.lm_head.weight = nn.Parameter(made)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys.pop("lm_head.weight", None)
    check_untied(model)


def _warn_fp16(dtype: torch.dtype | None) -> None:
    if dtype == torch.float16:
        warnings.warn(
            "T5 models overflow in float16 (all of them were trained in bfloat16); use dtype=torch.bfloat16",
            stacklevel=3,
        )


def _on_kernels(model: Any, kernels: str, options: dict[str, Any]) -> Any:
    one_of("kernels", kernels, KERNELS)
    if kernels == "tenfold":
        from tenfold.integrations import t5

        t5.patch(model, **options)
    return model


def build_model(
    config: Any = "ernie-code-560m",
    *,
    seed: int | None = None,
    head_std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernels: str = "tenfold",
    patch_options: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A new model, initialised as mT5 (variances of section 3.1: tables N(0, 1), q N(0, 1 / (d_model d_kv)), ...).

    Args:
        config: a preset of :func:`~tenfold.ernie_code.model_config`, with ``changes``, or an ``MT5Config``.
        seed: of the weights; None: torch's generator as it is. head_std: of the head; mT5's is 1, with which a first
            loss is about 127 at d_model 768; ``d_model**-0.5`` starts at log(vocab_size). device: ``"meta"`` takes no
            memory.
        kernels: ``"tenfold"`` (:func:`tenfold.integrations.t5.patch` with ``patch_options``) or ``"stock"``.

    Returns:
        ``MT5ForConditionalGeneration`` in evaluation mode; input table and head do not share memory.
    """
    from transformers import MT5ForConditionalGeneration

    if isinstance(config, str):
        config = model_config(config, **changes)
    elif changes:
        raise TypeError("changes go with a preset; change the fields of the configuration itself")
    one_of("kernels", kernels, KERNELS)
    _warn_fp16(dtype)
    config = copy.deepcopy(config)
    config.tie_word_embeddings = True  # else the encoder's and decoder's tables would be two more
    with torch.random.fork_rng(devices=[], enabled=seed is not None), torch.device(device):
        if seed is not None:
            torch.manual_seed(seed)
        model = MT5ForConditionalGeneration(config)
        untie_head(model, fresh_std=head_std)
    return _on_kernels(model.to(dtype).eval(), kernels, patch_options or {})


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    on_tied: str = "untie",
    kernels: str = "tenfold",
    patch_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A checkpoint of ours, of ERNIE-Code or of mT5, from a folder or by hub name.

    Args:
        dtype: None: that of the checkpoint. on_tied: what happens where its head is the input table: ``"untie"`` (a
            copy, with a warning) or ``"error"``.
        kernels, patch_options: as of :func:`build_model`. options: of ``from_pretrained``.

    Raises:
        RuntimeError: a tied head, with ``on_tied="error"``. OSError: no checkpoint there.
    """
    from transformers import MT5ForConditionalGeneration

    one_of("on_tied", on_tied, ON_TIED)
    one_of("kernels", kernels, KERNELS)
    _warn_fp16(dtype)
    with quiet_transformers():
        model = MT5ForConditionalGeneration.from_pretrained(
            str(name_or_path), dtype="auto" if dtype is None else dtype, **options
        )
    if is_tied(model):
        if on_tied == "error":
            check_untied(model)
        warnings.warn(
            f"{name_or_path} has one table for input and head; the head is a copy from now on",
            stacklevel=2,
        )
    untie_head(model)
    return _on_kernels(model, kernels, patch_options or {})


def parameter_count(config: Any = "ernie-code-560m") -> int:
    """Parameters of a preset or configuration, without making them."""
    model = build_model(config, device="meta", kernels="stock")
    return sum(p.numel() for p in model.parameters())
