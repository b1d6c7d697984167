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
    check_deterministic,
    check_errors,
    check_isas_agree,
    check_opcheck,
    fill,
    layout,
)  # fmt: skip

op = torch.ops.tenfold.template_scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_matches_reference(dtype, kind):
    for n in LENGTHS:
        x = layout(fill((2, 3, n), dtype), kind)
        assert_close_to_ref(ops.template_scale(x, 1.7), x.double() * 1.7,
                            reference.template_scale(x, 1.7))  # fmt: skip


@pytest.mark.parametrize("values", VALUES)
def test_values(values):
    x = fill((37,), torch.float32, values)
    assert_close_to_ref(ops.template_scale(x, 0.5), x.double() * 0.5, x * 0.5)


def test_standing_checks():
    x = fill((5, 100_003), torch.bfloat16)
    check_opcheck(op, (x[:, :70].clone().requires_grad_(), 2.0))
    check_compiles(ops.template_scale, (x, 2.0))
    check_compiles(ops.template_scale, (x, 2.0), backend="inductor", dynamic=None)
    check_deterministic(op, (x, 3.0))
    check_isas_agree(op, (x, 3.0), rtol=0, atol=0)


def test_gradient():
    x = fill((17,), torch.float32).requires_grad_()
    ops.template_scale(x, 3.0).sum().backward()
    assert torch.equal(x.grad, torch.full((17,), 3.0))


def test_bad_input():
    x = fill((3,), torch.float32)
    check_errors(ops.template_scale, op, (x, float("nan")), {}, ValueError, "scale", "finite")
    check_errors(
        ops.template_scale, op, (x.double(), 1.0), {}, TypeError, "x", "float64", "float16"
    )
