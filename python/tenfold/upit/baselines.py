# SPDX-License-Identifier: Apache-2.0
"""What UpIT is compared with: vanilla upcycling, BTX-style mixing, dense continued tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenfold.merge.sources import State
from tenfold.training.batches import Data
from tenfold.upit.assemble import assemble
from tenfold.upit.mixture import mixture_layers
from tenfold.upit.options import AssemblyConfig, PostTrainingConfig
from tenfold.upit.post_train import PostTrained, post_train


def upcycle(
    source: State | str | Path,
    out: str | Path,
    *,
    experts: int = 8,
    config: AssemblyConfig | None = None,
    model_config: Any = None,
) -> Path:
    """Vanilla upcycling (arXiv 2212.05055): every expert a copy of one dense model, routers at random.

    Args:
        source: the base model, or the one after instruction tuning. Others as in
            :func:`tenfold.upit.assemble.assemble`.
    """
    config = replace(config or AssemblyConfig(), allow_identical=True, rest="last", saved=None)
    return assemble([source] * experts, None, out, config=config, model_config=model_config)


def btx(
    experts: Sequence[State | str | Path],
    out: str | Path,
    *,
    config: AssemblyConfig | None = None,
    model_config: Any = None,
) -> Path:
    """Branch-Train-MiX (arXiv 2403.07816): separately trained experts, the mean of the rest, routers at random."""
    config = replace(config or AssemblyConfig(), rest="mean", saved=None)
    return assemble(experts, None, out, config=config, model_config=model_config)


def continue_dense(
    folder: Any,
    data: Data,
    *,
    config: PostTrainingConfig | None = None,
    out: str | Path | None = None,
    **kwargs: Any,
) -> PostTrained:
    """Dense continued tuning: the loop of post-training on the dense model, for the same steps and rows.

    Raises:
        ValueError: the model is a mixture.
    """
    if not isinstance(folder, str | Path) and mixture_layers(folder):
        raise ValueError("continue_dense is for dense models; this one is a mixture (post_train)")
    return post_train(folder, data, config=config, out=out, **kwargs)
