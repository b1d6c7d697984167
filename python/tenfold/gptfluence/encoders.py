# SPDX-License-Identifier: Apache-2.0
"""From texts to features: any transformers encoder, or hashed n-grams where no model is wanted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.training.checks import integers, one_of

POOLINGS = ("cls", "mean", "last")
BAG, PACKAGED = "bag", "minilm"


class TextEncoder:
    """Features of texts from a transformers model, which is put into eval mode: dropout would be noise.

    Args:
        model, tokenizer: an ``AutoModel`` (its last hidden state is read) and its tokenizer.
        pooling: ``"cls"``: the first token's; ``"mean"``: of all tokens, then scaled to length 1; ``"last"``: the
        last token's, for GPTs.
        max_length: tokens; longer texts are cut, and a warning says how many. batch_size: texts at a time.
        name: what the features are called; features of different names do not go together.
    """

    def __init__(
        self, model: Any, tokenizer: Any, pooling: str = "cls", *, max_length: int = 512, batch_size: int = 32,
        name: str | None = None,
    ) -> None:  # fmt: skip
        one_of("pooling", pooling, POOLINGS)
        self.model, self.tokenizer, self.pooling = model.eval(), tokenizer, pooling
        self.max_length, self.batch_size = max_length, batch_size
        integers(self, {"max_length": 1, "batch_size": 1})
        where = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.name = f"{name or where}, {pooling}"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def from_pretrained(
        cls, name: str, pooling: str = "cls", device: str = "cpu", **options: Any
    ) -> TextEncoder:
        """A folder or hub id of any ``AutoModel``."""
        from transformers import AutoModel, AutoTokenizer

        from tenfold.data.models import quiet_transformers

        with quiet_transformers():
            model = AutoModel.from_pretrained(name).to(device)
            tokenizer = AutoTokenizer.from_pretrained(name)
        return cls(model, tokenizer, pooling, **({"name": name} | options))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Features float32 [N, D], on the CPU, independent of what else is in a batch up to rounding."""
        self.model.eval()
        ids = [self.tokenizer(t, truncation=False, verbose=False)["input_ids"] for t in texts]
        long = sum(len(i) > self.max_length for i in ids)
        if long:
            warnings.warn(
                f"{long} of {len(texts)} texts are longer than {self.max_length} tokens and were cut",
                stacklevel=2,
            )
        made: list[Tensor] = [torch.empty(0)] * len(ids)
        # Texts of like length beside each other: less padding.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for at in range(0, len(order), self.batch_size):
            rows = order[at : at + self.batch_size]
            pooled = self._pooled([texts[i] for i in rows])
            for row, features in zip(rows, pooled):
                made[row] = features
        return torch.stack(made) if made else torch.empty(0, self.model.config.hidden_size)

    def _pooled(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt",
            padding_side="right",
        ).to(self.model.device)  # fmt: skip
        states = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].to(states.dtype)
        if self.pooling == "cls":
            made = states[:, 0]
        elif self.pooling == "last":
            made = states[
                torch.arange(len(states), device=states.device), batch["attention_mask"].sum(1) - 1
            ]
        else:
            made = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
            made = torch.nn.functional.normalize(made, dim=1)
        return made.cpu()


class BagEncoder:
    """Hashed counts of n-grams, projected at random and scaled to length 1: features that need no model.

    Args:
        width: D. n: tokens of an n-gram. buckets: counts before the projection. seed: of the projection.
    """

    def __init__(self, width: int = 64, n: int = 2, buckets: int = 8192, seed: int = 0) -> None:
        self.width, self.n, self.buckets, self.seed = width, n, buckets, seed
        integers(self, {"width": 1, "n": 1, "buckets": 1, "seed": 0})
        self.name = f"{BAG}, {n}-grams, {buckets} x {width}, seed {seed}"
        made = torch.Generator().manual_seed(seed)
        self._projection = torch.randn(buckets, width, generator=made) / width**0.5

    def __call__(self, texts: Sequence[str | Sequence[int]]) -> Tensor:
        """Features float32 [N, width] of texts (as bytes) or of token ids."""
        counts = torch.zeros(len(texts), self.buckets)
        for row, text in enumerate(texts):
            tokens = torch.tensor(
                list(text.encode()) if isinstance(text, str) else list(text), dtype=torch.int64
            )
            if len(tokens) >= self.n:
                grams = tokens.unfold(0, self.n, 1)
                key = torch.zeros(len(grams), dtype=torch.int64)
                for column in range(self.n):
                    key = (key * 1_000_003 + grams[:, column]) % 2_147_483_647
                counts[row] = torch.bincount(key % self.buckets, minlength=self.buckets).float()
        return torch.nn.functional.normalize(counts @ self._projection, dim=1)


def encoder_of(
    name: str = PACKAGED, pooling: str | None = None, device: str = "cpu", **options: Any
) -> TextEncoder | BagEncoder:  # fmt: skip
    """``"minilm"`` (the packaged all-MiniLM-L6-v2), ``"bag"``, or a folder or hub id of any ``AutoModel``.

    MissingData says how to get the packaged model where it is not installed.
    """
    if name == BAG:
        return BagEncoder()
    if name == PACKAGED:
        from tenfold.data.sentences import minilm

        model, tokenizer = minilm(device)
        return TextEncoder(model, tokenizer, pooling or "cls", name=PACKAGED, **options)
    return TextEncoder.from_pretrained(name, pooling or "cls", device, **options)
