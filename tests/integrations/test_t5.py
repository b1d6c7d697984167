# SPDX-License-Identifier: Apache-2.0
"""integrations.t5: stock T5, T5 v1.1, mT5 and UMT5 equal themselves on our ops, and come back unchanged."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from tenfold.integrations import t5
from tenfold.integrations._t5_modules import CACHE

VOCAB = 131
KINDS = {
    "t5": (T5Config, T5ForConditionalGeneration, "relu"),
    "t5v11": (T5Config, T5ForConditionalGeneration, "gated-gelu"),
    "mt5": (MT5Config, MT5ForConditionalGeneration, "gated-gelu"),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration, "gated-silu"),
}


def make(kind, layers=2, dropout=0.1, **more):
    config, model, act = KINDS[kind]
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2}
    made = config(
        **sizes, num_layers=layers, feed_forward_proj=act, dropout_rate=dropout,
        decoder_start_token_id=0, **more,
    )  # fmt: skip
    return model(made).eval()


def inputs(rows=3, length=9, targets=7, pad=True):
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (rows, length), generator=made)
    labels = torch.randint(2, VOCAB, (rows, targets), generator=made)
    mask = torch.ones_like(ids)
    if pad:
        mask[0, 6:], mask[1, 4:], labels[1, 5:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def both(kind, **options):
    """Stock and patched models of the same weights."""
    stock = make(kind)
    ours = copy.deepcopy(stock)
    t5.patch(ours, **options)
    return stock, ours


@pytest.mark.parametrize("kind", KINDS)
def test_equal_outputs_and_gradients(kind):
    """Check 8: logits to 1e-5 in float32; check 14: padding changes nothing."""
    stock, ours = both(kind)
    batch = inputs()
    a, b = stock(**batch), ours(**batch)
    torch.testing.assert_close(b.logits, a.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.loss, a.loss, atol=1e-5, rtol=1e-6)
    a.loss.backward()
    b.loss.backward()
    for (name, p), q in zip(stock.named_parameters(), ours.parameters()):
        scale = float(p.grad.abs().max())
        assert float((p.grad - q.grad).abs().max()) <= 1e-5 * scale + 1e-8, name
    again = stock(**batch, return_dict=False)
    mine = ours(**batch, return_dict=False)
    assert len(again) == len(mine)
    torch.testing.assert_close(mine[1], again[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_same(kind):
    stock, ours = both(kind)
    batch = inputs()
    del batch["labels"]
    for how in (
        {},
        {"num_beams": 3, "length_penalty": 0.0},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ):
        expected = stock.generate(**batch, max_new_tokens=8, **how)
        assert torch.equal(ours.generate(**batch, max_new_tokens=8, **how), expected), how


@pytest.mark.parametrize("name", [CACHE, "past_key_values"])
@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_cached_decoding_equals_the_full_forward(kind, name):
    _, ours = both(kind)
    batch = inputs()
    tokens = torch.cat([torch.zeros(3, 1, dtype=torch.int64), batch["labels"].clamp_min(0)], 1)
    encoded = ours.encoder(batch["input_ids"], batch["attention_mask"])
    call = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"]}
    full = ours(**call, decoder_input_ids=tokens, use_cache=False).logits
    cache, rows = None, []
    for part in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:]):
        made = ours(**call, decoder_input_ids=part, use_cache=True, **{name: cache})
        cache = getattr(made, CACHE)
        rows.append(made.logits)
    torch.testing.assert_close(torch.cat(rows, 1), full, atol=1e-5, rtol=1e-5)


def test_masks_that_are_no_prefix_take_the_stock_path_and_say_so():
    stock, ours = both("mt5")
    batch = inputs()
    for mask in (batch["attention_mask"].flip(1), torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1]] * 3)):
        call = batch | {"attention_mask": mask}
        with pytest.warns(UserWarning, match="not a prefix of ones"):
            made = ours(**call)
        torch.testing.assert_close(made.logits, stock(**call).logits, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(**batch)


def test_a_row_without_keys_is_no_nan():
    _, ours = both("mt5")
    batch = inputs()
    batch["attention_mask"][2] = 0
    assert torch.isfinite(ours(**batch).logits).all()


@pytest.mark.parametrize("kind", ["t5v11", "umt5"])
def test_attention_probabilities_and_hidden_states(kind):
    stock, ours = both(kind)
    stock.set_attn_implementation("eager")
    batch = inputs()
    a = stock(**batch, output_attentions=True, output_hidden_states=True)
    b = ours(**batch, output_attentions=True, output_hidden_states=True)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions",
                 "encoder_hidden_states", "decoder_hidden_states"):  # fmt: skip
        assert len(a[name]) == len(b[name]) >= 2, name
        for x, y in zip(a[name], b[name]):
            torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-4)


def test_logits_on_demand():
    batch = inputs()
    for logits, training, wanted in (("auto", True, False), ("auto", False, True),
                                     ("always", True, True), ("never", False, False)):  # fmt: skip
        _, ours = both("mt5", logits=logits)
        ours.train(training)
        assert (ours(**batch).logits is not None) is wanted
        assert ours(batch["input_ids"], decoder_input_ids=batch["input_ids"]).logits is not None


def test_accumulation_is_one_batch():
    """Check 14: 15 pieces with ``num_items_in_batch`` give the gradient of all rows at once."""
    _, ours = both("mt5")
    batch = inputs(rows=15)
    ours(**batch).loss.backward()
    whole = {n: p.grad.clone() for n, p in ours.named_parameters()}
    ours.zero_grad()
    count = (batch["labels"] != -100).sum()
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(15)]
    losses = [float(ours(**row).loss.detach()) for row in rows]
    weights = [int((r["labels"] != -100).sum()) for r in rows]
    mean = sum(a * n for a, n in zip(losses, weights)) / sum(weights)
    assert mean == pytest.approx(float(ours(**batch).loss.detach()), rel=1e-6)
    for row in rows:
        ours(**row, num_items_in_batch=count).loss.backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], atol=1e-6, rtol=1e-4)


def test_unpatch_leaves_nothing():
    stock = make("umt5")
    ours = copy.deepcopy(stock)
    before = {n: (type(m), set(m.__dict__)) for n, m in ours.named_modules()}
    with t5.patch(ours) as handle:
        assert {p: len(n) for p, n in handle.replaced.items()} == {
            "attention": 6, "norm": 12, "feed_forward": 4, "loss": 1,
        }  # fmt: skip
        assert type(ours).__name__ == "UMT5ForConditionalGeneration"
        assert type(ours) is not type(stock)
        assert isinstance(ours, UMT5ForConditionalGeneration)
    assert {n: (type(m), set(m.__dict__)) for n, m in ours.named_modules()} == before
    for a, b in ((stock.encoder, ours.encoder), (stock.decoder, ours.decoder)):
        assert a.config._attn_implementation == b.config._attn_implementation
    batch = inputs()
    assert torch.equal(ours(**batch).logits, stock(**batch).logits)
    t5.patch(ours)
    t5.unpatch(ours)
    assert torch.equal(ours(**batch).loss, stock(**batch).loss)
    with pytest.raises(RuntimeError, match="is not patched"):
        t5.unpatch(ours)


def test_parts_can_be_left_out():
    model = make("mt5")
    with t5.patch(model, attention=False, feed_forward=False, loss=False) as handle:
        assert [len(n) for n in handle.replaced.values()] == [0, 12, 0, 0]
        assert model.encoder.config._attn_implementation == "sdpa"
    relu = make("t5")
    assert not t5.patch(relu).replaced["feed_forward"]


def test_saved_copied_and_pickled(tmp_path):
    stock, ours = both("mt5")
    batch = inputs()
    expected = ours(**batch).logits
    ours.save_pretrained(tmp_path)
    loaded = MT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded) is MT5ForConditionalGeneration
    assert loaded.config.architectures == ["MT5ForConditionalGeneration"]
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(**batch).logits, expected)
        t5.unpatch(other)
        assert type(other) is MT5ForConditionalGeneration
        assert torch.equal(other(**batch).logits, stock(**batch).logits)
    assert torch.equal(ours(**batch).logits, expected)


def test_dropout_and_gradient_checkpointing():
    """Checkpointed layers draw the same bits again: gradients are those of the plain pass."""
    batch = inputs()
    found = []
    for checkpointing in (False, True):
        _, ours = both("t5v11")
        ours.train()
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        ours(**batch).loss.backward()
        found.append({n: p.grad for n, p in ours.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5)
    _, ours = both("t5v11")
    ours.train()
    first, second = (float(ours(**batch).loss.detach()) for _ in range(2))
    assert first != second


def test_compiled():
    """Without dropout the whole step is one graph; padding='right' keeps masks in it."""
    stock = make("mt5", layers=1, dropout=0.0)
    ours = copy.deepcopy(stock)
    t5.patch(ours, padding="right")
    ours.train()
    batch = inputs()
    compiled = torch.compile(ours, backend="aot_eager")
    loss = compiled(**batch, use_cache=False).loss
    loss.backward()
    expected = stock(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    for p, q in zip(stock.parameters(), ours.parameters()):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match=r"before torch\.compile"):
        t5.patch(torch.compile(make("mt5"), backend="eager"))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16(how):
    """As near to float32 as transformers' own bfloat16 is."""
    stock, ours = both("mt5")
    batch = inputs()
    exact = stock(**batch).logits
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        if how == "weights":
            stock.bfloat16()
            ours.bfloat16()
        theirs, mine = stock(**batch), ours(**batch)
    assert mine.loss.dtype == torch.float32
    worst = (theirs.logits.float() - exact).abs().max()
    assert (mine.logits.float() - exact).abs().max() <= 2 * worst + 0.05


def test_float64_runs_as_before():
    stock, ours = both("mt5")
    stock.double()
    ours.double()
    batch = inputs()
    assert torch.equal(ours(**batch).logits, stock(**batch).logits)


def test_an_encoder_alone():
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_heads=2, num_layers=2)
    stock = T5EncoderModel(config).eval()
    ours = copy.deepcopy(stock)
    t5.patch(ours)
    batch = inputs()
    call = {k: batch[k] for k in ("input_ids", "attention_mask")}
    torch.testing.assert_close(ours(**call)[0], stock(**call)[0], atol=1e-5, rtol=1e-5)


def test_refusals():
    model = make("mt5")
    with pytest.raises(TypeError, match="Linear has no module of transformers' T5"):
        t5.patch(nn.Linear(2, 2))
    for name, value in (("logits", "lazy"), ("padding", "left")):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            t5.patch(model, **{name: value})
    norm = model.encoder.final_layer_norm
    norm.forward = norm.forward
    with pytest.raises(TypeError, match=r"forward of encoder\.final_layer_norm has been replaced"):
        t5.patch(model)
    assert type(model) is MT5ForConditionalGeneration
    del norm.forward
    t5.patch(model)
    with pytest.raises(RuntimeError, match="patched already"):
        t5.patch(model)
