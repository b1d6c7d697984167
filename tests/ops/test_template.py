# SPDX-License-Identifier: Apache-2.0
"""The template family, tested the way every family is."""

import pytest
import torch

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    LENGTHS,
    VALUES,
    assert_close_to_ref,
    check_compiles,
    check_cuda_graph,
    check_deterministic,
    check_errors,
    check_inputs_unmodified,
    check_isas_agree,
    check_opcheck,
    check_strides_equal_fake,
    fill,
    layout,
)  # fmt: skip
from tenfold.testing.plugin import cuda_only

op = torch.ops.tenfold.template_scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_matches_reference(dtype, kind, device):
    for n in LENGTHS:
        x = fill((2, 3, n), dtype)
        got = ops.template_scale(layout(x.to(device), kind), 1.7)
        assert got.device.type == device.type and got.dtype == dtype and got.is_contiguous()
        assert_close_to_ref(got.cpu(), x.double() * 1.7, reference.template_scale(x, 1.7))


@pytest.mark.parametrize("values", VALUES)
def test_values(values, device):
    x = fill((37,), torch.float32, values)
    assert_close_to_ref(ops.template_scale(x.to(device), 0.5).cpu(), x.double() * 0.5, x * 0.5)


def test_standing_checks(device):
    x = fill((5, 100_003), torch.bfloat16).to(device)
    check_opcheck(op, (x[:, :70].clone().requires_grad_(), 2.0))
    check_compiles(ops.template_scale, (x, 2.0))
    check_inputs_unmodified(op, (x, 3.0))
    check_strides_equal_fake(op, (x[:, :70], 3.0))


def test_threads_and_isas_agree():
    x = fill((5, 100_003), torch.bfloat16)
    check_deterministic(op, (x, 3.0))
    check_isas_agree(op, (x, 3.0), rtol=0, atol=0)


def test_compiles_with_inductor():
    x = fill((5, 100_003), torch.bfloat16)
    check_compiles(ops.template_scale, (x, 2.0), backend="inductor", dynamic=None)


@cuda_only
def test_cuda_graph(device):
    x, y = (fill((3, 1001), torch.float16, seed=s).to(device) for s in (0, 1))
    check_cuda_graph(ops.template_scale, (x, 1.7), None, (y, 1.7))


def test_gradient(device):
    x = fill((17,), torch.float32).to(device).requires_grad_()
    ops.template_scale(x, 3.0).sum().backward()
    assert torch.equal(x.grad.cpu(), torch.full((17,), 3.0))


def test_bad_input(device):
    x = fill((3,), torch.float32).to(device)
    check_errors(ops.template_scale, op, (x, float("nan")), {}, ValueError, "scale", "finite")
    check_errors(
        ops.template_scale, op, (x.double(), 1.0), {}, TypeError, "x", "float64", "float16"
    )
