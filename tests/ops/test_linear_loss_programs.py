# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy and linear_logprob: layouts, determinism, memory, programs, bad input."""

import functools
import math

import pytest
import torch
from linear_loss_cases import FACES, problem, step

from tenfold import ops
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    check_deterministic,
    check_errors,
    check_isas_agree,
    check_op,
    check_opcheck,
    layout,
    on,
    peak_growth,
)  # fmt: skip

raw = torch.ops.tenfold


# -- layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(face, dtype, device):
    op = FACES[face][0]
    options = {"reduction": "none", "z_loss": 0.1} if face == "cross_entropy" else {}
    hidden, weight, target, _ = on(device, problem((36, 40, 101), dtype))
    ups = [x.to(device) for x in torch.randn(2, 36)]
    want = step(op, hidden, weight, target, ups, **options)
    turned = [(layout(hidden, kind), layout(weight, kind)) for kind in LAYOUTS]
    turned.append((hidden.t().contiguous().t(), weight.t().contiguous().t()))
    turned.append((torch.stack([hidden, hidden], 1)[:, 0], torch.stack([weight, weight], 1)[:, 1]))
    for mine in turned:
        for a, b in zip(step(op, *mine, target, ups, **options), want):
            assert torch.equal(a, b) and a.shape == b.shape
    for ids in (target.int(), torch.stack([target, target], -1)[:, 1]):
        for a, b in zip(step(op, hidden, weight, ids, ups, **options), want):
            assert torch.equal(a, b)
    folded = layout(hidden.view(4, 9, 40), "transposed")
    got = step(op, folded, weight, target.view(4, 9), [u.view(4, 9) for u in ups], **options)
    assert got[0].shape == got[1].shape == (4, 9) and got[2].shape == (4, 9, 40)
    for a, b in zip(got, want):
        assert torch.equal(a.reshape(b.shape), b)
    one = op(hidden[0], weight, target[0], **options)  # no leading dimension at all
    for a, b in zip(one, want):
        assert a.shape == () and torch.equal(a, b[0])


def test_row_weights_of_other_kinds(device):
    """Strided, expanded, of another floating dtype; and they have no gradient."""
    shape = (36, 20, 50)
    hidden, weight, target, row_weight = on(device, problem(shape, torch.float32, weighted=True))
    row_weight = row_weight.bfloat16().float()

    def run(row_weight, hidden=hidden):
        ups = torch.ones(()), None
        return step(ops.linear_cross_entropy, hidden, weight, target, ups, row_weight=row_weight)

    want = run(row_weight)
    every_other = torch.stack([row_weight, row_weight], -1)[:, 0]
    others = (
        every_other,
        row_weight.double(),
        row_weight.bfloat16(),
        row_weight.clone().requires_grad_(),
    )
    for other in others:
        for a, b in zip(run(other), want):
            assert torch.equal(a, b)
    filled, alike = hidden.nan_to_num(), torch.full((36,), 0.5, device=device)
    for a, b in zip(run(alike[:1].expand(36), filled), run(alike, filled)):
        assert torch.equal(a, b)


# -- determinism and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_runs_do_not_matter(dtype):
    """Many rows, and so many classes that the ranges of threads begin within the weight."""
    for shape in ((700, 33, 509), (5, 65, 9001)):
        hidden, weight, target, row_weight = problem(shape, dtype, weighted=True)
        call = functools.partial(step, ops.linear_cross_entropy)
        options = {"row_weight": row_weight, "z_loss": 0.1}
        for ups in ((torch.tensor(0.7), row_weight), (torch.tensor(0.7), None), (None, row_weight)):
            check_deterministic(call, (hidden, weight, target, ups), options)
        tensors = problem(shape, dtype)[:3]
        assert all(
            x.isfinite().all() for x in step(ops.linear_logprob, *tensors, (row_weight, row_weight))
        )
        call = functools.partial(step, ops.linear_logprob)
        check_deterministic(call, (*tensors, (row_weight, row_weight)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("face", FACES)
def test_rows_do_not_depend_on_their_batch(face, dtype, device):
    """Bit for bit, row by row and in pieces; the weight's gradient is the sum over pieces."""
    op = FACES[face][0]
    options = {"reduction": "none", "softcap": 5.0} if face == "cross_entropy" else {}
    hidden, weight, target, _ = on(device, problem((301, 40, 403), dtype))
    ups = [x.to(device) for x in torch.randn(2, 301)]
    whole = step(op, hidden, weight, target, ups, **options)
    grads = 0.0
    for start, stop in ((0, 1), (1, 2), (2, 50), (50, 150), (150, 301)):
        at = slice(start, stop)
        part = step(op, hidden[at], weight, target[at], [u[at] for u in ups], **options)
        for a, b in zip(part[:3], whole):
            assert torch.equal(a, b[at])
        grads = grads + part[3].double()
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    top = float(whole[3].abs().max())
    torch.testing.assert_close(whole[3].double(), grads, rtol=close, atol=close * top)


def test_instruction_sets_agree_in_float32():
    shape = (100, 47, 301)
    hidden, weight, target, row_weight = problem(shape, torch.float32, weighted=True)
    call = functools.partial(step, ops.linear_cross_entropy, softcap=8.0, row_weight=row_weight)
    check_isas_agree(call, (hidden, weight, target, (torch.tensor(1.0), row_weight)))
    call = functools.partial(step, ops.linear_logprob)
    check_isas_agree(call, (*problem(shape, torch.float32)[:3], (row_weight, row_weight)))


MEMORY = """
    from tenfold import ops, reference
    def inputs(n, v):
        hidden, weight = torch.randn(n, 32), torch.randn(v, 32)
        return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, v, (n,))
    def step(source, n_and_tensors):
        values = getattr(source, "{op}")(*n_and_tensors)
        (values[0].sum() + values[1].sum()).backward()
    step(ops, inputs(50, 50))
    step(reference, inputs(50, 50))
    mine = inputs({n}, {v})
"""


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprob"])
def test_memory_stays_at_the_gradients(op):
    """Forward and backward: far below the [N, V] logits; four times the classes add their gradient and no more."""
    n, few, many = 1024, 8192, 32768
    small, large = (
        peak_growth(MEMORY.format(op=op, n=n, v=v), "step(ops, mine)") for v in (few, many)
    )
    assert large < 4 * n * many // 6
    # The gradient, once more where autograd passes it on, and 2 MB.
    assert large - small < 2 * 4 * 32 * (many - few) + (2 << 20)


def test_memory_of_the_definition_is_that_of_logits():
    """That the measurement above would see them."""
    setup = MEMORY.format(op="linear_cross_entropy", n=1024, v=16384)
    assert peak_growth(setup, "step(reference, mine)") > 4 * 1024 * 16384


# -- in programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", FACES)
def test_only_what_is_asked_for(face, device):
    """Frozen weight, frozen hidden, nothing: values and the other gradient are bit for bit the same."""
    op = FACES[face][0]
    hidden, weight, target, _ = on(device, problem((60, 30, 203), torch.float32))
    up = torch.ones(() if face == "cross_entropy" else 60, device=device)
    want = step(op, hidden, weight, target, (up, None))
    for frozen in (0, 1):
        args = [hidden.detach(), weight.detach()]
        args[1 - frozen].requires_grad_()
        values = op(*args, target)
        assert all(v.requires_grad for v in values)
        (grad,) = torch.autograd.grad(values[0], [args[1 - frozen]], up)
        assert torch.equal(grad, want[3 - frozen])
        for a, b in zip(values, want):
            assert torch.equal(a, b)
    plain = op(hidden.detach(), weight.detach(), target)
    with torch.no_grad():
        quiet = op(hidden.requires_grad_(), weight.requires_grad_(), target)
    for a, b, c in zip(plain, quiet, want):
        assert not a.requires_grad and not b.requires_grad
        assert torch.equal(a, c) and torch.equal(b, c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("face", FACES)
def test_backward_may_run_again_with_other_gradients(face, dtype, device):
    op = FACES[face][0]
    hidden, weight, target, _ = on(device, problem((60, 30, 203), dtype))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    value, second = op(*leaves, target)
    up = torch.ones_like(value)
    first = torch.autograd.grad(value, leaves, up, retain_graph=True)
    kept = [x.clone() for x in first]
    other = torch.autograd.grad(value, leaves, -2 * up, retain_graph=True)
    mixed = torch.autograd.grad(
        [value, second], leaves, [up, torch.ones_like(second)], retain_graph=True
    )
    again = torch.autograd.grad(value, leaves, up)
    both = step(op, hidden, weight, target, (up, torch.ones_like(second)))[2:]
    for a, k, b, c, m, n in zip(first, kept, other, again, mixed, both):
        assert torch.equal(a, k) and torch.equal(a, c)
        close = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(m, n, rtol=close, atol=close * float(n.abs().max()))
        # Twice a number is exact, but where a float16 is subnormal.
        atol = 2.0**-23 if dtype == torch.float16 else 0
        torch.testing.assert_close(b, -2 * a, rtol=0, atol=atol)


def test_a_weight_changed_before_the_backward_is_not_used_silently(device):
    hidden, weight, target, _ = on(device, problem((60, 30, 203), torch.float32))
    want = step(ops.linear_cross_entropy, hidden, weight, target, (torch.ones(()), None))[2:]
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _ = ops.linear_cross_entropy(*leaves, target)
    with torch.no_grad():
        leaves[1].add_(1.0)
    try:
        got = torch.autograd.grad(loss, leaves)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("face", FACES)
def test_double_backward_is_refused(face, device):
    hidden, weight, target, _ = on(device, problem((6, 5, 7), torch.float32))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    value, _ = FACES[face][0](*leaves, target)
    with pytest.raises(RuntimeError, match="inference only"):
        torch.autograd.grad(value.sum(), leaves, create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_standing_checks(dtype, device):
    numbers = problem((40, 33, 101), dtype, weighted=True, poison=False)  # opcheck: NaN is not NaN
    hidden, weight, target, row_weight = on(device, numbers)
    close = {"rtol": 1e-5, "atol": 1e-5}
    check_op(raw.linear_cross_entropy.default, (hidden, weight, target), {}, **close)
    options = {"row_weight": row_weight, "softcap": 3.0, "z_loss": 0.1, "reduction": "none"}
    check_op(raw.linear_cross_entropy.default, (hidden, weight, target), options, **close)
    check_op(raw.linear_logprob.default, (hidden, weight, target, 0.7), {}, **close)
    for h, w in ((True, True), (True, False), (False, True)):
        leaves = hidden.clone().requires_grad_(h), weight.clone().requires_grad_(w)
        check_opcheck(raw.linear_cross_entropy.default, (*leaves, target), {} if h else options)
        if dtype == torch.float32:
            check_opcheck(raw.linear_logprob.default, (*leaves, target))


def test_autocast(device):
    hidden, weight, target, _ = on(device, problem((20, 16, 50), torch.float32))
    for face, (op, _, _) in FACES.items():
        up = torch.ones(() if face == "cross_entropy" else 20)
        want = step(op, hidden.bfloat16(), weight.bfloat16(), target, (up, None))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            got = step(op, hidden, weight, target, (up, None))
            mixed = step(op, hidden.bfloat16(), weight, target, (up, None))
        assert got[2].dtype == got[3].dtype == mixed[3].dtype == torch.float32
        for a, b, c in zip(got, mixed, want):
            assert torch.equal(a, c.float()) and torch.equal(b.float(), c.float())


@pytest.mark.parametrize("face", FACES)
def test_training_step_compiles_whole(face):
    """Also for another number of rows, without a second compilation for every number."""
    op = FACES[face][0]
    options = {"softcap": 5.0, "z_loss": 1e-3} if face == "cross_entropy" else {"temperature": 0.8}

    def total(hidden, weight, target):
        first, second = op(hidden, weight, target, **options)
        return first.sum() + second.sin().mean()

    def run_(function, *args):
        leaves = [x.clone().requires_grad_() for x in args[:2]]
        value = function(*leaves, args[2])
        return value.detach(), *torch.autograd.grad(value, leaves)

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (40, 41, 57):
        args = problem((n, 33, 101), torch.float32)[:3]
        for a, b in zip(run_(compiled, *args), run_(total, *args)):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_step_against_the_gradient_lowers_the_loss(device):
    hidden, weight, target, _ = on(device, problem((60, 30, 203), torch.float32))
    loss, _, dh, dw = step(ops.linear_cross_entropy, hidden, weight, target, (torch.ones(()), None))
    after, _ = ops.linear_cross_entropy(hidden - 0.1 * dh, weight - 0.1 * dw, target)
    slope = 0.1 * float(dh.square().sum() + dw.square().sum())
    assert 0.5 * slope < float(loss - after) < 1.5 * slope


# -- bad input ---------------------------------------------------------------------------------------


def bad(device, error, *words, face="linear_cross_entropy", options=None, **changed):
    target = torch.tensor([0, 1, 10, -100, 4])
    good = {"hidden": torch.ones(5, 8), "weight": torch.ones(11, 8), "target": target}
    args = on(device, list((good | changed).values()))
    check_errors(
        getattr(ops, face), getattr(raw, face), args, on(device, options or {}), error, face, *words
    )


FACE_NAMES = {"linear_cross_entropy": "target", "linear_logprob": "ids"}


@pytest.mark.parametrize("face", FACE_NAMES)
def test_bad_tensors(face, device):
    no, ids = functools.partial(bad, device, face=face), FACE_NAMES[face]
    no(
        TypeError,
        "hidden",
        "float64",
        hidden=torch.ones(5, 8).double(),
        weight=torch.ones(11, 8).double(),
    )
    no(
        TypeError,
        "hidden",
        "int64",
        hidden=torch.ones(5, 8).long(),
        weight=torch.ones(11, 8).long(),
    )
    no(ValueError, "weight", "dtype", "bfloat16", weight=torch.ones(11, 8).bfloat16())
    no(ValueError, "weight", "[11, 7]", weight=torch.ones(11, 7))
    no(ValueError, "weight", "[8]", weight=torch.ones(8))
    no(ValueError, "weight", "[1, 11, 8]", weight=torch.ones(1, 11, 8))
    no(ValueError, "weight", "[0, 8]", weight=torch.ones(0, 8))
    no(ValueError, ids, "[4]", target=torch.zeros(4).long())
    no(ValueError, ids, "[1, 5]", target=torch.zeros(1, 5).long())
    no(TypeError, ids, "int32 or int64", "float32", target=torch.zeros(5))
    no(TypeError, ids, "bool", target=torch.zeros(5).bool())
    if device.type != "cpu":
        args = [
            torch.ones(3, 8, device=device),
            torch.ones(11, 8),
            torch.zeros(3, device=device).long(),
        ]
        check_errors(
            getattr(ops, face), getattr(raw, face), args, {}, ValueError, "weight", "device"
        )


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature(face, temperature, device):
    bad(device, ValueError, "temperature", face=face, options={"temperature": temperature})


@pytest.mark.parametrize("face", FACE_NAMES)
def test_leading_dimensions_that_do_not_match(face, device):
    """The ops themselves take matrices only."""
    with pytest.raises(ValueError, match=f"{face}: hidden"):
        one = torch.ones((), device=device)
        getattr(ops, face)(one, torch.ones(11, 8, device=device), one.long())
    hidden, weight = torch.ones(3, 5, 8, device=device), torch.ones(11, 8, device=device)
    for shape in ((3, 4), (15,), (5, 3), (3, 5, 1), ()):
        with pytest.raises(ValueError, match=FACE_NAMES[face]) as caught:
            getattr(ops, face)(hidden, weight, torch.zeros(shape, dtype=torch.int64, device=device))
        assert face in str(caught.value)
    if face == "linear_cross_entropy":
        target = torch.zeros(3, 5, dtype=torch.int64, device=device)
        for shape in ((15,), (5, 3), (3, 1)):
            with pytest.raises(ValueError, match="row_weight"):
                ops.linear_cross_entropy(
                    hidden, weight, target, row_weight=torch.ones(shape, device=device)
                )


def test_bad_options(device):
    no = functools.partial(bad, device)
    no(ValueError, "reduction", "avg", "mean", "sum", "none", options={"reduction": "avg"})
    no(ValueError, "softcap", "-1", options={"softcap": -1.0})
    no(ValueError, "z_loss", "-1", options={"z_loss": -1.0})
    for value in (math.nan, math.inf):  # a softcap of inf would be inf * tanh(0)
        no(ValueError, "softcap", options={"softcap": value})
        no(ValueError, "z_loss", options={"z_loss": value})
    no(ValueError, "row_weight", "[4]", options={"row_weight": torch.ones(4)})
    no(ValueError, "row_weight", "[1, 5]", options={"row_weight": torch.ones(1, 5)})
    no(TypeError, "row_weight", "int64", options={"row_weight": torch.ones(5).long()})
    no(TypeError, "row_weight", "bool", options={"row_weight": torch.ones(5).bool()})


def test_bad_targets():
    """CPU only: CUDA does not wait for values on the device."""
    for value in (11, -1, -101, 2**40, -(2**40)):
        target = torch.tensor([0, 1, 10, -100, value])
        bad("cpu", IndexError, "target", str(value), target=target)
        if abs(value) < 2**31:
            bad("cpu", IndexError, "target", str(value), target=target.int())
    bad("cpu", IndexError, "target", "-100", options={"ignore_index": -1})
    # A row of weight 0 is skipped, its target with it.
    tensors = torch.ones(3, 8), torch.ones(11, 8), torch.tensor([99, 0, 1])
    loss, _ = ops.linear_cross_entropy(*tensors, row_weight=torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(loss, torch.tensor(math.log(11)))
