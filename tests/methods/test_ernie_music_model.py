# SPDX-License-Identifier: Apache-2.0
"""The U-Net and the text encoders: what is refused, conditions, kernels against plain PyTorch, ERNIE-M."""

import json
import warnings

import ernie_music_models as tiny
import pytest
import torch
from safetensors.torch import save_file

from tenfold.ernie_music import (
    BagText,
    ErnieMusicConfig,
    ErnieMusicPipeline,
    ErnieMusicUNet1D,
    TransformersText,
    text_encoder_of,
)
from tenfold.ernie_music.ernie_m import ErnieMConfig, ErnieMEncoder, split_pieces

CONFIGS = [
    ({"head_dim": 24}, "level 3 attends over 32 channels, which heads of 24 do not divide"),
    ({"attn_levels": (4,)}, r"attn_levels must be in 1..3, got \[4\]"),
    ({"attn_levels": (1,)}, "level 1 cannot attend"),
    ({"widths": (16,)}, "widths must be at least two positive integers"),
    ({"widths": (16, 0)}, "widths must be at least two positive integers"),
    ({"fuse": "product"}, "fuse must be one of concat, sum, none, got 'product'"),
    ({"text_dim": 0}, "fuse 'sum' needs a text_dim"),
    ({"condition_dropout": 1.5}, r"condition_dropout must be in \[0, 1\], got 1.5"),
    ({"layers_per_level": 0}, "layers_per_level must be >= 1, got 0"),
    ({"init_scale": 0.0}, "init_scale must be a positive number"),
]


@pytest.mark.parametrize("changes, words", CONFIGS)
def test_refused_configurations(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny.config(**changes)


def test_presets_and_lengths():
    paper = ErnieMusicConfig.from_preset("paper")
    assert paper.multiple == 8192 and paper.plane_dim == 16 + 768
    assert paper.valid_length(1) == 24576 and paper.valid_length(24577) == 32768
    assert ErnieMusicConfig.from_preset("dance").attn_levels == (9, 10, 11, 12, 13, 14)
    with pytest.raises(
        ValueError,
        match="multiples of 8192 samples, at least 24576; got 8192, the next valid length is 24576",
    ):
        paper.check_length(8192)
    again = ErnieMusicConfig.from_dict(json.loads(json.dumps(paper.to_dict())))
    assert again.widths == paper.widths and again.attn_levels == paper.attn_levels


X = torch.zeros(2, 1, 64)
INPUTS = [
    (
        X[:, :, :62],
        0.5,
        {},
        ValueError,
        "multiples of 4 samples, at least 12; got 62, the next valid length is 64",
    ),
    (X[:, :, :8], 0.5, {}, ValueError, "got 8, the next valid length is 12"),
    (X.int(), 0.5, {}, TypeError, "sample must be a floating tensor, got torch.int32"),
    (X[0], 0.5, {}, ValueError, r"sample must be \[B, 1, L\], got \[1, 64\]"),
    (X.expand(2, 3, 64), 0.5, {}, ValueError, r"sample must be \[B, 1, L\], got \[2, 3, 64\]"),
    (X, 1.5, {}, ValueError, r"timestep must be in \[0, 1\], got \[1.5\]"),
    (X, float("nan"), {}, ValueError, r"timestep must be in \[0, 1\], got \[nan\]"),
    (X, torch.zeros(3), {}, ValueError, r"timestep must be a scalar or \[2\], got \[3\]"),
    (
        X,
        torch.zeros(2, dtype=torch.bfloat16),
        {},
        ValueError,
        "timestep must be float32 or float64",
    ),
    (
        X,
        0.5,
        {"encoder_hidden_states": torch.zeros(2, 3, 15)},
        ValueError,
        r"must be \[2, n, 16\], got \[2, 3, 15\]",
    ),
    (
        X,
        0.5,
        {
            "encoder_hidden_states": torch.zeros(2, 3, 16),
            "encoder_attention_mask": torch.ones(2, 4),
        },
        ValueError,
        r"encoder_attention_mask must be \[2, 3\], got \[2, 4\]",
    ),
    (X, 0.5, {"class_labels": 1}, TypeError, "forward has no arguments class_labels"),
]


@pytest.mark.parametrize("x, t, more, error, words", INPUTS)
def test_refused_inputs(x, t, more, error, words):
    with pytest.raises(error, match=words):
        tiny.unet()(x, t, **more)


@pytest.mark.parametrize("fuse", ["concat", "sum", "none"])
@pytest.mark.parametrize("null", ["zero", "learned"])
def test_no_text_is_the_dropped_condition(fuse, null):
    made = tiny.unet(fuse=fuse, null_text=null)
    x, t = torch.randn(3, 1, 64), torch.rand(3)
    states = torch.randn(3, 5, 16)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    states[1] = torch.nan  # padding is not read
    mixed = made(x, t, states, mask).sample
    free = made(x, t).sample
    torch.testing.assert_close(mixed[1], free[1])
    assert (mixed[0] - free[0]).abs().max() > 1e-5
    alone = made(x[:1], t[:1], states[:1], mask[:1]).sample
    torch.testing.assert_close(alone, mixed[:1])


def test_projected_text_and_time_in_double():
    made = tiny.unet(fuse="concat", fuse_dim=4)
    assert made.body.down[0].planes == 16 + 4
    x, states = torch.randn(1, 1, 64), torch.randn(1, 2, 16)
    torch.testing.assert_close(
        made(x, 0.25, states).sample,
        made(x, torch.tensor([0.25], dtype=torch.float64), states).sample,
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_kernels_and_plain_pytorch_agree(autocast):
    made, x, t = tiny.unet(layers_per_level=2), torch.randn(2, 1, 128), torch.rand(2)
    states = torch.randn(2, 4, 16)
    found = []
    for kernels in ("tenfold", "torch"):
        made.set_kernels(kernels).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            v = made(x, t, states).sample
        (v.float() - 1).square().mean().backward()
        found.append((v.detach().float(), [p.grad.clone() for p in made.parameters()]))
    loose = {"atol": 3e-2, "rtol": 5e-2} if autocast else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(found[0][0], found[1][0], **loose)
    if not autocast:
        for a, b in zip(found[0][1], found[1][1]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="kernels must be one of tenfold, torch, got 'triton'"):
        made.set_kernels("triton")


def test_gradient_checkpointing_changes_nothing():
    made, x, t = tiny.unet().train(), torch.randn(1, 1, 64), torch.rand(1)
    grads = []
    for on in (False, True):
        if on:
            made.gradient_checkpointing_enable({"use_reentrant": False})
            assert made.body.gradient_checkpointing and made.body.inner.gradient_checkpointing
        made.zero_grad()
        made(x, t, torch.ones(1, 3, 16)).sample.square().sum().backward()
        grads.append([p.grad.clone() for p in made.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_initial_weights():
    made = tiny.unet()
    conv, norm = made.body.down[0].conv1, made.body.down[0].norm1
    bound = 0.5 / conv.weight[0].numel() ** 0.5
    assert 0.9 * bound < conv.weight.abs().max() <= bound
    assert (norm.weight == 0.5).all() and made.time.weight.std() > 0.3


def test_words_without_a_model():
    made = BagText(16)
    states, mask = made(["low tone", "", "a high tone!"])
    assert states.shape == (3, 4, 16) and mask.sum(1).tolist() == [3, 0, 4]
    other, _ = BagText(16)(["tone, low"])
    torch.testing.assert_close(states[0, 0], other[0, 0])
    with pytest.raises(TypeError, match="prompts must be a list of str, got int"):
        made([3])
    with pytest.raises(TypeError, match="prompts must be a list of str, got str"):
        made("one")
    assert text_encoder_of("bag:24").width == 24
    with pytest.raises(ValueError, match="'bag:WIDTH' has a number of values"):
        text_encoder_of("bag:x")


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )


def letters(text, **_):
    return {"input_ids": [1, *(ord(c) % 60 + 4 for c in text), 2]}


def test_any_encoder_its_padding_and_its_length():
    made = TransformersText(bert(), letters, max_length=8)
    states, mask = made(["abc", "abcdef", ""])
    assert mask.sum(1).tolist() == [5, 8, 0]
    alone, _ = TransformersText(bert(), letters, max_length=8)(["abc"])
    torch.testing.assert_close(states[0, :5], alone[0])
    with pytest.warns(UserWarning, match="1 prompts are longer than 8 tokens and were cut"):
        cut, mask = made(["abcdefgh"])
    assert mask.sum() == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = made(["abcdefgh"])  # remembered
    assert torch.equal(cut, again)
    with pytest.raises(ValueError, match="a prompt has 10 tokens, the encoder takes 8"):
        TransformersText(bert(), letters, max_length=8, strict=True)(["abcdefgh"])
    with pytest.raises(
        ValueError, match="the text encoder's states are 16 wide, the U-Net takes 24"
    ):
        ErnieMusicPipeline(tiny.unet(text_dim=24, text_encoder=None), text_encoder=made)


def test_ernie_m(tmp_path):
    """Its own layers against PyTorch's encoder layers, from files in the published names."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 20,
    }
    made = ErnieMEncoder(ErnieMConfig(**sizes)).eval()
    save_file(
        {f"ernie_m.{k}": v.contiguous() for k, v in made.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(
        json.dumps(sizes | {"model_type": "ernie_m", "pad_token_id": 1})
    )
    again = ErnieMEncoder.from_pretrained(tmp_path)
    ids = torch.tensor([[0, 5, 6, 2, 1, 1], [0, 7, 8, 9, 10, 2]])
    found = again(ids).last_hidden_state
    torch.testing.assert_close(found, made(ids).last_hidden_state)
    torch.testing.assert_close(
        again(ids[:1, :4]).last_hidden_state[0], found[0, :4]
    )  # padding has no influence
    e = made.embeddings
    x = e.layer_norm(e.word_embeddings(ids) + e.position_embeddings.weight[2:8])
    for mine in made.encoder.layers:
        layer = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", batch_first=True).eval()
        own = mine.self_attn.self_attn
        state = {
            "self_attn.in_proj_weight": torch.cat(
                [own.q_proj.weight, own.k_proj.weight, own.v_proj.weight]
            ),
            "self_attn.in_proj_bias": torch.cat(
                [own.q_proj.bias, own.k_proj.bias, own.v_proj.bias]
            ),
            "self_attn.out_proj.weight": mine.self_attn.out_proj.weight,
            "self_attn.out_proj.bias": mine.self_attn.out_proj.bias,
        } | {
            f"{n}.{p}": getattr(getattr(mine, n), p)
            for n in ("linear1", "linear2", "norm1", "norm2")
            for p in ("weight", "bias")
        }
        layer.load_state_dict(state)
        x = layer(x, src_key_padding_mask=ids == 1)
    torch.testing.assert_close(x[1], found[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(x[0, :4], found[0, :4], atol=1e-5, rtol=1e-4)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no weights of ERNIE-M"):
        ErnieMEncoder.from_pretrained(tmp_path)
    assert split_pieces(["▁calm", "▁", "▁钢琴曲", "12", "▁no.5"]) == [
        "▁calm",
        "钢",
        "琴",
        "曲",
        "12",
        "▁no",
        ".",
        "5",
    ]


def test_compiles_whole():
    made, x, t = tiny.unet(), torch.randn(2, 1, 64), torch.rand(2)
    states, mask = torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool)
    fast = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x, t, states, mask).sample, made(x, t, states, mask).sample)


def test_is_the_class_that_auto_finds(tmp_path):
    from transformers import AutoConfig

    tiny.unet().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ErnieMusicConfig)
    half = ErnieMusicUNet1D.from_pretrained(tmp_path, dtype=torch.bfloat16)
    v = half(torch.randn(1, 1, 64), 0.5, torch.randn(1, 3, 16)).sample
    assert v.dtype == torch.bfloat16 and v.isfinite().all()
