# SPDX-License-Identifier: Apache-2.0
"""masked_adamw_8bit_: blockwise 8-bit states against the definition, and against float32 states."""

import pytest
import torch
from optim_cases import (
    BF16,
    F16,
    F32,
    FLAT,
    KINDS,
    assert_lists,
    check_against,
    copies,
    hyper,
    make,
    make_8bit,
    mask_of,
    moved,
    shapes_of,
    steps,
)  # fmt: skip

from tenfold import ops, optim, reference
from tenfold.reference.optim.adamw import dequantize, nearest_code
from tenfold.reference.optim.masks import trained_elements
from tenfold.testing import (
    DTYPES,
    check_compiles,
    check_deterministic,
    check_op,
    peak_growth,
    threads,
)
from tenfold.testing.plugin import cuda_only

STEP = ops.masked_adamw_8bit_
RAW = torch.ops.tenfold.masked_adamw_8bit_


def check(lists, device, count=3, **kwargs):
    return check_against(STEP, reference.masked_adamw_8bit_, lists, device, count, **kwargs)


def fresh(p, device, kind="none", mask=None):
    """The lists of a first step."""
    lists = make_8bit([p.shape], p.dtype, kind, masks=[mask])
    lists |= {"params": [p], "steps": [torch.zeros(())]}
    for code, state, absmax in (
        ("code1", "exp_avgs", "absmax1"),
        ("code2", "exp_avg_sqs", "absmax2"),
    ):
        zero = int((lists[code] == 0).nonzero())
        lists[state] = [torch.full(p.shape, zero, dtype=torch.uint8)]
        lists[absmax] = [torch.zeros_like(lists[absmax][0])]
    return copies(lists, device)


def states(lists, i=0):
    """m and v of a tensor in float32."""
    there = copies(lists)
    return [dequantize(there[s][i].flatten(), there[a][i], there[c])
            for s, a, c in (("exp_avgs", "absmax1", "code1"), ("exp_avg_sqs", "absmax2", "code2"))]  # fmt: skip


# -- the code book -----------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_code(signed):
    code = optim.dynamic_code(signed)
    assert code.dtype == torch.float32 and code.shape == (256,)
    assert (
        bool((code.diff() > 0).all()) and float(code.max()) == 1.0 and int((code == 0).sum()) == 1
    )
    least = float(code[code > 0].min())
    assert least == pytest.approx(0.55e-6 if signed else 0.325e-6, rel=1e-6)
    if signed:  # symmetric but for 1
        assert torch.equal(code[:127], -code[128:255].flip(0)) and float(code[127]) == 0
        assert float(code.min()) == pytest.approx(-(1 - 0.45 / 64), rel=1e-6)
    else:
        assert float(code[0]) == 0 and float(code[254]) == pytest.approx(1 - 0.45 / 128, rel=1e-6)
    for power in range(7):  # numbers of fractions in (10^-k-1, 10^-k)
        inside = (code > 10.0 ** (power - 7)) & (code < 10.0 ** (power - 6))
        assert int(inside.sum()) == 2 ** (power + (not signed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_definitions_nearest_code(signed):
    code = reference.dynamic_code(signed)
    x = torch.cat([code, torch.linspace(-1.0, 1.0, 5001), torch.tensor([-3.0, 3.0])])
    distance = (x.double()[:, None] - code.double()).abs()
    assert torch.equal(nearest_code(x, code).long(), distance.argmin(1))  # the first of equals
    assert torch.equal(nearest_code(code, code).long(), torch.arange(256))
    tie = torch.arange(256).float()
    assert nearest_code(torch.tensor([0.5, 1.5, 254.5, -1.0, 300.0]), tie).tolist() == [
        0,
        1,
        254,
        0,
        255,
    ]


# -- acceptance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 255, 256])
@pytest.mark.parametrize("g", [0.37, -2.5])
def test_constant_block_is_exact_up_to_the_code_book(n, g, device):
    """One block of equal gradients: v, and m where it is positive, are exactly its absmax."""
    lists, grad = fresh(torch.full((n,), 0.5), device), torch.full((n,), g, device=device)
    p, m, v = torch.full((n,), 0.5), torch.zeros(n), torch.zeros(n)
    exact = [[p], [torch.full((n,), g)], [m], [v], [torch.zeros(())], []]
    for _ in range(30):
        STEP(*(lists | {"grads": [grad]}).values(), mask_kind="none", **hyper())
        reference.masked_adamw_(*exact, mask_kind="none", **hyper())
        got_m, got_v = states(lists)
        assert torch.equal(got_v, v)
        if g > 0:
            assert torch.equal(got_m, m) and torch.equal(lists["params"][0].cpu(), p)
        else:  # -1 is not in the code book; every step adds up to one spacing again
            torch.testing.assert_close(got_m, m, rtol=0.45 / 64 / 0.1, atol=0)


def test_quadratic_converges_as_with_fp32_states(device):
    """1/2 |p - t|^2, n = 4096: within 5 % after 100 steps, 15 % after 200."""
    target = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(device)
    kwargs = {"mask_kind": "none"} | hyper(weight_decay=0.0)
    lists = fresh(torch.zeros(4096), device)
    (p, m, v), step = torch.zeros(3, 4096, device=device), torch.zeros((), device=device)
    for k in range(1, 201):
        lists["grads"] = [lists["params"][0] - target]
        STEP(*lists.values(), **kwargs)
        ops.masked_adamw_([p], [p - target], [m], [v], [step], [], **kwargs)
        if k in (100, 200):
            loss, want = (
                0.5 * float((x - target).square().mean()) for x in (lists["params"][0], p)
            )
            assert abs(loss / want - 1) < {100: 0.05, 200: 0.15}[k]


# -- against the definition --------------------------------------------------------------------------


def grid():
    flags = [{}, {"maximize": True, "clip_coef": torch.tensor(0.3)}, {"grad_scale": torch.tensor(128.0)},
             {"stochastic_round": True, "seed": -3}, {"weight_decay": 0.0, "beta1": 0.3}]  # fmt: skip
    for i, dtype in enumerate(DTYPES):
        for j, kind in enumerate(KINDS):
            for f, changes in enumerate(flags):
                if dtype == F16 and "stochastic_round" in changes:
                    continue
                late = (i + j + f) % 3 != 0
                yield pytest.param(dtype, kind, changes, marks=[pytest.mark.slow] if late else [])


@pytest.mark.parametrize(("dtype", "kind", "changes"), grid())
def test_matches_the_definition(dtype, kind, changes, device):
    check(make_8bit(shapes_of(kind), dtype, kind), device, mask_kind=kind, **hyper(**changes))


@pytest.mark.parametrize(("kind", "shape"), [("none", (65537,)), ("element", (65537,)), ("block", (65537,)),
                                             ("row", (257, 601)), ("col", (257, 601))])  # fmt: skip
def test_large_tensors_match_the_definition(kind, shape, device):
    check(make_8bit([shape, shape], BF16, kind), device, 2, mask_kind=kind, **hyper())


@pytest.mark.parametrize("block", [32, 1024])
def test_block_sizes_other_than_that_of_the_states(block, device):
    lists = make_8bit([*FLAT, (5003,)], kind="block", block=block)
    check(lists, device, mask_kind="block", block_size=block, **hyper())


@pytest.mark.parametrize("kind", ["none", "block", "element"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, kind, device):
    """State blocks run along the storage; offsets of pointers differ."""
    lists = make_8bit([(3, 8, 5, 7), (37, 19), (600,), (600,)], dtype, kind)
    for at, name in enumerate(("params", "grads", "exp_avgs", "exp_avg_sqs")):
        x = lists[name]
        x[0] = x[0].contiguous(memory_format=torch.channels_last)
        x[1] = x[1].t().contiguous().t()
        x[2:] = [torch.empty(600 + k, dtype=y.dtype)[k:].copy_(y) for k, y in zip((1, at), x[2:])]
    check(lists, device, mask_kind=kind, **hyper())


def test_other_code_books(device):
    """Any ascending 256 values; several blocks of zeros among them give ties."""
    lists = make_8bit([(4099,), (3,)], kind="element")
    lists["code1"] = torch.linspace(-1, 1, 256)
    lists["code2"] = torch.arange(256) / 255.0
    check(lists, device, mask_kind="element", **hyper())


def test_one_call_mixes_dtypes_and_masks(device):
    lists = make_8bit([])
    for i in range(9):
        mask = mask_of((1000 + i,), "element", seed=i) if i % 3 else None
        one = make_8bit([(1000 + i,)], DTYPES[i % 2], "element", masks=[mask])
        for name in lists:
            lists[name] = one[name] if name.startswith("code") else lists[name] + one[name]
    check(lists, device, mask_kind="element", **hyper())


# -- frozen parts and special values -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_mask_changes_no_bit(dtype, kind, device):
    shapes = shapes_of(kind)
    lists = make_8bit(shapes, dtype, kind, masks=[mask_of(s, kind, 0.0) for s in shapes])
    for name in ("params", "grads", "absmax1", "absmax2"):
        for x in lists[name]:
            x.view(-1)[::3] = float("nan")
    got = copies(lists, device)
    STEP(*got.values(), mask_kind=kind, maximize=True, **hyper(weight_decay=0.5))
    lists["steps"] = [s + 1 for s in lists["steps"]]
    assert_lists(got, lists, strict=True)


def test_frozen_elements_in_a_trained_block_keep_their_byte_and_are_rescaled(device):
    lists = make_8bit([(512,)], kind="element", masks=[torch.full((64,), 0x55, dtype=torch.uint8)])
    got = copies(lists, device)
    STEP(*got.values(), mask_kind="element", **hyper())
    for name in ("exp_avgs", "exp_avg_sqs"):
        assert torch.equal(got[name][0].cpu()[1::2], lists[name][0][1::2])
    for before, after, absmax in zip(states(lists), states(got), ("absmax1", "absmax2")):
        ratio = (got[absmax][0].cpu() / lists[absmax][0]).repeat_interleave(256)
        torch.testing.assert_close(after[1::2], (before * ratio)[1::2])


def test_blocks_without_trained_elements_are_not_read(device):
    """NaN everywhere in a frozen block: it stays there, and its neighbours are as without it."""
    mask = reference.pack_mask(torch.arange(1000) // 256 != 1)
    lists = make_8bit([(1000,)], kind="element", masks=[mask])
    lists["absmax1"][0][1], lists["absmax2"][0][1] = float("nan"), float("inf")
    lists["grads"][0][256:512] = lists["params"][0][256:512] = float("nan")
    got = check(lists, device, mask_kind="element", **hyper())
    on = trained_elements(lists["params"][0], mask, "element")
    assert not got["params"][0][on].isnan().any() and bool(got["params"][0][~on].isnan().all())
    for name in ("absmax1", "absmax2"):
        assert bool(got[name][0][[0, 2, 3]].isfinite().all()) and not got[name][0][1].isfinite()


def test_zero_states_take_the_code_of_zero(device):
    lists = fresh(torch.randn(300), device)
    lists["grads"] = [torch.zeros(300, device=device)]
    STEP(*lists.values(), mask_kind="none", **hyper())
    assert bool((lists["exp_avgs"][0] == 127).all()) and not lists["exp_avg_sqs"][0].any()
    assert not lists["absmax1"][0].any() and not lists["absmax2"][0].any()
    assert not lists["params"][0].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_spoils_its_own_block_only(bad, device):
    lists = make_8bit([(1000,)])
    lists["grads"][0][300] = bad
    clean = steps(
        reference.masked_adamw_8bit_, make_8bit([(1000,)]), 1, {"mask_kind": "none"} | hyper()
    )
    got = copies(lists, device)
    STEP(*got.values(), mask_kind="none", **hyper())
    p, want = got["params"][0].cpu(), clean["params"][0]
    assert p[300].isnan()
    others = torch.arange(1000) != 300
    assert torch.equal(p[others], want[others])  # p comes from the states before they are stored
    outside = torch.arange(1000) // 256 != 1
    for name in ("exp_avgs", "exp_avg_sqs"):
        assert torch.equal(got[name][0].cpu()[outside], clean[name][0][outside])
    for name in ("absmax1", "absmax2"):
        assert torch.equal(got[name][0].cpu()[[0, 2, 3]], clean[name][0][[0, 2, 3]])


@pytest.mark.parametrize("found", [1.0, float("nan"), 0.0])
def test_found_inf(found, device):
    lists = make_8bit(FLAT, BF16, "element")
    got, flag = copies(lists, device), torch.tensor(found, device=device)
    STEP(*got.values(), mask_kind="element", found_inf=flag, **hyper())
    want = copies(lists)
    if found == 0:
        reference.masked_adamw_8bit_(*want.values(), mask_kind="element", **hyper())
    assert_lists(got, want, strict=True)


def test_empty_lists_and_tensors(device):
    lists = copies(make_8bit([]), device)
    STEP(*lists.values(), mask_kind="none", **hyper())
    lists = copies(make_8bit([(0,), (3, 0)]), device)
    STEP(*lists.values(), mask_kind="none", **hyper())
    assert [float(s) for s in lists["steps"]] == [1.0, 2.0]


# -- standing checks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_runs(kind):
    lists = make_8bit([(300, 500), (0, 3), (7, 9), (129, 1000)], BF16, kind)

    def call(*args):
        STEP(*args, mask_kind=kind, stochastic_round=True, **hyper())
        return args

    check_deterministic(call, tuple(lists.values()))


@pytest.mark.parametrize("kind", ["none", "element"])
def test_standing_checks(kind, device):
    lists = make_8bit([(6, 90), (300,)], F32, kind)
    extra = {"grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0),
             "clip_coef": torch.tensor(0.5)}  # fmt: skip
    kwargs = moved({"mask_kind": kind} | hyper(**extra), device)
    args = tuple(copies(lists, device).values())
    check_op(RAW.default, args, kwargs, mutates=True, rtol=0, atol=0)


def test_compiles_with_inductor():
    lists = make_8bit([(6, 90), (40,)], BF16, "element")

    def call(*args):
        STEP(*args, mask_kind="element", **hyper())
        return [x.clone() for i in (0, 2, 3, 4, 6, 7) for x in args[i]]

    check_compiles(call, tuple(lists.values()), backend="inductor", dynamic=None)


def test_refusal_under_grad_mode(device):
    lists = copies(make_8bit([(33,)]), device)
    lists["params"][0].requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        STEP(*lists.values(), mask_kind="none", **hyper())
    with torch.no_grad(), threads(1):
        STEP(*lists.values(), mask_kind="none", **hyper())
    assert float(lists["steps"][0]) == 1


@cuda_only
def test_lr_on_the_cpu(device):
    mine, theirs = (copies(make_8bit([(300,)]), d) for d in (device, "cpu"))
    STEP(*mine.values(), mask_kind="none", **hyper())
    reference.masked_adamw_8bit_(*theirs.values(), mask_kind="none", **hyper())
    assert_lists(mine, theirs)


def test_states_take_a_quarter_and_a_step_needs_no_memory():
    lists, full = make_8bit([(2**16,)]), make([(2**16,)])
    size = lambda of, names: sum(x.nbytes for n in names for x in of[n])  # noqa: E731
    both = ("exp_avgs", "exp_avg_sqs")
    assert size(lists, (*both, "absmax1", "absmax2")) == 2 * (2**16 + 4 * 2**8)
    assert size(full, both) == 8 * 2**16
    setup = """
        from tenfold import ops, reference
        n = 2**22
        p, g = torch.ones(n), torch.ones(n)
        q = [torch.ones(n, dtype=torch.uint8) for _ in range(2)]
        a = [torch.ones(n // 256) for _ in range(2)]
        codes = [reference.dynamic_code(signed) for signed in (True, False)]
        kw = dict(mask_kind="none", lr=torch.tensor(0.1), beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8)
        def call():
            ops.masked_adamw_8bit_([p], [g], q[:1], q[1:], [torch.tensor(0.0)], [], a[:1], a[1:], *codes, **kw)
        call()
    """
    assert peak_growth(setup, "call()") < 2**20
