"""patch_mse: values, gradients, what is masked, weights, PixelGPT's acceptance checks 3 to 5."""

import pytest
import torch
from moe_cases import every_isa, rand
from pixel_cases import EPS, GRIDS, image_of, plain_mse, weights

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    assert_close_to_ref,
    check_compiles,
    check_errors,
    check_op,
    check_opcheck,
    check_strides_equal_fake,
    peak_growth,
    poisoned_memory,
)

raw = torch.ops.tenfold
NAN = float("nan")
KINDS = (
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float32,
    torch.float64,
    torch.int16,
    torch.float16,
)
STRIP = ((2,), 1, 5, 16, 3)


def problem(
    grid, form="hwc", dtype=torch.float32, kind=torch.bool, pixels=torch.uint8, device="cpu"
):
    """(pred, image, mask, channels); pred is NaN where it does not count with shift 1."""
    batch, rows, cols, patch, c = grid
    image, channels = image_of(grid, form, pixels, device)
    shape = (*batch, rows * cols)
    pred = rand(*shape, patch * patch * c, dtype=dtype).to(device)
    return pred, image, weights(shape, kind).to(device), channels


def differentiated(face, pred, *args, by=1.0, **kwargs):
    x = pred.clone().requires_grad_()
    loss, per_patch, denom = face(x, *args, **kwargs)
    (grad,) = torch.autograd.grad(loss * by, x)
    return loss.detach(), per_patch, denom, grad


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


class TestGradients:
    def test_a_kept_graph_and_other_gradients(self, device):
        for dtype in DTYPES:
            pred, image, mask, _ = problem(STRIP, dtype=dtype, device=device)
            x = pred.clone().requires_grad_()
            loss = ops.patch_mse(x, image, mask)[0]
            one, three, again, last = (
                torch.autograd.grad(loss, x, loss.new_tensor(by), retain_graph=keep)[0]
                for by, keep in ((1.0, True), (3.0, True), (1.0, True), (0.3, False))
            )
            assert torch.equal(one, again)
            for by, grad in ((1.0, one), (3.0, three), (0.3, last)):
                direct = reference.patch_mse_backward(
                    loss.new_tensor(by),
                    pred.double(),
                    image,
                    mask,
                    ops.patch_mse(pred, image, mask)[2],
                )
                assert_close_to_ref(grad.cpu(), direct.cpu(), direct.to(dtype).cpu())
            with pytest.raises(RuntimeError):
                torch.autograd.grad(loss, x)

    def test_a_gradient_that_is_kept_is_not_touched_by_the_next_step(self, device):
        pred, image, mask, _ = problem(STRIP, device=device)
        x = pred.clone().requires_grad_()
        for _ in range(3):
            ops.patch_mse(x, image, mask)[0].backward()
        want = differentiated(ops.patch_mse, pred, image, mask, by=3.0)[3]
        torch.testing.assert_close(x.grad, want)

    def test_float16_under_a_scaled_loss(self, device):
        """What the forward made for a gradient of 1 is 0 in float16; the backward does not use it."""
        pred, image, mask, _ = problem(((8,), 1, 64, 16, 3), dtype=torch.float16, device=device)
        mask[:] = True
        grad = differentiated(ops.patch_mse, pred, image, mask, denom=65536.0, by=65536.0)[3]
        want = reference.patch_mse_backward(torch.tensor(65536.0, device=device), pred.double(), image, mask,
                                            torch.tensor(65536.0, device=device))  # fmt: skip
        assert_close_to_ref(grad.cpu(), want.cpu(), want.half().cpu())
        assert (grad[:, :-1] != 0).double().mean() > 0.9

    def test_in_the_place_of_the_prediction(self, device):
        for dtype in DTYPES:
            pred, image, mask, _ = problem(STRIP, dtype=dtype, device=device)
            loss, per_patch, denom, grad = differentiated(ops.patch_mse, pred, image, mask)
            x = pred.clone()
            version = x._version
            made = ops.patch_mse_(x, image, mask)
            assert x._version > version and torch.equal(x, grad)
            assert all(torch.equal(a, b) for a, b in zip(made, (loss, per_patch, denom)))
            rest = (loss.new_tensor(2.0), pred, image, mask, denom)
            twice = ops.patch_mse_backward(*rest)
            out = torch.full_like(pred, NAN)
            ops.patch_mse_backward_(out, *rest)
            assert torch.equal(out, twice)
            x = pred.clone()
            ops.patch_mse_backward_(x, rest[0], x, *rest[2:])
            assert torch.equal(x, twice)
            ops.patch_mse_backward_(out, rest[0] / 2, *rest[1:], made=True)
            assert torch.equal(out, twice)  # as asked: taken for the one of 1
            ops.patch_mse_backward_(out, *rest, made=True)
            assert torch.equal(out, twice)
            view = torch.zeros(2, 7, 768, dtype=dtype, device=device)
            view[:, :5] = pred
            ops.patch_mse_(view[:, :5], image, mask)
            assert torch.equal(view[:, :5], grad) and not view[:, 5:].any()

    def test_refusals(self, device):
        pred, image, mask, _ = problem(
            STRIP, "chw", pixels=torch.float32, kind=torch.float32, device=device
        )
        x = pred.clone().requires_grad_()
        loss = ops.patch_mse(x, image, mask)[0]
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, x, create_graph=True)
        for args in ((image.requires_grad_(), mask), (image.detach(), mask.requires_grad_())):
            with pytest.raises(RuntimeError, match="requires grad: detach it"):
                ops.patch_mse(pred, *args)
        with pytest.raises(RuntimeError, match="inference only"):
            ops.patch_mse_(pred.clone().requires_grad_(), image.detach(), mask.detach())
        y = x * 1
        loss = ops.patch_mse(y, image.detach(), mask.detach())[0]
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_errors(device):
    pred, image, mask, _ = problem(STRIP, device=device)
    args = (pred, image, mask, 16, True, EPS, 1, None)
    both = (ops.patch_mse, raw.patch_mse)

    def with_(at, value):
        return (*args[:at], value, *args[at + 1 :])

    check_errors(*both, with_(0, pred[:, 1:]), {}, ValueError, "pred", "[2, 5, 768]", "[2, 4, 768]")
    check_errors(*both, with_(0, pred[0]), {}, ValueError, "pred", "[5, 768]")
    check_errors(*both, with_(0, pred.int()), {}, TypeError, "pred", "int32")
    check_errors(*both, with_(1, image[:, :, :72]), {}, ValueError, "height 16", "width 72")
    check_errors(*both, with_(1, image.short()), {}, ValueError, "expected uint8 or float in [0,1]")
    check_errors(*both, with_(2, mask[:, 1:]), {}, ValueError, "mask", "[2, 5]", "[2, 4]")
    check_errors(*both, with_(2, mask.to(torch.complex64)), {}, TypeError, "mask")
    check_errors(*both, with_(3, 8), {}, ValueError, "pred", "[2, 20, 192]")
    check_errors(*both, with_(5, -1.0), {}, ValueError, "eps", "-1")
    check_errors(*both, with_(6, -1), {}, ValueError, "shift", "-1")
    check_errors(*both, with_(7, torch.ones(2, device=device)), {}, ValueError, "denom", "[2]")
    if device.type == "cpu":
        check_errors(*both, with_(7, torch.tensor(-1.0)), {}, ValueError, "denom", "-1")
        for bad in (-0.5, NAN, float("inf")):
            weight = mask.float()
            weight[1, 3] = bad
            check_errors(*both, with_(2, weight), {}, ValueError, "mask", "finite", "at 8")
        bright = image.float()
        check_errors(*both, with_(1, bright), {}, ValueError, "expected uint8 or float in [0,1]")
        half = image.half() / 255
        with pytest.raises(RuntimeError, match="float64 on a CPU only"):
            raw.patch_mse(*with_(0, pred.double())[:1], half, *args[2:])
    both = (ops.patch_mse_, raw.patch_mse_)
    turned = pred.transpose(1, 2).contiguous().transpose(1, 2)
    check_errors(*both, with_(0, turned), {}, ValueError, "pred", "contiguous")
    check_errors(*both, with_(0, pred[:1].expand(2, -1, -1)), {}, ValueError, "pred", "overlap")
    both = (ops.patch_mse_backward_, raw.patch_mse_backward_)
    one = torch.ones((), device=device)
    args = (torch.zeros_like(pred), one, pred, image, mask, one, 16, True, EPS, 1)
    check_errors(*both, with_(0, pred.bfloat16()), {}, ValueError, "grad", "bfloat16")
    check_errors(*both, with_(0, turned), {}, ValueError, "grad", "contiguous")
    check_errors(*both, with_(0, pred[:, :4]), {}, ValueError, "grad", "[2, 4, 768]")
    check_errors(*both, with_(1, one.double()), {}, TypeError, "grad_loss", "float64")
    check_errors(*both, with_(1, one.expand(3)), {}, ValueError, "grad_loss", "[3]")
    big = torch.zeros(4, 5, 768, device=device)
    check_errors(*both, (big[1:3], one, big[:2], *args[3:]), {}, ValueError, "grad", "pred")


def test_registration(device):
    pred, image, mask, _ = problem(STRIP, dtype=torch.bfloat16, kind=torch.float32, device=device)
    args = (image, mask, 16, True, EPS, 1, torch.tensor(3.0, device=device))
    close = {"rtol": 1e-2, "atol": 1e-4}
    check_op(raw.patch_mse, (pred.clone().requires_grad_(), *args), **close)
    check_opcheck(raw.patch_mse_forward, (pred, *args))
    check_strides_equal_fake(raw.patch_mse_forward, (pred, *args))
    check_op(raw.patch_mse_, (pred, *args), mutates=True, **close)
    one = torch.tensor(2.0, device=device)
    back = (one, pred, image, mask, args[-1], 16, True, EPS, 1)
    check_opcheck(raw.patch_mse_backward, back)
    check_strides_equal_fake(raw.patch_mse_backward, back)
    check_op(raw.patch_mse_backward_, (torch.zeros_like(pred), *back), mutates=True, **close)

    def step(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(ops.patch_mse(x, image, mask)[0] * 3, x)[0]

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.patch_mse(x, image, mask)[0] * 3, fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    x = pred.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], step(pred))
    check_compiles(lambda x: ops.patch_mse(x, image, mask), (pred,))


def test_no_target_is_in_memory():
    """A loss with its gradient: 12.6 MB of each, where the plain sequence makes several of 25.2 MB."""
    grown = peak_growth(
        """
        from tenfold import ops
        image = torch.randint(0, 256, (8, 16, 16 * 1024, 3), dtype=torch.uint8)
        pred = torch.randn(8, 1024, 768).bfloat16().requires_grad_()
        mask = torch.ones(8, 1024, dtype=torch.bool)
        small = [x[:1].detach() for x in (pred, image, mask)]
        ops.patch_mse(small[0].requires_grad_(), *small[1:])[0].backward()
        """,
        "ops.patch_mse(pred, image, mask)[0].backward()",
    )
    assert grown < 1.3 * 2 * 8 * 1024 * 768
