# SPDX-License-Identifier: Apache-2.0
"""The classifier: which row is pooled, losses, grey strips, a new head on a trained trunk."""

import pixelgpt_models as tiny
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from tenfold.pixelgpt.classifier import PixelGPTForSequenceClassification, classifier_of
from tenfold.pixelgpt.images import grey_weight, to_grey


def classifier(labels=3, **changes):
    return classifier_of(tiny.model(**changes), labels, seed=5).eval()


CASES = {
    "pixel": ([4, 6], None, [3, 5]),
    "text": (None, [5, 3], [4, 2]),
    "pair": (
        [4, 6],
        [2, 5],
        [6 + 1, 6 + 4],
    ),  # the second row is the one that the published code pools wrongly
}


@pytest.mark.parametrize(
    "kind, masked",
    [("pixel", True), ("text", True), ("pair", True), ("pixel", False), ("text", False)],
)
def test_pools_the_last_valid_position(kind, masked):
    """Check 9; without masks (no padding) the last position."""
    model = classifier()
    patches, tokens, at = CASES[kind]
    given = {}
    if patches:
        given["pixel_values"] = tiny.noise(2, 6)
        if masked:
            given["patch_mask"] = tiny.mask(patches, 6)
    if tokens:
        given["input_ids"] = tiny.ids(2, 5)
        if masked:
            given["attention_mask"] = tiny.mask(tokens, 5)
    hidden = model.model(**given).last_hidden_state
    if not masked:
        at = [hidden.shape[1] - 1] * 2
    want = torch.stack([hidden[i, a] for i, a in enumerate(at)]) @ model.score.weight.T
    torch.testing.assert_close(model(**given).logits, want, atol=1e-5, rtol=1e-5)


def test_left_padding_pools_the_last_token():
    model = classifier()
    tokens = tiny.ids(1, 3)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), tokens], 1)
    keep = torch.tensor([[0, 0, 1, 1, 1]])
    torch.testing.assert_close(
        model(padded, keep).logits, model(tokens).logits, atol=1e-5, rtol=1e-5
    )


def test_losses_and_gradients():
    model = classifier().train()
    image, keep, labels = tiny.noise(2, 6), tiny.mask([4, 6], 6), torch.tensor([2, 0])
    made = model(pixel_values=image, patch_mask=keep, labels=labels)
    torch.testing.assert_close(made.loss, F.cross_entropy(made.logits, labels))
    made.loss.backward()
    got = model.score.weight.grad.clone()
    model.zero_grad()
    hidden = model.model(pixel_values=image, patch_mask=keep).last_hidden_state
    F.cross_entropy(hidden[[0, 1], [3, 5]] @ model.score.weight.T, labels).backward()
    torch.testing.assert_close(got, model.score.weight.grad, atol=1e-6, rtol=1e-4)
    regression = classifier(1)
    made = regression(pixel_values=image, patch_mask=keep, labels=torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(made.loss, F.mse_loss(made.logits[:, 0], torch.tensor([0.5, 2.0])))
    with pytest.raises(IndexError, match=r"labels must be in \[0, 3\), got 3"):
        model(pixel_values=image, patch_mask=keep, labels=torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="row"):
        model(pixel_values=image, patch_mask=torch.zeros(2, 6))


def test_head_on_a_trained_trunk(tmp_path):
    model = tiny.model()
    made = classifier_of(model, 4, seed=1)
    for name, p in model.model.named_parameters():
        assert torch.equal(p, made.model.get_parameter(name))
    assert made.config.num_labels == 4 and made.config._attn_implementation == "tenfold"
    assert not torch.equal(made.score.weight, classifier_of(model, 4, seed=2).score.weight)
    made.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(again) is PixelGPTForSequenceClassification
    image = tiny.noise(2, 3)
    assert torch.equal(made.eval()(pixel_values=image).logits, again(pixel_values=image).logits)


def test_grey():
    """Check 11: the summed embedding of one channel is that of the replicated strip."""
    model = classifier()
    grey = tiny.noise(2, 6, channels=1)
    want = model.model.embed_patches(grey.expand(-1, 3, -1, -1))
    logits = model(pixel_values=grey.expand(-1, 3, -1, -1)).logits
    mean = grey_weight(model.model.embed_patches.projection.weight, "mean")
    to_grey(model)
    torch.testing.assert_close(model.model.embed_patches(grey), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(pixel_values=grey).logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(3 * mean, model.model.embed_patches.projection.weight)
    assert model.config.num_channels == 1
    with pytest.raises(ValueError, match="one channel already"):
        to_grey(model)
    with pytest.raises(ValueError, match="for classifiers"):
        to_grey(tiny.model())
    with pytest.raises(ValueError, match="how must be one of sum, mean"):
        grey_weight(torch.zeros(2, 3, 16, 16), "max")
