# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of ``merge`` on its emulated CUDA kernels: ``emulated_merge.py CHECK``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the
tests of ``tests/ops`` see them through the public ops; random drops must be exactly those of the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys

import torch

import tenfold
from build import build
from emu_calls import CODES, OPS, numbers, pointers, ptr, scheduled, shifted, stand_in
from tenfold import ops, reference
from tenfold.testing import DTYPES, LAYOUTS, VALUES

sys.path.insert(0, str(OPS))
import test_merge as cases

LIB = ctypes.CDLL(str(build("kernels_merge", "-shared", "-fPIC")))
NAN = float("nan")
NORMS = {"l1": 1, "l2": 2}


def real(values):
    return (ctypes.c_double * max(len(values), 1))(*values)


def written(out, write):
    """What ``write`` makes of ``out``, which may be an input: the same under both schedules."""
    before = out.clone()

    def run():
        out.copy_(before)
        write()
        return out.clone()

    return scheduled(LIB, run)


def fresh(like):
    return torch.full(like.shape, NAN, dtype=like.dtype)


def delta_merge(out, base, experts, weights, shares, drop, *, elect=False, normalize=False, lambda_=1.0, norm=0,
                key=(0, 0, 0), kept=None):  # fmt: skip
    """By the kernels of dare_merge; with ``kept``, of ties_merge. Experts of share 0 are left out."""
    used = [e for e, share in enumerate(shares) if share != 0]
    base, experts = base.contiguous(), [experts[e].contiguous() for e in used]
    columns = [[float(list_[e]) for e in used] for list_ in (weights, shares, drop)]
    is_random = any(columns[2])
    one = len(used) == 1 and torch.tensor(columns[0][0], dtype=torch.float32) == 1
    if one and not elect and not is_random and kept is None:
        return weighted_sum(out, experts, [1.0])
    w = real([*columns[0], *columns[1], *columns[2], *used])
    n = numbers(CODES[base.dtype], base.numel(), len(used), elect, normalize, is_random, *key)
    t, scale = pointers(base, out, *experts), ctypes.c_double(lambda_)

    def write():
        if kept is None:
            LIB.emu_delta_merge(t, w, scale, ctypes.c_int64(norm if is_random else 0), n)
        else:
            LIB.emu_ties_merge(t, w, scale, numbers(*(kept[e] for e in used)), n)

    written(out, write)


def weighted_sum(out, tensors, weights):
    used = [(t.contiguous(), w) for t, w in zip(tensors, weights) if w != 0]
    t = pointers(out, *(x for x, _ in used))
    n = numbers(CODES[out.dtype], out.numel(), len(used))
    written(out, lambda: LIB.emu_weighted_sum(t, real([w for _, w in used]), n))


def dare_merge_(out, base, experts, weights, drop, seed, stream=0, *, offset=0, rescale="inv_keep",
                elect_sign=False, normalize=False, lambda_=1.0):  # fmt: skip
    total = sum(weights) if normalize else 1.0
    scaled = [w / (1 - p) if rescale == "inv_keep" else w for w, p in zip(weights, drop)]
    if not elect_sign:
        scaled = [w * lambda_ / total for w in scaled]
    delta_merge(out, base, experts, scaled, weights, drop, elect=elect_sign, normalize=normalize, lambda_=lambda_,
                norm=NORMS.get(rescale, 0), key=(seed, stream, offset))  # fmt: skip


def dare_merge(base, *args, **kwargs):
    out = fresh(base)
    dare_merge_(out, base, *args, **kwargs)
    return out


def ties_merge_(out, base, experts, weights, density, *, normalize=True, lambda_=1.0):
    kept = [math.floor(d * base.numel()) for d in density]
    delta_merge(out, base, experts, weights, weights, [0.0] * len(weights), elect=True, normalize=normalize,
                lambda_=lambda_, kept=kept)  # fmt: skip


def ties_merge(base, *args, **kwargs):
    out = fresh(base)
    ties_merge_(out, base, *args, **kwargs)
    return out


def linear_merge_(out, tensors, weights, *, normalize=True):
    total = sum(weights) if normalize else 1.0
    weighted_sum(out, tensors, [w / total for w in weights])


def linear_merge(tensors, weights, *, normalize=True):
    out = fresh(tensors[0])
    linear_merge_(out, tensors, weights, normalize=normalize)
    return out


def slerp_merge_(out, v0, v1, t, *, base=None, dot_threshold=0.9995):
    if t in (0.0, 1.0):
        return weighted_sum(out, [v0, v1], [1 - t, t])
    base = None if base is None else base.contiguous()
    v0, v1 = v0.contiguous(), v1.contiguous()
    n = numbers(CODES[out.dtype], out.numel(), 2)
    places = pointers(base, out, v0, v1)
    written(out, lambda: LIB.emu_slerp(places, real([t, dot_threshold]), n))


def slerp_merge(v0, *args, **kwargs):
    out = fresh(v0)
    slerp_merge_(out, v0, *args, **kwargs)
    return out


def delta_gram_(gram, base, experts):
    base, experts = None if base is None else base.contiguous(), [e.contiguous() for e in experts]
    t, first = pointers(base, None, *experts), experts[0]
    n = numbers(CODES[first.dtype], first.numel(), len(experts))
    written(gram, lambda: LIB.emu_gram(t, ptr(gram), n))


def delta_gram(base, experts):
    gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    delta_gram_(gram, base, experts)
    return gram


FUNCTIONS = (dare_merge, dare_merge_, ties_merge, ties_merge_, linear_merge, linear_merge_, slerp_merge,
             slerp_merge_, delta_gram, delta_gram_)  # fmt: skip


CPU = torch.device("cpu")
# Results are NaN before a kernel writes them; what poisons all of torch's memory takes seconds to load.
cases.poisoned_memory = contextlib.nullcontext


def check_all():
    cases.LENGTHS = (0, 1, 33, 4099)
    dare, ties, linear = cases.TestDare(), cases.TestTies(), cases.TestLinear()
    slerp, gram = cases.TestSlerp(), cases.TestGram()
    for turn, drop in enumerate((0.0, 0.5, [0.1, 0.9, 0.0])):
        dare.test_equals_its_definition(DTYPES[turn], drop, CPU)
    options = [{"elect_sign": True}, {"elect_sign": True, "normalize": True, "lambda_": -2.0}, {"normalize": True},
               {"rescale": "l1"}, {"rescale": "l2", "elect_sign": True},
               {"offset": 2**37 + 3, "rescale": "none"}]  # fmt: skip
    for turn, chosen in enumerate(options):
        dare.test_options(DTYPES[turn % 3], chosen, CPU)
    for drop in (0.5, 0.3, 0.9999):
        masks(drop)
    for turn, kind in enumerate(VALUES):
        (ties if turn % 2 else dare).test_values(kind, CPU)
    dare.test_no_drop_is_the_linear_merge_and_weight_one_the_expert(torch.bfloat16, CPU)
    for turn, density in enumerate((0.2, [0.1, 0.0, 1.0])):
        ties.test_equals_its_definition(DTYPES[turn], density, CPU)
    ties.test_options_and_negative_weights({"normalize": False}, CPU)
    ties.test_by_hand(CPU)
    for kind in ("few", "rising"):
        ties.test_exactly_the_largest_stay(20_000, kind, CPU)
    linear.test_equals_its_definition(torch.float16, True, CPU)
    linear.test_one_tensor_and_weight_zero(CPU)
    for t, delta in ((0.25, False), (0.25, True), (1.0, True)):
        slerp.test_equals_its_definition(torch.bfloat16, t, delta, CPU)
    slerp.test_on_the_circle(CPU)
    slerp.test_no_direction(CPU)
    for turn, count in enumerate((2, 4, 9)):
        gram.test_equals_brute_force(DTYPES[turn % 3], count, CPU)
    gram.test_adds_up_over_tensors(CPU)
    experts = [torch.randn(300) for _ in range(20)]  # groups of pairs
    flat = torch.stack(experts).double()
    torch.testing.assert_close(delta_gram(None, experts), flat @ flat.T, rtol=1e-12, atol=1e-12)
    many = torch.randn(20, 40)  # more than are counted together
    want = reference.ties_merge(many[0], [*many[1:20]], [1.0] * 19, 0.3)
    torch.testing.assert_close(ties_merge(many[0], [*many[1:20]], [1.0] * 19, [0.3] * 19), want)
    for name in cases.INTO:
        cases.test_out_may_be_an_input(name, "base" if name == "dare_merge" else 1, CPU)
    for kind in LAYOUTS:
        cases.test_layouts("dare_merge", kind, CPU)
    wide_and_narrow()


def masks(drop):
    """Exactly those of the definition, at the carries of a counter."""
    for n, offset in ((3000, 129), (900, 2**36 - 700)):
        base = torch.zeros(n)
        two = [base, base + 1]
        got = dare_merge(base, two, [0.0, 1.0], [drop] * 2, 2**40 + 7, -9, offset=offset, rescale="none")  # fmt: skip
        assert torch.equal(got == 1, reference.dare_keep(n, drop, 1, 2**40 + 7, -9, offset))


def wide_and_narrow():
    """The same bits with and without wide loads."""
    weights = [0.5, 0.3, 0.2]
    for dtype in CODES:
        base, experts = torch.randn(777).to(dtype), [torch.randn(777).to(dtype) for _ in range(3)]
        away, moved = shifted(base), [shifted(e) for e in experts]
        for merge in (
            lambda b, e: ops.dare_merge(b, e, weights, 0.3, 7, offset=16),
            lambda b, e: ops.dare_merge(b, e, weights, 0.3, 7, offset=5, elect_sign=True),
            lambda b, e: ops.ties_merge(b, e, weights, 0.4),
            lambda b, e: ops.linear_merge(e, weights),
            lambda b, e: ops.delta_gram(b, e),
        ):  # fmt: skip
            assert torch.equal(merge(base, experts), merge(away, moved))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tenfold.cpu_capabilities = lambda: [tenfold.cpu_capability()]  # none of them is asked
    stand_in(FUNCTIONS)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
