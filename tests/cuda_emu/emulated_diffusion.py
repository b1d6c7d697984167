# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of ``diffusion`` on its emulated CUDA kernels: ``emulated_diffusion.py all``.

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
from emu_calls import CODES, numbers, pointers, ptr, run_tests, scheduled, stand_in
from tenfold import ops

LIB = ctypes.CDLL(str(build("kernels_diffusion", "-shared", "-fPIC")))
NAN = float("nan")
DOWN, UP, DOWN_GRAD, UP_GRAD = range(4)


def per_sample(t):
    return (0, 0) if t is None else (t.dtype == torch.float64, t.stride(0) if t.dim() else 0)


def sizes(x):
    return len(x), x.shape[1] * x.shape[2]


def fresh(like, count=1, shape=None, dtype=None):
    made = [torch.full(shape or like.shape, NAN, dtype=dtype or like.dtype) for _ in range(count)]
    return made if count > 1 else made[0]


def noised(z, v, x0, t, noise, seed=0, offset=0):
    x0, noise = x0.contiguous(), None if noise is None else noise.contiguous()
    n = numbers(CODES[x0.dtype], *sizes(x0), seed, offset, *per_sample(t))
    LIB.emu_vdiff_noise(pointers(x0, noise, t), pointers(z, v), n)


def vdiff_noise(x0, t, noise):
    def run():
        made = fresh(x0, 2)
        noised(*made, x0, t, noise)
        return made

    return tuple(scheduled(LIB, run))


def vdiff_noise_(z, v, x0, t, noise):
    noised(z, v, x0, t, noise)


def vdiff_noise_rng(x0, t, seed, offset):
    def run():
        made = fresh(x0, 2)
        noised(*made, x0, t, None, seed, offset)
        return made

    return tuple(scheduled(LIB, run))


def vdiff_noise_rng_(z, v, x0, t, seed, offset):
    noised(z, v, x0, t, None, seed, offset)


def lost(loss, grad, v_hat, x0, noise, t, grad_loss):
    v_hat, x0, noise = (x.contiguous() for x in (v_hat, x0, noise))
    n = numbers(CODES[x0.dtype], CODES[v_hat.dtype], *sizes(x0), *per_sample(t))
    LIB.emu_vdiff_loss(pointers(v_hat, x0, noise, t, grad_loss), pointers(loss, grad), n)


def vdiff_loss(v_hat, x0, noise, t):
    def run():
        made = fresh(x0, 1, x0.shape[:1], torch.float32)
        lost(made, None, v_hat, x0, noise, t, None)
        return made

    return scheduled(LIB, run)


def vdiff_loss_backward(grad, v_hat, x0, noise, t):
    grad, made = grad.contiguous(), fresh(v_hat)
    lost(None, made, v_hat, x0, noise, t, grad)
    return made


def vdiff_step_(z_next, x0_hat, z, v, v_uncond, t, u, guidance, eta, noise, clip, *,
                use_clipped_model_output=False, cfg_plus_plus=False):  # fmt: skip
    guided = v_uncond is not None and guidance is not None
    z, v = z.contiguous(), v.contiguous()
    free = v_uncond.contiguous() if guided else None
    noise = noise.contiguous() if eta > 0 else None
    n = numbers(CODES[z.dtype], CODES[v.dtype], *sizes(z), clip is not None, use_clipped_model_output,
                cfg_plus_plus and guided, *per_sample(t), *per_sample(u),
                *per_sample(guidance if guided else None))  # fmt: skip
    options = (ctypes.c_double * 2)(eta, clip or 0.0)
    LIB.emu_vdiff_step(pointers(z, v, free, noise, t, u, guidance), pointers(z_next, x0_hat), n, options)  # fmt: skip


def vdiff_step(z, *args, **kwargs):
    def run():
        made = fresh(z, 2)
        vdiff_step_(*made, z, *args, **kwargs)
        return made

    return tuple(scheduled(LIB, run))


def steps(t):
    return (0, 0) if t is None else t.stride()[:2]


def with_rows(t):
    return (
        t if t is None or t.numel() == 0 or t.shape[2] == 1 or t.stride(2) == 1 else t.contiguous()
    )


def fir(out, kind, x, skip, channels, length):
    x, skip = with_rows(x), with_rows(skip)
    skipped = 0 if skip is None else skip.shape[1]
    n = numbers(CODES[x.dtype], kind, len(x), channels, skipped, length, out.shape[2], *steps(x), *steps(skip),
                *steps(out))  # fmt: skip
    LIB.emu_fir(pointers(x, skip), pointers(out), n)
    return out


def fir_down2(x):
    shape = (*x.shape[:2], x.shape[2] // 2)
    return scheduled(LIB, lambda: fir(fresh(x, 1, shape), DOWN, x, None, x.shape[1], x.shape[2]))


def fir_down2_(out, x):
    fir(out, DOWN, x, None, x.shape[1], x.shape[2])


def fir_down2_backward(grad, length):
    shape = (*grad.shape[:2], length)
    return fir(fresh(grad, 1, shape), DOWN_GRAD, grad, None, grad.shape[1], length)


def fir_up2_cat(x, skip):
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    shape = (len(x), channels, 2 * x.shape[2])
    return scheduled(LIB, lambda: fir(fresh(x, 1, shape), UP, x, skip, x.shape[1], x.shape[2]))


def fir_up2_cat_(out, x, skip):
    fir(out, UP, x, skip, x.shape[1], x.shape[2])


def fir_up2_backward(grad, channels):
    length = grad.shape[2] // 2
    return fir(fresh(grad, 1, (len(grad), channels, length)), UP_GRAD, grad, None, channels, length)


def planes_add_(y, taps, bias, edges_only):
    if y.dtype == torch.float64:  # the definition: no CUDA kernel has it
        whole = torch.nn.functional.conv1d(torch.ones(1, 1, y.shape[2]).double(), taps.flatten(0, 1)[:, None],
                                           padding=taps.shape[2] // 2).view(y.shape)  # fmt: skip
        if edges_only:
            whole = whole - taps.sum(-1, keepdim=True)
        elif bias is not None:
            whole = whole + bias[:, None]
        y += whole
        return
    n = numbers(
        CODES[y.dtype], len(y) * y.shape[1], y.shape[1], y.shape[2], taps.shape[2], edges_only
    )
    LIB.emu_planes_add(ptr(y), ptr(taps.contiguous()), ptr(bias), n)


def planes_sums(grad, kernel_size):
    grad = grad.contiguous()
    if grad.dtype == torch.float64:
        windows = torch.nn.functional.conv1d(torch.ones(1, 1, grad.shape[2]).double(),
                                             torch.eye(kernel_size).double()[:, None],
                                             padding=kernel_size // 2)  # fmt: skip
        return torch.einsum("bol,kl->bok", grad, windows[0])
    n = numbers(CODES[grad.dtype], len(grad) * grad.shape[1], grad.shape[2], kernel_size)

    def run():
        made = fresh(grad, 1, (*grad.shape[:2], kernel_size), torch.float32)
        LIB.emu_planes_sums(ptr(grad), ptr(made), n)
        return made

    return scheduled(LIB, run)


def same_noise_as_the_cpu():
    """Drawn noise has the bits that the CPU's kernels draw, at positions that are no multiples of four too."""
    x0, t = torch.zeros(3, 1, 1003), torch.ones(3)
    mine = vdiff_noise_rng(x0, t, -5, 2**40)[0]
    assert torch.equal(mine, NOISE_OF_THE_CPU)
    for dtype in (torch.bfloat16, torch.float16):
        low = ops.vdiff_noise_rng(x0.to(dtype), t, -5, 2**40)[0]
        assert torch.equal(low, NOISE_OF_THE_CPU.to(dtype))


def check_all():
    same_noise_as_the_cpu()
    small = ("not errors and not registration and not large and not gradcheck and not inductor and not graph and "
             "not moments and not bits and not identities and not one_step and not gaussian and not posterior and "
             "not any_space and not float64 and not known and not dtype3 and not autocast")  # fmt: skip
    for file in ("velocity", "steps", "resample"):
        run_tests(f"test_diffusion_{file}.py", "-k", f"cpu and {small}")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    zeros, ones = torch.zeros(3, 1, 1003), torch.ones(3)
    NOISE_OF_THE_CPU = torch.ops.tenfold.vdiff_noise_rng(zeros, ones, -5, 2**40)[0]
    tenfold.cpu_capabilities = lambda: [tenfold.cpu_capability()]  # none of them is asked
    stand_in((vdiff_noise, vdiff_noise_, vdiff_noise_rng, vdiff_noise_rng_, vdiff_loss, vdiff_loss_backward,
              vdiff_step, vdiff_step_, fir_down2, fir_down2_, fir_down2_backward, fir_up2_cat, fir_up2_cat_,
              fir_up2_backward, planes_add_, planes_sums))  # fmt: skip
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
