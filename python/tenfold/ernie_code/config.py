# SPDX-License-Identifier: Apache-2.0
"""Sizes of models: mT5's architecture with a head of its own (section 3.1 of the specification)."""

from __future__ import annotations

from typing import Any

from tenfold.training.checks import one_of


def _sizes(
    vocab_size: int, d_model: int, d_kv: int, d_ff: int, num_layers: int, num_heads: int
) -> dict[str, int]:
    return dict(locals())


PRESETS: dict[str, dict[str, int]] = {
    "ernie-code-560m": _sizes(250_105, 768, 64, 2048, 12, 12),
    "mt5-base": _sizes(250_112, 768, 64, 2048, 12, 12),
    "mt5-small": _sizes(250_112, 512, 64, 1024, 8, 6),
    "small": _sizes(8192, 256, 64, 640, 3, 4),
    "tiny": _sizes(4096, 64, 16, 128, 2, 4),
}


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
