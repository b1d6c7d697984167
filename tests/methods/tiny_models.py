# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many kinds, and what a cache must equal: shared by the presses' tests."""

import torch
import transformers
from transformers import DynamicCache

from tenfold.integrations import transformers as hf

VOCAB = 97
LAYERS = 4
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ALTERNATE = ["sliding_attention", "full_attention"] * 2
# What is special about each: its rotary embedding, norms of queries, window, layers, projections.
KINDS = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Gemma": {},
    "Gemma3": {"layer_types": ALTERNATE, "sliding_window": 32},
    "Cohere": {},  # interleaved rotary pairs
    "Cohere2": {"layer_types": ALTERNATE, "sliding_window": 32},  # no rotary in full layers
    "SmolLM3": {"pad_token_id": 0},  # no rotary in every fourth layer
    "Glm": {"pad_token_id": 0},  # partial, interleaved
    "StableLm": {"pad_token_id": 0},  # partial
    "Olmo2": {},  # norm over all heads
    "HunYuanDenseV1": {},  # norm after the rotation
    "Lfm2": {"full_attn_idxs": [1, 3]},  # convolutions between
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"] * 2,  # and a gate among the queries
        "mlp_only_layers": [0, 1, 2, 3],
    },
}


def make(kind: str = "Llama", attention: str = "sdpa", **changes):
    config = getattr(transformers, ("Gemma3Text" if kind == "Gemma3" else kind) + "Config")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    config = config(**(sizes | KINDS.get(kind, {}) | changes))
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        # Sharper than a random start: else attention is uniform, and any kept set is as good.
        if "q_proj" in name:
            weight.data *= 8
        elif "norm" in name:  # a forgotten norm must not pass for the identity
            weight.data += 0.3 * torch.randn(weight.shape)
    model.set_attn_implementation(attention)
    return model


def prompt(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str = "left"):
    """Rows [1, n] as one batch, with its mask."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[b, at], mask[b, at] = row[0], 1
    return ids, mask


def feed(model, cache, ids, mask=None, seen: int = 0):
    """A forward of new tokens with the positions of their own sequence; ``mask`` covers the past too."""
    n = ids.shape[1]
    if mask is None:
        mask = torch.ones(ids.shape[0], seen + n, dtype=torch.long)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -n:]
    return hf.forward(model, ids, cache, attention_mask=mask, position_ids=positions).logits


def run(model, press, ids, more, mask=None):
    """Logits of ``more``, token by token, after the prompt under a press."""
    cache, logits = press.new_cache(model), []
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad(), press(model):
        feed(model, cache, ids, mask)
        for step in more.split(1, 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits.append(feed(model, cache, step, mask))
    return torch.cat(logits, 1), cache


def masked_reference(model, ids, kept, more):
    """Logits of ``more`` after ``ids`` if its queries see only ``kept[layer]`` of the prompt."""
    length, total = ids.shape[1], torch.cat([ids, more], 1)
    b, n = total.shape
    dtype = next(model.parameters()).dtype

    def hide(module, args, kwargs):
        groups = module.num_key_value_groups
        allowed = torch.zeros(b, kept[module.layer_idx].shape[1], n, dtype=torch.bool)
        for row in range(b):
            for head, idx in enumerate(kept[module.layer_idx][row]):
                allowed[row, head, idx[idx >= 0]] = True
        allowed[..., length:] = True
        see = torch.ones(n, n).tril().bool().expand(b, groups * allowed.shape[1], n, n).clone()
        see[:, :, length:] &= allowed.repeat_interleave(groups, 1)[:, :, None]
        mask = torch.zeros(see.shape, dtype=dtype).masked_fill(~see, torch.finfo(dtype).min)
        return args, kwargs | {"attention_mask": mask}

    # Only the evicted layers: sliding-window ones keep the mask that the model gives them.
    hooks = [
        m.register_forward_pre_hook(hide, with_kwargs=True)
        for m in hf.attention_layers(model)
        if m.layer_idx in kept
    ]
    with torch.no_grad():
        logits = model(total, use_cache=False).logits[:, length:]
    for hook in hooks:
        hook.remove()
    return logits


def assert_keys_are_those_of_kept_tokens(model, cache, press, tokens, starts=None):
    """Layer 0's keys depend on token and position only, so each slot must hold its token's key."""
    with torch.no_grad():
        want = [hf.forward(model, row[None], DynamicCache(config=model.config)) for row in tokens]
    layer, kept = cache.layers[0], press.kept[0]
    for b, out in enumerate(want):
        full = hf.get_cache(dict(out)).layers[0].keys[0]
        start = 0 if starts is None else starts[b]
        for head in range(kept.shape[1]):
            used = kept[b, head] >= 0
            idx = kept[b, head][used]
            assert bool((idx.diff() > 0).all())
            got = layer.keys[b, head, : len(used)][used]
            torch.testing.assert_close(got, full[head, idx - start], atol=1e-4, rtol=1e-4)
