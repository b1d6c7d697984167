# SPDX-License-Identifier: Apache-2.0
"""Generation: patches with a cache against whole forwards, ways to denormalise, text after a strip by ``generate``."""

import pixelgpt_models as tiny
import pytest
import torch

from tenfold.pixelgpt.generate import denormalised, generate_patches, patch_values, reconstruct

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def test_text_after_a_strip_equals_whole_forwards():
    model = tiny.model()
    image, keep = tiny.noise(2, 6), tiny.mask([4, 6], 6)
    prompt = torch.full((2, 1), 1)
    made = model.generate(prompt, pixel_values=image, patch_mask=keep, **GREEDY)
    tokens = prompt
    for _ in range(6):
        logits = model(input_ids=tokens, pixel_values=image, patch_mask=keep).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, tokens)
    slow = model.generate(prompt, pixel_values=image, patch_mask=keep, use_cache=False, **GREEDY)  # fmt: skip
    assert torch.equal(slow, made)


def test_strip_alone_begins_with_the_begin_token():
    model = tiny.model()
    image, keep = tiny.noise(2, 6), tiny.mask([4, 6], 6)
    made = model.generate(pixel_values=image, patch_mask=keep, bos_token_id=1, **GREEDY)
    want = model.generate(torch.full((2, 1), 1), pixel_values=image, patch_mask=keep, **GREEDY)  # fmt: skip
    assert torch.equal(made, want)
    beams = model.generate(
        torch.full((2, 1), 1), pixel_values=image, patch_mask=keep, num_beams=2, **GREEDY
    )
    assert beams.shape == (2, 7)
    with pytest.raises(ValueError, match="needs patch_mask"):
        model.generate(torch.full((2, 1), 1), pixel_values=image, **GREEDY)


def test_text_alone_with_padding_on_the_left():
    model = tiny.model()
    long, short = tiny.ids(1, 5, seed=1), tiny.ids(1, 3, seed=2)
    both = torch.cat([long, torch.cat([torch.zeros(1, 2, dtype=torch.int64), short], 1)])
    keep = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    made = model.generate(both, attention_mask=keep, **GREEDY)
    for row, alone in zip(made, (long, short)):
        want = model.generate(alone, attention_mask=torch.ones_like(alone), **GREEDY)
        assert torch.equal(row[5:], want[0, alone.shape[1] :])


@pytest.mark.parametrize("norm, denorm", [(True, "context"), (True, "minmax"), (False, None)])
def test_patches_equal_whole_forwards(norm, denorm):
    model = tiny.model(norm_pix_loss=norm)
    image = tiny.noise(2, 5)
    keep = tiny.mask([3, 5], 5)
    made = generate_patches(model, image, keep, steps=4, denorm=denorm)
    assert made.shape == (2, 3, 16, 64) and made.dtype == torch.uint8
    for row, length in enumerate((3, 5)):
        values = patch_values(image[row : row + 1, ..., : 16 * length], 16)
        context = values[:, -1]
        embed = model.model.embed_patches
        for at in range(4):
            hidden = model.model(
                inputs_embeds=embed.embed(embed.reordered(values))
            ).last_hidden_state
            how = denorm or "none"
            new = denormalised(model.pixel_head(hidden[:, -1]), how, context, 1e-6)
            want = new.view(16, 16, 3).permute(2, 0, 1)
            got = made[row, ..., 16 * at : 16 * at + 16].float() / 255
            torch.testing.assert_close(got, want, atol=0.5 / 255 + 1e-4, rtol=0)
            values = torch.cat([values, new[:, None]], 1)


def test_until_black():
    model = tiny.model(norm_pix_loss=False)
    with torch.no_grad():
        model.pixel_head.weight.zero_()  # writes black
    made = generate_patches(model, tiny.noise(2, 3), steps=5, until_black=True)
    assert made.shape == (2, 3, 16, 16) and int(made.max()) == 0


def test_reconstruction():
    model = tiny.model()
    image, keep = tiny.noise(2, 5), tiny.mask([3, 5], 5)
    made = reconstruct(model, image, keep)
    assert torch.equal(made[..., :16], image[..., :16])  # nothing predicts the first
    assert bool((made[0, ..., 48:] == 255).all())
    values = patch_values(image, 16)
    predicted = model(pixel_values=image, patch_mask=keep).patches
    want = (
        denormalised(predicted[1, 1], "target", values[1, 2], 1e-6).view(16, 16, 3).permute(2, 0, 1)
    )
    torch.testing.assert_close(
        made[1, ..., 32:48].float() / 255, want, atol=0.5 / 255 + 1e-5, rtol=0
    )
    other = reconstruct(model, image, keep, denorm="context")
    want = (
        denormalised(predicted[1, 1], "context", values[1, 1], 1e-6)
        .view(16, 16, 3)
        .permute(2, 0, 1)
    )
    torch.testing.assert_close(
        other[1, ..., 32:48].float() / 255, want, atol=0.5 / 255 + 1e-5, rtol=0
    )


def test_denormalised_target_of_a_perfect_prediction_is_the_patch():
    values = patch_values(tiny.noise(1, 4), 16)
    normal = (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(denormalised(normal, "target", values), values, atol=1e-5, rtol=1e-5)
    shown = denormalised(normal, "minmax")
    assert float(shown.amin()) == 0 and abs(float(shown.amax()) - 1) < 1e-6


@pytest.mark.parametrize("changes, text", [
    ({"steps": 0}, "steps must be at least 1"), ({"denorm": "best"}, "denorm must be one of context, minmax, none"),
    ({"until_black": True}, "until_black needs a model without norm_pix_loss"),
    ({"steps": 63}, "longer than the model's 64 positions"),
    ({"patch_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "has no patch to go on from"),
])  # fmt: skip
def test_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        generate_patches(tiny.model(), tiny.noise(2, 3), **changes)


def test_refused_for_the_model():
    with pytest.raises(ValueError, match="is for models with norm_pix_loss"):
        generate_patches(tiny.model(norm_pix_loss=False), tiny.noise(1, 3), denorm="context")
    with pytest.raises(ValueError, match="one row of patches"):
        generate_patches(tiny.model(), torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
