# SPDX-License-Identifier: Apache-2.0
"""Models with what reads for them, from the folders that training writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenfold.data.models import MissingData, quiet_transformers

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load(
    name: str | Path, *, device: str = "cpu", dtype: Any = None, num_labels: int | None = None, seed: int = 0
) -> tuple[Any, Any, Any]:  # fmt: skip
    """(model in eval mode, processor, tokenizer) of a folder or a hub id; what a folder does not have is None.

    Args:
        num_labels: of a classifier; then the model is one: the folder's own, if it is a classifier with as many labels,
            else a new head (drawn by ``seed``) on its trunk. None: a causal LM.

    Raises:
        MissingData: no such folder. ValueError: another kind of model.
    """
    from transformers import AutoConfig

    from tenfold.pixelgpt.classifier import PixelGPTForSequenceClassification, classifier_of
    from tenfold.pixelgpt.config import PixelGPTConfig
    from tenfold.pixelgpt.model import PixelGPTForCausalLM

    folder = Path(name).expanduser()
    if not folder.is_dir() and (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
        raise MissingData(
            f"no model folder at {str(name)!r}; `tenfold pixelgpt pretrain` makes one"
        )
    where = str(folder) if folder.is_dir() else str(name)
    options = {} if dtype is None else {"dtype": dtype}
    with quiet_transformers():
        config = AutoConfig.from_pretrained(where)
        if not isinstance(config, PixelGPTConfig):
            raise ValueError(
                f"{where} is a model of type {config.model_type!r}, not {PixelGPTConfig.model_type!r}"
            )
        heads = (config.architectures or [""])[0].endswith("SequenceClassification")
        if num_labels is None and heads:
            raise ValueError(
                f"{where} is a classifier; a model with a pixel and a token head is needed"
            )
        if num_labels is not None and heads and config.num_labels == num_labels:
            model: Any = PixelGPTForSequenceClassification.from_pretrained(where, **options)
        elif num_labels is not None:
            kind = PixelGPTForSequenceClassification if heads else PixelGPTForCausalLM
            model = classifier_of(kind.from_pretrained(where, **options), num_labels, seed)
        else:
            model = PixelGPTForCausalLM.from_pretrained(where, **options)
    return model.to(device).eval(), _processor(where), _tokenizer(where)


def _processor(where: str) -> Any:
    from tenfold.pixelgpt import PixelProcessor

    found = Path(where)
    if found.is_dir() and not list(found.glob("*processor_config.json")):
        return None
    return PixelProcessor.from_pretrained(where)


def _tokenizer(where: str) -> Any:
    from transformers import AutoTokenizer

    found = Path(where)
    if found.is_dir() and not any((found / f).is_file() for f in _TOKENIZER_FILES):
        return None
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(where)
