# SPDX-License-Identifier: Apache-2.0
"""PixelGPT's models: sizes, Llama's numbers, causality, padding, both losses, round trips, what is refused."""

import pixelgpt_models as tiny
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaModel

from tenfold.pixelgpt.classifier import PixelGPTForSequenceClassification
from tenfold.pixelgpt.config import PixelGPTConfig
from tenfold.pixelgpt.model import PixelGPTForCausalLM, PixelGPTModel


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_the_paper():
    """Check 7, first half."""
    config = PixelGPTConfig.from_size("base", num_labels=3)
    with torch.device("meta"):
        trunk, both = PixelGPTModel(config), PixelGPTForCausalLM(config)
        classifier = PixelGPTForSequenceClassification(config)
    assert count(trunk.layers[0]) == 11_798_528
    assert count(trunk) == 316_723_200
    assert count(classifier) == 316_726_272
    assert count(both) == 350_277_632
    assert config.rope_parameters["rope_theta"] == 10000.0 and config.rms_norm_eps == 1e-5


def llama_of(model):
    """Stock Llama with the same weights."""
    config = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")  # fmt: skip
    made = LlamaModel(LlamaConfig(**{n: getattr(config, n) for n in names}, attn_implementation="eager",
                                  pad_token_id=0))  # fmt: skip
    missing = made.load_state_dict(model.model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(k.startswith("embed_patches.") for k in missing.unexpected_keys)
    return made.eval()


@pytest.mark.parametrize("padded", [False, True])
def test_trunk_is_llama(padded):
    """Check 7, second half: outputs and gradients, on the same embeddings."""
    model = tiny.model()
    stock = llama_of(model)
    x = torch.randn(2, 11, 32)
    own, other = (x.clone().requires_grad_() for _ in range(2))
    keep = tiny.mask([11, 7], 11) if padded else None
    a = model.model(inputs_embeds=own, attention_mask=keep).last_hidden_state
    b = stock(inputs_embeds=other, attention_mask=None if keep is None else keep.long()).last_hidden_state  # fmt: skip
    rows = torch.ones(2, 11, dtype=torch.bool) if keep is None else keep
    torch.testing.assert_close(a[rows], b[rows], atol=2e-5, rtol=1e-4)
    weight = torch.randn(32)
    (a[rows] @ weight).sum().backward()
    (b[rows] @ weight).sum().backward()
    torch.testing.assert_close(own.grad, other.grad, atol=5e-5, rtol=1e-3)
    named = dict(stock.named_parameters())
    for name, p in model.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, named[name].grad, atol=2e-4, rtol=1e-3)


def test_patch_embedding_is_the_convolution():
    """Check 2, in both layouts of the image and as floats."""
    embed = tiny.model().model.embed_patches
    image = tiny.noise(2, 5)
    floats = image / 255
    conv = F.conv2d(floats, embed.projection.weight, embed.projection.bias, stride=16)
    want = embed.norm(conv.flatten(2).transpose(1, 2))
    for given in (
        image,
        floats,
        image.permute(0, 2, 3, 1),
        floats.permute(0, 2, 3, 1).contiguous(),
    ):
        torch.testing.assert_close(embed(given), want, atol=1e-5, rtol=1e-4)
    rows = floats.unflatten(3, (5, 16)).permute(0, 3, 2, 4, 1).flatten(2)  # row, column, channel
    torch.testing.assert_close(embed.embed(embed.reordered(rows)), want, atol=1e-5, rtol=1e-4)


def inputs(kind, batch=2):
    image, tokens = tiny.noise(batch, 6), tiny.ids(batch, 5)
    pixels = {"pixel_values": image, "patch_mask": tiny.mask([4, 6], 6)}
    text = {"input_ids": tokens, "attention_mask": tiny.mask([5, 3], 5)}
    return {"pixel": pixels, "text": text, "pair": pixels | text}[kind]


@pytest.mark.parametrize("kind", ["pixel", "text", "pair"])
def test_causality(kind):
    """Check 8: what comes later, and padding, change nothing before."""
    model = tiny.model()
    given = inputs(kind)
    before = model.model(**given).last_hidden_state
    if kind != "text":
        changed = given | {"pixel_values": given["pixel_values"].clone()}
        changed["pixel_values"][..., 16 * 4 :] = (
            0  # of row 0 padding, of row 1 its last two patches
        )
        after = model.model(**changed).last_hidden_state
        torch.testing.assert_close(after[:, :4], before[:, :4])
        if kind == "pair":  # row 0's tokens attend to no padding
            torch.testing.assert_close(after[0, 6:], before[0, 6:])
            assert not torch.allclose(after[1, 6:], before[1, 6:])
    if kind != "pixel":
        changed = given | {"input_ids": given["input_ids"].clone()}
        changed["input_ids"][:, 3:] = 7
        after = model.model(**changed).last_hidden_state
        start = before.shape[1] - 5
        torch.testing.assert_close(after[:, : start + 3], before[:, : start + 3])
        assert not torch.allclose(after[0, start + 3 :], before[0, start + 3 :])


def test_padding_after_the_end_can_be_cropped():
    model = tiny.model()
    given = inputs("pixel")
    wide = {"pixel_values": torch.cat([given["pixel_values"], torch.full((2, 3, 16, 64), 255, dtype=torch.uint8)], 3),
            "patch_mask": F.pad(given["patch_mask"], (0, 4))}  # fmt: skip
    torch.testing.assert_close(
        model.model(**wide).last_hidden_state[:, :6][given["patch_mask"]],
        model.model(**given).last_hidden_state[given["patch_mask"]],
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    torch.testing.assert_close(model(**wide).pixel_loss, model(**given).pixel_loss)


def plain_npp(model, given, eos=True):
    """Section 3.5 in plain PyTorch, float64."""
    image, keep = given["pixel_values"], given["patch_mask"].clone()
    if not eos:
        for row in keep:
            row[int(row.nonzero().max())] = False
    x = image.double() / 255
    patches = x.unflatten(3, (-1, 16)).permute(0, 3, 2, 4, 1).flatten(2)
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    target = (patches - mean) / (var + 1e-6).sqrt()
    length = image.shape[3] // 16
    f = model.pixel_head(model.model(**given).last_hidden_state[:, :length]).double()
    each = (f[:, :-1] - target[:, 1:]).square().mean(-1)
    m = keep[:, 1:].double()
    return (each * m).sum() / m.sum()


@pytest.mark.parametrize("eos", [True, False])
def test_pixel_loss(eos):
    model = tiny.model(eos_in_loss=eos)
    given = inputs("pixel")
    torch.testing.assert_close(
        model(**given).pixel_loss.double(), plain_npp(model, given, eos), atol=1e-5, rtol=1e-5
    )


def test_pair_loss_is_the_sum_of_its_segments():
    """Check 13: shifted inside the segments; without attention across they are the segments' own."""
    model = tiny.model()
    given = inputs("pair")
    labels = given["input_ids"].masked_fill(~given["attention_mask"], -100)
    made = model(**given, labels=labels, return_logits=True)
    logits = made.logits[:, :-1].flatten(0, 1)
    want = F.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(made.token_loss, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.pixel_loss.double(), plain_npp(model, given), atol=1e-5, rtol=1e-5)  # fmt: skip
    torch.testing.assert_close(made.loss, made.token_loss + made.pixel_loss)

    # Cross-attention disabled by a mask: every token sees tokens only.
    image, tokens = given["pixel_values"], given["input_ids"]
    embeds = torch.cat([model.model.embed_patches(image), model.model.embed_tokens(tokens)], 1)
    keep = torch.cat([given["patch_mask"], given["attention_mask"]], 1)
    see = torch.ones(11, 11).tril().bool()
    see[6:, :6] = False
    see = see[None, None] & keep[:, None, None]
    hidden = model.model(inputs_embeds=embeds, attention_mask=see).last_hidden_state
    alone = model(**{k: given[k] for k in ("input_ids", "attention_mask")}, labels=labels)
    logits = model.lm_head(hidden[:, 6:-1]).flatten(0, 1)
    torch.testing.assert_close(
        F.cross_entropy(logits, labels[:, 1:].flatten()), alone.token_loss, atol=1e-5, rtol=1e-5
    )
    pixels = model(**{k: given[k] for k in ("pixel_values", "patch_mask")})
    torch.testing.assert_close(made.pixel_loss, pixels.pixel_loss, atol=1e-5, rtol=1e-5)


def test_text_through_both_is_text_alone():
    """Check 13: with the same weights a text batch gives the same loss, whatever else a model was trained on."""
    dual = tiny.model(seed=1)
    text = tiny.model(seed=2)
    text.load_state_dict(dual.state_dict())
    with torch.no_grad():
        text.model.embed_patches.projection.weight.normal_()
        text.pixel_head.weight.normal_()
    given = inputs("text") | {"labels": tiny.ids(2, 5)}
    assert torch.equal(dual(**given).loss, text(**given).loss)
    assert dual(**given).pixel_loss is None


class Largest(TorchDispatchMode):
    """The largest number of elements that an op returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def test_token_head_equals_cross_entropy_and_never_has_logits():
    """Check 6 through the model: loss and gradients; no tensor of N * V elements."""
    vocab = 4099
    model = tiny.model(vocab_size=vocab, hidden_size=16)
    tokens = tiny.ids(4, 64, vocab=vocab)
    labels = tokens.clone()
    labels[0] = -100
    with Largest() as largest:
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
    assert largest.elements < tokens.numel() * vocab / 4
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=tokens).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    want.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    for name in (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        torch.testing.assert_close(got[name], model.get_parameter(name).grad, atol=1e-5, rtol=1e-3)
    none = model(input_ids=tokens, labels=torch.full_like(tokens, -100))
    assert none.loss == 0
    none.loss.backward()


def test_shares_of_micro_batches_add_up():
    model = tiny.model()
    given = inputs("pair")
    labels = given["input_ids"].masked_fill(~given["attention_mask"], -100)
    whole = model(**given, labels=labels).loss
    tokens = (labels[:, 1:] != -100).sum().float()
    patches = given["patch_mask"][:, 1:].sum().float()
    parts = [
        model(**{k: v[i : i + 1] for k, v in given.items()}, labels=labels[i : i + 1], token_count=tokens,
              patch_count=patches).loss
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=1e-5)


def test_round_trip(tmp_path):
    model = tiny.model(norm_pix_loss=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is PixelGPTForCausalLM and again.config._attn_implementation == "tenfold"
    assert AutoConfig.from_pretrained(tmp_path).norm_pix_loss is False
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name
    given = inputs("pair")
    assert torch.equal(model(**given).patches, again.eval()(**given).patches)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert type(trunk) is PixelGPTModel
    assert torch.equal(
        trunk.embed_patches.projection.bias, model.model.embed_patches.projection.bias
    )


def test_initial_weights():
    model = tiny.make_model(PixelGPTConfig.from_size("tiny"), 3)
    weight = model.model.embed_patches.projection.weight
    bound = (6 / (128 + 768)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.02
    assert abs(model.pixel_head.weight.std() / 0.02 - 1) < 0.02
    same = tiny.make_model(PixelGPTConfig.from_size("tiny"), 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention(attention):
    model = tiny.model()
    given = inputs("pair")
    keep = torch.cat([given["patch_mask"], given["attention_mask"]], 1)
    want = model.model(**given).last_hidden_state
    model.set_attn_implementation(attention)
    got = model.model(**given).last_hidden_state
    torch.testing.assert_close(got[keep], want[keep], atol=2e-5, rtol=1e-4)


def test_gradient_checkpointing():
    model = tiny.model().train()
    given = inputs("pair") | {"labels": tiny.ids(2, 5)}
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**given).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


IMAGE = torch.zeros(1, 16, 32, 3, dtype=torch.uint8)
BAD = {
    "nothing": ({}, ValueError, "got neither"),
    "no mask of a pair": ({"input_ids": tiny.ids(1, 2), "pixel_values": IMAGE}, ValueError, "needs patch_mask"),
    "mask": ({"pixel_values": IMAGE, "patch_mask": torch.ones(1, 3)}, ValueError, r"must be \[1, 2\], got \[1, 3\]"),
    "text mask": ({"input_ids": tiny.ids(1, 2), "attention_mask": torch.ones(1, 3)}, ValueError, r"must be \[1, 2\]"),
    "height": ({"pixel_values": IMAGE[:, :15]}, ValueError, "height .* multiple of the patch size 16, got 15"),
    "width": ({"pixel_values": IMAGE[:, :, :30]}, ValueError, "width .* multiple of the patch size 16, got 30"),
    "channels": ({"pixel_values": IMAGE[..., :1]}, ValueError, "3 channels of the patch embedding"),
    "rank": ({"pixel_values": IMAGE[0]}, ValueError, r"must be \[B, C, H, W\]"),
    "no tensor": ({"pixel_values": [[1]]}, TypeError, "must be a tensor"),
    "int16": ({"pixel_values": IMAGE.short()}, ValueError, r"expected uint8 or float in \[0,1\]"),
    "0 to 255": ({"pixel_values": IMAGE.float() + 255}, ValueError, r"\[0, ?1\]"),
    "rows": ({"pixel_values": IMAGE, "patch_mask": torch.ones(1, 2), "input_ids": tiny.ids(2, 2)}, ValueError,
             "a strip for every row"),
    "too long": ({"input_ids": tiny.ids(1, 65)}, ValueError, "65 patches and tokens is longer than the model's 64"),
    "labels": ({"input_ids": tiny.ids(1, 3), "labels": tiny.ids(1, 2)}, ValueError, r"labels must be \[1, 3\]"),
    "label": ({"input_ids": tiny.ids(1, 3), "labels": torch.full((1, 3), 97)}, IndexError, "97"),
    "late patches": ({"input_ids": tiny.ids(1, 3), "patch_mask": torch.ones(1, 2)}, ValueError, "there is none"),
    "embeds": ({"input_ids": tiny.ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}, ValueError, "not both"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """Section 8."""
    given, error, text = BAD[name]
    with pytest.raises(error, match=text):
        tiny.model()(**given)


@pytest.mark.parametrize("changes, text", [
    ({"patch_size": 0}, "patch_size must be >= 1"), ({"num_channels": 0}, "num_channels must be >= 1"),
    ({"norm_pix_eps": 0.0}, "norm_pix_eps must be a positive number"),
])  # fmt: skip
def test_bad_config(changes, text):
    with pytest.raises(ValueError, match=text):
        tiny.config(**changes)
    with pytest.raises(ValueError, match="size must be one of base, small, tiny"):
        PixelGPTConfig.from_size("huge")


def test_nan_shows():
    model = tiny.model()
    with torch.no_grad():
        model.pixel_head.weight[3, 2] = float("nan")
    assert model(**inputs("pixel")).pixel_loss.isnan()
