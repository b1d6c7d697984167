# SPDX-License-Identifier: Apache-2.0
"""linear_wgrad_rows against the row slice of the whole weight gradient."""

import pytest
import torch

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    VALUES,
    assert_close_to_ref,
    check_compiles,
    check_errors,
    check_op,
    fill,
    layout,
    poisoned_memory,
)  # fmt: skip

raw = torch.ops.tenfold
# tokens, out, in, rows: zero of each, one, odd sizes, past the tiles of a GEMM, past what is packed at once
SHAPES = [(1, 1, 1, 1), (0, 5, 7, 3), (3, 0, 7, 0), (3, 5, 0, 2), (3, 5, 7, 0), (7, 31, 33, 15), (64, 48, 32, 24),
          (33, 257, 65, 130), (130, 64, 300, 64), (257, 100, 129, 1),
          (2700, 60, 2100, 27), (2100, 250, 2500, 210)]  # fmt: skip


def problem(tokens, out, in_, rows, dtype=torch.float32):
    made = torch.Generator().manual_seed(tokens + out)
    at = torch.randperm(out, generator=made)[:rows].sort().values
    return fill((tokens, out), dtype, seed=1), fill((tokens, in_), dtype, seed=2), at


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_is_the_row_slice_of_the_whole_gradient(shape, dtype, index, device):
    dy, x, rows = problem(*shape, dtype)
    with poisoned_memory():
        got = ops.linear_wgrad_rows(dy.to(device), x.to(device), rows.to(index).to(device))
    assert got.dtype == dtype and got.is_contiguous() and got.device.type == device.type
    want = (dy.double().t() @ x.double())[rows]
    assert_close_to_ref(got.cpu(), want, (dy.t() @ x)[rows])
    assert_close_to_ref(reference.linear_wgrad_rows(dy, x, rows), want, (dy.t() @ x)[rows])


def test_the_definition_in_fp64():
    """1e-12 against what autograd gives the weight of a linear layer."""
    dy, x, rows = problem(50, 30, 20, 13)
    dy, x = dy.double(), x.double()
    weight = torch.zeros(30, 20, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.linear(x, weight).backward(dy)
    got = reference.linear_wgrad_rows(dy, x, rows)
    torch.testing.assert_close(got, weight.grad[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 4)])
def test_leading_dimensions(lead, device):
    dy, x = fill((*lead, 21), torch.float32, seed=1), fill((*lead, 9), torch.float32, seed=2)
    rows = torch.arange(0, 21, 3)
    want = (dy.reshape(-1, 21).double().t() @ x.reshape(-1, 9).double())[rows]
    got = ops.linear_wgrad_rows(dy.to(device), x.to(device), rows.to(device))
    assert_close_to_ref(got.cpu(), want)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(kind, dtype, device):
    dy, x, rows = (t.to(device) for t in problem(4 * 9, 40, 24, 17, dtype))
    want = ops.linear_wgrad_rows(dy, x, rows)
    mine = [layout(t.view(4, 9, -1), kind) for t in (dy, x)]
    got = ops.linear_wgrad_rows(*mine, rows)
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)
    turned = [t.t().contiguous().t() for t in (dy, x)]
    got = ops.linear_wgrad_rows(*turned, rows)
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)
    every_other = torch.stack([rows, rows], -1).flatten()[::2]
    assert torch.equal(ops.linear_wgrad_rows(dy, x, every_other), want)
    spread = torch.ones(1, 1, device=device, dtype=dtype).expand(
        36, 40
    )  # what sum().backward() gives
    got = ops.linear_wgrad_rows(spread, x, rows)
    torch.testing.assert_close(got, x.float().sum(0).to(dtype).expand(17, 24), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("values", VALUES)
def test_values(values, device):
    dy, x, rows = problem(20, 30, 10, 11)
    x = fill(x.shape, torch.float32, values, seed=2)
    want = (dy.double().t() @ x.double())[rows]
    got = ops.linear_wgrad_rows(dy.to(device), x.to(device), rows.to(device))
    assert_close_to_ref(got.cpu(), want, (dy.t() @ x)[rows])


def test_frozen_rows_are_not_read(device):
    dy, x, rows = problem(20, 30, 10, 11)
    want = ops.linear_wgrad_rows(dy.to(device), x.to(device), rows.to(device))
    off = torch.ones(30, dtype=torch.bool)
    off[rows] = False
    dy[:, off] = float("nan")
    assert torch.equal(ops.linear_wgrad_rows(dy.to(device), x.to(device), rows.to(device)), want)


def test_sums_of_many_tokens_stay_in_fp32(device):
    """Ones over 5000 tokens: bfloat16 sums would stop at 256."""
    dy, x = (torch.ones(5000, k, dtype=torch.bfloat16, device=device) for k in (8, 16))
    got = ops.linear_wgrad_rows(dy, x, torch.tensor([0, 7], device=device))
    assert torch.equal(got, torch.full((2, 16), 5000.0, device=device).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_standing_checks(dtype, device):
    dy, x, rows = (t.to(device) for t in problem(40, 33, 21, 9, dtype))
    check_op(raw.linear_wgrad_rows.default, (dy, x, rows), rtol=1e-2, atol=1e-3)


def test_compiles_with_inductor():
    check_compiles(ops.linear_wgrad_rows, problem(40, 33, 21, 9), backend="inductor", dynamic=None)


def test_bad_input(device):
    dy, x, rows = problem(20, 30, 10, 11)

    def bad(error, *words, **changes):
        args = {"grad_out": dy, "input": x, "rows": rows} | changes
        check_errors(ops.linear_wgrad_rows, raw.linear_wgrad_rows, [t.to(device) for t in args.values()],
                     {}, error, "linear_wgrad_rows", *words)  # fmt: skip

    bad(ValueError, "input", "[19, 10]", input=x[:19])
    bad(ValueError, "dtype", grad_out=dy.half())
    bad(TypeError, "float64", grad_out=dy.double(), input=x.double())
    bad(TypeError, "int64", grad_out=dy.long(), input=x.long())
    bad(TypeError, "rows", "float32", rows=rows.float())
    bad(ValueError, "rows", "[1, 11]", rows=rows[None])
    bad(ValueError, "grad_out", grad_out=dy[0, 0], input=x[0, 0])
    with pytest.raises(RuntimeError, match="inference only"):
        ops.linear_wgrad_rows(dy.to(device).requires_grad_(), x.to(device), rows.to(device))


def test_bad_rows():
    """CPU only: CUDA does not wait for values on the device."""
    dy, x, _ = problem(20, 30, 10, 11)
    call = ops.linear_wgrad_rows, raw.linear_wgrad_rows
    for rows, error, words in (([3, 3], ValueError, ["strictly increasing"]), ([4, 2], ValueError, ["increasing"]),
                               ([0, 30], IndexError, ["30"]), ([-1, 3], IndexError, ["-1"])):  # fmt: skip
        check_errors(*call, (dy, x, torch.tensor(rows)), {}, error, "rows", *words)
