# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of ``pixels`` on its emulated CUDA kernels: ``emulated_pixels.py all``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the
tests of ``tests/ops`` see them through the public ops. Calls run under two thread schedules, whose results must
be the same bits.
"""

from __future__ import annotations

import ctypes
import sys

import torch

import tenfold
from build import build
from emu_calls import CODES, numbers, pointers, ptr, run_tests, scheduled, shifted, stand_in
from tenfold import ops
from tenfold.ops.pixels.patches import patch_shape

LIB = ctypes.CDLL(str(build("kernels_pixels", "-shared", "-fPIC")))
NAN = float("nan")
PIXELS = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS = {torch.bool: 0, torch.uint8: 0, torch.int32: 1, torch.int64: 2, torch.float32: 3,
         torch.float64: 4}  # fmt: skip


def poisoned(shape, dtype):
    return torch.full(tuple(shape), NAN if dtype.is_floating_point else 77, dtype=dtype)


def one_batch(x, dims):
    """The leading dims as one; a copy where they have no common stride."""
    lead = x.dim() - dims
    return x.unsqueeze(0) if lead == 0 else x.flatten(0, lead - 1)


def grid_of(image, patch, layout, channels):
    """(image with one batch dim, numbers of its grid)."""
    x = one_batch(image, 3)
    last = channels == "last" or (channels == "auto" and x.shape[-1] in (1, 3, 4))
    sizes, strides = (t if last else (t[0], *t[2:], t[1]) for t in (x.shape, x.stride()))
    (b, h, w, c), (sb, sh, sw, sc) = sizes, strides
    if c == 1:
        box = (1, patch, patch, 0, sh, sw)
    elif layout == "rcc":
        box = (patch, patch, c, sh, sw, sc)
    else:
        box = (c, patch, patch, sc, sh, sw)
    return x, (PIXELS[x.dtype], b, h // patch, w // patch, sb, sh * patch, sw * patch, *box)


def eps_of(x):
    return ctypes.c_double(x)


def patchify(image, patch, layout, normalize, eps, dtype, channels, shape):
    x, grid = grid_of(image, patch, layout, channels)

    def run():
        out = poisoned(shape, dtype)
        LIB.emu_patchify(
            ptr(x), ptr(out), None, numbers(*grid, CODES[dtype], normalize), eps_of(eps)
        )
        return out

    return scheduled(LIB, run)


def patchify_u8(image, patch, layout, normalize, eps, dtype, channels="auto", validate=True):
    shape = patch_shape(image, patch, channels)
    return patchify(image, patch, layout, normalize, eps, dtype or torch.float32, channels, shape)


def patchify_u8_(out, image, patch, layout, normalize, eps, channels="auto", validate=True):
    out.copy_(patchify_u8(image, patch, layout, normalize, eps, out.dtype, channels))


def masks(num_patches, length, eos, second=None):
    num_patches = num_patches.contiguous()

    def run():
        made = [poisoned((*num_patches.shape, length), torch.bool) for _ in range(2)]
        LIB.emu_patch_mask(ptr(num_patches), ptr(made[0]), None if second is None else ptr(made[1]),
                           numbers(num_patches.numel(), length, eos, second or False,
                                   num_patches.dtype == torch.int64))  # fmt: skip
        return made

    return scheduled(LIB, run)


def patch_mask(num_patches, length, eos=True):
    return masks(num_patches, length, eos)[0]


def patchify_batch(image, num_patches, patch, layout, norm_pix, eps, dtype, eos_in_loss, targets=True,
                   target_dtype=None, channels="auto", validate=True):  # fmt: skip
    shape = patch_shape(image, patch, channels)
    dtype, target_dtype = dtype or torch.float32, target_dtype or torch.float32
    there = masks(num_patches, shape[-2], True, eos_in_loss)
    if not targets or not norm_pix or layout != "rcc" or dtype != target_dtype:
        made = patchify(image, patch, "rcc", norm_pix, eps, target_dtype, channels, shape)
        made = made if targets else made.new_empty(0)
        return patchify_u8(image, patch, layout, False, eps, dtype, channels), made, *there
    x, grid = grid_of(image, patch, layout, channels)

    def run():
        outs = [poisoned(shape, dtype) for _ in range(2)]
        LIB.emu_patchify(ptr(x), *map(ptr, outs), numbers(*grid, CODES[dtype], False), eps_of(eps))
        return outs

    return *scheduled(LIB, run), *there


def unpatchify(patches, patch, height, width, layout, dtype, channels="first", mean=None, std=None):
    depth = patches.shape[-1] // patch**2
    sizes = (depth, height, width) if channels == "first" else (height, width, depth)
    x = one_batch(patches, 2)
    x = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()

    def run():
        out = poisoned((*patches.shape[:-2], *sizes), dtype or torch.uint8)
        grid = grid_of(out, patch, layout, channels)[1]
        LIB.emu_unpatchify(ptr(out), ptr(x), ptr(mean), ptr(std),
                           numbers(*grid, CODES[x.dtype], *x.stride()[:2]))  # fmt: skip
        return out

    return scheduled(LIB, run)


def mse(
    pred,
    image,
    mask,
    patch,
    norm_pix,
    eps,
    shift,
    denom,
    channels,
    grad,
    losses,
    grad_loss=None,
    made=False,
):
    """``grad``: where to write it, or None. Under one schedule where it is pred, which a second would read."""
    x, grid = grid_of(image, patch, "rcc", channels)
    rows, into = (None if t is None else one_batch(t, 2) for t in (pred, grad))
    rows = rows if rows.shape[-1] == 1 or rows.stride(-1) == 1 else rows.contiguous()
    mask = mask.contiguous()
    shift = min(shift, pred.shape[-2])
    steps = (*rows.stride()[:2], *((0, 0) if into is None else into.stride()[:2]))
    kept = None if into is None else into.clone()

    def run():
        out = [poisoned(s, torch.float32) for s in (pred.shape[:-1], (), ())]
        if kept is not None and into.data_ptr() != rows.data_ptr():
            into.copy_(kept)
        LIB.emu_mse(ptr(rows), ptr(x), ptr(mask), ptr(denom), ptr(grad_loss),
                    pointers(into, *(out if losses else (None,) * 3)),
                    numbers(*grid, CODES[pred.dtype], *steps, KINDS[mask.dtype], norm_pix, shift, made),
                    eps_of(eps))  # fmt: skip
        return [out[1], out[0], out[2], *([] if into is None else [into.clone()])]

    over = into is not None and into.data_ptr() == rows.data_ptr()
    return (run() if over or not losses else scheduled(LIB, run))[:3]


def patch_mse(
    pred, image, mask, patch, norm_pix, eps, shift, denom, channels="auto", validate=True
):
    args = (pred, image, mask, patch, norm_pix, eps, shift, denom)
    return tuple(mse(*args, channels, None, True))


def patch_mse_forward(
    pred, image, mask, patch, norm_pix, eps, shift, denom, channels="auto", validate=True
):
    args = (pred, image, mask, patch, norm_pix, eps, shift, denom)
    grad = poisoned(pred.shape, pred.dtype)
    return *mse(*args, channels, grad, True), grad


def patch_mse_(
    pred, image, mask, patch, norm_pix, eps, shift, denom, channels="auto", validate=True
):
    return tuple(mse(pred, image, mask, patch, norm_pix, eps, shift, denom, channels, pred, True))


def patch_mse_backward_(grad, grad_loss, pred, image, mask, denom, patch, norm_pix, eps, shift, channels="auto",
                        made=False):  # fmt: skip
    mse(
        pred,
        image,
        mask,
        patch,
        norm_pix,
        eps,
        shift,
        denom,
        channels,
        grad,
        False,
        grad_loss,
        made,
    )


def patch_mse_backward(grad_loss, pred, *args, channels="auto"):
    grad = poisoned(pred.shape, pred.dtype)
    patch_mse_backward_(grad, grad_loss, pred, *args, channels=channels)
    return grad


def places_of_memory():
    """The same bits with and without wide loads, of rows held in registers and not."""
    image = torch.randint(0, 256, (2, 16, 16 * 7, 3), dtype=torch.uint8)
    mask = torch.ones(2, 7, dtype=torch.uint8)
    for dtype in CODES:
        pred = torch.randn(2, 7, 768).to(dtype)
        want = ops.patch_mse(pred, image, mask)
        for x, y in (
            (shifted(pred), image),
            (pred, shifted(image)),
            (shifted(pred), shifted(image)),
        ):
            assert all(torch.equal(a, b) for a, b in zip(ops.patch_mse(x, y, mask), want))
            for normalize in (False, True):
                got, same = (
                    ops.patchify_u8(t, normalize=normalize, dtype=dtype) for t in (y, image)
                )
                assert torch.equal(got, same)


def values_that_cannot_be_checked():
    """Numbers of patches are brought into [0, L]."""
    count = torch.tensor([-5, 99, 3])
    there = masks(count, 4, True, False)
    assert there[0].sum(1).tolist() == [0, 4, 4]
    assert there[1].sum(1).tolist() == [0, 4, 3]


def check_all():
    # Of each op one form of images with all grids and dtypes; its other tests bring the others.
    choice = "cpu and not errors and not registration and"
    run_tests(
        "test_pixels.py", "-k", f"{choice} (hwc or not patches) and not large and not constant"
    )
    run_tests("test_pixels_mse.py", "-k", f"{choice} (chw or not gradients) and not float64")
    run_tests("test_pixels_gradients.py", "-k", f"{choice} not refusals")
    places_of_memory()
    values_that_cannot_be_checked()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tenfold.cpu_capabilities = lambda: [tenfold.cpu_capability()]  # none of them is asked
    stand_in((patchify_u8, patchify_u8_, patchify_batch, unpatchify, patch_mask, patch_mse, patch_mse_forward,
              patch_mse_, patch_mse_backward, patch_mse_backward_))  # fmt: skip
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
