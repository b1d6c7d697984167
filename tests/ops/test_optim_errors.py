# SPDX-License-Identifier: Apache-2.0
"""Bad input of the AdamW ops: the text, the Python type, and that nothing was written."""

import pytest
import torch
from optim_cases import BF16, F16, F32, assert_lists, copies, hyper, make, make_8bit, mask_of, moved

from tenfold import ops
from tenfold.testing import check_errors
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold
SHAPES = [(33,), (5, 7)]
NAMES = ("masked_adamw_", "masked_adamw_8bit_")
both = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def bad(device):
    """Good lists with one entry or keyword changed, on the device."""

    def check(
        name, error, *words, kind="element", lists=None, dtype=F32, put=None, kwargs=None, **kw
    ):
        maker = make if name == "masked_adamw_" else make_8bit
        masks = [mask_of(s, kind, seed=i) for i, s in enumerate(SHAPES)]
        lists = lists or maker(SHAPES, dtype, kind=kind, masks=masks, **kw)
        for (entry, at), value in (put or {}).items():
            lists[entry][at] = value(lists[entry][at]) if callable(value) else value
        args = tuple(copies_as_they_are(lists, device).values())
        kwargs = moved({"mask_kind": kind} | hyper() | (kwargs or {}), device)
        check_errors(getattr(ops, name), getattr(raw, name), args, kwargs, error, name, *words)

    return check


def copies_as_they_are(lists, device):
    """On the device with strides kept, those of expanded and sliced tensors too."""

    def there(x):
        if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
            return x
        size = x.untyped_storage().nbytes() // x.element_size()
        return x.as_strided((size,), (1,), 0).to(device).clone().as_strided(
            x.shape, x.stride(), x.storage_offset())  # fmt: skip

    return {n: there(v) if isinstance(v, torch.Tensor) else [there(x) for x in v]
            for n, v in lists.items()}  # fmt: skip


def last_strided(x):
    """The same shape in rows of a bigger buffer: not dense."""
    big = torch.zeros(*x.shape[:-1], x.shape[-1] * 2, dtype=x.dtype)
    return big[..., ::2]


@both
def test_hyper_parameters(name, bad, device):
    for value in (1.0, -0.1, 1.5, float("nan")):
        bad(name, ValueError, "Invalid beta parameter at index 0", kwargs={"beta1": value})
        bad(name, ValueError, "Invalid beta parameter at index 1", kwargs={"beta2": value})
    for value in (-1e-8, float("nan")):
        bad(name, ValueError, "Invalid epsilon value", kwargs={"eps": value})
        bad(name, ValueError, "Invalid weight_decay value", kwargs={"weight_decay": value})
        if device.type == "cpu":  # CUDA does not wait for a value on the device
            bad(name, ValueError, "Invalid learning rate", kwargs={"lr": torch.tensor(value)})
    bad(name, ValueError, "lr", "[2]", kwargs={"lr": torch.tensor([0.1, 0.1])})
    bad(name, TypeError, "lr", "int64", kwargs={"lr": torch.tensor(1)})


@both
def test_masks(name, bad):
    bad(name, ValueError, "mask_kind", "none, row, col, block or element", "'diag'",
        kwargs={"mask_kind": "diag"})  # fmt: skip
    for size in (0, 16, 48, -256):
        bad(name, ValueError, "block_size", "power of two >= 32", str(size), kind="block",
            kwargs={"block_size": size})  # fmt: skip
    for kind in ("row", "col"):
        bad(
            name,
            ValueError,
            f"mask_kind='{kind}'",
            "2 or more dimensions",
            "[0]",
            "[33]",
            kind=kind,
        )
    bad(name, ValueError, "masks[0]", "'none'", kwargs={"mask_kind": "none"})
    bad(name, TypeError, "masks[1]", "uint8", "bool", put={("masks", 1): torch.ones(35).bool()})
    for wrong in (4, 6):
        bad(name, ValueError, "masks[1]", "[5]", "35", "[5, 7]", f"[{wrong}]",
            put={("masks", 1): torch.zeros(wrong, dtype=torch.uint8)})  # fmt: skip
    bad(name, ValueError, "masks[1]", put={("masks", 1): torch.zeros(5, 1, dtype=torch.uint8)})


@cuda_only
@both
def test_tensors_of_other_devices(name, device):
    maker = make if name == NAMES[0] else make_8bit
    names = ["grads", "exp_avgs", "exp_avg_sqs", "steps", "masks"]
    for entry in names + (["absmax1", "absmax2"] if maker is make_8bit else []):
        lists = copies(maker(SHAPES, kind="element"), device)
        lists[entry][1] = lists[entry][1].cpu()
        kwargs = {"mask_kind": "element"} | hyper()
        args = getattr(ops, name), getattr(raw, name), tuple(lists.values()), kwargs
        check_errors(*args, ValueError, name, f"{entry}[1]", "cuda", "cpu")
    lists = copies(maker(SHAPES), device)
    for scalar in ("grad_scale", "found_inf", "clip_coef"):
        kwargs = {"mask_kind": "none", scalar: torch.ones(())} | hyper()
        args = getattr(ops, name), getattr(raw, name), tuple(lists.values()), kwargs
        check_errors(*args, ValueError, name, scalar, "cuda", "cpu")


def test_row_masks_need_contiguous_tensors(bad):
    turned = lambda x: x.view(5, 7).t().contiguous().t()  # noqa: E731
    put = {(n, 1): turned for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    lists = make([(5, 7), (5, 7)], kind="row")
    bad(
        NAMES[0],
        ValueError,
        "mask_kind='row'",
        "not contiguous",
        "[1]",
        kind="row",
        lists=lists,
        put=put,
    )


@both
def test_lists_of_different_lengths(name, bad):
    maker = make if name == NAMES[0] else make_8bit
    for entry in maker(SHAPES):
        if entry in ("params", "max_exp_avg_sqs", "prefixes") or entry.startswith("code"):
            continue
        lists = maker(SHAPES, kind="element")
        lists[entry] = lists[entry][:1]
        bad(name, ValueError, entry, "1", "2", lists=lists)
    bad(name, ValueError, "tensor_ids", "1", "2", kwargs={"tensor_ids": [3]})


@both
def test_parameters_and_gradients(name, bad):
    bad(name, TypeError, "params[1]", "float64", put={("params", 1): torch.Tensor.double})
    for dtype in (BF16, torch.float64, torch.int64, torch.complex64):
        bad(
            name,
            RuntimeError,
            "grads[1]",
            "float32",
            put={("grads", 1): lambda x, d=dtype: x.to(d)},
        )
    bad(
        name,
        ValueError,
        "grads[1]",
        "[5, 7]",
        "[5, 6]",
        put={("grads", 1): lambda x: x[:, :6].clone()},
    )
    for entry in ("grads", "exp_avgs", "exp_avg_sqs"):
        bad(name, ValueError, f"{entry}[1]", "strides",
            put={(entry, 1): lambda x: x.t().contiguous().t()})  # fmt: skip
    everything = {(n, 1): last_strided for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    bad(name, ValueError, "params[1]", "dense", put=everything)
    bad(name, ValueError, "params[1]", put={("params", 1): lambda x: x[:, :1].expand(5, 7)})


@both
def test_sparse_gradients(name, device):
    lists = copies(make(SHAPES) if name == NAMES[0] else make_8bit(SHAPES), device)
    before = copies(lists)
    lists["grads"][1] = lists["grads"][1].to_sparse()
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        getattr(ops, name)(*lists.values(), mask_kind="none", **moved(hyper(), device))
    del lists["grads"], before["grads"]
    assert_lists(lists, before)


def test_states(bad):
    name = NAMES[0]
    for entry in ("exp_avgs", "exp_avg_sqs"):
        bad(name, TypeError, f"{entry}[1]", "float64", put={(entry, 1): torch.Tensor.double})
        bad(
            name, ValueError, f"{entry}[1]", "[5, 7]", "[7, 5]", put={(entry, 1): torch.zeros(7, 5)}
        )
    bad(
        name,
        RuntimeError,
        "exp_avg_sqs[1]",
        "dtype",
        put={("exp_avg_sqs", 1): torch.Tensor.bfloat16},
    )
    half = {(n, 1): torch.Tensor.half for n in ("exp_avgs", "exp_avg_sqs")}
    for dtype in (F32, BF16):  # float16 states need float16 parameters
        bad(name, TypeError, "exp_avgs[1]", "float16", dtype=dtype, put=half)
    bad(name, ValueError, "max_exp_avg_sqs", "0", "2", kwargs={"amsgrad": True})
    bad(name, RuntimeError, "max_exp_avg_sqs[1]", "dtype", amsgrad=True, kwargs={"amsgrad": True},
        put={("max_exp_avg_sqs", 1): torch.Tensor.bfloat16})  # fmt: skip
    bad(
        name, ValueError, "mask_scope", "all", "param_only", "'some'", kwargs={"mask_scope": "some"}
    )


@both
def test_steps_and_scalars(name, bad):
    bad(name, TypeError, "steps[1]", "float32", "int64", put={("steps", 1): torch.tensor(1)})
    bad(name, ValueError, "steps[1]", "[2]", put={("steps", 1): torch.ones(2)})
    for scalar in ("grad_scale", "found_inf", "clip_coef"):
        bad(name, TypeError, scalar, "float32", "int64", kwargs={scalar: torch.tensor(1)})
        bad(name, ValueError, scalar, "[2]", kwargs={scalar: torch.ones(2)})


@both
def test_stochastic_rounding_of_fp16(name, bad):
    bad(name, ValueError, "stochastic_round", "float16", "params[0]", dtype=F16,
        kwargs={"stochastic_round": True})  # fmt: skip
    one = {(n, 1): torch.Tensor.half for n in ("params", "grads")}
    bad(name, ValueError, "stochastic_round", "float16", "params[1]", put=one,
        kwargs={"stochastic_round": True})  # fmt: skip


def test_compact_states(bad, device):
    name, compact = NAMES[0], {"storage": "compact"}
    bad(name, ValueError, "param_only", "compact", **compact, kwargs={"mask_scope": "param_only"})
    bad(
        name,
        TypeError,
        "prefixes[1]",
        "int32",
        "int64",
        **compact,
        put={("prefixes", 1): torch.Tensor.long},
    )
    bad(
        name,
        ValueError,
        "prefixes[1]",
        **compact,
        put={("prefixes", 1): torch.zeros(3, dtype=torch.int32)},
    )
    bad(name, ValueError, "prefixes[1]", "masks[1]", **compact, put={("masks", 1): None})
    if device.type == "cpu":  # CUDA does not wait for a count on the device
        for entry in ("exp_avgs", "exp_avg_sqs"):
            bad(
                name,
                ValueError,
                f"{entry}[1]",
                **compact,
                put={(entry, 1): lambda x: x[:-1].clone()},
            )


def test_8bit_states(bad):
    name = NAMES[1]
    for entry, absmax in (("exp_avgs", "absmax1"), ("exp_avg_sqs", "absmax2")):
        bad(
            name, TypeError, f"{entry}[1]", "uint8", "float32", put={(entry, 1): torch.Tensor.float}
        )
        bad(
            name,
            ValueError,
            f"{entry}[1]",
            "[5, 7]",
            put={(entry, 1): torch.zeros(7, 5, dtype=torch.uint8)},
        )
        bad(name, TypeError, f"{absmax}[1]", "float32", put={(absmax, 1): torch.Tensor.double})
        bad(name, ValueError, f"{absmax}[1]", "[1]", "[2]", put={(absmax, 1): torch.zeros(2)})
    for code in ("code1", "code2"):
        lists = make_8bit(SHAPES, kind="element")
        bad(name, ValueError, code, "[256]", "[255]", lists=lists | {code: lists[code][1:].clone()})
        bad(name, TypeError, code, "float32", "float64", lists=lists | {code: lists[code].double()})


@both
@pytest.mark.parametrize("count", [2, 150])  # sorted by comparing, and digit by digit
def test_what_is_written_shares_no_memory(name, count, device):
    maker = make if name == "masked_adamw_" else make_8bit
    kwargs = moved({"mask_kind": "none"} | hyper(), device)
    last, shape = count - 1, (40,)
    for entry, other, words in (
        ("params", ("params", 0), ("params[0]", f"params[{last}]", "both are written")),
        ("params", ("grads", 0), ("grads[0]", f"params[{last}]", "one of them is written")),
        ("exp_avgs", ("exp_avg_sqs", last), (f"exp_avgs[{last}]", f"exp_avg_sqs[{last}]")),
    ):
        lists = copies(maker([shape] * count, F32), device)
        source = lists[other[0]][other[1]]
        wide = torch.zeros(60, dtype=source.dtype, device=device)
        lists[other[0]][other[1]] = wide[:40].copy_(source)
        lists[entry][last] = wide[20:]  # half of it
        args = tuple(lists.values())
        check_errors(getattr(ops, name), getattr(raw, name), args, kwargs, ValueError, name, *words)
    lists = copies(maker([shape] * count, F32), device)
    lists["grads"][last] = lists["grads"][0]  # only read
    getattr(ops, name)(*lists.values(), **kwargs)
