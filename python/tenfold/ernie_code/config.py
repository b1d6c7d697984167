"""Sizes of models: mT5's architecture with a head of its own (section 3.1 of the specification)."""

from __future__ import annotations

from typing import Any

from tenfold.training.checks import one_of

PRESETS: dict[str, dict[str, int]] = {
    "ernie-code-560m": {"vocab_size": 250_105, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "mt5-base": {"vocab_size": 250_112, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "mt5-small": {"vocab_size": 250_112, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "small": {"vocab_size": 8192, "d_model": 256, "d_kv": 64, "d_ff": 640, "num_layers": 3, "num_heads": 4},
    "tiny": {"vocab_size": 4096, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
}  # fmt: skip


def model_config(preset: str = "ernie-code-560m", **changes: Any) -> Any:
    """transformers' ``MT5Config`` of a preset, with some fields changed.

    Args:
        preset: ``"ernie-code-560m"``, ``"mt5-base"``, ``"mt5-small"``; ``"small"`` and ``"tiny"`` train on a CPU.
        changes: fields of ``MT5Config``, as ``vocab_size=len(tokenizer)`` or ``dropout_rate=0.0``.

    Raises:
        ValueError: a preset that is none. TypeError: a field that is none.
    """
    from transformers import MT5Config

    one_of("preset", preset, tuple(PRESETS))
    known = set(MT5Config().to_dict())
    unknown = sorted(set(changes) - known)
    if unknown:
        raise TypeError(f"{', '.join(unknown)} is no field of MT5Config")
    return MT5Config(**(PRESETS[preset] | changes))
