# SPDX-License-Identifier: Apache-2.0
"""Tiny dense models, mixtures made of them, and rows: shared by the tests of mixtures."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

VOCAB, WIDTH, FFN, LAYERS = 61, 32, 48, 2


def dense(seed=0, layers=LAYERS, width=WIDTH, ffn=FFN, dtype=torch.float32, **changes):
    """A random Llama whose matrices are large enough to matter."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=128,
            bos_token_id=None, eos_token_id=None, pad_token_id=None, rope_theta=5000.0,
            **({"tie_word_embeddings": False} | changes),
        )
    )  # fmt: skip
    return _sharper(model).to(dtype).eval()


def _sharper(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4) if p.ndim > 1 else p.add_(0.2 * torch.randn(p.shape))
            del name
    return model


def experts(count=4, seed=0, spread=0.3, **changes):
    """Checkpoints of one run, as state dicts: a model, and the same with noise."""
    base = dense(seed, **changes)
    made = []
    for i in range(count):
        generator = torch.Generator().manual_seed(100 + i)
        made.append({n: p.detach() + spread * p.detach().float().std().to(p.dtype) * torch.randn(
            p.shape, generator=generator).to(p.dtype) for n, p in base.state_dict().items()})  # fmt: skip
    return base, made


def mixtral(n=4, k=2, seed=0, dtype=torch.float32, **changes):
    """A random Mixtral."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, head_dim=WIDTH // 4, max_position_embeddings=128,
            num_local_experts=n, num_experts_per_tok=k, bos_token_id=None, eos_token_id=None,
            pad_token_id=None, tie_word_embeddings=False, **changes,
        )
    )  # fmt: skip
    return _sharper(model).to(dtype).eval()


def rows(count=8, length=12, seed=1, low=0, high=VOCAB):
    return torch.randint(low, high, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits
