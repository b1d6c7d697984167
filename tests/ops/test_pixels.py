# SPDX-License-Identifier: Apache-2.0
"""patchify_u8, its inverse, masks and batches: layouts, exactness, PixelGPT's acceptance checks 1 to 3."""

import pytest
import torch
from moe_cases import every_isa
from pixel_cases import EPS, FORMS, GRIDS, STRIP, image_of, plain_patches, plain_targets, values

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    assert_close_to_ref,
    check_compiles,
    check_errors,
    check_op,
    check_opcheck,
    check_strides_equal_fake,
    poisoned_memory,
)

raw = torch.ops.tenfold
LAYOUTS = ("rcc", "crc")


def each_isa(device, face, *args, **named):
    """The face's result on each instruction set."""
    for isa in every_isa(device):
        with isa, poisoned_memory():
            yield face(*args, **named)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_patches(grid, form, device):
    """Scaled ones and their way back exactly, in all dtypes; normalised ones within rounding."""
    patch = grid[3]
    for dtype in (torch.uint8, torch.bfloat16):
        image, channels = image_of(grid, form, dtype, device)
        h, w = image.shape[-3:-1] if channels == "last" else image.shape[-2:]
        for layout, out in zip(LAYOUTS * 2, (*DTYPES, torch.float32)):
            args, named = (image, patch, layout, False, EPS, out), {"channels": channels}
            want = reference.patchify_u8(*args, **named)
            for got in each_isa(device, ops.patchify_u8, *args, **named):
                assert got.dtype == out and got.is_contiguous() and torch.equal(got, want)
            for to in (dtype, torch.float32):
                back = (want, patch, h, w, layout, to)
                plain = reference.unpatchify(*back, **named)
                for got in each_isa(device, ops.unpatchify, *back, **named):
                    assert torch.equal(got, plain) and got.is_contiguous()
                    if to == torch.uint8:  # whatever dtype the patches have
                        assert torch.equal(got, image)
            args = (image, patch, layout, True, EPS, out)
            exact = reference.patchify_u8(*args[:-1], torch.float64, **named)
            low = plain_targets(plain_patches(image, patch, channels, torch.float32))
            low = low if layout == "rcc" else reference.patchify_u8(*args, **named)
            for got in each_isa(device, ops.patchify_u8, *args, **named):
                assert_close_to_ref(got.cpu(), exact.cpu(), low.to(out).cpu())
            made = torch.full_like(got, float("nan"))
            ops.patchify_u8_(made, *args[:-1], **named)
            assert torch.equal(made, got)


def test_every_byte_is_exact_both_ways(device):
    image = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16)
    for dtype in DTYPES:
        for got in each_isa(device, ops.patchify_u8, image, dtype=dtype):
            assert torch.equal(got.flatten(), (image.flatten().double() / 255).float().to(dtype))
            assert torch.equal(ops.unpatchify(got, 16, 16, 16), image)


def test_values_beyond_the_levels(device):
    """Of predictions: NaN and what is outside [0, 1], and denormalised ones."""
    x = torch.tensor([-1.0, float("nan"), 2.0, 0.5, float("inf"), -float("inf"), 1.0, 0.1]).to(
        device
    )
    x = x.repeat(24).view(1, 3, 64)
    want = reference.unpatchify(x, 8, 8, 24)
    mean, std = torch.rand(2, 1, 3, device=device)
    for got in each_isa(device, ops.unpatchify, x, 8, 8, 24):
        assert torch.equal(got, want)
        wide = ops.unpatchify(x, 8, 8, 24, dtype=torch.float32, mean=mean, std=std)
        same = reference.unpatchify(x, 8, 8, 24, dtype=torch.float32, mean=mean, std=std)
        torch.testing.assert_close(wide, same, equal_nan=True, rtol=1e-6, atol=1e-6)
    big = torch.rand(2, 9, 3 * 64 + 5, device=device)
    view = big[:, 3:7, :192]  # rows of a larger tensor
    assert torch.equal(ops.unpatchify(view, 8, 16, 16), reference.unpatchify(view, 8, 16, 16))
    turned = view.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.unpatchify(turned, 8, 16, 16), ops.unpatchify(view, 8, 16, 16))


class TestAcceptance:
    """Section 10 of the method's specification."""

    def test_1_layout(self, device):
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        sizes = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 8,
        }
        small = {f"decoder_{k}": v for k, v in sizes.items()}
        model = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **small, image_size=48, patch_size=16))
        image, _ = image_of(((2,), 3, 3, 16, 3), "chw", device=device)
        x = image.float() / 255
        got = ops.patchify_u8(image)
        assert torch.equal(got, model.patchify(x))
        assert torch.equal(
            got, torch.einsum("nchpwq->nhwpqc", x.view(2, 3, 3, 16, 3, 16)).reshape(2, 9, 768)
        )
        assert torch.equal(
            ops.unpatchify(got, 16, 48, 48, dtype=torch.float32), model.unpatchify(got)
        )
        strip = values((2, 16, 16 * 7, 3), torch.uint8).to(device)  # where theirs wants a square
        for layout in LAYOUTS:
            back = ops.unpatchify(ops.patchify_u8(strip, layout=layout), 16, 16, 112, layout,
                                  channels="last")  # fmt: skip
            assert torch.equal(back, strip)

    def test_2_embedding(self, device):
        image, _ = image_of(((2,), 1, 9, 16, 3), "hwc", device=device)
        made = torch.Generator().manual_seed(0)
        weight = (torch.randn(32, 3, 16, 16, generator=made) * 0.05).to(device)
        bias = torch.randn(32, generator=made).to(device)
        pixels = image.movedim(-1, -3).float() / 255
        want = (
            torch.nn.functional.conv2d(pixels, weight, bias, stride=16).flatten(2).transpose(1, 2)
        )
        for layout, matrix in (("rcc", weight.movedim(1, -1)), ("crc", weight)):
            got = ops.patchify_u8(image, layout=layout) @ matrix.flatten(1).T + bias
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_3_targets(self, device):
        image, _ = image_of(((2,), 1, 9, 16, 3), "hwc", device=device)
        x = plain_patches(image, 16, "last")
        v = x.var(-1)
        for y in each_isa(device, ops.patchify_u8, image, normalize=True):
            y = y.double()
            constant = v == 0
            assert constant.any() and not y[constant].any()
            want = 767 * v / (v + 1e-6)
            assert y.sum(-1).abs().max() < 3e-4
            torch.testing.assert_close(y.square().sum(-1), want, rtol=1e-5, atol=1e-12)
        strip = torch.full((16, 32, 3), 255, dtype=torch.uint8, device=device)
        strip[:, 16:24] = 0
        for y in each_isa(device, ops.patchify_u8, strip, normalize=True):
            assert not y[0].any()
            torch.testing.assert_close(
                y[1].abs(), torch.full_like(y[1], 0.99934667), rtol=0, atol=6e-8
            )
            assert torch.equal(y[1] > 0, (strip[:, 16:] > 0).flatten())


def test_constant_patches_are_zero(device):
    """Where a mean that is rounded leaks: every byte, many sizes; and floats, whose mean is never exact."""
    for patch, c in ((16, 3), (7, 3), (32, 4), (1, 1), (100, 3)):
        level = torch.arange(0, 256, 1 if patch < 32 else 51, dtype=torch.uint8, device=device)
        image = level.view(-1, 1, 1, 1).expand(-1, patch, patch, c)
        for eps in (1e-6, 0.0):
            for x in (image, (image.float() / 255).bfloat16(), image.float() / 255):
                got = ops.patchify_u8(x, patch, "rcc", True, eps, channels="last")
                assert not got.any()


def test_batches(device):
    """One call from strips to inputs, targets and masks."""
    for grid, form in ((STRIP, "hwc"), (GRIDS[2], "chw"), (GRIDS[5], "hwc"), (GRIDS[8], "hwc")):
        image, channels = image_of(grid, form, device=device)
        length = grid[1] * grid[2]
        count = torch.randint(0, length + 3, grid[0], device=device)
        for turn, layout in enumerate(LAYOUTS):
            for eos, norm in ((True, True), (False, True), (True, False)):
                dtypes = (DTYPES[turn], DTYPES[2 * turn])
                args = (image, count if eos else count.int(), grid[3], layout, norm, EPS, dtypes[0],
                        eos)  # fmt: skip
                named = {"target_dtype": dtypes[1], "channels": channels}
                want = reference.patchify_batch(*args, **named)
                for got in each_isa(device, ops.patchify_batch, *args, **named):
                    for g, w, equal in zip(got, want, (True, not norm, True, True)):
                        assert g.dtype == w.dtype and g.shape == w.shape
                        if equal:
                            assert torch.equal(g, w)
                        else:
                            torch.testing.assert_close(g, w, rtol=2e-2 if turn else 1e-5, atol=1e-5)
                    alone = ops.patchify_u8(image, grid[3], "rcc", norm, EPS, dtypes[1],
                                            channels=channels)  # fmt: skip
                    assert torch.equal(got.targets, alone)
                assert torch.equal(got.mask, ops.patch_mask(count, length))
        none = ops.patchify_batch(image, count, grid[3], targets=False, channels=channels)
        assert none.targets.shape == (0,)


def test_masks(device):
    count = torch.tensor([[0, 1, 6], [7, 8, 100]], device=device)
    for eos in (True, False):
        want = [[[i < min(n + eos, 8) for i in range(8)] for n in row] for row in count.tolist()]
        for given in (count, count.int(), count.t().contiguous().t()):
            assert ops.patch_mask(given, 8, eos).tolist() == want
    assert ops.patch_mask(count, 0).shape == (2, 3, 0)
    assert ops.patch_mask(torch.tensor(2, device=device), 4).tolist() == [True] * 3 + [False]


def test_errors(device):
    image, _ = image_of(STRIP, "hwc", device=device)
    both = (ops.patchify_u8, raw.patchify_u8)
    args = (image, 16, "rcc", False, EPS, None)

    def with_(at, value):
        return (*args[:at], value, *args[at + 1 :])

    odd = image[:, :, :50]
    check_errors(*both, with_(0, odd), {}, ValueError, "height 16", "width 50", "16 x 16")
    check_errors(*both, with_(0, image[:, :13]), {}, ValueError, "height 13", "width 80")
    for dtype in (torch.int16, torch.float64, torch.bool):
        check_errors(*both, with_(0, image.to(dtype)), {}, ValueError,
                     "expected uint8 or float in [0,1]")  # fmt: skip
    check_errors(*both, with_(0, image[0, 0]), {}, ValueError, "[..., H, W, C]", "[80, 3]")
    square = torch.zeros(3, 16, 3, dtype=torch.uint8, device=device)
    check_errors(*both, with_(0, square), {}, ValueError, "channels", "[3, 16, 3]")
    check_errors(*both, with_(0, image[..., :2]), {}, ValueError, "channels", "first")
    check_errors(*both, args, {"channels": "middle"}, ValueError, "channels", "middle")
    check_errors(*both, with_(1, 0), {}, ValueError, "patch", "[1, 1024]")
    check_errors(*both, with_(2, "rgb"), {}, ValueError, "layout", "rcc or crc", "rgb")
    for eps in (-1e-9, float("nan"), float("inf")):
        check_errors(*both, with_(4, eps), {}, ValueError, "eps")
    check_errors(*both, with_(5, torch.float64), {}, TypeError, "dtype", "float64")
    if device.type == "cpu":
        for bad in (255.0, -0.01, float("nan")):
            for dtype in DTYPES:
                x = torch.zeros(1, 3, 16, 48, dtype=dtype)
                x[0, 1, 7, 33] = bad
                check_errors(*both, with_(0, x), {}, ValueError, "expected uint8 or float in [0,1]")
                ops.patchify_u8(x, validate=False)
    both = (ops.patchify_u8_, raw.patchify_u8_)
    out = ops.patchify_u8(image)
    rest = args[:-1]
    check_errors(*both, (out[:, 1:], *rest), {}, ValueError, "out", "[2, 5, 768]", "[2, 4, 768]")
    check_errors(*both, (out.double(), *rest), {}, TypeError, "out", "float64")
    wide = torch.zeros(2, 5, 800, device=device)[..., :768]
    check_errors(*both, (wide, *rest), {}, ValueError, "out", "contiguous")
    floats = torch.zeros(2, 16, 80, 3, device=device)
    check_errors(
        *both, (floats.view(2, 5, 768), floats, *args[1:-1]), {}, ValueError, "out", "image"
    )
    both = (ops.unpatchify, raw.unpatchify)
    args = (out, 16, 16, 80, "rcc", None)
    check_errors(*both, with_(2, 17), {}, ValueError, "height 17", "width 80")
    check_errors(*both, with_(3, 96), {}, ValueError, "patches must be 6", "got 5")
    check_errors(*both, with_(0, out[..., 1:]), {}, ValueError, "767")
    check_errors(*both, with_(0, out[0, 0]), {}, ValueError, "[..., L, P]")
    check_errors(*both, with_(0, image), {}, TypeError, "patches", "uint8")
    check_errors(*both, with_(5, torch.int32), {}, TypeError, "dtype", "int32")
    check_errors(*both, args, {"channels": "auto"}, ValueError, "channels", "auto")
    check_errors(*both, args, {"mean": out[..., 0].double()}, TypeError, "mean", "float64")
    check_errors(*both, args, {"std": out[0, :, 0]}, ValueError, "std", "[2, 5]")
    both = (ops.patchify_batch, raw.patchify_batch)
    count = torch.tensor([1, 2], device=device)
    args = (image, count, 16, "rcc", True, EPS, None, True)
    check_errors(*both, with_(1, count[1:]), {}, ValueError, "num_patches", "[2]", "[1]")
    check_errors(*both, with_(1, count.float()), {}, TypeError, "num_patches", "float32")
    check_errors(*both, args, {"target_dtype": torch.int8}, TypeError, "target_dtype", "int8")
    both = (ops.patch_mask, raw.patch_mask)
    check_errors(*both, (count, -1), {}, ValueError, "length", "-1")
    if device.type == "cpu":
        check_errors(*both, (count - 2, 4), {}, ValueError, "num_patches", "-1")
        check_errors(
            ops.patchify_batch,
            raw.patchify_batch,
            with_(1, count - 5),
            {},
            ValueError,
            "num_patches",
        )


def test_an_image_that_requires_grad_is_refused(device):
    x = torch.zeros(3, 16, 16, device=device, requires_grad=True)
    for call in (ops.patchify_u8, lambda x: raw.patchify_u8(x, 16, "rcc", True, EPS, None)):
        with pytest.raises(RuntimeError, match="inference only"):
            call(x)
    with torch.no_grad():
        ops.patchify_u8(x)


def test_registration(device):
    image, channels = image_of(GRIDS[2], "cropped", device=device)
    named = {"channels": channels}
    check_op(raw.patchify_u8, (image, 7, "crc", True, EPS, torch.bfloat16), named, rtol=1e-2)
    image, _ = image_of(STRIP, "hwc", device=device)
    count = torch.tensor([1, 4], device=device)
    check_op(raw.patchify_batch, (image, count, 16, "crc", True, EPS, None, False))
    out = torch.zeros(2, 5, 768, device=device)
    check_op(raw.patchify_u8_, (out, image, 16, "rcc", False, EPS), mutates=True)
    patches = ops.patchify_u8(image)
    moment = patches[..., 0].contiguous()
    check_op(
        raw.unpatchify, (patches, 16, 16, 80, "rcc", torch.float16), {"mean": moment, "std": moment}
    )
    check_opcheck(raw.patch_mask, (count, 9))
    check_strides_equal_fake(raw.patch_mask, (count, 9))
    check_compiles(ops.patchify_u8, (image.movedim(-1, 1),))  # channels are told from shapes


@pytest.mark.parametrize("large", [False, True])
def test_large_outputs_go_past_the_caches(large, device):
    """The same values either way: rows of whole lines and others, and the end of the memory."""
    length = 1100 if large else 3
    image, _ = image_of(((2,), 1, length, 16, 3), "hwc", device=device)
    for dtype in (torch.float32, torch.bfloat16):
        for normalize in (False, True):
            got = ops.patchify_u8(image, 16, "rcc", normalize, EPS, dtype)
            apart = [
                ops.patchify_u8(x, 16, "rcc", normalize, EPS, dtype)
                for x in (image[:, :, : 16 * (length // 2)], image[:, :, 16 * (length // 2) :])
            ]
            assert torch.equal(got, torch.cat(apart, 1))
