# SPDX-License-Identifier: Apache-2.0
"""The model: sizes, initialisation, an untied head whatever it comes from, checkpoints that others load."""

import math

import pytest
import torch
from transformers import MT5ForConditionalGeneration

from tenfold.ernie_code import (
    build_model,
    check_untied,
    load_model,
    model_config,
    parameter_count,
    train_tokenizer,
    untie_head,
)
from tenfold.ernie_code import model as home
from tenfold.ernie_code.generation import decode, encode_sources, generate, log_likelihoods

SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2, "num_layers": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Delete the file", "def f(x):\n    return x", "Datei löschen"] * 3, 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model("tiny", vocab_size=len(tokenizer), seed=0, **SIZES)


def test_parameter_count():
    """Check 10."""
    assert parameter_count() == 582_390_528 == home.PARAMETERS
    base = build_model("mt5-base", device="meta", kernels="stock")
    assert base.lm_head.weight.shape == (250_112, 768)
    with pytest.raises(ValueError, match="preset must be one of"):
        model_config("huge")
    with pytest.raises(TypeError, match="d_modle is no field"):
        model_config("tiny", d_modle=3)


def test_initial_variances():
    """Section 3.1, and check 10: a first loss of about 22 at V 205 and d_model 64."""
    made = build_model(
        "tiny",
        vocab_size=2050,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_heads=4,
        seed=0,
        kernels="stock",
    )
    stds = {
        "shared.weight": 1, "lm_head.weight": 1,
        "encoder.block.1.layer.0.SelfAttention.q.weight": (128 * 32) ** -0.5,
        "decoder.block.1.layer.1.EncDecAttention.k.weight": 128**-0.5,
        "decoder.block.0.layer.0.SelfAttention.v.weight": 128**-0.5,
        "encoder.block.0.layer.0.SelfAttention.o.weight": (4 * 32) ** -0.5,
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": 128**-0.5,
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": 256**-0.5,
    }  # fmt: skip
    weights = dict(made.named_parameters())
    for name, std in stds.items():
        assert float(weights[name].detach().std()) == pytest.approx(std, rel=0.03), name
    losses = []
    for seed in range(4):
        small = build_model("tiny", vocab_size=205, seed=seed)
        made = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, 205, (64, 20), generator=made)
        losses.append(float(small(input_ids=ids, labels=ids[:, :12]).loss.detach()))
    assert sum(losses) / 4 == pytest.approx(22, abs=4)
    low = build_model("tiny", vocab_size=205, seed=0, head_std=64**-0.5)
    assert float(low(input_ids=ids, labels=ids).loss.detach()) == pytest.approx(
        math.log(205), abs=1
    )


def test_the_head_is_its_own(tmp_path, model):
    check_untied(model)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    tied = MT5ForConditionalGeneration(model_config("tiny", vocab_size=64, **SIZES))
    with pytest.raises(RuntimeError, match="head shares its memory"):
        check_untied(tied)
    tied.save_pretrained(tmp_path / "tied")
    with pytest.raises(RuntimeError, match="head shares its memory"):
        load_model(tmp_path / "tied", on_tied="error")
    with pytest.warns(UserWarning, match="one table for input and head"):
        loaded = load_model(tmp_path / "tied")
    check_untied(loaded)
    assert torch.equal(loaded.lm_head.weight, loaded.shared.weight)
    untie_head(tied, fresh_std=1.0)
    assert not torch.equal(tied.lm_head.weight, tied.shared.weight)
    loaded.resize_token_embeddings(70)
    check_untied(loaded)
    assert loaded.lm_head.weight.shape == loaded.encoder.embed_tokens.weight.shape == (70, 32)


def test_checkpoints_are_stock(tmp_path, model):
    ids = torch.arange(5, 25).view(2, 10)
    expected = model(input_ids=ids, labels=ids).logits
    model.save_pretrained(tmp_path)
    stock = MT5ForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(
        stock(input_ids=ids, labels=ids).logits, expected, atol=1e-5, rtol=1e-5
    )
    again = load_model(tmp_path)
    assert torch.equal(again(input_ids=ids, labels=ids).logits, expected)
    assert load_model(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="overflow in float16"):
        load_model(tmp_path, dtype=torch.float16, kernels="stock")
    with pytest.raises(OSError):
        load_model(tmp_path / "nothing")


ROWS = [
    {"source": "Datei löschen", "source_language": "de", "target_language": "fr"},
    {"source": "def f(x):\n    return x", "source_language": "Python", "target_language": "English"},
    {"source": "Delete", "source_language": "en", "target_language": "Python", "prompt": "write: "},
]  # fmt: skip


def test_sources(tokenizer):
    made = encode_sources(tokenizer, ROWS)
    assert [decode(tokenizer, ids, "Python") for ids in made] == [
        "translate German to French: \nDatei löschen",
        "translate Python to English: \ndef f(x):\n    return x",
        "write: Delete",
    ]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in made)
    width = len(made[1]) - 2
    with pytest.warns(UserWarning, match="cut to fit: 1 of 1"):
        cut = encode_sources(tokenizer, ROWS[1:2], width)
    assert len(cut[0]) == width and cut[0][-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="does not fit into max_inputs"):
        encode_sources(tokenizer, ROWS[:1], 4)


def test_batches_change_nothing(tokenizer, model):
    """Beam search and likelihoods of rows of different lengths, together and alone."""
    options = {"max_length": 8}
    together = generate(model, tokenizer, ROWS, **options)
    assert together == generate(model, tokenizer, ROWS, batch_size=1, **options)
    assert len(together) == 3 and generate(model, tokenizer, []) == []
    rows = ROWS[:2]
    candidates = [["Supprimer le fichier", "x"], ["Delete the file", ""]]
    found = log_likelihoods(model, tokenizer, rows, candidates)
    alone = log_likelihoods(model, tokenizer, rows[1:], candidates[1:], batch_size=1)
    torch.testing.assert_close(found[1:], alone, atol=1e-4, rtol=1e-5)
    ids = torch.tensor([encode_sources(tokenizer, rows[:1])[0]])
    labels = torch.tensor([[*tokenizer("x", add_special_tokens=False)["input_ids"], 1]])
    loss = model(input_ids=ids, labels=labels).loss
    assert float(found[0, 1]) == pytest.approx(-float(loss.detach()) * labels.shape[1], rel=1e-4)
    with pytest.raises(ValueError, match="as many candidates"):
        log_likelihoods(model, tokenizer, rows, [["a"], ["a", "b"]])
    with pytest.raises(ValueError, match="embedding rows"):
        generate(build_model("tiny", vocab_size=300, **SIZES), tokenizer, ROWS)
