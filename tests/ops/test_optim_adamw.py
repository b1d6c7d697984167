# SPDX-License-Identifier: Apache-2.0
"""masked_adamw_ against its definition and against torch's fused AdamW."""

import pytest
import torch
from optim_cases import (
    BF16,
    F16,
    F32,
    KINDS,
    STATES,
    assert_bits,
    assert_lists,
    assert_torch,
    check_against,
    copies,
    each_isa,
    hyper,
    make,
    mask_of,
    moved,
    shapes_of,
    steps,
    tensors,
    torch_fused,
)  # fmt: skip

from tenfold import ops, reference
from tenfold.reference.optim.masks import storage_flat, trained_elements
from tenfold.testing import (
    DTYPES,
    check_compiles,
    check_cuda_graph,
    check_deterministic,
    check_op,
    peak_growth,
    threads,
)  # fmt: skip
from tenfold.testing.plugin import cuda_only

STEP = ops.masked_adamw_
RAW = torch.ops.tenfold.masked_adamw_
STORAGES = ("dense", "compact", "param_only")


def check(lists, device, count=3, **kwargs):
    return check_against(STEP, reference.masked_adamw_, lists, device, count, **kwargs)


# -- the definition itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [
    {}, {"weight_decay": 0.0}, {"amsgrad": True}, {"maximize": True}, {"grad_scale": torch.tensor(3.0)},
    {"beta1": 0.3}, {"beta1": 0.5}, {"beta1": 0.0}, {"beta2": 0.0}, {"beta2": 0.5}, {"lr": 0.0}])  # fmt: skip
def test_definition_equals_torch_fused(dtype, changes):
    amsgrad = changes.get("amsgrad", False)
    lists = make([(1000,)], dtype, dtype, amsgrad=amsgrad)
    lists["steps"][0].fill_(5)
    grads = [lists["grads"][0] * s for s in (1.0, -0.5, 2.0)]
    want = torch_fused(lists["params"][0], grads, m=lists["exp_avgs"][0], v=lists["exp_avg_sqs"][0],
                       v_max=lists["max_exp_avg_sqs"][0] if amsgrad else None, step=5,
                       **hyper(**changes))  # fmt: skip
    steps(reference.masked_adamw_, lists, 3, {"mask_kind": "none"} | hyper(**changes))
    for name, x in zip(("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), want):
        if lists[name]:
            assert_torch(lists[name][0], x)


# -- acceptance --------------------------------------------------------------------------------------


def all_ones(n, wd, device):
    made = torch.Generator().manual_seed(n)
    start = torch.randn(n, generator=made)
    grads = [torch.randn(n, generator=made) for _ in range(100)]
    fused = torch_fused(start, grads, **hyper(lr=1e-3, weight_decay=wd))
    single = torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([single], lr=1e-3, weight_decay=wd, foreach=False, fused=False)
    for g in grads:
        single.grad = g
        adamw.step()
    state = adamw.state[single]
    for kind in KINDS:
        shape = {"row": (n, 1), "col": (1, n)}.get(kind, (n,))
        p, m, v = (x.to(device).view(shape) for x in (start.clone(), *torch.zeros(2, n)))
        step, mask = torch.zeros((), device=device), mask_of(shape, kind, 1.0)
        masks = [] if mask is None else [mask.to(device)]
        for g in grads:
            STEP([p], [g.to(device).view(shape)], [m], [v], [step], masks, mask_kind=kind,
                 **hyper(lr=1e-3, weight_decay=wd))  # fmt: skip
        assert float(step) == 100
        for x, want in zip((p, m, v), fused):
            assert_torch(x, want)
        assert_torch(m, state["exp_avg"])
        assert_torch(v, state["exp_avg_sq"])
        torch.testing.assert_close(p.cpu().flatten(), single.data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("n", [1, 7, 4099, 65537])
def test_all_ones_equals_torch_after_100_steps(n, wd, device):
    with threads(1):
        all_ones(n, wd, device)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("storage", STORAGES[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_mask_changes_no_bit(dtype, storage, kind, device):
    """After an active phase, under weight decay, with NaN in frozen gradients, parameters, states."""
    for changes in ({}, {"maximize": True}, {"amsgrad": True}, {"stochastic_round": dtype == BF16}):
        amsgrad, shapes = changes.get("amsgrad", False), shapes_of(kind)
        active = copies(make(shapes, dtype, kind=kind, masks=[None] * len(shapes), amsgrad=amsgrad),
                        device)  # fmt: skip
        kwargs = moved({"mask_kind": kind} | hyper(weight_decay=0.5, **changes), device)
        steps(STEP, active, 2, kwargs)
        frozen = make(shapes, dtype, kind=kind, storage=storage, amsgrad=amsgrad,
                      masks=[mask_of(s, kind, 0.0) for s in shapes])  # fmt: skip
        if storage == "dense":
            frozen |= {n: active[n] for n in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")}
        frozen = copies(frozen | {"params": active["params"]}, device)
        for name in ("grads", "params", "exp_avgs", "exp_avg_sqs"):
            for x in frozen[name]:
                storage_flat(x)[1::5] = float("nan")
                storage_flat(x)[2::5] = float("-inf")
        before = copies(frozen)
        steps_before = [float(s) for s in frozen["steps"]]
        STEP(*frozen.values(), **kwargs)
        assert [float(s) for s in frozen["steps"]] == [s + 1 for s in steps_before]
        before["steps"] = [s + 1 for s in before["steps"]]
        assert_lists(frozen, before, strict=True)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_active_part_is_adamw_on_the_gathered_tensor(kind, amsgrad, device):
    """And compact states are the dense ones, gathered."""
    shape = (37, 111) if kind in ("row", "col") else (4099,)
    made = torch.Generator().manual_seed(1)
    start, mask = torch.randn(shape, generator=made), mask_of(shape, kind)
    grads = [torch.randn(shape, generator=made) for _ in range(20)]
    on = trained_elements(start, mask, kind)
    k = int(on.sum())
    assert 0 < k < start.numel()
    want = torch_fused(start.flatten()[on], [g.flatten()[on] for g in grads], amsgrad=amsgrad,
                       **hyper())  # fmt: skip
    mask, prefix = mask.to(device), reference.mask_prefix(mask).to(device)
    for compact in (False, True):
        p = start.clone().to(device)
        m, v, top = torch.zeros(3, *((k,) if compact else shape), device=device)
        step = torch.zeros((), device=device)
        for g in grads:
            STEP([p], [g.to(device)], [m], [v], [step], [mask], [top] if amsgrad else [],
                 [prefix] if compact else [], mask_kind=kind, amsgrad=amsgrad, **hyper())  # fmt: skip
        for x, y in zip((m, v, top), want[1:]):
            x = x.cpu().flatten()
            assert_torch(x if compact else x[on], y)
            assert compact or not x[~on].any()
        assert_torch(p.cpu().flatten()[on], want[0])
        assert torch.equal(p.cpu().flatten()[~on], start.flatten()[~on])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_low_precision_states_equal_torch_fused_after_100_steps(dtype, device):
    made = torch.Generator().manual_seed(3)
    start = torch.randn(4099, generator=made).to(dtype)
    grads = [torch.randn(4099, generator=made).to(dtype) for _ in range(100)]
    want = torch_fused(start, grads, **hyper(lr=1e-3))
    p, m, v = (x.to(device) for x in (start.clone(), *torch.zeros(2, 4099, dtype=dtype)))
    step = torch.zeros((), device=device)
    for g in grads:
        STEP([p], [g.to(device)], [m], [v], [step], [], mask_kind="none", **hyper(lr=1e-3))
    assert_torch(p, want[0])
    assert_torch(v, want[2])
    torch.testing.assert_close(m.cpu(), want[1], rtol=0, atol=2e-9)


# -- the grid ----------------------------------------------------------------------------------------


def grid():
    """Every kind with every storage and dtypes; the flags in a Latin square, the rest of them slow."""
    flags = [{}, {"amsgrad": True}, {"maximize": True, "clip_coef": torch.tensor(0.3)},
             {"grad_scale": torch.tensor(128.0)}, {"stochastic_round": True, "seed": 2**40 + 5}]  # fmt: skip
    for i, (dtype, state) in enumerate(STATES):
        for j, kind in enumerate(KINDS):
            for k, storage in enumerate(STORAGES):
                for f, changes in enumerate(flags):
                    if dtype == F16 and "stochastic_round" in changes:
                        continue
                    late = (i + j + k - f) % len(flags) != 0
                    yield pytest.param(dtype, state, kind, storage, changes,
                                       marks=[pytest.mark.slow] if late else [])  # fmt: skip


@pytest.mark.parametrize(("dtype", "state", "kind", "storage", "changes"), grid())
def test_matches_the_definition(dtype, state, kind, storage, changes, device):
    lists = make(
        shapes_of(kind), dtype, state, kind, storage, amsgrad=changes.get("amsgrad", False)
    )
    scope = {"mask_scope": "param_only"} if storage == "param_only" else {}
    check(lists, device, mask_kind=kind, **scope, **hyper(**changes))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("kind", "shape"), [("none", (65537,)), ("element", (65537,)), ("block", (65537,)),
                                             ("row", (257, 601)), ("col", (257, 601))])  # fmt: skip
def test_large_tensors_match_the_definition(kind, shape, storage, device):
    """More than one chunk; two of them, so that chunks of tensors meet."""
    lists = make([shape, shape], BF16, F32, kind, storage)
    scope = {"mask_scope": "param_only"} if storage == "param_only" else {}
    check(lists, device, 2, mask_kind=kind, **scope, **hyper())


@pytest.mark.parametrize("block", [32, 64, 1024])
@pytest.mark.parametrize("storage", STORAGES[:2])
def test_block_sizes(block, storage, device):
    lists = make([*shapes_of("block"), (5003,)], kind="block", storage=storage, block=block)
    check(lists, device, mask_kind="block", block_size=block, **hyper())


@pytest.mark.parametrize("kind", ["none", "block", "element"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, storage, kind, device):
    """Storage order: channels-last, transposed, permuted; strides of length-1 dimensions; offsets."""
    shapes = [(3, 8, 5, 7), (37, 19), (4, 5, 6), (1, 41), (300,), (300,)]
    lists = make(shapes, dtype, kind=kind, storage=storage, amsgrad=True)

    def laid(i, x):
        if i == 0:
            return x.contiguous(memory_format=torch.channels_last)
        if i in (1, 2):
            return x.transpose(-1, 0).contiguous().transpose(-1, 0)
        if i == 3:
            return x.as_strided((1, 41), (1000, 1))
        offset = torch.empty(x.numel() + i, dtype=x.dtype)[i:].view(x.shape)
        return offset.copy_(x)

    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        # compact states are flat, but those of tensors without a mask are not compact
        lists[name] = [laid(i, x) if x.shape == shapes[i] else x for i, x in enumerate(lists[name])]
    assert not lists["params"][1].is_contiguous() and lists["params"][5].storage_offset() == 5
    scope = {"mask_scope": "param_only"} if storage == "param_only" else {}
    check(lists, device, mask_kind=kind, amsgrad=True, **scope, **hyper())


@pytest.mark.parametrize("offsets", [(0, 1, 0, 3), (1, 0, 2, 0), (3, 1, 1, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_mix_of_misaligned_pointers(dtype, offsets, device):
    lists = make([(1000,)], dtype, dtype)
    for name, offset in zip(("params", "grads", "exp_avgs", "exp_avg_sqs"), offsets):
        x = lists[name][0]
        lists[name] = [torch.empty(1000 + offset, dtype=dtype)[offset:].copy_(x)]
    check(lists, device, 1, mask_kind="none", **hyper())


@pytest.mark.parametrize("storage", STORAGES[:2])
def test_one_call_mixes_dtypes_states_and_masks(storage, device):
    lists = {name: [] for name in make([])}
    for i, (dtype, state) in enumerate(STATES * 2):
        one = make([(1000 + i,)], dtype, state, "element", storage, amsgrad=True,
                   masks=[mask_of((1000 + i,), "element", seed=i)] if i % 3 else [None])  # fmt: skip
        for name in lists:
            lists[name] += one[name]
        lists["steps"][-1].fill_(i)
    check(lists, device, mask_kind="element", amsgrad=True, **hyper())


def test_many_small_tensors(device):
    """More than any table in kernel arguments holds."""
    shapes = [(i % 41,) for i in range(400)]
    check(make(shapes, BF16, F32, "element"), device, 2, mask_kind="element", **hyper())


@pytest.mark.parametrize("changes", [
    {"beta1": 0.3}, {"beta1": 0.5}, {"beta1": 0.0}, {"beta2": 0.0}, {"eps": 0.0}, {"eps": 1e-3}, {"lr": 0.0},
    {"weight_decay": 0.0}, {"lr": torch.tensor(3e-4)}, {"lr": torch.tensor(3e-4, dtype=BF16)},
    {"lr": torch.tensor(3e-4, dtype=F16)}, {"clip_coef": torch.tensor(0.0)}])  # fmt: skip
def test_hyper_parameters(changes, device):
    check(make([(300,), (5,)], kind="element"), device, mask_kind="element", **hyper(**changes))


def test_lr_on_the_cpu(device):
    """A CPU lr serves tensors on any device."""
    mine, theirs = (copies(make([(300,)]), d) for d in (device, "cpu"))
    STEP(*mine.values(), mask_kind="none", **hyper())
    reference.masked_adamw_(*theirs.values(), mask_kind="none", **hyper())
    assert_lists(mine, theirs)


def test_late_steps(device):
    """Bias corrections of step numbers from 1 to where they are gone."""
    at = [0, 1, 5, 99, 999, 12_345, 1_000_000, 2**23]
    lists = make([(100,)] * len(at))
    lists["steps"] = [torch.tensor(float(t)) for t in at]
    check(lists, device, 2, mask_kind="none", **hyper())


# -- scaling, skipping, values -----------------------------------------------------------------------


def test_sign_scale_and_clipping_in_that_order(device):
    lists = make([(1000,)], BF16, F32)
    scale, clip = torch.tensor(1024.0), torch.tensor(0.37)
    got = check(lists, device, 1, mask_kind="none", maximize=True, grad_scale=scale, clip_coef=clip,
                **hyper())  # fmt: skip
    byhand = copies(lists)
    byhand["grads"] = [-g.float() / scale * clip for g in byhand["grads"]]
    byhand["params"] = [p.float() for p in byhand["params"]]
    reference.masked_adamw_(*byhand.values(), mask_kind="none", **hyper())
    assert_bits(got["exp_avgs"], byhand["exp_avgs"])
    assert_bits(got["params"], [p.bfloat16() for p in byhand["params"]])


@pytest.mark.parametrize("found", [1.0, 0.5, float("inf"), float("nan"), 0.0])
@pytest.mark.parametrize("storage", STORAGES[:2])
def test_found_inf(found, storage, device):
    """Not zero: nothing is written and no step advances."""
    lists = make(shapes_of("element"), BF16, F32, "element", storage)
    got, flag = copies(lists, device), torch.tensor(found, device=device)
    STEP(*got.values(), mask_kind="element", found_inf=flag, **hyper())
    want = copies(lists)
    if found == 0:
        reference.masked_adamw_(*want.values(), mask_kind="element", **hyper())
    assert_lists(got, want, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 6e4])
def test_bad_gradients_pass_through_as_in_torch(dtype, bad, device):
    for amsgrad in (False, True):
        lists = make([(100,)], dtype, dtype, amsgrad=amsgrad)
        lists["steps"][0].zero_()
        lists["grads"][0][::7] = bad
        want = torch_fused(lists["params"][0], [lists["grads"][0]], m=lists["exp_avgs"][0],
                           v=lists["exp_avg_sqs"][0], v_max=lists["max_exp_avg_sqs"][0] if amsgrad
                           else None, amsgrad=amsgrad, **hyper())  # fmt: skip
        got = check(lists, device, 1, mask_kind="none", amsgrad=amsgrad, **hyper())
        for name, x in zip(("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), want):
            if got[name]:
                assert_torch(got[name][0], x)
        if bad != bad:
            assert int(got["params"][0].isnan().sum()) == 15


def test_fp16_overflows_to_infinity(device):
    lists = make([(100,)], F16, F32)
    lists["params"][0][:] = 65504.0
    got = check(lists, device, 1, mask_kind="none", **hyper(lr=1e3, weight_decay=0.0))
    assert bool(got["params"][0].isinf().any())


def test_nan_beside_trained_elements_stays_out(device):
    """A frozen NaN gradient is not read into its neighbours; a trained one touches nothing else."""
    lists = make([(1000,)], F32, F32, "element")
    on = trained_elements(lists["params"][0], lists["masks"][0], "element")
    lists["grads"][0][~on] = float("nan")
    got = check(lists, device, mask_kind="element", **hyper())
    assert not got["params"][0].isnan().any() and not got["exp_avgs"][0].isnan().any()


def test_gradients_and_scalars_are_not_written(device):
    lists = copies(make([(1000,)], BF16, F32, "element"), device)
    extra = {"grad_scale": torch.tensor(3.0), "clip_coef": torch.tensor(0.5),
             "found_inf": torch.tensor(0.0), "lr": torch.tensor(0.01)}  # fmt: skip
    kwargs = moved(hyper(**extra), device)
    grads, masks = ([x.clone() for x in lists[n]] for n in ("grads", "masks"))
    STEP(*lists.values(), mask_kind="element", **kwargs)
    assert_bits(lists["grads"], grads)
    assert_bits(lists["masks"], masks)
    assert all(torch.equal(kwargs[n].cpu(), x) for n, x in extra.items())


def test_empty_lists_and_tensors(device):
    STEP([], [], [], [], [], [], mask_kind="none", **hyper())
    lists = copies(make([(0,), (3, 0), (0, 4)]), device)
    STEP(*lists.values(), mask_kind="none", **hyper())
    assert [float(s) for s in lists["steps"]] == [1.0, 2.0, 3.0]


# -- standing checks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES[:2])
def test_threads_runs_and_instruction_sets(kind, storage):
    shapes = [(300, 500), (0, 3), (7, 9), (129, 1000)]
    lists = make(shapes, BF16, F32, kind, storage, amsgrad=True)

    def call(*args):
        STEP(*args, mask_kind=kind, amsgrad=True, stochastic_round=True, **hyper())
        return args

    check_deterministic(call, tuple(lists.values()))
    results = []
    for context in each_isa("cpu"):
        mine = copies(lists)
        with context, threads(2):
            call(*mine.values())
        results.append(mine)
    for other in results[1:]:
        assert_lists(other, results[0], strict=True)


def test_a_tensors_result_does_not_depend_on_its_company(device):
    """Alone, and last in a list of others, with the id it has."""
    lists = make([(70_001,), (33,), (4099,)], BF16, F32, "element")
    kwargs = moved({"mask_kind": "element", "stochastic_round": True, "seed": 3} | hyper(), device)
    together = copies(lists, device)
    STEP(*together.values(), **kwargs)
    for i in range(3):
        alone = copies({name: items[i : i + 1] for name, items in lists.items()}, device)
        STEP(*alone.values(), tensor_ids=[i], **kwargs)
        assert_lists(alone, {name: items[i : i + 1] for name, items in together.items()})


@pytest.mark.parametrize(
    ("kind", "storage"), [("none", "dense"), ("element", "compact"), ("row", "dense")]
)
def test_standing_checks(kind, storage, device):
    shapes = [(6, 9), (3, 40)]
    lists = make(shapes, F32, F32, kind, storage, amsgrad=True)
    if kind != "none":
        lists["masks"][1] = None
        lists["prefixes"] = lists["prefixes"] and [lists["prefixes"][0], None]
        for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
            lists[name][1] = torch.ones(3, 40)
    args = tuple(copies(lists, device).values())
    extra = {"grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0),
             "clip_coef": torch.tensor(0.5)}  # fmt: skip
    kwargs = moved(hyper(amsgrad=True, mask_kind=kind, **extra), device)
    check_op(RAW.default, args, kwargs, mutates=True, rtol=0, atol=0)


def test_compiles_with_inductor():
    lists = make([(6, 9), (40,)], BF16, F32, "element")

    def call(*args):
        STEP(*args, mask_kind="element", stochastic_round=True, **hyper())
        return [x.clone() for x in (*args[0], *args[2], *args[3], *args[4])]

    check_compiles(call, tuple(lists.values()), backend="inductor", dynamic=None)


def test_step_under_no_grad_and_refusal_under_grad(device):
    lists = copies(make([(33,)]), device)
    lists["params"][0].requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        STEP(*lists.values(), mask_kind="none", **hyper())
    version = [lists[n][0]._version for n in ("params", "exp_avgs", "exp_avg_sqs")]
    with torch.no_grad():
        STEP(*lists.values(), mask_kind="none", **hyper())
    after = [lists[n][0]._version for n in ("params", "exp_avgs", "exp_avg_sqs")]
    assert all(a > b for a, b in zip(after, version))
    assert float(lists["steps"][0]) == 1


@cuda_only
def test_cuda_graph(device):
    """Replays follow gradients, steps, the learning rate and the skip flag."""

    def inputs(seed, lr):
        lists = make([(33,), (4099,)], BF16, F32, "element")
        lists["grads"] = tensors([(33,), (4099,)], BF16, seed)
        return tuple(copies(lists, device).values()), moved(hyper(lr=lr), device)

    def call(*args, **kwargs):
        STEP(*args, mask_kind="element", **kwargs)
        return [x.clone() for x in (*args[0], *args[2], *args[3], *args[4])]

    check_cuda_graph(call, *inputs(1, 0.01), *inputs(2, 0.5))


def test_a_step_needs_no_memory():
    setup = """
        from tenfold import ops
        p, g, m, v = (torch.ones(2**23) for _ in range(4))
        mask, lr = torch.full((2**20,), 0x55, dtype=torch.uint8), torch.tensor(0.1)
        kw = dict(mask_kind="element", lr=lr, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8)
        ops.masked_adamw_([p], [g], [m], [v], [torch.tensor(0.0)], [mask], **kw)
    """
    call = "ops.masked_adamw_([p], [g], [m], [v], [torch.tensor(0.0)], [mask], **kw)"
    assert peak_growth(setup, call) < 2**20
