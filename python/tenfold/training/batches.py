# SPDX-License-Identifier: Apache-2.0
"""Token batches that are a function of (stage, step): a resumed run reads exactly what it would have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Data = (
    Any  # Tensor | Mapping[str, Tensor] | Callable[[str, int, int], Tensor | Mapping[str, Tensor]]
)


def token_rows(tokenizer: Any, texts: Iterable[str], length: int) -> Tensor:
    """All texts, one after the other with an end token between, as rows [R, length] int64.

    Raises ValueError if they do not fill one row.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return rows_of(torch.tensor(ids, dtype=torch.int64), length)


def rows_of(ids: Tensor, length: int) -> Tensor:
    """A token stream [n] cut into rows [n // length, length]."""
    count = ids.numel() // length
    if count < 1:
        raise ValueError(f"{ids.numel()} tokens do not fill a row of {length}")
    return ids[: count * length].view(count, length)


def sample_digest(tensor: Tensor, digest: Any) -> None:
    """Adds shape, dtype and up to 4096 evenly spaced elements of a tensor to a hash."""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // 4096)
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(flat[::step].to("cpu").contiguous().view(torch.uint8).numpy().tobytes())


def model_digest(model: Any) -> str:
    """Identifies a model in a work folder: a hash over samples of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        sample_digest(parameter, digest)
    return digest.hexdigest()[:16]


class Batches:
    """Rows of tokens in a shuffled order that depends on nothing but the seed, stage and step.

    Args:
        data: a token stream [n] or rows [R, S] int64; a dict of ``input_ids`` [R, S] with optional
            ``labels`` and ``attention_mask``; or a function (stage, step, size) -> such rows, which
            must return the same for the same arguments.
        length: tokens per row, where ``data`` is a stream.
    """

    def __init__(self, data: Data, length: int, seed: int) -> None:
        self._function: Callable[[str, int, int], Any] | None = None
        self._rows: dict[str, Tensor] = {}
        self._orders: dict[tuple[str, int], Tensor] = {}
        self._seed = seed
        if callable(data):
            self._function = data
            return
        if isinstance(data, Tensor):
            data = {"input_ids": rows_of(data, length) if data.ndim == 1 else data}
        if not isinstance(data, Mapping) or "input_ids" not in data:
            raise TypeError(
                "data must be token ids [n] or [R, S], a dict with 'input_ids' [R, S], or a function "
                f"(stage, step, size) -> rows; got {type(data).__name__}"
            )
        self._rows = {k: v for k, v in data.items() if v is not None}
        ids = self._rows["input_ids"]
        if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point():
            raise ValueError(f"data: input_ids must be integers [R, S], got {ids.dtype} {list(ids.shape)}")  # fmt: skip
        for name, rows in self._rows.items():
            if rows.shape != ids.shape:
                raise ValueError(
                    f"data: {name} must have the shape of input_ids {list(ids.shape)}, got "
                    f"{list(rows.shape)}"
                )

    def digest(self) -> str:
        """Identifies the data in a work folder; functions cannot be told apart."""
        made = hashlib.sha256()
        for name in sorted(self._rows):
            made.update(name.encode())
            sample_digest(self._rows[name], made)
        return made.hexdigest()[:16] if self._rows else "function"

    def rows(self) -> int | None:
        """How many rows there are; None for a function."""
        return len(self._rows["input_ids"]) if self._rows else None

    def _order(self, stage: str, epoch: int, rows: int) -> Tensor:
        key = (stage, epoch)
        if key not in self._orders:
            text = f"{self._seed} {stage} {epoch}".encode()
            seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
            self._orders = {k: v for k, v in self._orders.items() if k[1] >= epoch - 1}
            self._orders[key] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        return self._orders[key]

    def take(self, stage: str, step: int, size: int) -> dict[str, Tensor]:
        """The ``size`` rows of a step, over all ranks; ``labels`` are the tokens if none were given."""
        if self._function is not None:
            made = self._function(stage, step, size)
            batch = dict(made) if isinstance(made, Mapping) else {"input_ids": made}
        else:
            rows = self._rows["input_ids"].shape[0]
            at = range(step * size, (step + 1) * size)
            index = torch.stack([self._order(stage, i // rows, rows)[i % rows] for i in at])
            batch = {name: value[index.to(value.device)] for name, value in self._rows.items()}
        if "labels" not in batch:
            batch["labels"] = batch["input_ids"]
            mask = batch.get("attention_mask")
            if mask is not None:
                batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
        return batch


@torch.no_grad()
def lm_loss(model: Any, rows: Tensor, batch_size: int = 16) -> float:
    """Mean next-token loss (nats) of a model over rows [R, S]."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    total = 0.0
    for part in rows.split(batch_size):
        ids = part.to(device)
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(part)
    model.train(was)
    return total / len(rows)
