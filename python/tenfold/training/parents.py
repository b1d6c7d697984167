# SPDX-License-Identifier: Apache-2.0
"""Models that demos begin with: trained once, then read from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tenfold import __version__
from tenfold.data import cache_dir
from tenfold.data.cache import build_once


def trained(
    name: str, settings: Mapping[str, Any], model: Any, train: Callable[[Any], Mapping[str, float]]
) -> tuple[Any, dict[str, float]]:
    """(the model with trained weights, what ``train`` said of them, such as a loss).

    ``train(model)`` trains it in place. What it does has to follow from ``settings`` (a JSON value), this version
    of tenfold and that of torch: weights of the same three are read from the cache instead.
    """
    made_by = [name, settings, __version__, torch.__version__]
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        said = dict(train(model))
        save_file(
            {k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "said.json").write_text(json.dumps(said))

    folder = build_once(cache_dir() / "parents" / f"{name}-{key}", build)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), json.loads((folder / "said.json").read_text())
