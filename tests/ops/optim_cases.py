# SPDX-License-Identifier: Apache-2.0
"""What the tests of the optimiser ops share: lists of tensors, masks, and torch's AdamW as an oracle."""

import contextlib

import torch

import tenfold
from tenfold import reference
from tenfold.reference.optim.masks import storage_flat, trained_elements
from tenfold.testing import forced_isa, threads

KINDS = ("none", "row", "col", "block", "element")
FLAT = [(), (0,), (1,), (7,), (31,), (32,), (3, 11), (255,), (256,), (257,), (4099,)]
MATRICES = [(0, 5), (5, 0), (1, 1), (1, 7), (7, 1), (31, 33), (2, 3, 32), (257, 16), (8, 257)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STATES = [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16), (F16, F32), (F16, BF16), (F16, F16)]
# Whether torch's own fused step contracts as the definition does.
FMA = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def shapes_of(kind):
    return MATRICES if kind in ("row", "col") else FLAT


def hyper(**changes):
    """Keyword arguments of a step; ``lr`` may be a number."""
    base = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8} | changes
    if not isinstance(base["lr"], torch.Tensor):
        base["lr"] = torch.tensor(base["lr"], dtype=torch.float64)
    return base


def units(shape, kind, block=256):
    n = torch.Size(shape).numel()
    return {"none": 0, "row": shape[0] if shape else 0, "col": shape[-1] if shape else 0,
            "block": -(-n // block), "element": n}[kind]  # fmt: skip


def mask_of(shape, kind, fraction=0.5, block=256, seed=0):
    """A packed random mask, fraction 0 and 1 included; None for kind "none"."""
    if kind == "none":
        return None
    made = torch.Generator().manual_seed(seed)
    return reference.pack_mask(torch.rand(units(shape, kind, block), generator=made) < fraction)


def some_masks(shapes, kind, block=256):
    """None, all ones and all zeros among random ones."""
    fractions = [0.5, 0.25, 1.0, 0.5, 0.0, 0.75, None]
    pick = [fractions[i % len(fractions)] for i in range(len(shapes))]
    return [None if f is None else mask_of(s, kind, f, block, seed=i)
            for i, (s, f) in enumerate(zip(shapes, pick))]  # fmt: skip


def tensors(shapes, dtype, seed, scale=1.0, positive=False):
    made = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=made) * scale for s in shapes]
    return [(x.abs() if positive else x).to(dtype) for x in drawn]


def make(shapes, dtype=F32, state=F32, kind="none", storage="dense", *, amsgrad=False, block=256,
         masks=None):  # fmt: skip
    """The positional arguments of ``masked_adamw_`` in the middle of a training, by name."""
    masks = some_masks(shapes, kind, block) if masks is None else masks
    params = tensors(shapes, dtype, 1)
    prefixes = [None] * len(shapes)
    sizes = list(shapes)
    if storage == "compact":
        prefixes = [None if m is None else reference.mask_prefix(m) for m in masks]
        sizes = [s if m is None else (int(trained_elements(p, m, kind, block).sum()),)
                 for s, p, m in zip(shapes, params, masks)]  # fmt: skip
    return {
        "params": params,
        "grads": tensors(shapes, dtype, 2),
        "exp_avgs": tensors(sizes, state, 3, 0.1),
        "exp_avg_sqs": tensors(sizes, state, 4, 0.01, positive=True),
        "steps": [torch.tensor(float(i % 4)) for i in range(len(shapes))],
        "masks": masks,
        "max_exp_avg_sqs": tensors(sizes, state, 5, 0.01, positive=True) if amsgrad else [],
        "prefixes": prefixes if storage == "compact" else [],
    }


def make_8bit(shapes, dtype=F32, kind="none", *, block=256, masks=None):
    """The positional arguments of ``masked_adamw_8bit_`` in the middle of a training, by name."""
    made = torch.Generator().manual_seed(6)
    blocks = [-(-torch.Size(s).numel() // 256) for s in shapes]
    lists = make(shapes, dtype, kind=kind, block=block, masks=masks)
    for name in ("exp_avgs", "exp_avg_sqs"):
        lists[name] = [torch.randint(256, s, generator=made, dtype=torch.uint8) for s in shapes]
    del lists["max_exp_avg_sqs"], lists["prefixes"]
    return lists | {
        "absmax1": [torch.rand(n, generator=made) * 0.1 for n in blocks],
        "absmax2": [torch.rand(n, generator=made) * 0.01 for n in blocks],
        "code1": reference.dynamic_code(True),
        "code2": reference.dynamic_code(False),
    }


def twin(x, device="cpu"):
    """A copy with the strides and the storage offset of ``x``, between guards."""
    if not isinstance(x, torch.Tensor):
        return x
    at = x.storage_offset()
    buffer = torch.full((at + x.numel() + 9,), 77, dtype=x.dtype, device=device)
    return buffer.as_strided(x.shape, x.stride(), at).copy_(x)


def copies(lists, device="cpu"):
    """Twins of all tensors; an entry is a list or one tensor."""
    return {name: twin(items, device) if isinstance(items, torch.Tensor)
            else [twin(x, device) for x in items] for name, items in lists.items()}  # fmt: skip


def check_guards(lists):
    """Nothing was written before or behind a tensor of :func:`twin`."""
    for x in torch.utils._pytree.tree_leaves(lists):
        if isinstance(x, torch.Tensor):
            at, n = x.storage_offset(), x.numel()
            whole = x.as_strided((at + n + 9,), (1,), 0)
            assert bool((whole[:at] == 77).all()) and bool((whole[at + n :] == 77).all())


def bits(x):
    """The bits of a dense tensor in storage order, as integers on the CPU."""
    return storage_flat(x).cpu().view(INTS[x.dtype.itemsize])


def assert_bits(got, want, what="", strict=False):
    """Equal bits; a NaN may have any bits unless ``strict``."""
    assert len(got) == len(want)
    for i, (x, y) in enumerate(zip(got, want)):
        if y is None:
            continue
        assert x.dtype == y.dtype and x.shape == y.shape
        same = bits(x) == bits(y)
        if y.is_floating_point() and not strict:
            same |= (storage_flat(x).isnan().cpu()) & storage_flat(y).isnan().cpu()
        bad = (~same).nonzero()
        if bad.numel():
            at = int(bad[0])
            a, b = storage_flat(x)[at].item(), storage_flat(y)[at].item()
            raise AssertionError(
                f"{what}[{i}] {tuple(x.shape)} {x.dtype}: {len(bad)} of {x.numel()} elements differ, "
                f"first at {at}: {a!r} instead of {b!r}"
            )


def assert_lists(got, want, strict=False):
    """Equal bits of all entries."""
    for name in want:
        one = isinstance(want[name], torch.Tensor)
        assert_bits(
            [got[name]] if one else got[name], [want[name]] if one else want[name], name, strict
        )


class _On:
    """``with``, any number of times: the instruction set of that name; None: the device as it is."""

    def __init__(self, name=None):
        self.name = name

    def __enter__(self):
        self.inside = forced_isa(self.name) if self.name else contextlib.nullcontext()
        self.inside.__enter__()

    def __exit__(self, *what):
        return self.inside.__exit__(*what)


def each_isa(device):
    """Contexts: every instruction set on the CPU, the device as it is elsewhere."""
    on_cpu = torch.device(device).type == "cpu"
    return [_On(name) for name in (tenfold.cpu_capabilities() if on_cpu else [None])]


def steps(function, lists, count, kwargs):
    """``count`` calls; the gradients change by a power of two, exactly, from call to call."""
    for k in range(count):
        function(*lists.values(), **kwargs)
        for g in lists["grads"]:
            g.mul_((-0.5, -4.0)[k % 2])
    return lists


def moved(kwargs, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def check_against(function, definition, lists, device, count=3, **kwargs):
    """The op on every instruction set gives the bits of the definition, in all lists."""
    with threads(1):  # hundreds of small operations: a busy second core would cost most of the time
        want = steps(definition, copies(lists), count, kwargs)
    for context in each_isa(device):
        got = copies(lists, device)
        with context:
            steps(function, got, count, moved(kwargs, device))
        assert_lists(got, want)
        check_guards(got)
    return want


def torch_fused(p, grads, *, m=None, v=None, v_max=None, step=0, grad_scale=None, maximize=False,
                amsgrad=False, **kwargs):  # fmt: skip
    """``torch._fused_adamw_`` over the gradients: p, m, v and the largest v.

    Padded to whole vectors: torch's scalar tail contracts v in another order than its vectors.
    """
    n, dtype = p.numel(), p.dtype

    def padded(x):
        x = torch.zeros(n) if x is None else x.flatten()
        return torch.cat([x.to(dtype), torch.ones(-n % 64, dtype=dtype)])

    p, m, v, v_max = (padded(x) for x in (p, m, v, v_max))
    for k, g in enumerate(grads):
        torch._fused_adamw_(
            [p], [padded(g)], [m], [v], [v_max] if amsgrad else [],
            [torch.tensor(step + k + 1.0)], amsgrad=amsgrad, maximize=maximize,
            grad_scale=grad_scale, found_inf=None, **(kwargs | {"lr": float(kwargs["lr"])}),
        )  # fmt: skip
    return tuple(x[:n] for x in (p, m, v, v_max))


def assert_torch(got, want):
    """Bits, or near where torch has no FMA."""
    if FMA:
        assert_bits([got.flatten()], [want])
    else:
        torch.testing.assert_close(got.flatten().cpu(), want, rtol=1e-5, atol=1e-7, equal_nan=True)
