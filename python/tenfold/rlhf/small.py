# SPDX-License-Identifier: Apache-2.0
"""A byte-level policy small enough for a CPU, and the tokenizer that it needs: for tests and studies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tenfold.training.tiny import make_model

PAD = 0  # NUL and ETX do not occur in text
EOS = 3


class ByteTokenizer:
    """Bytes as tokens, with as much of transformers' tokenizers as training asks for.

    Args:
        eos: the byte that ends a response; it is not decoded.
    """

    pad_token_id = PAD
    chat_template = None

    def __init__(self, eos: int = EOS) -> None:
        self.eos_token_id = eos

    def __call__(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> dict[str, Any]:
        """``input_ids`` of a text, one per byte of its UTF-8."""
        return {"input_ids": list(text.encode("utf-8"))}

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """The text of some bytes; what is not UTF-8 becomes U+FFFD."""
        special = (self.pad_token_id, self.eos_token_id) if skip_special_tokens else ()
        return bytes(int(i) for i in ids if int(i) not in special).decode("utf-8", "replace")


def make_policy(
    seed: int = 0, layers: int = 4, heads: int = 8, head_dim: int = 32, eos: int = EOS
) -> Any:
    """A random Llama over bytes (2.8M parameters by default) that knows how responses end."""
    model = make_model(seed, layers, heads, head_dim)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = eos, PAD
    return model.eval()
