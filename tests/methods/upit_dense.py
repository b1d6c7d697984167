# SPDX-License-Identifier: Apache-2.0
"""Dense models for the tests of UpIT's first half: tiny Llamas, their task vectors, adapters, letters as tokens."""

import json

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, WIDTH = 32, 16


def llama(seed=0, layers=2, width=WIDTH, ffn=24, vocab=VOCAB, tied=False):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=width // 2, max_position_embeddings=128,
            bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


def near(base, seed, scale=0.05):
    """A state dict that differs from another by noise."""
    made = torch.Generator().manual_seed(seed)
    return {
        n: t + (scale * torch.randn(t.shape, generator=made)).to(t.dtype) for n, t in base.items()
    }


def folders(place, count, dtype=torch.float32, scale=0.05):
    """Paths of a base and so many experts."""
    model = llama()
    base = {n: t.to(dtype) for n, t in model.state_dict().items()}
    made = []
    for i in range(count + 1):
        state = base if i == 0 else near(base, i, scale)
        folder = place / ("base" if i == 0 else f"checkpoint-{i}")
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict() | {
            "architectures": ["LlamaForCausalLM"],
            "dtype": str(dtype)[6:],
        }
        (folder / "config.json").write_text(json.dumps(config))
        made.append(str(folder))
    return made[0], made[1:]


def rows(count=32, length=16, seed=1, vocab=VOCAB, prompt=4):
    """Prompts of which only the answer has labels; every other row is padded."""
    ids = torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :prompt] = -100
    labels[::2, -3:] = -100
    mask[::2, -3:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def letters():
    """A tokenizer whose tokens are letters (and an end), for a vocabulary of VOCAB."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {chr(97 + i): i for i in range(26)} | {"<e>": 26, "<u>": 27}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", unk_token="<u>")


def adapter(
    folder, seed, rank=2, scale=0.1, initial=False, layers=("gate_proj", "up_proj"), alpha=4
):
    """A folder as PEFT writes it; all have the same A at the start."""
    start, own = (torch.Generator().manual_seed(s) for s in (99, seed))
    state = {}
    for layer, name in ((i, n) for i in range(2) for n in layers):
        at = f"base_model.model.model.layers.{layer}.mlp.{name}"
        a, b = torch.randn(rank, WIDTH, generator=start), torch.zeros(24, rank)
        if not initial:
            a, b = (
                a + scale * torch.randn(a.shape, generator=own),
                scale * torch.randn(b.shape, generator=own),
            )
        state |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(layers)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)
