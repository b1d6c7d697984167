# SPDX-License-Identifier: Apache-2.0
"""DARE, TIES, linear and spherical merging and Gram matrices of task vectors, against their definitions."""

import itertools
import math

import pytest
import torch

import tenfold
from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    VALUES,
    assert_close_to_ref,
    check_errors,
    check_op,
    fill,
    forced_isa,
    layout,
    on,
    peak_growth,
    poisoned_memory,
    threads,
)  # fmt: skip
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LENGTHS = (0, 1, 7, 8, 16, 33, 511, 513, 4099, 33_333)
NORM_STREAM = -8724508259633237938
NORM_KEEP = "10010111111011111110111111111110"
RATES = (0.0, 0.5, 0.3, 0.9, 1e-4, 0.9999)
WEIGHTS = [0.5, 0.3, 0.2]


def family(n, dtype=F32, count=3, kind="normal", spread=0.1, shape=None):
    """(base, experts): experts are the base and a little more."""
    base = fill((n,), F32, kind)
    made = [base + spread * fill((n,), F32, seed=i + 1) for i in range(count)]
    return base.to(dtype), [x.to(dtype) for x in made]


def bits(x):
    return x.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()])


def on_every_isa(device, op, *args, **kwargs):
    """The result, which has the same bits on all instruction sets."""
    args, kwargs = on(device, (args, kwargs))
    if device.type != "cpu":
        return op(*args, **kwargs).cpu()
    results = []
    for name in tenfold.cpu_capabilities():
        with forced_isa(name), poisoned_memory():
            results.append(op(*args, **kwargs))
    assert all(torch.equal(bits(r), bits(results[0])) for r in results)
    return results[0]


def against(op, definition, device, base, experts, *args, **kwargs):
    """Bits agree on all ISAs, values with the definition; and so does the form that writes into a tensor."""
    got = on_every_isa(device, op, base, experts, *args, **kwargs)
    assert got.dtype == base.dtype and got.shape == base.shape and got.is_contiguous()
    wide = definition(base.double(), [e.double() for e in experts], *args, **kwargs)
    assert_close_to_ref(got, wide, definition(base, experts, *args, **kwargs))
    out = torch.full(base.shape, 7, dtype=base.dtype, device=device)
    getattr(ops, op.__name__ + "_")(out, *on(device, (base, experts)), *args, **kwargs)
    assert torch.equal(bits(out.cpu()), bits(got))
    return got


class TestDare:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("drop", [0.0, 0.5, 0.3, [0.1, 0.9, 0.0]])
    def test_equals_its_definition(self, dtype, drop, device):
        for n in LENGTHS:
            against(
                ops.dare_merge, reference.dare_merge, device, *family(n, dtype), WEIGHTS, drop, 3, n
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("options", [
        {"elect_sign": True}, {"elect_sign": True, "normalize": True}, {"normalize": True},
        {"lambda_": 0.7}, {"elect_sign": True, "lambda_": -2.0}, {"rescale": "none"}, {"rescale": "l1"},
        {"rescale": "l2", "elect_sign": True}, {"offset": 5}, {"offset": 2**37 + 3, "normalize": True},
    ], ids=str)  # fmt: skip
    def test_options(self, dtype, options, device):
        for n in (0, 1, 513, 4099):
            base, experts = family(n, dtype)
            weights = [0.5, -0.3, 0.8]
            against(ops.dare_merge, reference.dare_merge, device, base, experts, weights,
                    [0.4, 0.5, 0.2], -5, "layer.weight", **options)  # fmt: skip

    @pytest.mark.parametrize("kind", VALUES)
    def test_values(self, kind, device):
        for elect in (False, True):
            against(ops.dare_merge, reference.dare_merge, device, *family(100, F32, kind=kind), WEIGHTS,
                    0.5, 3, elect_sign=elect)  # fmt: skip

    @pytest.mark.parametrize("drop", RATES)
    def test_masks_are_the_defined_ones(self, drop, device):
        """Exactly, at every position: between vectors, blocks, 32-bit counters and parts."""
        for n, offset in (
            (5000, 0),
            (3000, 129),
            (1500, 2**32 * 16 - 700),
            (1500, 2**36 - 700),
            (70_000, 1),
        ):
            base = torch.zeros(n)
            for expert in (0, 2):
                weights = [0.0, 0.0, 0.0]
                weights[expert] = 1.0
                got = on_every_isa(device, ops.dare_merge, base, [base + 1] * 3, weights, drop, 2**40 + 7, -9,
                                   offset=offset, rescale="none")  # fmt: skip
                want = reference.dare_keep(n, drop, expert, 2**40 + 7, -9, offset)
                assert torch.equal(got == 1, want)
                assert abs(want.double().mean() - (1 - drop)) <= 5 * math.sqrt(drop / n)

    def test_masks_never_change(self):
        """Checkpoints merged by one version are reproduced by the next."""
        keep = reference.dare_keep(32, 0.3, 1, 42, reference.name_stream("model.norm.weight"))
        assert reference.name_stream("model.norm.weight") == NORM_STREAM
        assert "".join("01"[int(k)] for k in keep) == NORM_KEEP

    def test_experts_streams_and_seeds_draw_apart(self, device):
        base = torch.zeros(20_000, device=device)

        def mask(seed=1, stream="a", expert=0):
            weights = [float(e == expert) for e in range(2)]
            return ops.dare_merge(base, [base + 1] * 2, weights, 0.5, seed, stream) != 0

        first = mask()
        for other in (mask(seed=2), mask(seed=1 + 2**32), mask(stream="b"), mask(expert=1)):
            assert abs(float((first & other).double().mean()) - 0.25) < 5 * math.sqrt(
                0.1875 / 20_000
            )

    @pytest.mark.parametrize("elect", [False, True])
    def test_any_chunking_and_any_threads(self, elect, device):
        base, experts = on(device, family(100_003, BF16))
        args = (WEIGHTS, 0.3, 11, "some.weight")
        whole = ops.dare_merge(base, experts, *args, elect_sign=elect)
        for count in (1, 2, 3):
            with threads(count):
                assert torch.equal(whole, ops.dare_merge(base, experts, *args, elect_sign=elect))
        for cuts in ([0, 1, 100_003], [0, 511, 512, 5000, 77_777, 100_003]):
            parts = [
                ops.dare_merge(
                    base[a:b], [e[a:b] for e in experts], *args, offset=a, elect_sign=elect
                )
                for a, b in itertools.pairwise(cuts)
            ]
            assert torch.equal(whole, torch.cat(parts))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_drop_is_the_linear_merge_and_weight_one_the_expert(self, dtype, device):
        base, experts = family(4099, dtype, 2)
        against(ops.dare_merge, reference.dare_merge, device, base, experts, [0.25, 0.75], 0.0, 3)
        want = base.double() + 0.25 * (experts[0].double() - base.double()) + 0.75 * (
            experts[1].double() - base.double()
        )  # fmt: skip
        moved = on(device, (base, experts))
        b, x, y = (t.float() for t in (base, *experts))
        plain = (b + 0.25 * (x - b) + 0.75 * (y - b)).to(dtype)
        assert_close_to_ref(ops.dare_merge(*moved, [0.25, 0.75], 0.0, 3).cpu(), want, plain)
        base[:3] = torch.tensor([1.0, 1e-7, 3e4])  # where base + (expert - base) is not the expert
        experts[0][:3] = experts[1][:3] = torch.tensor([1e-7, 1.0, -0.0])
        moved = on(device, (base, experts))
        for weights, kept in (([1.0, 0.0], 0), ([0.0, 1.0], 1)):
            got = ops.dare_merge(*moved, weights, 0.0, 3).cpu()
            assert torch.equal(bits(got), bits(experts[kept]))

    @pytest.mark.parametrize("drop", [0.2, 0.5, 0.9])
    def test_share_of_untouched_elements(self, drop, device):
        """Where both are dropped the base stays, bit for bit: a share of p^2, within 3 sigma."""
        n = 200_000
        base, experts = on(device, family(n, F32, 2))
        got = ops.dare_merge(base, experts, [0.4, 0.6], drop, 17)
        share = float((got == base).double().mean())
        assert abs(share - drop**2) <= 3 * math.sqrt(drop**2 * (1 - drop**2) / n)

    def test_mean_over_seeds_is_the_linear_merge(self, device):
        """400 seeds: the standardised error is 1.00 +- 0.02."""
        n, seeds, p, alpha = 4000, 400, 0.5, 0.3
        base = torch.zeros(n, dtype=F32, device=device)
        experts = [fill((n,), F32, seed=s).to(device) for s in (1, 2)]
        total = torch.zeros(n, dtype=torch.float64, device=device)
        for seed in range(seeds):
            total += ops.dare_merge(base, experts, [alpha, 1 - alpha], p, seed)
        a, b = (w * e.double() for w, e in zip((alpha, 1 - alpha), experts))
        sigma = ((a**2 + b**2) * p / (1 - p) / seeds).sqrt()
        z = (total / seeds - (a + b)) / sigma
        assert abs(float(z.std()) - 1) < 0.02 and abs(float(z.mean())) < 4 / math.sqrt(n)

    def test_norm_of_the_child(self, device):
        """About 1 / sqrt(1 - p) of the linear merge's, for independent task vectors: 3.17 at p = 0.9."""
        n = 400_000
        base = torch.zeros(n, device=device)
        experts = [fill((n,), F32, seed=s).to(device) for s in (1, 2)]
        linear, child = (ops.dare_merge(base, experts, [0.5, 0.5], p, 1).norm() for p in (0.0, 0.9))
        assert abs(float(child / linear) - 3.17) < 0.03

    def test_warns_of_weights_that_do_not_sum_to_one(self):
        base, experts = family(8, F32, 2)
        with pytest.warns(UserWarning, match=r"sum to 0\.8"):
            ops.dare_merge(base, experts, [0.5, 0.3], 0.5, 1)


class TestTies:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0, [0.1, 0.9, 1.0]])
    def test_equals_its_definition(self, dtype, density, device):
        for n in (*LENGTHS, 70_001):
            against(
                ops.ties_merge, reference.ties_merge, device, *family(n, dtype), WEIGHTS, density
            )

    @pytest.mark.parametrize("options", [{"normalize": False}, {"lambda_": 0.4}], ids=str)
    def test_options_and_negative_weights(self, options, device):
        against(
            ops.ties_merge,
            reference.ties_merge,
            device,
            *family(4099, F32),
            [1.0, -0.5, 0.0],
            0.3,
            **options,
        )

    @pytest.mark.parametrize("kind", VALUES)
    def test_values(self, kind, device):
        against(
            ops.ties_merge, reference.ties_merge, device, *family(100, F32, kind=kind), WEIGHTS, 0.5
        )

    def test_by_hand(self, device):
        """Two of four stay; + has more mass where signs clash; who was trimmed does not count in the mean."""
        base = torch.zeros(4, device=device)
        experts = [
            torch.tensor(x, device=device)
            for x in ([4.0, -1, 3, 0.5], [2.0, 5, -4, 0.5], [1, 2, 3.0, 6])
        ]
        got = ops.ties_merge(base, experts, [1.0, 1.0, 1.0], 0.5)
        # Trimmed: [4 0 3 0], [0 5 -4 0], [0 0 3 6]
        assert got.tolist() == [4.0, 5.0, 3.0, 6.0]
        assert ops.ties_merge(base, experts, [1.0, 1.0, 1.0], 0.5, normalize=False).tolist() == [
            4,
            5,
            6,
            6,
        ]
        # Mass, not count: -4 against 1 + 2; weights count as mass.
        experts = [torch.tensor([x], device=device) for x in (-4.0, 1.0, 2.0)]
        assert ops.ties_merge(base[:1], experts, [1.0, 1.0, 1.0], 1.0).item() == -4
        assert ops.ties_merge(base[:1], experts, [0.5, 1.0, 1.0], 1.0).item() == 1.5
        even = ops.ties_merge(base[:1], experts, [0.5, 1.0, 0.5], 1.0)  # -2 against 1 + 1: + wins
        assert even.item() == pytest.approx(2 / 1.5)

    def test_equal_magnitudes_go_by_index(self, device):
        for n in (10, 2000, 50_000, 200_000):  # every way of finding the cut
            base = torch.zeros(n, device=device)
            sign = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0).to(device)
            got = ops.ties_merge(base, [sign], [1.0], 0.3).cpu()
            assert torch.equal(got != 0, torch.arange(n) < math.floor(0.3 * n))

    @pytest.mark.parametrize("n", [1000, 20_000, 150_000, 300_001])
    @pytest.mark.parametrize("kind", ["normal", "few", "sparse", "rising"])
    def test_exactly_the_largest_stay(self, n, kind, device):
        delta = fill((n,), F32)
        if kind == "few":
            delta = (delta * 4).round() / 4
        if kind == "sparse":
            delta[torch.arange(n) % 10 != 0] = 0
        if kind == "rising":
            delta = torch.arange(n, dtype=F32) / n
        base = torch.zeros(n, device=device)
        for density in (0.001, 0.05, 0.4, 0.999):
            got = on_every_isa(device, ops.ties_merge, base, [delta], [1.0], density)
            assert torch.equal(got, torch.where(reference.ties_keep(delta, density), delta, 0.0))

    @pytest.mark.parametrize("kind", ["rows", "few", "nan", "misleading"])
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_large_tensors(self, kind, dtype, device):
        """Cuts are found while the result is written: exactly, whatever the sample of the tensor says."""
        n, densities = 300_001, [0.2, 0.7, 1.0]
        base, experts = family(n, F32)
        deltas = [x - base for x in experts]
        if kind == "rows":  # scales of their own, and one expert all in one sign
            scale = torch.linspace(0.1, 3, n // 1000 + 1).repeat_interleave(1000)[:n]
            deltas = [d * scale for d in deltas[:2]] + [deltas[2].abs()]
        if kind == "few":  # about a hundredth of the magnitudes equals the cut
            deltas = [(d * 400).round() / 400 for d in deltas]
        if kind == "nan":
            deltas[0][torch.arange(n) % 4 == 0] = torch.nan
            deltas[1][5], deltas[1][-1] = torch.inf, -torch.inf
        if kind == "misleading":  # all that is sampled is small
            groups = n // 256 // 64 * 64
            inside = [i + i * 0x9E3779B9 % 2**32 / 2**32 for i in range(groups)]
            for i in inside:
                at = int(i * ((n - 16) / groups)) // 16 * 16
                for d in deltas:
                    d[at : at + 16] *= 1e-5
        base = torch.zeros(n, dtype=dtype)
        experts = [d.to(dtype) for d in deltas]
        got = on_every_isa(device, ops.ties_merge, base, experts, [1.0, 1.0, 0.5], densities)
        kept = [torch.where(reference.ties_keep(x.float(), p), x.float(), 0.0).to(dtype)
                for x, p in zip(experts, densities)]  # fmt: skip
        want = ops.ties_merge(base.to(device), on(device, kept), [1.0, 1.0, 0.5], 1.0)
        assert torch.equal(bits(got), bits(want.cpu()))
        for out in (0, 1):  # over an input
            base, *experts = on(device, [base.clone(), *[x.clone() for x in experts]])
            ops.ties_merge_((base, *experts)[out], base, experts, [1.0, 1.0, 0.5], densities)
            assert torch.equal(bits((base, *experts)[out].cpu()), bits(got))
            base, experts = torch.zeros(n, dtype=dtype), [d.to(dtype) for d in deltas]

    def test_any_threads(self, device):
        base, experts = on(device, family(300_000, BF16))
        want = ops.ties_merge(base, experts, WEIGHTS, 0.3)
        for count in (1, 2, 3):
            with threads(count):
                assert torch.equal(want, ops.ties_merge(base, experts, WEIGHTS, 0.3))


class TestLinear:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("normalize", [True, False])
    def test_equals_its_definition(self, dtype, normalize, device):
        for n in LENGTHS:
            _, tensors = family(n, dtype)
            weights = [1.0, -0.5, 2.0]
            got = on_every_isa(device, ops.linear_merge, tensors, weights, normalize=normalize)
            wide = reference.linear_merge(
                [t.double() for t in tensors], weights, normalize=normalize
            )
            assert_close_to_ref(
                got, wide, reference.linear_merge(tensors, weights, normalize=normalize)
            )

    def test_one_tensor_and_weight_zero(self, device):
        x = fill((100,), BF16).to(device)
        nan = torch.full_like(x, float("nan"))
        assert torch.equal(ops.linear_merge([x, nan], [3.0, 0.0]), x)
        assert ops.linear_merge([nan], [0.0], normalize=False).eq(0).all()


class TestSlerp:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
    @pytest.mark.parametrize("delta", [False, True])
    def test_equals_its_definition(self, dtype, t, delta, device):
        for n in LENGTHS:
            origin, (a, b) = family(n, dtype, 2)
            base = origin if delta else None
            got = on_every_isa(device, ops.slerp_merge, a, b, t, base=base)
            wide = reference.slerp_merge(
                a.double(), b.double(), t, base=base.double() if delta else None
            )
            assert_close_to_ref(got, wide, reference.slerp_merge(a, b, t, base=base))
            if t in (0.0, 1.0):
                assert torch.equal(got, a if t == 0 else b)

    def test_on_the_circle(self, device):
        """Equal steps of angle at a constant radius."""
        a, b = torch.tensor([2.0, 0.0], device=device), torch.tensor([0.0, 2.0], device=device)
        for t in (0.1, 0.5, 0.75):
            got = ops.slerp_merge(a, b, t).cpu()
            want = 2 * torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_nearly_parallel_is_linear(self, sign, device):
        a = fill((1000,), F32).to(device)
        b = sign * a * 3 + 1e-3 * fill((1000,), F32, seed=1).to(device)
        torch.testing.assert_close(
            ops.slerp_merge(a, b, 0.3), torch.lerp(a, b, 0.3), rtol=1e-6, atol=1e-6
        )
        apart = ops.slerp_merge(a, a.roll(1), 0.3)
        assert float((apart - torch.lerp(a, a.roll(1), 0.3)).norm()) > 1  # elsewhere it is not
        linear = ops.slerp_merge(a, a.roll(1), 0.3, dot_threshold=0.0)
        torch.testing.assert_close(linear, torch.lerp(a, a.roll(1), 0.3), rtol=1e-6, atol=1e-6)

    def test_no_direction(self, device):
        """cos counts as 0: a quarter of a circle."""
        a, zero = torch.ones(8, device=device), torch.zeros(8, device=device)
        torch.testing.assert_close(ops.slerp_merge(a, zero, 0.5), a * math.sqrt(0.5))
        assert ops.slerp_merge(zero, zero, 0.5).eq(0).all()


class TestGram:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", [1, 2, 5, 9])
    def test_equals_brute_force(self, dtype, count, device):
        """To 1e-12, as the differences, products and sums of float64."""
        for n in LENGTHS:
            base, experts = family(n, dtype, count)
            base *= 1000
            for origin in (None, base):
                got = on_every_isa(device, ops.delta_gram, origin, experts)
                want = reference.delta_gram(origin, experts)
                assert got.dtype == torch.float64 and torch.equal(got, got.T)
                norms = want.diagonal().sqrt()
                assert bool(((got - want).abs() <= 1e-12 * norms[:, None] * norms).all())

    def test_adds_up_over_tensors(self, device):
        gram, want = (
            torch.zeros(3, 3, dtype=torch.float64, device=device),
            torch.zeros(3, 3, dtype=torch.float64),
        )
        for n in (5, 1000, 40_000):
            base, experts = family(n, BF16)
            ops.delta_gram_(gram, *on(device, (base, experts)))
            want += reference.delta_gram(base, experts)
        torch.testing.assert_close(gram.cpu(), want, rtol=1e-12, atol=0)

    def test_any_threads(self, device):
        base, experts = on(device, family(300_000, BF16, 4))
        want = ops.delta_gram(base, experts)
        for count in (1, 2, 3):
            with threads(count):
                assert torch.equal(want, ops.delta_gram(base, experts))


# -- what all have in common -------------------------------------------------------------------------

CALLS = {
    "dare_merge": lambda b, e, **k: ops.dare_merge(b, e, WEIGHTS, 0.5, 3, **k),
    "ties_merge": lambda b, e: ops.ties_merge(b, e, WEIGHTS, 0.5),
    "linear_merge": lambda b, e: ops.linear_merge(e, WEIGHTS),
    "slerp_merge": lambda b, e: ops.slerp_merge(e[0], e[1], 0.3, base=b),
    "delta_gram": lambda b, e: ops.delta_gram(b, e),
}
INTO = {
    "dare_merge": lambda o, b, e: ops.dare_merge_(o, b, e, WEIGHTS, 0.5, 3),
    "ties_merge": lambda o, b, e: ops.ties_merge_(o, b, e, WEIGHTS, 0.5),
    "linear_merge": lambda o, b, e: ops.linear_merge_(o, e, WEIGHTS),
    "slerp_merge": lambda o, b, e: ops.slerp_merge_(o, e[0], e[1], 0.3, base=b),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_layouts(name, kind, device):
    """Position is that in the flattened tensor, wherever it lies."""
    base, experts = family(6 * 35, BF16)
    plain = base.view(6, 35).to(device), [e.view(6, 35).to(device) for e in experts]
    moved = layout(plain[0], kind), [layout(e, kind) for e in plain[1]]
    assert torch.equal(CALLS[name](*plain), CALLS[name](*moved))


@pytest.mark.parametrize("at", ["base", 0, 1, 2])
@pytest.mark.parametrize("name", INTO)
def test_out_may_be_an_input(name, at, device):
    base, experts = on(device, family(70_001, BF16))
    want = CALLS[name](base, experts)
    out = base if at == "base" else experts[at]
    before = out._version
    INTO[name](out, base, experts)
    assert torch.equal(bits(out), bits(want)) and out._version > before


@pytest.mark.parametrize("name", CALLS)
def test_refuses_to_differentiate(name, device):
    base, experts = on(device, family(8))
    for leaf in (experts[1],) if name == "linear_merge" else (base, experts[1]):
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match="inference only"):
            CALLS[name](base, experts)
        if name in INTO:
            with pytest.raises(RuntimeError, match="inference only"):
                INTO[name](torch.empty_like(base).detach(), base, experts)
        with torch.no_grad():
            CALLS[name](base, experts)
        leaf.requires_grad_(False)


def test_standing_checks(device):
    base, experts = on(device, family(1000, BF16))
    gram, out = torch.ones(3, 3, dtype=torch.float64, device=device), torch.zeros_like(base)
    drop = [0.3, 0.5, 0.0]
    exact = {"rtol": 0.0, "atol": 0.0}
    check_op(raw.dare_merge, (base, experts, WEIGHTS, drop, 3), **exact)
    check_op(raw.dare_merge_, (out, base, experts, WEIGHTS, drop, 3), mutates=True, **exact)
    check_op(raw.ties_merge, (base, experts, WEIGHTS, drop), **exact)
    check_op(raw.ties_merge_, (out, base, experts, WEIGHTS, drop), mutates=True, **exact)
    check_op(raw.linear_merge, (experts, WEIGHTS), **exact)
    check_op(raw.linear_merge_, (out, experts, WEIGHTS), mutates=True, **exact)
    check_op(raw.slerp_merge, (base, experts[0], 0.3), {"base": experts[1]}, **exact)
    check_op(raw.slerp_merge_, (out, base, experts[0], 0.3), mutates=True, **exact)
    check_op(raw.delta_gram, (base, experts), **exact)
    check_op(raw.delta_gram_, (gram, base, experts), mutates=True, **exact)


def good(name, device, **changes):
    """(face, op, args) of a call that works; ``changes`` by the name of an argument."""
    base, experts = on(device, family(12, F32))
    values = {"base": base, "experts": experts, "tensors": experts, "weights": WEIGHTS, "drop": [0.5] * 3, "seed": 1,
              "density": [0.5] * 3, "v0": base, "v1": experts[0], "t": 0.5, "out": torch.empty_like(base),
              "gram": torch.zeros(3, 3, dtype=torch.float64, device=device)} | changes  # fmt: skip
    order = {"dare_merge": ["base", "experts", "weights", "drop", "seed"],
             "ties_merge": ["base", "experts", "weights", "density"], "linear_merge": ["tensors", "weights"],
             "slerp_merge": ["v0", "v1", "t"], "delta_gram": ["base", "experts"],
             "delta_gram_": ["gram", "base", "experts"]}  # fmt: skip
    names = order.get(name) or ["out", *order[name[:-1]]]
    return getattr(ops, name), getattr(raw, name).default, [values[n] for n in names]


X = torch.zeros
BAD = [
    ("dare_merge", {"drop": [0.5, 1.0, 0.5]}, {}, ValueError, "drop[1]", "[0, 1)", "got 1"),
    ("dare_merge", {"drop": [0.5, -0.1, 0.5]}, {}, ValueError, "drop[1]", "-0.1"),
    ("dare_merge", {"drop": [0.5, float("nan"), 0.5]}, {}, ValueError, "drop[1]", "finite"),
    ("dare_merge", {"drop": [0.5]}, {}, ValueError, "drop", "3", "got 1"),
    ("dare_merge", {"weights": [1.0, 2.0]}, {}, ValueError, "weights", "3", "got 2"),
    ("dare_merge", {"weights": [1.0, float("inf"), 0.0]}, {}, ValueError, "weights[1]", "finite", "inf"),
    ("dare_merge", {"weights": [1.0, -1.0, 0.0]}, {"normalize": True}, ValueError, "weights", "sum to 0"),
    ("dare_merge", {"experts": [X(12)] * 2 + [X(11)]}, {}, ValueError, "experts[2]", "[12]", "[11]"),
    ("dare_merge", {"experts": [X(12)] * 2 + [X(12, dtype=BF16)]}, {}, ValueError, "experts[2]", "float32", "bfloat16"),
    ("dare_merge", {"base": X(12, dtype=torch.float64)}, {}, TypeError, "base", "float64"),
    ("dare_merge", {"base": X(12, dtype=torch.int8)}, {}, TypeError, "base", "int8"),
    ("dare_merge", {}, {"rescale": "l3"}, ValueError, "rescale", "l3", "inv_keep"),
    ("dare_merge", {}, {"offset": -1}, ValueError, "offset", "-1"),
    ("dare_merge", {}, {"offset": 2**49}, ValueError, "offset", "2^49"),
    ("dare_merge", {}, {"offset": 3, "rescale": "l1"}, ValueError, "offset", "l1", "3"),
    ("dare_merge", {}, {"lambda_": float("nan")}, ValueError, "lambda_", "nan"),
    ("dare_merge_", {"out": X(11)}, {}, ValueError, "out", "[12]", "[11]"),
    ("dare_merge_", {"out": X(12, dtype=F16)}, {}, ValueError, "out", "float32", "float16"),
    ("dare_merge_", {"out": X(24)[::2]}, {}, ValueError, "out", "contiguous"),
    ("ties_merge", {"density": [0.5, 1.1, 0.5]}, {}, ValueError, "density[1]", "[0, 1]", "1.1"),
    ("ties_merge", {"density": [0.5, 0.5]}, {}, ValueError, "density", "got 2"),
    ("ties_merge", {"weights": [float("nan")] * 3}, {}, ValueError, "weights[0]", "finite"),
    ("ties_merge_", {"out": X(24)[::2]}, {}, ValueError, "out", "contiguous"),
    ("linear_merge", {"tensors": [X(2)] * 65, "weights": [1.0] * 65}, {}, ValueError, "tensors", "got 65"),
    ("linear_merge", {"weights": [1.0, -1.0, 0.0]}, {}, ValueError, "weights", "sum to 0"),
    ("linear_merge", {"tensors": [X(2), X(2), X(3)]}, {}, ValueError, "tensors[2]", "[3]"),
    ("slerp_merge", {"t": 1.5}, {}, ValueError, "t", "[0, 1]", "1.5"),
    ("slerp_merge", {"v1": X(3)}, {}, ValueError, "v1", "[12]", "[3]"),
    ("slerp_merge", {}, {"base": X(3)}, ValueError, "base", "[3]"),
    ("slerp_merge", {}, {"dot_threshold": 2.0}, ValueError, "dot_threshold", "2"),
    ("slerp_merge", {"v0": X(12, dtype=torch.int32)}, {}, TypeError, "v0", "int32"),
    ("delta_gram", {"experts": [X(12), X(1)]}, {}, ValueError, "experts[1]"),
    ("delta_gram", {"base": X(1)}, {}, ValueError, "base", "[1]"),
    ("delta_gram_", {"gram": X(3, 3)}, {}, TypeError, "gram", "float64", "float32"),
    ("delta_gram_", {"gram": X(2, 2, dtype=torch.float64)}, {}, ValueError, "gram", "[3, 3]", "[2, 2]"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, changes, options, error, words", [(n, c, o, e, w) for n, c, o, e, *w in BAD]
)
def test_bad_input(name, changes, options, error, words, device):
    face, op, args = good(name, device, **on(device, changes))
    check_errors(face, op, args, options, error, *words)


def test_nothing_to_merge():
    calls = (lambda: ops.linear_merge([], []), lambda: ops.delta_gram(None, []),
             lambda: ops.dare_merge(X(3), [], [], 0.5, 1), lambda: ops.ties_merge(X(3), [], [], 0.5))  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="must be 1 to 64 tensors, got 0"):
            call()


def test_out_must_not_share_a_part_of_an_input(device):
    whole = torch.zeros(20, device=device)
    for name in ("dare_merge_", "ties_merge_", "linear_merge_"):
        key = "tensors" if name == "linear_merge_" else "experts"
        face, op, args = good(name, device, **{key: [whole[:12]] * 3, "out": whole[4:16]})
        check_errors(face, op, args, {}, ValueError, "out[0]", "share memory")


@cuda_only
def test_devices_must_agree(device):
    face, op, args = good("dare_merge", device, experts=[X(12, device=device), X(12), X(12)])
    check_errors(face, op, args, {}, ValueError, "experts[1]", "cuda", "cpu")


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "misaligned"])
def test_large_results_are_those_of_parts(isa, start):
    """A large result is written past the caches, where whole vectors are; small parts never are."""
    n, part = (1 << 22) + 37, 1 << 21
    for dtype in (BF16, F32) if isa != "scalar" else (BF16,):
        base = (torch.arange(n, dtype=torch.int32) % 251).to(dtype) / 64
        experts = [base * 1.5, base.flip(0)]
        out = torch.full((n + 1,), torch.nan, dtype=dtype)[start:][:n]
        for op, tensors, args in (
            (ops.dare_merge_, (base, experts), ([0.5, 0.5], 0.3, 1)),
            (ops.linear_merge_, (experts,), ([0.5, 0.5],)),
        ):
            with forced_isa(isa):
                op(out, *tensors, *args)
                for a in (0, part // 2, n - 1000):
                    cut = [t[a : a + part // 2] if isinstance(t, torch.Tensor) else
                           [x[a : a + part // 2] for x in t] for t in tensors]  # fmt: skip
                    want = torch.empty_like(experts[0][a : a + part // 2])
                    op(want, *cut, *args, **({"offset": a} if len(args) > 1 else {}))
                    assert torch.equal(out[a : a + part // 2], want)


@pytest.mark.parametrize("call, most", [
    ("ops.dare_merge_(out, base, experts, [0.5, 0.5], 0.3, 1)", 2),
    ("ops.ties_merge_(out, base, experts, [0.5, 0.5], 0.3)", 8),
    ("ops.dare_merge(base, experts, [0.5, 0.5], 0.3, 1)", 34),
])  # fmt: skip
def test_memory(call, most):
    """Of 2^24 bfloat16 elements (32 MB): the output and little more, in MB."""
    setup = """
        from tenfold import ops
        base = torch.randn(1 << 24).bfloat16()
        experts = [base * 1.01, base * 0.99]
        out = torch.zeros_like(base)
        ops.dare_merge_(out[:9], base[:9], [e[:9] for e in experts], [0.5, 0.5], 0.3, 1)
        """
    assert peak_growth(setup, call) < most * 2**20
