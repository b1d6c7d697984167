# SPDX-License-Identifier: Apache-2.0
"""The test kit catches what it exists for: every check is shown an op that is wrong in its way."""

import math
import os
import re
import signal
import time

import pytest
import torch
from torch.testing._internal.optests import OpCheckError

import tenfold
from tenfold import ops
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    VALUES,
    assert_close_to_ref,
    check_compiles,
    check_deterministic,
    check_errors,
    check_inputs_unmodified,
    check_isas_agree,
    check_op,
    check_opcheck,
    check_strides_equal_fake,
    fill,
    forced_isa,
    layout,
    poisoned_memory,
    processes,
    threads,
    ulp_floor,
)

pytest_plugins = ["pytester"]


# -- toy ops: one right, the others wrong in one way each --------------------------------------------


def toy(name: str, function, fake=None, mutates=()):
    """Registers ``function(x: Tensor) -> Tensor`` as ``tenfold_toys::name``."""
    function.__annotations__ = {"x": torch.Tensor, "return": torch.Tensor}
    made = torch.library.custom_op(f"tenfold_toys::{name}", function, mutates_args=mutates)
    made.register_fake(fake or (lambda x: torch.empty_like(x)))
    return getattr(torch.ops.tenfold_toys, name)


def _modifies(x):
    x.add_(1)
    return x * 2


def _by_threads(x):
    return x * torch.get_num_threads()


def _by_isa(x):
    return x + (1 if tenfold.cpu_capability() == "scalar" else 0)


def _partly_written(x):
    out = torch.empty_like(x)
    out[..., :-1] = x[..., :-1]
    return out


def _adds(x):
    x.add_(1)
    return x.clone()


good = toy("good", lambda x: x * 2)
wrong_shape = toy("wrong_shape", lambda x: x * 2, lambda x: x.new_empty(x.shape[0] + 1, x.shape[1]))
wrong_dtype = toy("wrong_dtype", lambda x: x * 2, lambda x: torch.empty_like(x, dtype=torch.half))
wrong_strides = toy("wrong_strides", lambda x: x * 2, lambda x: x.new_empty(x.shape[::-1]).t())
random = toy("random", lambda x: x + torch.rand_like(x))
modifies = toy("modifies", _modifies)
aliases = toy("aliases", lambda x: x.view(x.shape))
by_threads = toy("by_threads", _by_threads)
by_isa = toy("by_isa", _by_isa)
partly_written = toy("partly_written", _partly_written)
adds = toy("adds", _adds, mutates=("x",))


def x23():
    return torch.arange(6.0).view(2, 3)


class TestCheckOp:
    """The bundle refuses every wrong op; the pieces say what is wrong."""

    def test_passes_what_is_right(self):
        check_op(good, (x23(),))
        check_op(torch.ops.tenfold.template_scale, (x23(), 2.0))
        check_op(adds, (x23(),), mutates=True)

    @pytest.mark.parametrize(
        "op", [wrong_shape, wrong_dtype, wrong_strides, random, modifies, aliases, by_threads, by_isa]
    )  # fmt: skip
    def test_refuses(self, op):
        with pytest.raises((AssertionError, OpCheckError)):
            check_op(op, (x23(),))

    # Not wrong_strides: torch 2.10 does not see them; check_strides_equal_fake does.
    @pytest.mark.parametrize("op", [wrong_shape, wrong_dtype, modifies])
    def test_opcheck(self, op):
        check_opcheck(good, (x23(),))
        with pytest.raises(OpCheckError):
            check_opcheck(op, (x23(),))

    @pytest.mark.parametrize("op", [wrong_shape, wrong_dtype, wrong_strides])
    def test_fake(self, op):
        check_strides_equal_fake(good, (x23(),))
        with pytest.raises(AssertionError, match=r"kernel gives .* fake"):
            check_strides_equal_fake(op, (x23(),))

    def test_run_to_run(self):
        check_deterministic(good, (x23(),))
        with pytest.raises(AssertionError, match="threads differs"):
            check_deterministic(random, (x23(),))

    def test_thread_count(self):
        before = torch.get_num_threads()
        with pytest.raises(AssertionError, match="result with 2 threads differs from that with 1"):
            check_deterministic(by_threads, (x23(),))
        assert torch.get_num_threads() == before

    def test_isas(self):
        check_isas_agree(good, (x23(),))
        others = [n for n in tenfold.cpu_capabilities() if n != "scalar"]
        if others:  # a machine with one path has nothing to compare
            for x in (x23(), x23().long()):
                with pytest.raises(
                    AssertionError, match=f"{others[0]}.*scalar|scalar.*{others[0]}"
                ):
                    check_isas_agree(by_isa, (x,))

    def test_compiled_result(self):
        def face(x):
            return x + 1 if torch.compiler.is_compiling() else x

        check_compiles(good, (x23(),))
        with pytest.raises(AssertionError, match=r"compiled .* differs"):
            check_compiles(face, (x23(),))

    def test_graph_breaks(self):
        def face(x):
            torch._dynamo.graph_break()
            return x * 2

        with pytest.raises(torch._dynamo.exc.Unsupported):
            check_compiles(face, (x23(),))

    def test_inputs(self):
        check_inputs_unmodified(good, (x23(),))
        with pytest.raises(AssertionError, match="an input was modified"):
            check_inputs_unmodified(_modifies, (x23(),))
        with pytest.raises(AssertionError, match="an input was modified"):
            check_inputs_unmodified(lambda a, *, x: x.zero_().clone(), (x23(),), {"x": x23()})
        for view in (lambda x: x, lambda x: x[1:], lambda x: (x + 1, x.t())):
            with pytest.raises(AssertionError, match="shares memory"):
                check_inputs_unmodified(view, (x23(),))

    @pytest.mark.parametrize(
        "before, after", [(math.nan, 7.5), (math.inf, torch.finfo(torch.float32).max)]
    )
    def test_nan_and_inf_are_values_of_their_own(self, before, after):
        """Only equal values count as unmodified: NaN is no number, inf not the largest one."""

        def replaces(x):
            x.fill_(after)
            return x + 1

        check_inputs_unmodified(lambda x: x + 1, (torch.full((3,), before),))
        with pytest.raises(AssertionError, match="an input was modified"):
            check_inputs_unmodified(replaces, (torch.full((3,), before),))


class TestCheckErrors:
    op = torch.ops.tenfold.template_scale

    def check(self, face, *words, op=None, args=None, error=ValueError):
        check_errors(face, op or self.op, args or (x23(), math.inf), {}, error, *words)

    def test_passes(self):
        self.check(ops.template_scale, "template_scale", "scale", "finite")

    def test_wrong_type(self):
        with pytest.raises(AssertionError, match="TypeError expected, got ValueError"):
            self.check(ops.template_scale, "scale", error=TypeError)
        # The op itself must raise RuntimeError, not the face's type (nor a subclass of it).
        with pytest.raises(AssertionError, match="RuntimeError expected, got ValueError"):
            self.check(ops.template_scale, op=ops.template_scale)

    def test_nothing_raised(self):
        with pytest.raises(AssertionError, match="ValueError expected, nothing was raised"):
            self.check(lambda x, scale: x)
        with pytest.raises(AssertionError, match="RuntimeError expected, nothing was raised"):
            self.check(ops.template_scale, op=lambda x, scale: x)

    def test_missing_word(self):
        with pytest.raises(AssertionError, match=r"\['contiguous'\] not in the message"):
            self.check(ops.template_scale, "scale", "contiguous")

    def test_texts_differ(self):
        def face(x, scale):
            raise ValueError("scale must be finite")

        with pytest.raises(AssertionError, match="texts differ"):
            self.check(face, "scale")

    def test_changed_arguments(self):
        def spoils(call):
            def run(x, scale):
                x.zero_()
                return call(x, scale)

            return run

        for face, op in (
            (spoils(ops.template_scale), self.op),
            (ops.template_scale, spoils(self.op)),
        ):
            with pytest.raises(AssertionError, match="changed its arguments"):
                self.check(face, "scale", op=op)


class TestTolerance:
    @pytest.mark.parametrize(
        "dtype, mantissa, least",
        [(torch.float32, 23, -126), (torch.bfloat16, 7, -126), (torch.float16, 10, -14)],
    )
    def test_ulp_floor_is_the_dtypes_step(self, dtype, mantissa, least):
        for top in (1.0, 1.5, 1.999, 2.0, 300.0, 2.0**-10):
            step = ulp_floor(torch.tensor([0.0, -top, top / 2], dtype=torch.float64), dtype)
            assert step == 2.0 ** (math.floor(math.log2(top)) - mantissa)
            low = torch.tensor(2.0 ** math.floor(math.log2(top)), dtype=dtype)
            assert torch.nextafter(low, low * 2).double() - low.double() == step
        smallest = 2.0 ** (
            least - mantissa
        )  # subnormal numbers have the smallest normal one's step
        for tiny in ([], [0.0], [2.0 ** (least - 3)]):
            assert ulp_floor(torch.tensor(tiny, dtype=torch.float64), dtype) == smallest
        ref = torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64)
        assert ulp_floor(ref, dtype) == 2.0**-mantissa  # of the finite values

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_passes_the_rounded_reference_and_refuses_wrong_values(self, dtype):
        ref = torch.randn(100, dtype=torch.float64)
        assert_close_to_ref(ref.to(dtype), ref)
        wrong = ref.to(dtype)
        wrong[37] += wrong.abs().max() / 10
        with pytest.raises(AssertionError, match="scores: max error"):
            assert_close_to_ref(wrong, ref, what="scores")

    def test_max_limit_is_twice_plain_torch_plus_a_step(self):
        ref = torch.zeros(64, dtype=torch.float64)
        ref[0] = 1.0
        lowp = ref.clone()
        lowp[1] = 1e-3
        limit = 2e-3 + 2.0**-23
        for factor, passes in ((0.999, True), (1.001, False)):
            out = ref.clone()
            out[1] = factor * limit
            if passes:
                # Alone, this error would also be over the limit of the mean.
                lowp[2:34] = 1e-3
                assert_close_to_ref(out, ref, lowp, torch.float32)
            else:
                with pytest.raises(AssertionError, match="max error"):
                    assert_close_to_ref(out, ref, lowp, torch.float32)

    def test_mean_limit_is_one_and_a_half_of_plain_torch(self):
        ref = torch.ones(64, dtype=torch.float64)
        lowp = ref + 1e-3
        assert_close_to_ref(ref + 1.499e-3, ref, lowp, torch.float32)
        with pytest.raises(AssertionError, match="mean error"):
            assert_close_to_ref(ref + 1.501e-3, ref, lowp, torch.float32)  # below the limit of max

    def test_one_step_is_allowed_where_plain_torch_is_exact(self):
        ref = torch.ones(4, dtype=torch.float64)
        assert_close_to_ref(ref.bfloat16() + 2.0**-7, ref)
        with pytest.raises(AssertionError, match="error"):
            assert_close_to_ref(ref.bfloat16() + 2.0**-6, ref)

    def test_shape(self):
        ref = torch.ones(4, 1, dtype=torch.float64)
        for shape in ((4,), (1, 4), (4, 2)):
            with pytest.raises(AssertionError, match=re.escape(f"shape {shape}")):
                assert_close_to_ref(torch.ones(shape), ref)
        with pytest.raises(AssertionError, match="shape"):
            assert_close_to_ref(torch.ones(0, 3), torch.ones(0, 4).double())
        assert_close_to_ref(torch.ones(0, 3), torch.ones(0, 3).double())

    @pytest.mark.parametrize(
        "name, value", [("NaN", math.nan), ("+inf", math.inf), ("-inf", -math.inf)]
    )
    def test_pattern_of_nan_and_inf(self, name, value):
        special = torch.tensor([1.0, value, 3.0], dtype=torch.float64)
        plain = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        assert_close_to_ref(special.float(), special)
        for out, ref in ((special, plain), (plain, special), (special.roll(1), special)):
            with pytest.raises(AssertionError, match=re.escape(f"{name} differs")):
                assert_close_to_ref(out.float(), ref)

    def test_finite_values_beside_nan_are_judged(self):
        ref = torch.tensor([1.0, math.nan], dtype=torch.float64)
        with pytest.raises(AssertionError, match="max error"):
            assert_close_to_ref(torch.tensor([1.1, math.nan]), ref)

    def test_plain_torch_that_overflows_gives_no_slack(self):
        ref = torch.tensor([1.0, 2.0], dtype=torch.float64)
        lowp = torch.full((2,), math.inf)
        assert_close_to_ref(ref.float(), ref, lowp)
        with pytest.raises(AssertionError, match="max error"):
            assert_close_to_ref(ref.float() + 1e-3, ref, lowp)


class TestPoisonedMemory:
    def test_unwritten_outputs_are_nan(self):
        x = x23()
        with poisoned_memory():
            assert torch.isnan(torch.empty(1000)).all()
            assert (torch.empty(1000, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
            out = partly_written(x)
        assert torch.isnan(out[:, -1]).all() and torch.equal(out[:, :-1], x[:, :-1])

    def test_an_unwritten_row_fails_the_comparison_every_time(self):
        for _ in range(5):
            with poisoned_memory(), pytest.raises(AssertionError, match="NaN differs"):
                assert_close_to_ref(partly_written(x23()), x23().double())

    @pytest.mark.parametrize(
        "tokens", [40, 40_000]
    )  # below and above the size of huge-page outputs
    def test_reaches_the_ops_own_allocator(self, tokens):
        """What tenfold's C++ allocates inside an op is filled first; then the op overwrites all of it."""
        k, v = torch.randn(2, 1, 2, tokens, 32)
        idx = torch.arange(tokens).expand(1, 2, tokens).contiguous()

        def fills():
            with torch.profiler.profile() as seen:
                out = ops.kv_gather(k, v, idx)
            assert torch.equal(out[0], k) and torch.equal(out[1], v)
            inside = [e.name for e in seen.events() if e.cpu_parent is not None]
            assert sum(name.startswith(("aten::empty", "aten::new_empty")) for name in inside) >= 2
            return inside.count("aten::fill_")

        assert fills() == 0
        with poisoned_memory():
            assert fills() >= 2  # K and V

    @pytest.mark.parametrize("on, fills", [(False, True), (True, False), (False, False)])
    def test_restores_the_settings(self, on, fills):
        settings = torch.utils.deterministic
        before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
        try:
            torch.use_deterministic_algorithms(on)
            settings.fill_uninitialized_memory = fills
            with pytest.raises(KeyError), poisoned_memory():
                raise KeyError
            now = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
            assert now == (on, fills)
        finally:
            torch.use_deterministic_algorithms(before[0])
            settings.fill_uninitialized_memory = before[1]


class TestForced:
    def test_isa_is_set_and_restored(self):
        before = tenfold.cpu_capability()
        for name in tenfold.cpu_capabilities():
            with forced_isa(name):
                assert tenfold.cpu_capability() == name
            assert tenfold.cpu_capability() == before
        with pytest.raises(KeyError), forced_isa("scalar"):
            raise KeyError
        assert tenfold.cpu_capability() == before

    def test_isas_nest(self):
        before, last = tenfold.cpu_capability(), tenfold.cpu_capabilities()[-1]
        with forced_isa("scalar"):
            with forced_isa(last):
                assert tenfold.cpu_capability() == last
            assert tenfold.cpu_capability() == "scalar"
        assert tenfold.cpu_capability() == before

    def test_unknown_isa(self):
        before = tenfold.cpu_capability()
        with pytest.raises(ValueError, match="sse9"), forced_isa("sse9"):
            pass
        assert tenfold.cpu_capability() == before

    def test_threads(self):
        before = torch.get_num_threads()
        with pytest.raises(KeyError), threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError
        assert torch.get_num_threads() == before


class TestMatrix:
    @pytest.mark.parametrize("kind", VALUES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_fill(self, kind, dtype):
        x = fill((5, 7), dtype, kind)
        assert x.shape == (5, 7) and x.dtype == dtype
        assert torch.equal(x.nan_to_num(nan=9.0), fill((5, 7), dtype, kind).nan_to_num(nan=9.0))
        normal = fill((5, 7), torch.float32)
        expected = {
            "normal": lambda: torch.equal(x, normal.to(dtype)),
            "zeros": lambda: not x.any(),
            "large": lambda: torch.equal(x, (normal * 100).to(dtype)),
            "tiny": lambda: torch.equal(x, (normal * 1e-6).to(dtype)) and bool(x.any()),
            "nan": lambda: int(x.isnan().sum()) == 1 and int(x.isfinite().sum()) == 34,
            "inf": lambda: int(x.isposinf().sum()) == 1 and int(x.isfinite().sum()) == 34,
        }
        assert expected[kind]()
        assert fill((0, 3), dtype, kind).shape == (0, 3)

    def test_seeds_differ(self):
        assert not torch.equal(fill((9,), torch.float32), fill((9,), torch.float32, seed=1))

    def test_unknown_kinds_are_named(self):
        with pytest.raises(ValueError, match=r"'huge'.*normal, zeros"):
            fill((3,), torch.float32, "huge")
        with pytest.raises(ValueError, match=r"'strided'.*contiguous, sliced"):
            layout(torch.ones(3, 3), "strided")

    @pytest.mark.parametrize("kind", LAYOUTS)
    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 4, 5), (4, 5), (2, 0, 3, 4)])
    def test_layout_keeps_the_values(self, kind, shape):
        x = fill(shape, torch.bfloat16)
        y = layout(x, kind)
        assert torch.equal(x, y) and y.dtype == x.dtype and y.stride(-1) == 1

    def test_layouts_are_what_they_are_called(self):
        x = fill((2, 3, 4, 5), torch.float32)
        assert layout(x.transpose(1, 2), "contiguous").is_contiguous()
        sliced = layout(x, "sliced")
        assert sliced.stride(-2) == 10 and not sliced.is_contiguous()
        transposed = layout(x, "transposed")
        assert transposed.transpose(1, 2).is_contiguous() and not transposed.is_contiguous()
        assert not layout(x[0], "transposed").is_contiguous()
        off = layout(x, "misaligned")
        assert off.is_contiguous() and off.storage_offset() == 1 and off.data_ptr() % 16 != 0


ARGS = ["-q", "-p", "no:cacheprovider", "-p", "tenfold.testing.plugin"]


@pytest.fixture
def skips(pytester):
    """Runs a test file under the policy with some rules; returns (status, output)."""

    def run(source: str, rules: str = "", *args: str):
        pytester.makeini("[pytest]\nallowed_skips = skips.txt\n")
        pytester.path.joinpath("skips.txt").write_text(rules)
        pytester.makepyfile(test_it=f"import pytest\n\ndef test_fine():\n    pass\n\n{source}")
        found = pytester.runpytest_inprocess(*ARGS, *args)
        return found.ret, found.stdout.str()

    return run


class TestSkipPolicy:
    SKIP = "def test_skipped():\n    pytest.skip('no music here')\n"

    def test_a_run_without_skips_passes(self, skips):
        status, said = skips("")
        assert status == 0 and "1 passed" in said and "NOT ALLOWED" not in said

    def test_an_unlisted_skip_fails_the_run(self, skips):
        status, said = skips(self.SKIP)
        assert status == 1
        assert "SKIP NOT ALLOWED test_it.py::test_skipped: no music here" in said

    def test_a_listed_skip_passes(self, skips):
        status, said = skips(self.SKIP, "# why\n\n*test_skipped : no music*\n")
        assert status == 0 and "1 passed, 1 skipped" in said

    @pytest.mark.parametrize(
        "rule", ["*test_other : no music*", "*test_skipped : no sound*", "# *test_skipped : *"]
    )
    def test_a_rule_needs_both_the_test_and_the_reason(self, skips, rule):
        assert skips(self.SKIP, rule)[0] == 1

    def test_marks_count_like_calls(self, skips):
        marked = "@pytest.mark.skip(reason='later')\ndef test_marked():\n    pass\n"
        status, said = skips(marked + self.SKIP, "*test_skipped : *")
        assert status == 1
        assert "test_marked: later" in said and "test_skipped:" not in said

    @pytest.mark.parametrize(
        "line", ["pytest.importorskip('no_such_module_at_all')",
                 "pytest.skip('not today', allow_module_level=True)"]
    )  # fmt: skip
    def test_skipping_a_whole_module_counts(self, skips, pytester, line):
        pytester.makepyfile(test_gone=f"import pytest\n{line}\n\ndef test_gone():\n    pass\n")
        status, said = skips("")
        assert status == 1 and "SKIP NOT ALLOWED test_gone.py" in said and "1 passed" in said
        assert skips("", "test_gone.py : *")[0] == 0

    def test_with_several_processes(self, skips, pytester):
        pytester.makepyfile(
            test_gone="import pytest\npytest.importorskip('no_such_module_at_all')\n"
        )
        on_cuda = "@cuda_only\ndef test_on(device):\n    pass\n"
        on_cuda = f"from tenfold.testing.plugin import cuda_only\n{on_cuda}"
        status, said = skips(self.SKIP + on_cuda, "", "-n", "2")
        assert status == 1
        if torch.cuda.is_available():
            assert "2 passed" in said
        else:  # both collect it, neither runs it
            assert "1 passed" in said and "not run: 1\n" in said
        for name in ("test_it.py::test_skipped", "test_gone.py"):
            assert said.count(f"SKIP NOT ALLOWED {name}") == 1
        assert skips(self.SKIP, "* : *", "-n", "1")[0] == 0

    def test_expected_failures_are_no_skips(self, skips):
        source = "@pytest.mark.xfail(reason='known')\ndef test_known():\n    assert False\n"
        assert skips(source)[0] == 0

    def test_a_failure_stays_a_failure(self, skips):
        assert skips("def test_wrong():\n    assert False\n" + self.SKIP, "* : *")[0] == 1

    def test_device_fixture(self, skips):
        """One body, both devices; ``-m 'not cuda'`` leaves the CPU."""
        source = "def test_on(device):\n    assert device.type in ('cpu', 'cuda')\n"
        status, said = skips(source, "", "-vv")
        assert status == 0
        assert re.search(r"test_on\[cpu\] PASSED", said)
        left_out = "no CUDA device; tests that need one, not run: 1\n"
        if torch.cuda.is_available():
            assert re.search(r"test_on\[cuda\] PASSED", said) and left_out not in said
        else:
            assert "[cuda]" not in said and "2 passed, 1 deselected" in said and left_out in said
        status, said = skips(source, "", "-m", "not cuda")
        assert status == 0 and "2 passed, 1 deselected" in said and left_out not in said

    def test_the_mark_alone_leaves_nothing_out(self, skips):
        """A test that is marked, but does not take the fixture's CUDA, decides for itself."""
        source = "import pytest\n@pytest.mark.cuda\ndef test_marked():\n    pass\n"
        status, said = skips(source)
        assert status == 0 and "2 passed" in said and "no CUDA device" not in said


class TestProcesses:
    def test_a_program_runs_as_its_interpreter_runs_it(self, tmp_path):
        (tmp_path / "beside.py").write_text("VALUE = 3\n")
        (tmp_path / "script.py").write_text(
            "import os, sys, beside\n"
            "print(__name__, sys.argv[1:], beside.VALUE, os.environ['MINE'], os.getcwd())\n"
            "print('torch' in sys.modules, 'tenfold' in sys.modules, sys.stdin.read(), file=sys.stderr)\n"
            "sys.exit(5)\n"
        )
        env = os.environ | {"MINE": "x"}
        done = processes.python(tmp_path / "script.py", "a", 2, env=env, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (5, f"__main__ ['a', '2'] 3 x {tmp_path}\n")
        assert done.stderr == "True False \n"
        again = processes.python("-c", "import os; print('MINE' in os.environ, end='')")
        assert (again.returncode, again.stdout, again.stderr) == (0, "False", "")

    def test_errors_and_signals(self):
        done = processes.python("-c", "print('before'); raise KeyError('gone')")
        assert done.returncode == 1 and done.stdout == "before\n"
        assert "Traceback" in done.stderr and done.stderr.endswith("\nKeyError: 'gone'\n")
        done = processes.python("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        assert done.returncode == -signal.SIGKILL

    def test_ranks(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "import torch.distributed as dist, torch\n"
            "dist.init_process_group('gloo')\n"
            "x = torch.tensor([dist.get_rank() + 1])\n"
            "dist.all_reduce(x)\n"
            "print(int(x))\n"
            "dist.destroy_process_group()\n"
        )
        done = processes.ranks(script, count=3)
        said = [
            line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")
        ]  # older torch
        assert (done.returncode, said) == (0, ["6"] * 3), done.stderr
        script.write_text(
            "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(300)"
        )
        start = time.monotonic()
        assert processes.ranks(script).returncode != 0  # the other one is ended
        assert time.monotonic() - start < 60
