# SPDX-License-Identifier: Apache-2.0
"""ERNIE-M, the encoder of 96 languages: what transformers had up to version 4, as a small module of its own.

Weights are the user's: a folder with ``config.json`` (``model_type`` ernie_m), ``model.safetensors`` or
``pytorch_model.bin``, ``sentencepiece.bpe.model`` and ``vocab.txt``.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Where a piece is cut further: Chinese characters and punctuation are tokens, numbers stand apart.
_PARTS = re.compile(
    r"[\u4e00-\u9fff]|[,;:.?!~，；：。？！《》【】]|\d+|[^\d\u4e00-\u9fff,;:.?!~，；：。？！《》【】]+"
)
_SPACE = "\u2581"
CLS, PAD, SEP, UNK = 0, 1, 2, 3


@dataclass
class ErnieMConfig:
    """Sizes of ERNIE-M; the defaults are base."""

    vocab_size: int = 250_002
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 514
    layer_norm_eps: float = 1e-5


class _Embeddings(nn.Module):
    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, PAD)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        # Positions are counted from 2, padding included.
        at = torch.arange(2, ids.shape[1] + 2, device=ids.device)
        return self.layer_norm(self.word_embeddings(ids) + self.position_embeddings(at))


class _Projections(nn.Module):
    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))


class _Attention(nn.Module):
    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.self_attn = _Projections(config)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, d = x.shape
        inner: Any = self.self_attn
        q, k, v = (
            p(x).view(b, n, self.heads, -1).transpose(1, 2)
            for p in (inner.q_proj, inner.k_proj, inner.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out_proj(y.transpose(1, 2).reshape(b, n, d))


class _Layer(nn.Module):
    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x, mask))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class _Encoder(nn.Module):
    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


@dataclass
class EncoderOutput:
    """``last_hidden_state`` [B, n, D]."""

    last_hidden_state: Tensor


class ErnieMEncoder(nn.Module):
    """ERNIE-M without its pooler, under the published names of its weights (section 3.2 of the specification)."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.embeddings.layer_norm.weight.device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> EncoderOutput:
        """Last hidden states [B, n, D] of ids [B, n]."""
        mask = input_ids != PAD if attention_mask is None else attention_mask.to(torch.bool)
        x = self.embeddings(input_ids)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        return EncoderOutput(x)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ErnieMEncoder:
        """A folder of published weights. Raises ValueError for weights that are missing or of another shape."""
        folder = Path(folder)
        given = json.loads((folder / "config.json").read_text())
        config = ErnieMConfig(
            **{f.name: given[f.name] for f in fields(ErnieMConfig) if f.name in given}
        )
        if (folder / "model.safetensors").is_file():
            from safetensors.torch import load_file

            state = load_file(folder / "model.safetensors")
        else:
            state = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
        state = {k.removeprefix("ernie_m."): v for k, v in state.items()}
        model = cls(config)
        own = model.state_dict()
        wrong = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
        if wrong:
            raise ValueError(
                f"{folder} has no weights of ERNIE-M: {', '.join(wrong[:3])} are missing or of another shape"
            )
        model.load_state_dict({k: state[k] for k in own})
        return model.eval()


class ErnieMTokenizer:
    """``[CLS] pieces [SEP]`` by the sentencepiece model and vocabulary of a folder."""

    pad_token = "[PAD]"

    def __init__(self, folder: str | Path) -> None:
        if importlib.util.find_spec("sentencepiece") is None:
            raise ModuleNotFoundError(
                "ERNIE-M's tokenizer needs sentencepiece; install it with `pip install sentencepiece`"
            )
        from sentencepiece import SentencePieceProcessor

        folder = Path(folder)
        self._pieces = SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        self.vocab = {token: i for i, token in reversed(list(enumerate(lines))) if token}

    def tokens(self, text: str) -> list[str]:
        """The tokens of a text."""
        return split_pieces(self._pieces.encode(text, out_type=str))

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """``input_ids`` of one text."""
        return {"input_ids": [CLS, *(self.vocab.get(t, UNK) for t in self.tokens(text)), SEP]}


def split_pieces(pieces: list[str]) -> list[str]:
    """Sentencepiece's pieces as ERNIE-M's vocabulary has them: Chinese, punctuation and numbers apart."""
    made: list[str] = []
    for i, piece in enumerate(pieces):
        if piece == _SPACE:
            if i and i + 1 < len(pieces) and not pieces[i + 1].startswith(_SPACE):
                made.append(piece)
            continue
        made += [part for part in _PARTS.findall(piece) if part != _SPACE]
    return made
