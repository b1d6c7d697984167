# SPDX-License-Identifier: Apache-2.0
"""A byte-level Llama small enough to train on a CPU, and what it is trained on: text and recall.

Half of the rows are standard-library documentation, half are recall: pairs of a key and a value, then
the same pairs again in other orders. Those values can be predicted only by looking them up, which is
what attention heads are for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.data import long_documents
from tenfold.training.muon import Muon

LENGTH = 128
PAIRS = 16
_KEYS = torch.tensor(list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_VALUES = torch.tensor(list(b"0123456789abcdef"))


def byte_stream(limit: int = 60, most: int = 30_000) -> Tensor:
    """Bytes [n] int64 of up to ``limit`` documents of the standard library's documentation."""
    texts = [d.text[:most] for d in long_documents(("docs",), limit=limit)]
    return torch.tensor(list("\n\n".join(texts).encode("ascii", errors="replace")))


def split(stream: Tensor, share: float = 0.9) -> tuple[Tensor, Tensor]:
    """(training, validation) parts of a stream; the validation part is its end."""
    at = int(share * len(stream))
    return stream[:at], stream[at:]


def text_rows(
    stream: Tensor, count: int, generator: torch.Generator, length: int = LENGTH
) -> Tensor:
    """``count`` rows [count, length] from random places of a stream."""
    starts = torch.randint(0, len(stream) - length, (count,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]


def recall_rows(
    count: int, generator: torch.Generator, pairs: int = PAIRS, rounds: int = 2
) -> Tensor:
    """Rows [count, 2 * pairs * rounds]: keys with values, all of them again and again, reordered."""
    keys = torch.rand(count, len(_KEYS), generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(0, len(_VALUES), (count, pairs), generator=generator)
    order = torch.rand(count, rounds, pairs, generator=generator).argsort(2).flatten(1)
    made = torch.stack([_KEYS[keys.gather(1, order)], _VALUES[values.gather(1, order)]], -1)
    return made.flatten(1)


def mixture(
    stream: Tensor, seed: int, length: int = LENGTH, pairs: int = PAIRS
) -> Callable[[str, int, int], Tensor]:
    """The data function of ``convert``: every other row is text, every other recall."""
    rounds = length // (2 * pairs)

    def rows(stage: str, step: int, size: int) -> Tensor:
        mixed = hash((seed, *stage.encode(), step)) % (
            1 << 62
        )  # of integers: the same in any process
        generator = torch.Generator().manual_seed(mixed)
        made = text_rows(stream, size, generator, length)
        recall = recall_rows((size + 1) // 2, generator, pairs, rounds)
        made[::2, : recall.shape[1]] = recall
        return made

    return rows


def make_model(seed: int, layers: int = 4, heads: int = 8, head_dim: int = 32) -> Any:
    """A random MHA Llama over bytes, width heads * head_dim."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = heads * head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=width, intermediate_size=2 * width,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                head_dim=head_dim, max_position_embeddings=4096, tie_word_embeddings=False,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip


def train(
    model: Any,
    data: Callable[[str, int, int], Tensor],
    steps: int,
    batch_size: int = 16,
    callback: Callable[[int, float], None] | None = None,
) -> Any:
    """Trains a model from scratch: Muon for matrices, AdamW for the rest; rates fall to 0."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=5e-3, weight_decay=0.01, betas=(0.9, 0.95)),
    ]
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    model.train()
    for step in range(steps):
        factor = min(1.0, (step + 1) / 10, (steps - step) / (0.4 * steps))
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * factor
        ids = data("parent", step, batch_size)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if callback is not None:
            callback(step + 1, float(loss.detach()))
    return model.eval()


@torch.no_grad()
def recall_score(model: Any, seed: int, count: int = 256, pairs: int = PAIRS) -> dict[str, float]:
    """Share of values looked up right in the second half, and their mean log-probability (nats)."""
    rows = recall_rows(count, torch.Generator().manual_seed(seed + 7919), pairs)
    asked = torch.arange(2 * pairs, 4 * pairs, 2)
    logits = torch.cat(
        [model(input_ids=part, use_cache=False).logits[:, asked] for part in rows.split(64)]
    )
    answers = rows[:, asked + 1]
    right = (logits.argmax(-1) == answers).float().mean()
    loss = F.cross_entropy(logits.float().flatten(0, 1), answers.flatten())
    return {"accuracy": float(right), "log_prob": -float(loss)}
