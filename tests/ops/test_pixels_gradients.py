# SPDX-License-Identifier: Apache-2.0
"""patch_mse: autograd, forms that write into given memory, bad input, registrations, memory."""

import pytest
import torch
from pixel_cases import EPS, NAN, STRIP, differentiated, problem

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
)

raw = torch.ops.tenfold


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
