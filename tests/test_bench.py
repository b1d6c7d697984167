# SPDX-License-Identifier: Apache-2.0
"""The benchmark kit: what it times, what it refuses to time, what it records, and the GPU ledger."""

import contextlib
import copy
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tenfold
from bench import ceilings as ceilings_module
from bench import gpu, gpu_proof, gpu_status, report, results, runner, sources, timing
from bench.__main__ import main as bench_main
from bench.case import (
    Case,
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

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LIMITS = Limits(seconds=0.01, min_samples=3, max_samples=6, min_sample_seconds=0)
OPTIONS = Options(limits=LIMITS)
CEILINGS = {
    "copy": {"value": 10.0, "unit": "GB/s", "source": "test"},
    "fma_fp32": {"value": 100.0, "unit": "GFLOP/s", "source": "test", "torch_matmul": 80.0},
}


def make_inputs(shape, dtype, device):
    return Inputs(x=torch.arange(shape["n"], dtype=dtype, device=device), factor=2)


def double(i):
    return i.x * i.factor


def case(*providers, **changes):
    """``y = 2 x``, with ``providers`` beside ours."""
    kinds = [p.kind for p in providers]
    ours = [] if "tenfold" in kinds else [provider("tenfold", double)]
    settings = {
        "op": "double", "shape": {"n": 1000}, "dtype": torch.float32, "inputs": make_inputs,
        "bytes": lambda s, size: 2 * size * s["n"], "providers": [*ours, *providers],
        "reference": double,
    }  # fmt: skip
    return Case(**(settings | changes))


class Log:
    """Providers that note each call."""

    def __init__(self):
        self.calls = []

    def provider(self, name, function=double, **extra):
        def noted(i):
            self.calls.append(name)
            return function(i)

        return provider(name, noted, **extra)


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
        made = lambda seconds: SimpleNamespace(estimate=seconds, calls=1)  # noqa: E731
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


def a_record(family="kv_eviction", **changes):
    """A record as a run makes it."""
    made = case(
        provider("eager", lambda i: i.x + i.x), provider("copy_", lambda i: i.x.clone(), "bound")
    )
    found = [measure(made, OPTIONS, CEILINGS)]
    record = results.make_record(family, found, CEILINGS, results.environment(CPU),
                                 results.source_state("kv_eviction"), OPTIONS)  # fmt: skip
    return record | changes


@pytest.fixture(scope="module")
def record():
    return a_record()


class TestResults:
    def test_says_what_was_measured_where_with_what(self, record):
        done = subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
        )
        assert record["commit"] == (done.stdout.strip() if done.returncode == 0 else None)
        assert record["sources"] == sources.measured_hash(ROOT, "kv_eviction")
        assert record["cuda_sources"] == sources.cuda_hash(ROOT, "kv_eviction")
        env = record["environment"]
        assert env["versions"]["torch"] == torch.__version__
        assert env["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert env["tenfold"] == tenfold.__version__ and env["isa"] == tenfold.cpu_capability()
        assert env["threads"] == torch.get_num_threads() and env["device"] == results.cpu_model()
        assert re.fullmatch(r"[0-9a-f]{64}", env["ops_sha256"]) and env["compiler"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
        assert record["ceilings"] == CEILINGS

    def test_machine_name(self, monkeypatch):
        monkeypatch.setenv("TENFOLD_CPU_CAPABILITY", "avx512_bf16")
        forced = results.machine_name(CPU)
        monkeypatch.delenv("TENFOLD_CPU_CAPABILITY")
        monkeypatch.setattr(tenfold, "cpu_capability", lambda: "avx512_amx")
        name = results.machine_name(CPU)
        assert forced == f"{name}-avx512-bf16"
        with monkeypatch.context() as lesser:
            lesser.setattr(tenfold, "cpu_capability", lambda: "avx2")
            assert results.machine_name(CPU) == f"{name}-avx2"
        assert re.fullmatch(rf"[a-z0-9]+(-[a-z0-9]+)*-{results.num_cores()}c", name)
        for model, expected in {
            "Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz": "intel-xeon-platinum-8480c",
            "AMD EPYC 9654 96-Core Processor": "amd-epyc-9654",
        }.items():
            monkeypatch.setattr(results, "cpu_model", lambda m=model: m)
            assert results.machine_name(CPU) == f"{expected}-{results.num_cores()}c"
        for device, expected in {
            "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-40GB": "a100",
            "NVIDIA GeForce RTX 4090": "nvidia-geforce-rtx-4090",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda d, n=device: n)
            assert results.machine_name(torch.device("cuda")) == expected

    def test_save_and_load(self, record, tmp_path):
        path = results.save(record, tmp_path)
        assert path == tmp_path / record["machine"] / "kv_eviction.json"
        loaded = results.load(path)
        assert (
            loaded["commit"] == record["commit"] and loaded["environment"] == record["environment"]
        )
        ours = loaded["cases"][0]["providers"]["tenfold"]
        want = record["cases"][0]["providers"]["tenfold"]
        assert ours["samples"] == pytest.approx(want["samples"], rel=1e-5)
        assert results.load_all(tmp_path) == [loaded]
        assert [p.name for p in path.parent.iterdir()] == ["kv_eviction.json"]
        assert "samples" in path.read_text() and len(path.read_text().splitlines()) < 300

    def test_what_json_cannot_hold_does_not_lose_the_run(self, tmp_path):
        """A result of another shape has an infinite error."""
        made = case(provider("peer", lambda i: i.x[1:]))
        found = [measure(made, OPTIONS, CEILINGS)]
        assert found[0].providers["peer"].error == math.inf
        record = results.make_record("kv_eviction", found, CEILINGS, {}, {}, OPTIONS)
        theirs = results.load(results.save(record, tmp_path))["cases"][0]["providers"]["peer"]
        assert (
            theirs["error"] is None and theirs["status"] == "disagrees" and "inf" in theirs["note"]
        )

    def test_load_refuses_other_files(self, tmp_path):
        for text in ("{", "[]", "{}", '{"schema": 0}'):
            path = tmp_path / "x.json"
            path.write_text(text)
            with pytest.raises(ValueError, match=r"x\.json is not a result file"):
                results.load(path)

    def test_problems_forbid_publication(self, record):
        clean = copy.deepcopy(record)
        clean["environment"]["ops_older_than_sources"] = False
        assert results.problems(clean) == []
        for change, word in (({"quick": True}, "quick"), ({"partial": True}, "selected"),
                             ({"void": "machine was busy"}, "machine was busy")):  # fmt: skip
            (said,) = results.problems(clean | change)
            assert word in said
        clean["environment"]["ops_older_than_sources"] = True
        assert "older than the sources" in results.problems(clean)[0]

    def test_wrong_names_our_failures_only(self, record):
        made = copy.deepcopy(record)
        providers = made["cases"][0]["providers"]
        providers["eager"]["status"] = "error"
        assert results.wrong(made) == []
        providers["tenfold"].update(status="disagrees", note="error 1")
        assert results.wrong(made) == ["double/float32/n1000: tenfold disagrees: error 1"]
        assert results.problems(made)[-1:] == results.wrong(made)


# -- a small source tree -----------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Two families, one with CUDA code, and a core of which it includes a part."""
    files = {
        "_template/ops.cpp": "//",
        "alpha/ops.cpp": "// alpha",
        "alpha/alpha.h": '#include "core/math.h"\n',
        "alpha/cpu/alpha.cpp": '#include "core/parallel.h"\n',
        "alpha/cuda/alpha.cu": '#include "alpha_kernel.cuh"\n#include <core/launch.cuh>\n',
        "alpha/cuda/alpha_kernel.cuh": "#include <cuda_fp16.h>\n",
        "alpha/notes.txt": "",
        "beta/ops.cpp": "// beta",
        "core/math.h": '  #  include "types.h"\n',
        "core/types.h": '#include "core/math.h"\n',  # a circle
        "core/launch.cuh": "// launch",
        "core/parallel.h": "// CPU only",
        "core/cpu/isa.h": "// CPU only",
    }
    for name, text in files.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def change(tree, name):
    path = tree / "csrc" / name
    path.write_text(path.read_text() + "// changed\n")


class TestSources:
    def test_families(self, tree):
        assert sources.families(tree) == ["alpha", "beta"]
        assert sources.families(ROOT) == list(runner.FAMILIES)

    @pytest.mark.parametrize(
        "name", ["alpha/cuda/alpha.cu", "alpha/cuda/alpha_kernel.cuh", "alpha/alpha.h",
                 "core/launch.cuh", "core/math.h", "core/types.h"],
    )  # fmt: skip
    def test_what_the_gpu_runs_changes_the_ledgers_hash(self, tree, name):
        before = sources.cuda_hash(tree, "alpha")
        assert before == sources.cuda_hash(tree, "alpha")
        change(tree, name)
        assert sources.cuda_hash(tree, "alpha") != before

    @pytest.mark.parametrize(
        "name", ["alpha/ops.cpp", "alpha/cpu/alpha.cpp", "core/parallel.h", "core/cpu/isa.h",
                 "beta/ops.cpp", "alpha/notes.txt"],
    )  # fmt: skip
    def test_other_files_leave_the_ledgers_hash(self, tree, name):
        before = sources.cuda_hash(tree, "alpha")
        change(tree, name)
        assert sources.cuda_hash(tree, "alpha") == before

    def test_the_line_of_the_licence_does_not_count(self, tree):
        before = sources.cuda_hash(tree, "alpha"), sources.measured_hash(tree, "alpha")
        for path in (tree / "csrc").rglob("*.*"):
            path.write_bytes(b"// SPDX-License-Identifier: Apache-2.0\n" + path.read_bytes())
        assert (sources.cuda_hash(tree, "alpha"), sources.measured_hash(tree, "alpha")) == before

    def test_new_and_renamed_files_count(self, tree):
        before = sources.cuda_hash(tree, "alpha")
        kernel = tree / "csrc/alpha/cuda/alpha.cu"
        renamed = kernel.rename(kernel.with_name("omega.cu"))
        assert sources.cuda_hash(tree, "alpha") != before
        renamed.rename(kernel)
        assert sources.cuda_hash(tree, "alpha") == before
        (kernel.parent / "more.cuh").write_text("")
        assert sources.cuda_hash(tree, "alpha") != before

    def test_text_cannot_move_between_files(self, tree):
        before = sources.cuda_hash(tree, "alpha")
        a, b = (tree / "csrc/alpha/cuda" / n for n in ("alpha.cu", "alpha_kernel.cuh"))
        one, two = a.read_text(), b.read_text()
        a.write_text(one + two)
        b.write_text("")
        assert sources.cuda_hash(tree, "alpha") != before

    def test_no_cuda_code(self, tree):
        assert (
            sources.cuda_hash(tree, "beta") is None and sources.cuda_sources(tree, "beta") == set()
        )

    @pytest.mark.parametrize(
        "name, counts", [("alpha/cpu/alpha.cpp", True), ("alpha/cuda/alpha.cu", True),
                         ("core/cpu/isa.h", True), ("core/parallel.h", True),
                         ("beta/ops.cpp", False), ("alpha/notes.txt", False)],
    )  # fmt: skip
    def test_a_cpu_result_is_of_the_whole_family_and_core(self, tree, name, counts):
        before = sources.measured_hash(tree, "alpha")
        change(tree, name)
        assert (sources.measured_hash(tree, "alpha") != before) == counts

    def test_the_real_tree(self):
        csrc = ROOT / "csrc"
        for family in sources.families(ROOT):
            found = {p.relative_to(csrc).as_posix() for p in sources.cuda_sources(ROOT, family)}
            own = {p.relative_to(csrc).as_posix() for p in (csrc / family / "cuda").iterdir()}
            assert own <= found and "core/launch.cuh" in found
            assert not any(
                name.startswith((f"{family}/cpu/", f"{family}/ops.cpp")) for name in found - own
            )
            assert "core/tensor.cpp" not in found and "core/cpu/vec.h" not in found


class TestLedger:
    def write(self, tree, **content):
        path = tree / "bench/results/h200/alpha.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def test_states(self, tree):
        assert gpu_status.status(tree, "alpha") == "never"
        self.write(tree, schema=1)  # measured, but not proven
        assert gpu_status.status(tree, "alpha") == "never"
        self.write(tree, verified_cuda_hash=None)
        assert gpu_status.status(tree, "alpha") == "never"
        self.write(tree, verified_cuda_hash=sources.cuda_hash(tree, "alpha"))
        assert gpu_status.status(tree, "alpha") == "verified"
        change(tree, "alpha/cpu/alpha.cpp")
        assert gpu_status.status(tree, "alpha") == "verified"
        change(tree, "core/types.h")
        assert gpu_status.status(tree, "alpha") == "stale"
        assert gpu_status.status(tree, "beta") == "never"

    def test_another_gpu_proves_nothing(self, tree):
        path = tree / "bench/results/h100/alpha.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"verified_cuda_hash": sources.cuda_hash(tree, "alpha")}))
        assert gpu_status.status(tree, "alpha") == "never"

    def test_an_h100_is_a_machine_of_its_own(self, tree, capsys):
        path = tree / "bench/results/h100/alpha.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"verified_cuda_hash": sources.cuda_hash(tree, "alpha")}))
        assert gpu_status.main(["--root", str(tree)]) == 0
        assert capsys.readouterr().out == "alpha never (h100 verified)\nbeta never\n"
        assert "`alpha`: never run on an H200 (H100: verified);" in report.ledger(tree)
        change(tree, "core/types.h")
        self.write(tree, verified_cuda_hash=sources.cuda_hash(tree, "alpha"))
        assert gpu_status.main(["--root", str(tree)]) == 0
        assert capsys.readouterr().out == "alpha verified (h100 stale)\nbeta never\n"
        assert "`alpha`: verified on an H200 (H100: stale);" in report.ledger(tree)

    def test_other_results_folder(self, tree, tmp_path):
        self.write(tree, verified_cuda_hash=sources.cuda_hash(tree, "alpha"))
        assert gpu_status.status(tree, "alpha", tmp_path / "empty") == "never"

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_a_broken_file_is_named(self, tree, text):
        self.write(tree)
        path = tree / "bench/results/h200/alpha.json"
        path.write_text(text)
        with pytest.raises(SystemExit, match=re.escape(f"{path} is not a result file")):
            gpu_status.status(tree, "alpha")

    def test_one_line_per_family(self, tree, capsys):
        self.write(tree, verified_cuda_hash="0" * 64)
        assert gpu_status.main(["--root", str(tree)]) == 0
        assert capsys.readouterr().out == "alpha stale\nbeta never\n"

    def test_without_sources(self, tmp_path, capsys):
        assert gpu_status.main(["--root", str(tmp_path)]) == 2
        assert "run it in a checkout" in capsys.readouterr().err

    @pytest.mark.parametrize("command", [["-m", "bench.gpu_status"], ["bench/gpu_status.py"]])
    def test_standard_library_only(self, command, tree):
        """No site-packages, no environment: as on a machine where nothing is installed."""
        bare = [sys.executable, "-S", "-E", "-s"]
        done = subprocess.run([*bare, "-c", "import torch"], capture_output=True, cwd=ROOT)
        assert done.returncode != 0  # the interpreter is really bare
        done = subprocess.run(
            [*bare, *command, "--root", tree], capture_output=True, text=True, cwd=ROOT
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "alpha never\nbeta never\n", "")

    def test_of_this_checkout(self, capsys):
        assert gpu_status.main([]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(runner.FAMILIES)
        assert {line.split()[1] for line in lines} <= {"verified", "stale", "never"}


# -- tables and pages --------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, record):
    """A copy of what the generated tables are made from and stand in, with results of its own."""
    root = tmp_path / "checkout"
    for name in ("csrc", "docs", "bench"):
        ignore = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    shutil.copy(ROOT / "README.md", root)
    results.save(record, root / "bench/results")
    study = {
        "setting": "a small model",
        "rows": [{"task": "needle", "length": 512, "budget": 0.2, "method": "nacl", "cases": 3,
                  "accuracy": 2 / 3, "log_prob": -0.5, "perplexity": None, "evict_ms": 3.2,
                  "cache_mb": 4.75}],
    }  # fmt: skip
    (root / "bench/results/nacl").mkdir()
    (root / "bench/results/nacl/summary.json").write_text(json.dumps(study))
    return root


class TestReport:
    @pytest.fixture
    def run(self, checkout, monkeypatch, capsys):
        monkeypatch.setattr(sources, "repository_root", lambda: checkout)

        def run(*arguments):
            status = report.main([*map(str, arguments)])
            return status, capsys.readouterr().out

        return run

    def test_readme(self, run, checkout, record):
        readme, study = checkout / "README.md", checkout / "docs/methods/nacl.md"
        before = readme.read_text()
        status, said = run("--readme", "--check")
        assert (
            status == 1 and "README.md: not up to date; run python -m bench.report --readme" in said
        )
        assert readme.read_text() == before  # a check changes nothing
        status, said = run("--readme")
        assert status == 0 and "README.md: renewed" in said and "nacl.md: renewed" in said
        assert run("--readme", "--check") == (0, "")
        text = readme.read_text()
        row = "| " + " | ".join(report.summary_rows(record)[0]) + " |"
        assert row in text and record["commit"][:10] in text
        row = "| " + " | ".join(report.row_of(record["cases"][0])) + " |"
        assert row in (checkout / "docs/benchmarks.md").read_text()
        assert (
            "| needle | 512 | 20 % | nacl | 3 | 0.67 | -0.500 | – | 3 | 4.8 |" in study.read_text()
        )
        # Only what stands between the marks was changed.
        cut = re.compile(r"<!-- summary:begin -->.*?<!-- summary:end -->", re.DOTALL)
        assert cut.sub("", text) == cut.sub("", before)

    @pytest.mark.parametrize("name", ["README.md", "docs/methods/nacl.md"])
    def test_an_edit_by_hand_fails_the_check(self, run, checkout, name):
        run("--readme")
        path = checkout / name
        good = path.read_text()
        blocks = re.findall(r":begin -->.*?:end -->", good, re.DOTALL)
        table = next(b for b in blocks if re.search(r"\d(?= \|)", b))
        spoiled = re.sub(r"\d(?= \|)", "9999", table, count=1)
        path.write_text(good.replace(table, spoiled))
        status, said = run("--readme", "--check")
        assert status == 1 and said.startswith(f"{name}: not up to date")
        run("--readme")
        assert path.read_text() == good

    def test_new_results_make_the_tables_stale(self, run, checkout, record):
        run("--readme")
        faster = copy.deepcopy(record)
        faster["cases"][0]["providers"]["tenfold"]["p50_s"] /= 10
        results.save(faster, checkout / "bench/results")
        assert run("--readme", "--check")[0] == 1

    def test_as_a_command(self, checkout):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [sys.executable, "-m", "bench.report", "--readme"]
        for extra, status in (([], 0), (["--check"], 0)):
            done = subprocess.run(
                [*command, *extra], cwd=checkout, env=env, capture_output=True, text=True
            )
            assert done.returncode == status, done.stderr
        assert (checkout / "README.md").read_text() != (ROOT / "README.md").read_text()

    def test_page(self, run, tmp_path):
        path = tmp_path / "page" / "results.html"
        status, said = run("--out", path)
        assert status == 0 and said.strip() == str(path)
        text = path.read_text()
        assert text.count("data:image/png;base64,iVBORw0KGgo") == 2
        for word in ("double/float32/n1000", "eager", "copy_", "ceilings measured in the same run"):
            assert word in text
        assert "Not for publication: quick run" not in text

    def test_page_says_what_is_wrong_with_a_run(self, record, tmp_path):
        path = report.write_page([record | {"quick": True, "void": "busy"}], tmp_path / "x.html")
        assert "Not for publication: quick run" in path.read_text()
        assert "Not for publication: void: busy" in path.read_text()

    def test_markdown(self):
        assert report.markdown(("a", "b", "c", "d"), [("1", "2", "3", "4")]) == (
            "| a | b | c | d |\n| --- | --- | --- | ---: |\n| 1 | 2 | 3 | 4 |"
        )

    def test_row(self, record):
        made = copy.deepcopy(record["cases"][0])
        made["shape"] = {"hq": 9, "hkv": 3, "d": 64, "l": 4096}
        made["ratios"] = {"eager": 2.0, "bound": 0.5, "best_other": 1.2}
        made["providers"]["tenfold"].update(p50_s=1.5e-3, gb_s=12.34, share=0.876)
        shape = "Hq 9, Hkv 3, D 64, L 4096"
        assert report.row_of(made) == [
            "double", shape, "float32", "1.5 ms", "12.3 GB/s", "88 %", "2.00×", "–", "0.50×"]  # fmt: skip
        made.update(bound="compute", variant="llama-ragged")
        made["providers"]["tenfold"].update(p50_s=42e-6, gflop_s=321.4)
        assert report.row_of(made)[1:5] == [f"{shape} (ragged)", "float32", "42 µs", "321 GFLOP/s"]
        made["providers"]["tenfold"].update(p50_s=None, status="disagrees")
        assert report.row_of(made)[3:] == ["disagrees", *["–"] * 5]

    def test_memory(self, record, checkout):
        made = copy.deepcopy(record["cases"][0])
        kinds = [("tenfold", 1.5, 1_260_000), ("eager", 2.0, 4_000_000), ("peer", 1.0, 9_000_000),
                 ("bound", 0.1, 0)]  # fmt: skip
        made["providers"] = {
            kind: asdict(Measured(kind, "ok", p50_s=t, gb_s=1.0, share=0.5, peak_bytes=peak))
            for kind, t, peak in kinds
        }
        assert report.memory_row(made)[3:] == ["1.3", "4.0", "9.0"]
        for p in made["providers"].values():
            del p["peak_bytes"]  # as in results from before peaks were measured
        assert report.memory_row(made)[3:] == ["–", "–", "–"]
        assert report.memory_block("loss")(checkout) == "No measurement has been committed."
        found = report.memory_block(record["family"])(checkout)
        assert "| double |" in found and report.MEMORY_COLUMNS[3] in found

    def test_study_of_macro_actions(self, checkout):
        """A method is compared with PPO of the same seeds, of which one may lack."""
        make = report.BLOCKS["ma-rlhf-study"]
        assert make(checkout) == "No study has been committed."
        setting = {
            "parent_steps": 400, "reward_model": {"after": {"accuracy": 0.876}},
            "ppo": {"steps": 40, "batch_size": 32, "minibatches": 2, "learning_rate": 2e-4,
                    "critic_learning_rate": 5e-4, "beta": 0.01, "lam": 0.95, "max_prompt": 32,
                    "max_response": 48},
        }  # fmt: skip
        ppo = {"reward": "model", "method": "ppo", "name": "PPO (n = 1)", "seeds": [0, 1], "final": [0.5, 0.7],
               "mean": [0.4, 0.6], "kl": [1.0, 2.0], "steps_to_ppo": [30, 38]}  # fmt: skip
        ours = ppo | {"method": "ma-ppo-5", "name": "MA-PPO, n = 5", "seeds": [0, 1, 2],
                      "final": [0.6, 0.65, 0.9], "mean": [0.5, 0.5, 0.8], "kl": [1.5, 2.5, 3.5],
                      "steps_to_ppo": [20, None, None]}  # fmt: skip
        path = checkout / "bench/results/ma_rlhf/study.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"setting": setting, "summary": [ppo, ours], "runs": []}))
        found = make(checkout)
        assert "40 steps of 32 responses of 48 bytes" in found and "88 % of held-out" in found
        assert found.splitlines()[-2:] == [
            "| model | PPO (n = 1) | 0.500, 0.700 | 0.600 | – | 30, 38 | 0.500 | 1.0, 2.0 |",
            "| model | MA-PPO, n = 5 | 0.600, 0.650, 0.900 | 0.717 | 1/2 | 20, –, – | 0.600 | 1.5, 2.5, 3.5 |",
        ]
        assert len(report.load_records(checkout)) == 1  # a study is no record of a benchmark

    def test_study_of_upcycling(self, checkout):
        """Means over the seeds that a method has; a run's other numbers of experts are other rows."""
        setting = {"model": "smollm2", "layers": 10, "heal": 200, "train": 128, "test": 32, "length": 128,
                   "batch": 16, "post_epochs": 2.0}  # fmt: skip
        losses = {
            "UpIT": {"code": 1.0, "german": 2.0, "mean": 1.5},
            "vanilla": {"code": 3, "german": 1, "mean": 2},
        }
        more = {"UpIT": {"code": 2.0, "german": 3.0, "mean": 2.5}}
        runs = [{"experts": n, "seed": seed, "setting": setting, "families": ["code", "german"], "losses": found}
                for n, seed, found in ((8, 0, losses), (4, 0, more), (8, 1, more))]  # fmt: skip
        path = checkout / "bench/results/upit/smollm2.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"about": {"threads": 2}, "runs": runs}))
        found = report.BLOCKS["upit-smollm2"](checkout)
        assert (
            "10 of its 30 layers, healed for 200 steps" in found
            and "seeds 0, 1, 2 threads" in found
        )
        assert found.splitlines()[-3:] == [
            "| 4 | UpIT | 2.000 | 3.000 | 2.500 | 2.500 |",
            "| 8 | UpIT | 1.500 | 2.500 | 2.000 | 1.500, 2.500 |",
            "| 8 | vanilla | 3.000 | 1.000 | 2.000 | 2.000 |",
        ]

    def test_smollm2_by_macro_actions(self, checkout):
        curve = [{"objective/scores": 0.1 * t, "objective/kl": float(t), "macro/length_mean": 4.75}
                 for t in range(10)]  # fmt: skip
        config = {
            "seed": 3,
            "batch_size": 8,
            "max_response": 24,
            "lora_rank": 16,
            "learning_rate": 3e-4,
        }
        run = {"name": "MA-PPO, n = 5", "config": config, "curve": curve,
               "seconds": [{"generate": 1.0, "update": 2.0}, {"generate": 3.0, "update": 4.0}]}  # fmt: skip
        path = checkout / "bench/results/ma_rlhf/smollm2.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"runs": [run], "reward": "judge", "threads": 2}))
        found = report.BLOCKS["ma-rlhf-smollm2"](checkout)
        row = "| MA-PPO, n = 5 | 3 | 10 | 0.200 | 0.700 | 7.00 | 4.8 | 5.0 |"
        assert found.splitlines()[-1] == row and "reward: judge; 2 threads" in found

    def test_ledger(self, tree):
        assert report.ledger(tree) == (
            "CUDA kernels: `alpha`: never run on an H200; `beta`: never run on an H200."
        )

    def test_needs_a_checkout(self, monkeypatch, capsys):
        monkeypatch.setattr(sources, "repository_root", lambda: None)
        assert report.main([]) == 2 and "checkout" in capsys.readouterr().err


# -- commands ----------------------------------------------------------------------------------------


class TestRunner:
    def test_every_family_has_cases_that_quick_runs_cover(self):
        for family in runner.FAMILIES:
            every = runner.cases_of(family)
            names = [c.name for c in every]
            assert len(set(names)) == len(names)  # results are matched by name
            assert {c.op for c in every if c.quick} == {c.op for c in every}
            for c in every:
                assert {"tenfold", "eager"} <= {p.kind for p in c.providers}, c.name
                assert c.bytes(c.shape, c.dtype.itemsize) > 0, c.name
                assert (c.flops(c.shape) > 0) == (c.peak is not None), c.name

    def test_every_op_is_measured(self):
        ops = {c.op for family in runner.FAMILIES for c in runner.cases_of(family)}
        assert ops == set(tenfold.ops.__all__) - {"template_scale"}

    def test_choice(self):
        some = runner.choose("kv_eviction", False, "GATHER")
        assert some and all("gather" in c.name for c in some)
        quick = runner.choose("kv_eviction", True, "")
        assert len(quick) < len(runner.choose("kv_eviction", False, ""))
        assert runner.families_with(runner.FAMILIES, True, "nacl_select") == ["kv_eviction"]
        assert runner.families_with(runner.FAMILIES, True, "decode") == ["attention", "kv_eviction"]

    def test_wrong_arguments(self, capsys, tmp_path):
        for arguments, words in (
            (
                ["nothing"],
                "unknown family 'nothing'; there are: attention, corruption, diffusion, influence, kv_eviction",
            ),
            (
                ["--select", "nothing-like-this"],
                "no case of attention, corruption, diffusion, influence, kv_eviction, loss, merge, moe, norm, optim, "
                "pixels, rl contains",
            ),
            (["--quick", "--select", "32768"], "no quick case"),
            (["--device", "abacus"], "--device takes cpu or cuda, got 'abacus'"),
        ):
            assert bench_main([*arguments, "--out", str(tmp_path)]) == 2
            said = capsys.readouterr().err
            assert words in said.splitlines()[-1] and "Traceback" not in said

    def test_a_kernel_that_is_wrong_fails_the_run(self, monkeypatch, tmp_path, capsys):
        """Status 1, the case is named, and the results are still written."""
        broken = case(provider("tenfold", lambda i: i.x[1:] * 2), provider("eager", double))
        monkeypatch.setattr(runner, "cases_of", lambda family: [broken])
        monkeypatch.setattr(runner, "settle", lambda device: None)  # it touches half of the memory
        monkeypatch.setattr(runner, "measure_ceilings", lambda device: CEILINGS)
        assert runner.run(["kv_eviction"], out=tmp_path) == 1
        said = capsys.readouterr().out
        assert "double/float32/n1000: disagrees" in said
        assert "not for publication: double/float32/n1000: tenfold disagrees" in said
        assert runner.run(["kv_eviction"], out=tmp_path, json=True) == 1
        (printed,) = json.loads(capsys.readouterr().out)
        assert printed["cases"][0]["providers"]["tenfold"]["status"] == "disagrees"
        (loaded,) = results.load_all(tmp_path)
        assert results.wrong(loaded) and (tmp_path / "index.html").is_file()

    def test_out_is_checked_before_measuring(self, monkeypatch, tmp_path):
        monkeypatch.setattr(runner, "measure_ceilings", lambda device: pytest.fail("measured"))
        monkeypatch.setattr(runner, "settle", lambda device: pytest.fail("settled"))
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError):
            runner.run(["kv_eviction"], quick=True, out=tmp_path / "file", quiet=True)

    def test_pytest_collects_the_same_cases(self):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "bench", "--collect-only", "-p", "no:cacheprovider"],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        listed = re.findall(r"test_case\[kv_eviction/(.+)\]", done.stdout)
        assert listed == [c.name for c in runner.choose("kv_eviction", True, "")]


def ended(pid):
    """Gone, or only waiting for its parent to notice."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


class TestGpuScript:
    def test_help_and_no_gpu(self):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        script = [sys.executable, "bench/gpu.py"]
        found = subprocess.run(
            [*script, "--help"], capture_output=True, text=True, cwd=ROOT, env=env
        )
        assert found.returncode == 0
        for option in ("--ops", "--out", "--with", "--skip", "--tool", "-k", "--quick", "--select",
                       "--limit", "--commit", "verified_cuda_hash"):  # fmt: skip
            assert option in found.stdout
        found = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=env)
        assert found.returncode == 2 and found.stdout == ""
        assert found.stderr == "bench/gpu.py needs a GPU, and torch finds none here\n"

    @pytest.mark.parametrize(
        "arguments, message",
        [(["--ops", "/none/_ops.so"], "--ops /none/_ops.so does not exist"),
         (["--with", "/none"], "--with /none is not a folder"), (["--tool", "x"], "invalid choice")],
    )  # fmt: skip
    def test_bad_arguments(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as stopped:
            gpu.parse(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err

    def test_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", "/else")
        monkeypatch.setenv("PYTEST_ADDOPTS", "-q")  # would hide the counts
        env = gpu.environment(tmp_path / "x" / ".." / "_ops.so")
        assert env["TENFOLD_OPS_PATH"] == str(tmp_path / "_ops.so")
        assert env["PYTHONPATH"].split(":") == [str(ROOT / "python"), str(ROOT), "/else"]
        assert "PYTEST_ADDOPTS" not in env

    def test_run_logs_status(self, tmp_path):
        log = tmp_path / "log"
        code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
        for times in (1, 2):  # later commands are added
            status, text = gpu.run([sys.executable, "-c", code], dict(os.environ), log, 60)
            assert status == 7 and sorted(text.split()) == ["err", "out"]
            assert log.read_text().count("\nerr\n") == times and log.read_text().endswith(text)

    def test_a_time_out_ends_the_whole_group(self, tmp_path, capsys):
        slow = ["bash", "-c", "sleep 300 & echo $!; wait"]
        status, text = gpu.run(slow, dict(os.environ), tmp_path / "log", 3)
        assert status == 124 and "status 124" in capsys.readouterr().out
        deadline = time.monotonic() + 10
        while not ended(int(text)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ended(int(text))

    def test_being_stopped_ends_the_steps_too(self, tmp_path):
        code = (
            "import os, signal, sys; from pathlib import Path; from bench import gpu\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            "gpu.run(['bash', '-c', 'echo $$; sleep 300'], dict(os.environ), Path(sys.argv[1]), 60)"
        )
        log = tmp_path / "log"
        script = subprocess.Popen([sys.executable, "-c", code, log], cwd=ROOT)
        found, deadline = None, time.monotonic() + 30
        while found is None and time.monotonic() < deadline:
            found = re.search(r"^(\d+)\n", log.read_text() if log.exists() else "", re.MULTILINE)
            time.sleep(0.05)
        script.terminate()
        assert script.wait(30) == 143
        assert ended(int(found[1]))


class TestGpuSteps:
    """The steps themselves, on small folders of tests that need no GPU."""

    PASSES = "import pytest\npytestmark = pytest.mark.cuda\n" + "".join(
        f"def test_{n}(): pass\n" for n in ("a", "b", "4099", "4099_kwargs0")
    )

    @pytest.fixture
    def repository(self, tmp_path, monkeypatch):
        """pyproject.toml with its options is the real one; the tests are not."""
        root = tmp_path / "repository"
        for name in ("ops", "methods"):
            (root / "tests" / name).mkdir(parents=True)
        shutil.copy(ROOT / "pyproject.toml", root)
        (root / "tests/test_cli.py").write_text("import tenfold._no_such_kit")  # not collected
        monkeypatch.setattr(gpu, "ROOT", root)
        return root

    @pytest.fixture
    def env(self, tmp_path):
        return {k: v for k, v in gpu.environment(tmp_path / "_ops.so").items() if k != "PYTHONPATH"}

    @pytest.mark.parametrize(
        "text, outcome",
        [
            (PASSES, (0, 4, 0)),
            (PASSES + "def test_x(): assert 0\n", (1, 4, 0)),
            (PASSES + "def test_x(): pytest.skip('7 passed in 3s')\n", (0, 4, 1)),
            ("def test_x(): pass\n", (5, 0, 0)),  # nothing is marked
            ("import nothing_of_that_name\n", (2, 0, 0)),
        ],
        ids=["passes", "fails", "skips", "none", "broken"],
    )
    def test_the_scripts_own_pytest_run_is_counted(self, repository, env, tmp_path, text, outcome):
        (repository / "tests/ops/test_x.py").write_text(text)
        found = gpu.tests(env, tmp_path / "log", 120)
        assert (found["status"], found["passed"], found["skipped"]) == outcome

    def test_both_folders_are_tested(self, repository, env, tmp_path):
        for name in ("ops", "methods"):
            (repository / f"tests/{name}/test_{name}.py").write_text(self.PASSES)
        assert gpu.tests(env, tmp_path / "log", 120)["passed"] == 8

    @pytest.mark.slow  # collects all tests
    def test_the_real_folders_are_collected_where_tenfold_is_not_installed(self, tmp_path):
        """As on the GPU machine: only the sources on the path, and no metadata of the package."""
        code = (
            "import importlib.metadata as m, sys, pytest\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]\n"
            "assert 'tenfold._bench' not in sys.modules\n"
            "sys.exit(pytest.main([*sys.argv[1:], '--collect-only']))"
        )
        ops = tenfold._load.PATH
        done = subprocess.run(
            [sys.executable, "-c", code, *gpu.PYTEST[2:], *gpu.TESTED], cwd=ROOT, text=True,
            capture_output=True, env=gpu.environment(ops),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert "tests/ops/" in done.stdout and "tests/methods/" in done.stdout
        assert "[cuda-" in done.stdout and "/test_cli.py" not in done.stdout
        for op in ("gather", "select", "proxy_scores", "decode", "evict"):  # every kernel
            assert re.search(rf"tests/ops/.*{op}.*cuda", done.stdout), op

    @pytest.fixture
    def program(self, tmp_path, monkeypatch):
        """A compute-sanitizer that only runs what it is given, and ends with status $FAKE."""
        path = tmp_path / "bin" / "compute-sanitizer"
        path.parent.mkdir()
        path.write_text(
            '#!/bin/bash\necho "options: $*"\nwhile [[ $1 != */python* ]]; do shift; done\n'
            '"$@" || exit $?\necho "========= ERROR SUMMARY: 0 errors"\nexit ${FAKE:-0}\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    def test_sanitizer(self, repository, env, program, tmp_path):
        (repository / "tests/ops/test_x.py").write_text(
            self.PASSES + "def test_cuda_graph(): assert 0\n"  # cannot pass there
        )
        log = tmp_path / "log"
        found = gpu.sanitizer("racecheck", env, log, 120)
        assert found == {"status": 0, "passed": 3, "skipped": 0, "selection": gpu_proof.SMALL}
        options = re.search("options: (.*)", log.read_text())[1]
        assert "--tool=racecheck" in options and "--kernel-name kns=tenfold" in options
        assert gpu.sanitizer("memcheck", env, log, 120, "")["passed"] == 4
        assert "kns" not in log.read_text().rsplit("options: ", 1)[1].splitlines()[0]
        assert gpu.sanitizer("memcheck", {**env, "FAKE": "86"}, log, 120)["status"] == 86

    def test_no_sanitizer(self, env, monkeypatch, tmp_path):
        monkeypatch.setattr(shutil, "which", lambda name: None)
        monkeypatch.setattr(Path, "exists", lambda self: False)
        found = gpu.sanitizer("memcheck", env, tmp_path / "log", 9)
        assert found["status"] is None and found["note"] == "compute-sanitizer was not found"

    def test_every_kernel_is_in_the_namespace_that_the_sanitizer_looks_at(self):
        for path in (ROOT / "csrc").glob("*/cuda/*"):
            text = path.read_text()
            if "__global__" in text:
                assert re.search(r"^namespace tenfold", text, re.MULTILINE), path

    @pytest.mark.slow  # collects all tests
    def test_the_small_selection_leaves_no_test_out(self):
        """Of the long rows one is kept; no test of a kernel is left out."""
        listed = subprocess.run(
            [sys.executable, *gpu.PYTEST, *gpu.SANITIZED, "--collect-only"], cwd=ROOT, text=True,
            capture_output=True,
        ).stdout  # fmt: skip
        small = subprocess.run(
            [sys.executable, *gpu.PYTEST, *gpu.SANITIZED, "--collect-only", "-k", gpu_proof.SMALL],
            cwd=ROOT, text=True, capture_output=True,
        ).stdout  # fmt: skip
        names = [
            set(re.findall(r"^(tests/.*?::\w+)\[", text, re.MULTILINE)) for text in (listed, small)
        ]
        assert names[1] <= names[0] and len(names[1]) > 3
        assert all(re.search("standing_checks|large_output", n) for n in names[0] - names[1])

    def test_bench_options(self, monkeypatch, tmp_path):
        seen = []
        monkeypatch.setattr(gpu, "run", lambda command, *rest: (seen.append(command), (0, ""))[1])
        gpu.bench({}, tmp_path / "log", 9, tmp_path)
        gpu.bench({}, tmp_path / "log", 9, tmp_path, True, "gather")
        whole = ["-m", "bench", "--device", "cuda", "--out", str(tmp_path)]
        assert seen[0][1:] == whole
        assert seen[1][1:] == [*whole, "--quick", "--select", "gather"]


class TestGpuProof:
    """The steps need a GPU; what is concluded from their outcomes, over several commands, does not."""

    @pytest.fixture
    def gpu_record(self, record, ops):
        made = copy.deepcopy(record)
        made["environment"].update(device="NVIDIA H200", ops_sha256=self.sha(ops))
        made.update(machine="h200", device_type="cuda", commit=None)
        return made

    @pytest.fixture
    def ops(self, tmp_path):
        path = tmp_path / "_ops.so"
        path.write_text("built")
        return path

    @staticmethod
    def sha(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @pytest.fixture
    def command(self, monkeypatch, tmp_path, ops, gpu_record):
        """Runs the script with steps of given outcomes; returns its status."""

        def run(out, *arguments, device="NVIDIA H200", save=gpu_record, **changes):
            def fake(name, **more):
                return {"status": 0, "passed": 9, "skipped": 0, **more, **changes.get(name, {})}

            def fake_bench(env, log, limit, folder, quick, select):
                if save is not None:
                    results.save(save, folder, changes.get("suffix", ".json"))
                return {"selection": select, **fake("bench")}

            for module in (sources, gpu, gpu_proof):  # the record here is of one family
                if hasattr(module, "families"):
                    monkeypatch.setattr(module, "families", lambda root: ["kv_eviction"])
            monkeypatch.setattr(gpu, "tests", lambda *a: fake("tests"))
            monkeypatch.setattr(
                gpu, "sanitizer", lambda tool, *a, selection: fake(tool, selection=selection)
            )
            monkeypatch.setattr(gpu, "bench", fake_bench)
            monkeypatch.setattr(gpu, "device_name", lambda: device)
            known = [] if "--no-ops" in arguments else ["--ops", str(ops)]
            rest = [a for a in arguments if a != "--no-ops"]
            return gpu.main([*known, "--out", str(tmp_path / out), *rest])

        return run

    def verified(self, tmp_path, out):
        path = tmp_path / out / "h200/kv_eviction.json"
        found = results.load(path)["verified_cuda_hash"]
        ledger = gpu_status.status(ROOT, "kv_eviction", tmp_path / out)
        assert ledger == ("verified" if found else "never")
        assert found in (None, sources.cuda_hash(ROOT, "kv_eviction"))
        return bool(found)

    def test_all_in_one_command(self, command, tmp_path):
        assert command("out", "--commit", "abc") == 0
        assert self.verified(tmp_path, "out")
        names = {"tests", "memcheck", "racecheck", "synccheck", "bench"}
        assert {p.stem for p in (tmp_path / "out/steps").iterdir()} == names
        written = results.load(tmp_path / "out/h200/kv_eviction.json")
        assert set(written["gpu_checks"]) == names and written["commit"] == "abc"
        step = json.loads((tmp_path / "out/steps/racecheck.json").read_text())
        assert step["device"] == "NVIDIA H200" and step["ops_sha256"] == self.sha(
            tmp_path / "_ops.so"
        )
        assert step["cuda_hash"] == {"kv_eviction": sources.cuda_hash(ROOT, "kv_eviction")}
        assert step["commit"] == "abc" and step["selection"] == gpu_proof.SMALL

    @pytest.mark.parametrize(
        "changes, status",
        [
            ({"tests": {"status": 1}}, 1),
            ({"tests": {"skipped": 1}}, 3),
            ({"tests": {"passed": 0}}, 3),
            ({"memcheck": {"status": None, "note": "not found"}}, 1),
            ({"racecheck": {"status": 86}}, 1),
            ({"synccheck": {"status": 124}}, 1),
            ({"synccheck": {"passed": 0}}, 3),
            ({"bench": {"status": -11}}, 1),
        ],
    )
    def test_one_bad_step_is_enough(self, command, tmp_path, changes, status):
        assert command("out", **changes) == status
        assert not self.verified(tmp_path, "out")

    def test_a_wrong_result_in_the_benchmarks(self, command, tmp_path, gpu_record, capsys):
        bad = copy.deepcopy(gpu_record)
        bad["cases"][0]["providers"]["tenfold"].update(status="disagrees", note="error 1")
        assert command("out", save=bad, bench={"status": 1}) == 1
        assert not self.verified(tmp_path, "out")
        assert "tenfold disagrees: error 1" in capsys.readouterr().out

    def test_a_narrow_selection_proves_nothing(self, command, tmp_path):
        assert command("out", "-k", "gather") == 3 and not self.verified(tmp_path, "out")
        assert command("whole", "-k", "") == 0 and self.verified(tmp_path, "whole")

    def test_split_over_commands(self, command, tmp_path, capsys):
        paths = [str(tmp_path / name) for name in "abcd"]
        assert command("a", "--skip", "sanitizer", "bench") == 3
        assert "memcheck: has not run" in capsys.readouterr().out
        assert command("b", "--skip", "tests", "sanitizer") == 3
        assert not self.verified(tmp_path, "b")
        assert command("c", "--skip", "tests", "bench", "--tool", "memcheck", "racecheck") == 3
        assert command("d", "--skip", "tests", "bench", "--tool", "synccheck",
                       "--with", *paths[:3]) == 0  # fmt: skip
        assert self.verified(tmp_path, "d")  # with the record of b
        assert (tmp_path / "d/steps").exists() and not (tmp_path / "d/steps/tests.json").exists()

    def test_merged_without_a_gpu(self, command, tmp_path, capsys):
        command("a", "--skip", "bench")
        command("b", "--skip", "tests", "sanitizer")
        nothing = ["--skip", "tests", "sanitizer", "bench", "--no-ops", "--with"]
        with_both = [*nothing, str(tmp_path / "a"), str(tmp_path / "b")]
        assert command("c", *with_both, device=None) == 0 and self.verified(tmp_path, "c")
        assert command("d", *nothing, str(tmp_path / "b"), device=None) == 3
        command("b", "--skip", "tests", "sanitizer", device="NVIDIA H100 80GB HBM3")
        assert command("e", *with_both, device=None) == 2
        assert "steps of one GPU and one _ops.so are needed" in capsys.readouterr().err

    @pytest.mark.parametrize("other", ["device", "ops_sha256", "cuda_hash"])
    def test_only_alike_steps_are_merged(self, command, tmp_path, ops, monkeypatch, capsys, other):
        command(
            "a", "--skip", "bench", device="NVIDIA H100" if other == "device" else "NVIDIA H200"
        )
        if other == "ops_sha256":
            path = tmp_path / "a/steps/racecheck.json"
            path.write_text(path.read_text().replace(self.sha(ops), "0" * 64))
        if other == "cuda_hash":
            path = tmp_path / "a/steps/racecheck.json"
            path.write_text(path.read_text().replace(sources.cuda_hash(ROOT, "kv_eviction"), "1"))
        bench = ["--skip", "tests", "sanitizer"]
        assert command("b", *bench, "--with", str(tmp_path / "a")) == 3
        assert not self.verified(tmp_path, "b")
        assert re.search(rf"not counted: racecheck of .*: another {other}", capsys.readouterr().out)

    @pytest.mark.parametrize("change", [{"cuda_sources": "1"}, {"device": "x"}, {"sha": "0"}])
    def test_only_an_alike_record_is_used(self, command, tmp_path, gpu_record, change, capsys):
        gpu_record["cuda_sources"] = change.get("cuda_sources", gpu_record["cuda_sources"])
        gpu_record["environment"]["device"] = change.get("device", "NVIDIA H200")
        if "sha" in change:
            gpu_record["environment"]["ops_sha256"] = "0"
        assert command("out", save=gpu_record) == 3
        assert "bench: there is no record" in capsys.readouterr().out

    def test_a_repeated_step_replaces_the_earlier(self, command, tmp_path):
        assert command("out", racecheck={"status": 124}) == 1
        only = ["--skip", "tests", "bench", "--tool", "racecheck"]
        assert command("out", *only) == 0 and self.verified(tmp_path, "out")
        assert command("out", *only, racecheck={"status": 86}) == 1
        assert not self.verified(tmp_path, "out")

    def test_a_stopped_benchmark_keeps_what_it_measured(self, command, tmp_path, gpu_record):
        gpu_record.update(partial=True, all_cases=[gpu_record["cases"][0]["name"], "late"])
        assert command("out", save=gpu_record, suffix=".json.partial", bench={"status": 124}) == 1
        assert self.verified(
            tmp_path, "out"
        )  # the kernels are, the numbers are not for publication
        assert [p.name for p in (tmp_path / "out/h200").iterdir()] == ["kv_eviction.json"]
        written = results.load(tmp_path / "out/h200/kv_eviction.json")
        assert written["partial"] and len(written["cases"]) == 1
        assert "selected cases only" in results.problems(written)

    def test_records_of_parts_add_up(self, gpu_record):
        first, second = (copy.deepcopy(gpu_record) for _ in range(2))
        names = [gpu_record["cases"][0]["name"], "late"]
        for made, time_ in ((first, "2026-01-01T00:00:01Z"), (second, "2026-01-01T00:00:02Z")):
            made.update(partial=True, all_cases=names, time=time_)
        second["cases"][0]["name"] = "late"
        second["ceilings"]["copy"]["value"] *= 2
        one = gpu_proof.merge_records([first])
        assert one["partial"] and one["cases"] == first["cases"]
        both = gpu_proof.merge_records([second, first])
        assert not both["partial"] and [c["name"] for c in both["cases"]] == names
        assert both["ceilings"]["copy"]["value"] == 20.0 and both["merged_runs"] == 2
        for was, now in zip((first, second), both["cases"]):
            share = was["cases"][0]["providers"]["tenfold"]["share"]
            scale = 0.5 if was["cases"][0]["peak"] is None else 1
            assert now["providers"]["tenfold"]["share"] == pytest.approx(share * scale, rel=1e-4)
        again = copy.deepcopy(second)  # the newest numbers of a case
        again["time"] = "2026-01-01T00:00:03Z"
        again["cases"][0]["providers"]["tenfold"]["p50_s"] = 7.0
        merged = gpu_proof.merge_records([again, first, second])
        assert merged["cases"][1]["providers"]["tenfold"]["p50_s"] == 7.0
        quick = {**first, "quick": True, "cases": []}
        assert gpu_proof.merge_records([quick, second])["quick"] is False
        assert gpu_proof.merge_records([quick])["quick"] is True
        assert gpu_proof.merge_records([]) is None


class TestGraphCapture:
    """What can be said here of timing on a GPU: whose graph is tried."""

    class Events:
        def __init__(self, **_):
            self.at = time.perf_counter()

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    @pytest.mark.parametrize("capture, method", [(True, "graph"), (False, "events")])
    def test_a_provider_that_waits_is_not_captured(self, monkeypatch, capture, method):
        tried = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", lambda g: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)
        monkeypatch.setattr(torch.cuda, "Event", self.Events)
        graph = SimpleNamespace(replay=lambda: tried.append("replay"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: tried.append("graph") or graph)
        ring = Rotation(make_inputs({"n": 10}, torch.float32, CPU), CPU, warm=True)
        clock = timing.cuda_clock(double, ring, LIMITS, capture)
        assert clock.method == method and clock.sample() >= 0
        assert tried == (["graph", "replay", "replay"] if capture else [])

    def test_the_harness_passes_it_on(self, monkeypatch):
        seen = []
        original = timing.make_clock

        def noted(function, ring, device, limits, capture):
            seen.append(capture)
            return original(function, ring, device, limits, capture)

        monkeypatch.setattr("bench.harness.make_clock", noted)
        measure(case(provider("peer", double, graph=False)), OPTIONS, CEILINGS)
        assert seen == [True, False]

    def test_numpy_is_the_only_one_that_waits(self):
        waits = {p.name for c in runner.cases_of("kv_eviction") for p in c.providers if not p.graph}
        assert waits == {"peer:numpy"}


def test_what_was_measured_is_saved_after_each_case(monkeypatch, tmp_path):
    """A crash or a time limit keeps the cases before it, and an earlier complete result."""
    monkeypatch.setattr(runner, "measure_ceilings", lambda device: copy.deepcopy(CEILINGS))
    monkeypatch.setattr(runner, "settle", lambda device: None)
    made = [case(), case(shape={"n": 10}), case(shape={"n": 20})]
    monkeypatch.setattr(runner, "choose", lambda family, quick, select: made[: 3 - len(select)])
    done = []

    def measured(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(measure(*arguments))
        return done[-1]

    monkeypatch.setattr(runner, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        runner.run(["kv_eviction"], out=tmp_path, quiet=True)
    folder = tmp_path / results.machine_name(CPU)
    left = results.load(folder / "kv_eviction.json.partial")
    assert [c["name"] for c in left["cases"]] == [c.name for c in made[:2]]
    assert left["partial"] and left["all_cases"] == [c.name for c in made]
    assert results.load_all(tmp_path) == []  # nobody takes it for a result
    monkeypatch.setattr(runner, "measure", measure)
    assert runner.run(["kv_eviction"], out=tmp_path, quiet=True) == 0
    assert [p.name for p in folder.iterdir()] == ["kv_eviction.json"]
    assert not results.load(folder / "kv_eviction.json")["partial"]


def test_the_wheels_kit_is_this_one():
    """``tenfold bench`` runs ``tenfold._bench``: the same sources under another name."""
    for name in ("case", "harness", "runner", "report", "sources"):
        shipped = importlib.import_module(f"tenfold._bench.{name}")
        mine = importlib.import_module(f"bench.{name}")
        assert Path(shipped.__file__).read_text() == Path(mine.__file__).read_text()
