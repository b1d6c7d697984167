# SPDX-License-Identifier: Apache-2.0
"""The toy of the acceptance checks (Markov chains, a 4-layer Llama), and tiny models and rows."""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold import hft

VOCAB, LENGTH, BATCH = 32, 32, 64


def llama(layers=4, width=64, ffn=128, heads=4, kv_heads=None, vocab=VOCAB, seed=0, dtype=torch.float32,
          **changes):  # fmt: skip
    torch.manual_seed(seed)
    settings = {"tie_word_embeddings": False} | changes
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads or heads, head_dim=width // heads,
            max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None, **settings,
        )
    ).to(dtype)  # fmt: skip


def tiny(layers=2, seed=0, **changes):
    """Small enough for tests of loops."""
    return llama(**({"layers": layers, "width": 16, "ffn": 24, "seed": seed} | changes))


def rows(count=32, length=16, seed=1, vocab=VOCAB):
    return torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(seed))


class Chain:
    """A Markov chain over the vocabulary: rows softmax(2 * N(0, 1))."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(VOCAB, VOCAB, generator=self.generator)
        self.matrix = logits.softmax(-1)

    def batch(self, count=BATCH, length=LENGTH):
        ids = torch.empty(count, length, dtype=torch.int64)
        ids[:, 0] = torch.randint(0, VOCAB, (count,), generator=self.generator)
        for t in range(1, length):
            ids[:, t] = torch.multinomial(self.matrix[ids[:, t - 1]], 1, generator=self.generator)[
                :, 0
            ]
        return ids


@torch.no_grad()
def loss_on(model, ids):
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def train(model, chain, steps, lr, optimizer=None, batch=BATCH):
    """Plain AdamW on what needs a gradient; returns the optimiser."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    for _ in range(steps):
        ids = chain.batch(batch)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


class Forgetting:
    """Pre-trained on chain A; ``tune`` fine-tunes a copy on B and says what that cost."""

    def __init__(self, seed, steps=400, batch=BATCH):
        self.seed, self.batch = seed, batch
        self.a, self.b = Chain(1000 + seed), Chain(2000 + seed)
        self.model = llama(
            seed=seed, tie_word_embeddings=True
        )  # as the numbers of the checks assume
        train(self.model, self.a, steps, 3e-3, batch=batch)
        self.held_a, self.held_b = self.a.batch(256), self.b.batch(256)
        self.start = loss_on(self.model, self.held_a)
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def tune(self, steps=100, **selection):
        """(increase of the loss on A, loss on B)."""
        hft.release(self.model)
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.copy_(self.weights[n])
        hft.apply(self.model, **({"seed": self.seed} | selection))
        self.b.generator.manual_seed(77 + self.seed)
        train(self.model, self.b, steps, 1e-3, batch=self.batch)
        return loss_on(self.model, self.held_a) - self.start, loss_on(self.model, self.held_b)


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)
