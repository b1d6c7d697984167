# SPDX-License-Identifier: Apache-2.0
"""The benchmark kit: what it times, what it refuses to time, and its ceilings."""

import copy
import itertools
import math
import statistics
import time
from types import SimpleNamespace

import pytest
import torch

import tenfold
from bench import ceilings as ceilings_module
from bench import runner, timing
from bench.case import (
    Inputs,
    NotAvailable,
    Provider,
    clone_inputs,
    input_bytes,
    provider,
    relative_error,
)
from bench.harness import Measured, Options, TooSlow, floor_seconds, measure, ratios, time_limit
from bench.timing import Clock, Limits, Rotation, interleave, percentile, sample_count
from bench_cases import (
    CEILINGS,
    CPU,
    LIMITS,
    OPTIONS,
    Log,
    case,
    double,
)


class TestAgreement:
    """Nothing is timed that gives a wrong answer, and nothing is left out silently."""

    @pytest.mark.parametrize(
        "wrong",
        [lambda i: i.x * 2.1, lambda i: i.x[1:] * 2, lambda i: i.x * math.nan, lambda i: (i.x, i.x),
         lambda i: None],
        ids=["values", "shape", "nan", "count", "nothing"],
    )  # fmt: skip
    def test_a_wrong_provider_is_named_and_not_timed(self, wrong):
        log = Log()
        found = measure(case(log.provider("eager", wrong)), OPTIONS, CEILINGS)
        theirs = found.providers["eager"]
        assert theirs.status == "disagrees" and "over the tolerance 1e-04" in theirs.note
        assert theirs.error > 1e-4
        assert log.calls == ["eager"]  # once, to compare
        assert theirs.p50_s is None and theirs.samples == [] and theirs.share is None
        assert found.ratios == {}  # nobody to be compared with
        assert found.tenfold.status == "ok" and found.tenfold.samples

    def test_everybody_is_judged_before_anybody_is_timed(self):
        log = Log()
        found = measure(
            case(log.provider("tenfold"), log.provider("eager"), log.provider("peer:a"),
                 log.provider("peer:b", lambda i: i.x)), OPTIONS, CEILINGS)  # fmt: skip
        assert log.calls[:4] == ["tenfold", "eager", "peer:a", "peer:b"]
        timed = log.calls[4:]
        assert set(timed) == {"tenfold", "eager", "peer:a"}
        assert all(len(p.samples) >= 3 for p in found.providers.values() if p.status == "ok")

    def test_tolerance_is_inclusive_and_relative(self):
        for error, status in ((0.9e-3, "ok"), (1.1e-3, "disagrees")):
            made = case(provider("eager", lambda i, e=error: 2 * i.x * (1 + e)), tolerance=1e-3)
            found = measure(made, OPTIONS, CEILINGS).providers["eager"]
            assert found.status == status and found.error == pytest.approx(error, rel=1e-2)

    def test_a_provider_may_have_its_own_rule(self):
        random = provider("eager", lambda i: torch.rand(1000), agree=lambda g, w, i: 0.0)
        assert measure(case(random), OPTIONS, CEILINGS).providers["eager"].status == "ok"

    def test_a_yardstick_need_not_agree(self):
        found = measure(case(provider("copy", lambda i: i.x.clone(), "bound")), OPTIONS, CEILINGS)
        assert found.providers["copy"].status == "ok" and found.providers["copy"].error is None
        assert set(found.ratios) == {"bound"}  # and is nobody's competitor

    def test_crash(self):
        def crashes(i):
            raise RuntimeError("no such kernel\nsecond line")

        found = measure(case(provider("peer", crashes)), OPTIONS, CEILINGS).providers["peer"]
        assert (found.status, found.note) == ("error", "RuntimeError: no such kernel")

    def test_not_available(self):
        def build(inputs):
            raise NotAvailable("flashinfer is not installed")

        found = measure(case(Provider("peer", "peer", build)), OPTIONS, CEILINGS).providers["peer"]
        assert (found.status, found.note) == ("n/a", "flashinfer is not installed")
        assert found.p50_s is None

    def test_too_much_memory(self):
        log = Log()
        made = case(log.provider("eager", scratch=1 << 60), log.provider("peer", scratch=1 << 10))
        found = measure(made, OPTIONS, CEILINGS).providers
        assert found["eager"].status == "n/a"
        assert found["eager"].note == f"needs {2**30:.1f} GiB of intermediates"
        assert "eager" not in log.calls and found["peer"].status == "ok"

    def test_slow_compilation(self):
        def build(inputs):
            time.sleep(20)

        start = time.monotonic()
        options = Options(limits=LIMITS, compile_limit=0.2)
        made = case(Provider("compile", "compile", build))
        found = measure(made, options, CEILINGS).providers["compile"]
        assert found.status == "n/a" and "s to compile" in found.note
        assert time.monotonic() - start < 10

    def test_slow_compilation_that_the_compiler_wraps(self):
        def build(inputs):
            try:
                time.sleep(20)
            except TooSlow as error:
                raise RuntimeError("the backend failed") from error

        options = Options(limits=LIMITS, compile_limit=0.1)
        made = case(Provider("compile", "compile", build))
        found = measure(made, options, CEILINGS).providers["compile"]
        assert (found.status, found.note) == ("n/a", "over 0 s to compile")

    def test_compilation_can_be_left_out(self):
        log = Log()
        made = case(log.provider("compile"))
        found = measure(made, Options(limits=LIMITS, compile=False), CEILINGS)
        assert found.providers["compile"].note == "not asked for" and log.calls == []

    def test_slower_eager_forms_are_timed_once(self):
        def slow(i):
            time.sleep(0.02)
            return i.x * 2

        made = case(provider("eager:fast", double), provider("eager:slow", slow))
        found = measure(made, OPTIONS, CEILINGS)
        slower = found.providers["eager:slow"]
        assert slower.status == "slower form" and "s once, not the fastest form" in slower.note
        assert slower.samples == [] and found.providers["eager:fast"].samples

    def test_time_limit(self):
        with pytest.raises(TooSlow), time_limit(0.05):
            time.sleep(5)
        with time_limit(0.05):
            pass
        time.sleep(0.1)  # an alarm that were left behind would end the process


class TestInPlace:
    """The result of an in-place provider is what it left in the inputs."""

    def doubles(self, i):
        i.x.mul_(2)

    def case(self, *providers):
        return case(provider("tenfold", self.doubles), *providers, reference=self.doubles,
                    mode="inplace", mutates=("x",))  # fmt: skip

    def test_right(self):
        found = measure(self.case(provider("eager", self.doubles)), OPTIONS, CEILINGS)
        assert [p.status for p in found.providers.values()] == ["ok", "ok"]
        assert "eager" in found.ratios

    def test_a_provider_that_only_returns_the_answer_is_wrong(self):
        found = measure(self.case(provider("eager", double)), OPTIONS, CEILINGS)
        assert found.providers["eager"].status == "disagrees"

    def test_every_provider_starts_from_fresh_inputs(self):
        seen = []

        def notes(i):
            seen.append(i.x.clone())
            i.x.mul_(2)

        measure(self.case(provider("eager", notes), provider("peer", notes)), OPTIONS, CEILINGS)
        fresh = torch.arange(1000.0)
        assert torch.equal(seen[0], fresh) and torch.equal(seen[1], fresh)

    def test_out(self):
        def inputs(shape, dtype, device):
            return Inputs(x=torch.arange(10.0), out=torch.full((10,), math.nan))

        def good(i):
            torch.mul(i.x, 2, out=i.out)

        made = case(provider("tenfold", good), provider("eager", lambda i: None), inputs=inputs,
                    reference=good, mode="out", mutates=("out",))  # fmt: skip
        found = measure(made, OPTIONS, CEILINGS).providers
        assert found["tenfold"].status == "ok" and found["eager"].status == "disagrees"


class TestCase:
    def test_errors(self):
        with pytest.raises(ValueError, match=r"double: mode must be one of .*'fast'"):
            case(mode="fast")
        with pytest.raises(ValueError, match="mutates"):
            case(mode="inplace")
        with pytest.raises(ValueError, match="mutates"):
            case(mutates=("x",))
        with pytest.raises(ValueError, match="unique"):
            case(provider("eager", double), provider("eager", double))
        with pytest.raises(ValueError, match="exactly one provider"):
            case(provider("ours", double, "tenfold"), provider("tenfold", double))
        with pytest.raises(ValueError, match="exactly one provider"):
            case(providers=[provider("eager", double)])
        with pytest.raises(ValueError, match=r"provider fast: kind .*'fast'"):
            provider("fast", double)

    def test_name(self):
        assert case().name == "double/float32/n1000"
        other = case(variant="v", shape={"a": 1, "n": 2}, dtype=torch.bfloat16, warm=True)
        assert other.name == "double/v/bfloat16/a1-n2/warm"

    def test_kind_from_the_name(self):
        assert provider("eager:gather", double).kind == "eager"
        assert provider("copy_", double, "bound").kind == "bound"

    def test_clones_keep_strides_and_do_not_share(self):
        x = torch.arange(6.0).view(2, 3).t()
        one = Inputs(x=x, n=3, none=None)
        two = clone_inputs(one)
        assert torch.equal(two.x, x) and two.x.stride() == x.stride() and two.n == 3
        two.x.zero_()
        assert x.sum() == 15
        assert input_bytes(Inputs(a=torch.zeros(3), b=torch.zeros(2, dtype=torch.int64), n=7)) == 28

    def test_relative_error(self):
        a = torch.tensor([3.0, 4.0])
        assert relative_error(a, a) == 0
        assert relative_error(a + torch.tensor([0.0, 0.5]), a) == pytest.approx(0.1)
        assert relative_error((a, a * 1.01), (a, a)) == pytest.approx(0.01, rel=1e-3)  # the worst
        assert relative_error(torch.tensor([1e-3]), torch.tensor([0.0])) == pytest.approx(1e-3)
        for bad in (a[:1], torch.tensor([3.0, math.nan]), torch.tensor([math.inf, 4.0])):
            assert relative_error(bad, a) == math.inf
        ids = torch.tensor([1, 2])
        assert relative_error(ids, ids) == 0 and relative_error(ids + 1, ids) == math.inf
        with pytest.raises(ValueError):
            relative_error((a, a), (a,))


class TestTiming:
    def test_percentile(self):
        samples = [5.0, 1.0, 4.0, 2.0, 3.0]
        assert percentile(samples, 0.5) == 3.0 == statistics.median(samples)
        assert percentile(samples, 0.2) == pytest.approx(1.8)
        assert percentile(samples, 0.0) == 1.0 and percentile(samples, 1.0) == 5.0
        assert percentile([7.0], 0.8) == 7.0
        quantiles = statistics.quantiles(samples, n=10, method="inclusive")
        for at, value in enumerate(quantiles, 1):
            assert percentile(samples, at / 10) == pytest.approx(value)

    def test_rotation_outgrows_the_cache(self, monkeypatch):
        cache = 1 << 20
        monkeypatch.setattr(timing, "cache_bytes", lambda device: cache)
        for size in (10_000, 100_000, 300_000, 5_000_000):
            ring = Rotation(Inputs(x=torch.zeros(size // 4)), CPU)
            assert len(ring.sets) >= 2
            # Everything that is read between two uses of a set is over twice the cache.
            assert (len(ring.sets) - 1) * (size // 4 * 4) >= 2 * cache or len(ring.sets) == 2
            pointers = {s.x.data_ptr() for s in ring.sets}
            assert len(pointers) == len(ring.sets)
            seen = [ring.next() for _ in range(2 * len(ring.sets))]
            half = len(ring.sets)
            assert len({id(s) for s in seen[:half]}) == half and seen[:half] == seen[half:]

    def test_two_large_sets_are_over_twice_the_cache(self, monkeypatch):
        monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 10)
        ring = Rotation(Inputs(x=torch.zeros(1 << 20)), CPU)
        assert len(ring.sets) == 2

    def test_warm_keeps_one_set(self):
        ring = Rotation(Inputs(x=torch.zeros(10)), CPU, warm=True)
        assert len(ring.sets) == 1 and ring.next() is ring.next()
        found = measure(case(warm=True), OPTIONS, CEILINGS)
        assert found.buffer_sets == 1 and found.warm

    def test_number_of_sets_is_bounded(self):
        assert len(Rotation(Inputs(n=1), CPU).sets) <= timing.MAX_SETS

    def test_every_call_gets_the_next_set(self):
        pointers = []

        def notes(i):
            pointers.append(i.x.data_ptr())
            return i.x * 2

        found = measure(case(provider("eager", notes)), OPTIONS, CEILINGS)
        timed = pointers[1:]
        assert found.buffer_sets > 100 and len(set(timed)) > 3

    def clocks(self, **counts):
        """Clocks that only note who was sampled; ``counts``: seconds per sample."""
        order = []

        def make(name, seconds):
            def sample():
                order.append(name)
                return seconds

            return Clock(sample, seconds, 1, "test")

        return order, {name: make(name, seconds) for name, seconds in counts.items()}

    def test_samples_are_interleaved(self):
        order, clocks = self.clocks(a=0.001, b=0.001, c=0.001)
        interleave(clocks, Limits(seconds=0.04))
        assert len(order) == 120
        rounds = [order[i : i + 3] for i in range(0, 120, 3)]
        assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
        assert len({tuple(turn) for turn in rounds}) > 3  # no fixed neighbour
        assert [len(c.samples) for c in clocks.values()] == [40] * 3

    def test_slow_providers_are_spread_over_the_rounds(self):
        order, clocks = self.clocks(fast=0.001, slow=0.008)
        interleave(clocks, Limits(seconds=0.04))
        assert (order.count("fast"), order.count("slow")) == (40, 5)
        at = [i for i, name in enumerate(order) if name == "slow"]
        gaps = [b - a for a, b in itertools.pairwise(at)]
        assert max(gaps) <= 11 and min(gaps) >= 7

    def test_sample_count(self):
        limits = Limits(seconds=1.0, min_samples=5, max_samples=60, slow_call=1.0)

        def made(seconds):
            return SimpleNamespace(estimate=seconds, calls=1)

        assert sample_count(made(0.1), limits) == 10
        assert sample_count(made(1e-4), limits) == 60
        assert sample_count(made(0.9), limits) == 5
        assert sample_count(made(30.0), limits) == 3

    def test_times_are_per_call(self):
        def sleeps(i):
            time.sleep(0.002)
            return i.x * 2

        limits = Limits(seconds=0.05, min_samples=3, max_samples=5, min_sample_seconds=0.01)
        made = case(provider("tenfold", sleeps))
        ours = measure(made, Options(limits=limits), CEILINGS).tenfold
        assert ours.calls > 1 and 0.002 <= ours.p20_s <= ours.p50_s <= ours.p80_s < 0.05
        assert ours.p50_s == statistics.median(ours.samples)


class TestNumbers:
    def measured(self, **times):
        return {
            name: Measured(name.split("_")[0], "ok" if t else "n/a", p50_s=t)
            for name, t in times.items()
        }

    def test_ratios_are_to_the_best_of_each_kind(self):
        found = ratios(self.measured(tenfold=2.0, eager_a=6.0, eager_b=4.0, compile=3.0, peer=None,
                                     bound_a=1.0, bound_b=1.5))  # fmt: skip
        assert found == {"eager": 2.0, "compile": 1.5, "bound": 0.5, "best_other": 1.5}

    def test_a_yardstick_is_not_the_best_other(self):
        assert ratios(self.measured(tenfold=2.0, bound=1.0)) == {"bound": 0.5}
        assert ratios(self.measured(tenfold=None, eager=1.0)) == {}

    def test_floor_is_the_larger_of_memory_and_compute(self):
        made = case(flops=lambda s: 1e9, peak="fma_fp32", bytes=lambda s, size: 1e9)
        assert floor_seconds(made, CEILINGS) == (0.1, "memory")
        made = case(flops=lambda s: 2e10, peak="fma_fp32", bytes=lambda s, size: 1e9)
        assert floor_seconds(made, CEILINGS) == (0.2, "compute")
        assert floor_seconds(case(flops=lambda s: 2e10), CEILINGS)[1] == "memory"

    def test_rates_and_share(self):
        made = case(flops=lambda s: 7 * s["n"], peak="fma_fp32")
        found = measure(made, OPTIONS, CEILINGS)
        ours = found.tenfold
        assert (found.bytes, found.flops, found.bound) == (8000, 7000, "memory")
        assert ours.gb_s == pytest.approx(8000 / ours.p50_s * 1e-9)
        assert ours.gflop_s == pytest.approx(7000 / ours.p50_s * 1e-9)
        assert ours.share == pytest.approx(ours.gb_s / 10.0)

    def test_shares_follow_higher_ceilings(self):
        made = case(flops=lambda s: 7 * s["n"], peak="fma_fp32")
        found = measure(made, OPTIONS, CEILINGS)
        before = found.tenfold.share
        higher = copy.deepcopy(CEILINGS)
        higher["copy"]["value"] = 20.0
        runner.rescale(found, CEILINGS, higher)
        assert found.tenfold.share == pytest.approx(before / 2)


class TestCeilings:
    def test_void_below_matmul(self):
        assert ceilings_module.void_reason(CEILINGS) == ""
        low = copy.deepcopy(CEILINGS)
        low["fma_fp32"]["value"] = 79.0
        assert "fma_fp32 measured 79 GFLOP/s, below torch's matmul (80)" in (
            ceilings_module.void_reason(low)
        )

    def test_merge_takes_the_higher_of_each(self):
        other = copy.deepcopy(CEILINGS)
        other["copy"].update(value=9.0, source="later")
        other["fma_fp32"].update(value=120.0, source="later", torch_matmul=70.0)
        for one, two in ((CEILINGS, other), (other, CEILINGS)):
            best = ceilings_module.merge(one, two)
            assert (best["copy"]["value"], best["copy"]["source"]) == (10.0, "test")
            assert (best["fma_fp32"]["value"], best["fma_fp32"]["source"]) == (120.0, "later")
            assert best["fma_fp32"]["torch_matmul"] == 80.0  # the stricter judge of the two
        assert CEILINGS["fma_fp32"]["value"] == 100.0  # nothing was changed

    def test_native_peaks(self):
        assert ceilings_module.native_peak("fma_fp32", tries=1) > 0.1
        has_bf16 = tenfold.cpu_capability() in ("avx512_bf16", "avx512_amx")
        assert (ceilings_module.native_peak("dot_bf16", tries=1) > 0.1) == has_bf16

    def test_without_bf16_instructions_the_ceiling_is_that_of_fp32(self, monkeypatch):
        """A ceiling of 0 would make every run void there."""
        for name, value in {"torch_copy": 20.0, "torch_read": 10.0, "torch_update": 20.0}.items():
            monkeypatch.setattr(ceilings_module, name, lambda device, value=value: value)
        monkeypatch.setattr(ceilings_module, "torch_matmul", lambda dtype, device: 3.0)
        peaks = {"fma_fp32": 100.0, "dot_bf16": 0.0, "copy": 25.0, "read": 9.0}
        monkeypatch.setattr(ceilings_module, "native_peak", peaks.get)
        found = ceilings_module.measure_ceilings(CPU)
        assert found["dot_bf16"]["value"] == 100.0 and found["dot_bf16"]["torch_matmul"] == 3.0
        assert (found["copy"]["value"], found["read"]["value"]) == (25.0, 10.0)
        assert ceilings_module.void_reason(found) == ""

    @pytest.mark.parametrize(
        ("seconds_of_256", "sizes"), [(0.06, [256]), (0.001, [256, 512, 1024])]
    )
    def test_the_matmul_is_no_larger_than_it_is_fast(self, monkeypatch, seconds_of_256, sizes):
        """Of 2,048 rows it would be 31 s a call in the first case."""
        now, seen = [0.0], []

        def matmul(a, b, *, out):
            seen.append(len(a))
            now[0] += seconds_of_256 * (len(a) / 256) ** 3

        monkeypatch.setattr(torch, "matmul", matmul)
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        rate = ceilings_module.torch_matmul(torch.bfloat16, CPU, tries=2)
        assert sorted(set(seen)) == sizes
        assert rate == pytest.approx(2 * 256**3 / seconds_of_256 * 1e-9)
