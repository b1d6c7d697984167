# SPDX-License-Identifier: Apache-2.0
"""patch_mse: values, gradients, what is masked, weights, PixelGPT's acceptance checks 3 to 5."""

import pytest
import torch
from moe_cases import every_isa
from pixel_cases import (
    EPS,
    GRIDS,
    NAN,
    differentiated,
    plain_mse,
    problem,
)

from tenfold import ops, reference
from tenfold.testing import DTYPES, assert_close_to_ref, poisoned_memory

KINDS = (
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float32,
    torch.float64,
    torch.int16,
    torch.float16,
)


def judge(pred, image, mask, patch, norm_pix, shift, denom, channels, device, by=1.0):
    """Loss, errors, divisor and gradient on every ISA against the definition in float64."""
    args, named = (image, mask, patch, norm_pix, EPS, shift, denom), {"channels": channels}
    exact = differentiated(reference.patch_mse, pred.double(), *args, by=by, **named)
    plain = differentiated(reference.patch_mse, pred, *args, by=by, **named)
    for isa in every_isa(device):
        with isa, poisoned_memory():
            got = differentiated(ops.patch_mse, pred, *args, by=by, **named)
            only = ops.patch_mse(pred, *args, **named)
        for name, g, e, p in zip(("loss", "per_patch", "denom", "grad"), got, exact, plain):
            assert g.dtype == p.dtype and g.shape == e.shape, name
            assert_close_to_ref(g.cpu(), e.cpu(), p.cpu(), what=name)
        assert all(torch.equal(a, b) for a, b in zip(only, got))
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["hwc", "chw", "cropped"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_and_gradients(grid, form, dtype, device):
    turn = GRIDS.index(grid) + DTYPES.index(dtype)
    pixels = (torch.uint8, torch.uint8, torch.float16, torch.float32)[turn % 4]
    pred, image, mask, channels = problem(
        grid, form, dtype, KINDS[turn % len(KINDS)], pixels, device
    )
    for norm_pix, shift in ((True, 1), (False, 1), (True, 0), (False, 3)):
        denom = torch.tensor(77.0, device=device) if shift == 0 else None
        judge(pred, image, mask, grid[3], norm_pix, shift, denom, channels, device, by=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_weights(kind, device):
    pred, image, mask, _ = problem(((3,), 2, 9, 8, 3), kind=kind, device=device)
    got = judge(pred, image, mask, 8, True, 1, None, "last", device)
    assert float(got[2]) == pytest.approx(float(mask[:, 1:].double().sum()), rel=1e-6)
    for denom in (12.5, torch.tensor([12.5], dtype=torch.float64, device=device)):
        other = ops.patch_mse(pred, image, mask, 8, denom=denom)
        torch.testing.assert_close(other[0] * 12.5, got[0] * got[2])
        assert float(other[2]) == 12.5 and torch.equal(other[1], got[1])


def test_what_weighs_nothing_is_not_read(device):
    pred, image, mask, _ = problem(((4,), 1, 6, 16, 3), device=device)
    mask[0], mask[1] = True, False
    want = differentiated(ops.patch_mse, pred, image, mask)
    noisy = pred.clone()
    unread = torch.ones_like(mask)
    unread[:, :-1] = ~mask[:, 1:]
    noisy[unread] = NAN
    got = differentiated(ops.patch_mse, noisy, image, mask)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert not got[3][unread].any() and not got[1][unread].any() and got[3][~unread].any()
    noisy = pred.clone()
    noisy[0, 2, 5] = NAN  # counts
    got = differentiated(ops.patch_mse, noisy, image, mask)
    assert got[0].isnan() and int(got[1].isnan().sum()) == 1 and int(got[3].isnan().sum()) == 1
    noisy[0, 2, 5] = float("inf")
    assert ops.patch_mse(noisy, image, mask)[0].isposinf()


@pytest.mark.parametrize("why", ["mask", "denom", "length", "shift", "batch"])
def test_nothing_counts(why, device):
    pred, image, mask, _ = problem(((2,), 1, 1 if why == "length" else 4, 16, 3), device=device)
    mask[:] = why != "mask"
    if why == "batch":
        pred, image, mask = pred[:0], image[:0], mask[:0]
    denom = 0.0 if why == "denom" else None
    for shift in (4, 100) if why == "shift" else (1,):
        for isa in every_isa(device):
            with isa, poisoned_memory():
                loss, _, by, grad = differentiated(
                    ops.patch_mse, pred, image, mask, 16, True, EPS, shift, denom
                )
            assert float(loss) == 0.0 and float(by) == 0.0 and not grad.any()
            assert grad.shape == pred.shape


class _Loss:
    def __init__(self, face, *args, **named):
        self.face, self.args, self.named = face, args, named

    def __call__(self, x):
        return self.face(x, *self.args, **self.named)[0]


class TestAcceptance:
    """Section 10 of the method's specification."""

    def test_3_closed_form(self, device):
        strip = torch.full((16, 32, 3), 255, dtype=torch.uint8, device=device)
        strip[:, 16:24] = 0
        mask = torch.ones(2, device=device)
        for isa in every_isa(device):
            with isa:
                loss = ops.patch_mse(torch.zeros(2, 768, device=device), strip, mask)[0]
            assert float(loss) == pytest.approx(0.99869393, abs=6e-8)

    @pytest.mark.parametrize("norm_pix", [True, False])
    @pytest.mark.parametrize("shift", [0, 1])
    @pytest.mark.parametrize(
        "dtype, tolerance",
        [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
        ids=["float64", "float32", "bfloat16"],
    )
    def test_4_the_plain_sequence(self, dtype, tolerance, shift, norm_pix, device):
        pred, image, mask, _ = problem(((3,), 1, 7, 16, 3), kind=torch.float32, device=device)
        image[:, :, :80] = torch.randint(0, 256, (3, 16, 80, 3), dtype=torch.uint8)  # theirs leaks
        f = pred.to(dtype)
        args = (image, mask, 16, norm_pix, EPS, shift)
        if dtype == torch.float64 and device.type != "cpu":
            with pytest.raises(TypeError, match="float64 on a CPU only"):
                ops.patch_mse(f, *args)
            return
        loss, per_patch, _, grad = differentiated(ops.patch_mse, f, *args)
        x = f.clone().double().requires_grad_()
        want, errors = plain_mse(x, image, mask.double(), 16, norm_pix, "last", shift)
        (of_x,) = torch.autograd.grad(want, x)
        there = (mask > 0)[:, shift:]
        close = {"rtol": tolerance, "atol": tolerance * 1e-2}
        torch.testing.assert_close(loss.double(), want.detach(), **close)
        made = per_patch[:, : 7 - shift]
        torch.testing.assert_close(made[there].double(), errors.detach()[there], **close)
        scale = of_x.abs().max()
        torch.testing.assert_close(
            grad.double() / scale, of_x / scale, rtol=tolerance, atol=tolerance
        )

    def test_4_gradcheck(self):
        """Of the kernel itself: float64 on the CPU."""
        for pixels in (torch.uint8, torch.float32):
            pred, image, mask, _ = problem(
                ((2,), 1, 3, 4, 1), "hwc", torch.float64, torch.float64, pixels
            )
            x = pred.requires_grad_()
            for rest in ((True, EPS, 1), (False, EPS, 0, torch.tensor(3.0))):
                for face in (ops.patch_mse, reference.patch_mse):
                    loss = _Loss(face, image, mask, 4, *rest, channels="last")
                    assert torch.autograd.gradcheck(loss, x)

    def test_5_masked_autoencoder(self, device):
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        sizes = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 8,
        }
        small = {f"decoder_{k}": v for k, v in sizes.items()}
        config = ViTMAEConfig(**sizes, **small, image_size=64, patch_size=16, norm_pix_loss=True)
        model = ViTMAEForPreTraining(config).to(device)
        pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        for x in (pixels, (pixels - 0.5) / 0.25):  # or as their image processor hands them over
            theirs = model(x)
            pred = theirs.logits.detach()
            mine = differentiated(ops.patch_mse, pred, x, theirs.mask, shift=0, validate=False)
            torch.testing.assert_close(mine[0], theirs.loss.detach(), rtol=1e-5, atol=0)
            (grad,) = torch.autograd.grad(theirs.loss, theirs.logits)
            torch.testing.assert_close(mine[3], grad, rtol=1e-4, atol=1e-7)


def test_views_of_predictions_are_read_where_they_are(device):
    """The patches of a sequence that goes on with tokens, as a paired batch has them; bit for bit."""
    pred, image, mask, _ = problem(((2,), 1, 6, 16, 3), device=device)
    want = differentiated(ops.patch_mse, pred, image, mask)
    whole = torch.full((2, 10, 768 + 16), NAN, device=device)
    for view in (whole[:, :6, :768], whole[:, 4:, 16:], whole[:, :6, 3:771]):
        view.copy_(pred)
        for x in (view, view.transpose(1, 2).contiguous().transpose(1, 2)):
            x = x.detach().requires_grad_()
            loss, per_patch, _ = ops.patch_mse(x, image, mask)
            (grad,) = torch.autograd.grad(loss, x)
            got = (loss.detach(), per_patch, want[2], grad)
            assert all(torch.equal(a, b) for a, b in zip(got, want))
    halves = [ops.patch_mse(pred[i : i + 1], image[i : i + 1], mask[i : i + 1], denom=want[2])[0]
              for i in range(2)]  # fmt: skip
    torch.testing.assert_close(sum(halves), want[0])  # of batches that are accumulated
