# SPDX-License-Identifier: Apache-2.0
"""The installed package: what it links, exports, weighs, imports and says when it cannot load.

These run against whatever is installed: CI installs the built wheel in a clean environment first.
"""

import importlib.metadata
import inspect
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import typing
import zlib
from pathlib import Path

import pytest
import torch

import tenfold
from tenfold import _load
from tenfold.testing import processes

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(tenfold.__file__).parent
OPS = _load.PATH
# Libraries whose symbols carry a version, as the linker records it.
RUNTIMES = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")
# Weak references of the start-up code in every shared object.
STARTUP = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
# The third: what stable/ops.h itself calls.
SHIM_HEADERS = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h",
                "inductor/aoti_torch/generated/c_shim_aten.h")  # fmt: skip
LIBRARIES = ("libtorch_cpu.", "libstdc++.", "libm.", "libgcc_s.", "libc.", "libdl.",
             "libpthread.", "librt.", "ld-linux")  # fmt: skip
CPU_ONLY = {"_peak"}
# What the faces of other ops call: checks, and forward and backward halves of what autograd sees as one.
INNER = {"fir_down2_backward", "fir_up2_backward", "gated_act", "gated_act_", "gated_act_backward", "gn1_gelu_backward",
         "last_token_reward_backward",
         "last_token_reward_forward", "linear_cross_entropy_backward",
         "linear_cross_entropy_grads", "linear_logprob_backward", "load_balance_loss_backward",
         "ma_ppo_loss_backward", "ma_ppo_policy_loss_forward", "ma_ppo_value_loss_forward",
         "macro_pool_backward", "macro_segment_check", "markov_onestep_backward",
         "markov_onestep_tuples_backward", "markov_scan_backward", "moe_combine_backward",
         "moe_gate_backward", "moe_gate_linear_backward", "moe_lora_experts",
         "moe_lora_experts_backward", "moe_lora_experts_train", "moe_permute_backward",
         "moe_swiglu_mlp_backward", "moe_swiglu_mlp_train", "pairwise_logsigmoid_grads",
         "patch_mse_forward", "planes_add_", "planes_check", "planes_sums",
         "rms_norm_backward", "rms_norm_forward", "rms_norm_forward_", "router_seed_loss_backward",
         "router_seed_loss_grads", "segment_mean_backward",
         "selective_logprob_backward", "sequence_nll_backward", "sequence_nll_forward", "vdiff_loss_backward",
         "weighted_linear_ce_backward", "weighted_linear_ce_forward",
         "weighted_linear_ce_grads"}  # fmt: skip


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """A process that has torch, but nothing of tenfold yet."""
    return processes.python("-c", code, env={**os.environ, **env})


def output(code: str, **env: str) -> str:
    done = run(code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fresh_output(code: str) -> str:
    """Of a new interpreter, which has imported nothing, and writes bytecode as one does by default."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def nm(*args: str) -> list[list[str]]:
    done = subprocess.run(["nm", *args], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines() if line.strip()]


class TestBinary:
    """``_ops.so``: one build for every torch >= 2.10, every Python, with or without a GPU."""

    def undefined(self) -> list[str]:
        names = [fields[-1] for fields in nm("-D", "--undefined-only", str(OPS))]
        assert len(names) > 20
        return names

    def test_undefined_symbols_are_the_stable_shim_and_the_c_runtimes(self):
        torch_include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
        shim = "".join((torch_include / header).read_text() for header in SHIM_HEADERS)
        declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", shim))
        # Families of getters that the header declares through a macro.
        macros = ("aoti_torch_dtype_", "aoti_torch_device_type_", "aoti_torch_layout_",
                  "aoti_torch_memory_format_")  # fmt: skip
        foreign = []
        for symbol in self.undefined():
            name, _, version = symbol.partition("@")
            known = version.lstrip("@").startswith(RUNTIMES) or name in STARTUP | declared
            if not known and not name.startswith(macros):
                foreign.append(symbol)
        assert foreign == []

    def test_no_python_and_no_cuda_library_symbol(self):
        named = re.compile(r"^_?Py[A-Z_]|^cu[A-Z]|^cuda|c10|at4|pybind11")
        assert [s for s in self.undefined() if named.search(s)] == []

    def test_links_libtorch_cpu_only_and_has_no_rpath(self):
        dynamic = subprocess.run(
            ["readelf", "-d", str(OPS)], capture_output=True, text=True, check=True
        ).stdout
        needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
        assert any(n.startswith("libtorch_cpu") for n in needed)
        assert [n for n in needed if not n.startswith(LIBRARIES)] == []
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic

    def test_exports_only_its_own_c_functions(self):
        strong = {f[-1] for f in nm("-D", "--defined-only", str(OPS)) if f[-2] in "TDB"}
        assert strong - {"__bss_start", "_edata", "_end", "_init", "_fini"} == {
            "tenfold_build_compiler", "tenfold_build_cuda", "tenfold_build_torch",
            "tenfold_cpu_capability", "tenfold_cpu_capability_at", "tenfold_last_error_kind",
            "tenfold_set_cpu_capability", "tenfold_version",
        }  # fmt: skip

    def test_messages_carry_no_path_of_the_build_machine(self):
        data = OPS.read_bytes()
        assert str(ROOT / "csrc").encode() not in data
        assert b"site-packages/torch/include" not in data


def isa_objects(folder: Path) -> list[Path]:
    return [
        path for path in folder.glob("**/CMakeFiles/tenfold_*.dir/**/*_isa.cpp.o")
        if (ROOT / path.as_posix().partition(".dir/")[2].removesuffix(".o")).is_file()
    ]  # fmt: skip


def test_kernels_with_code_for_bf16_are_compiled_for_it():
    """A plain TENFOLD_ISA_DECLARE in its header would leave one at AVX-512: right, but slower."""
    of_bf16 = re.compile(r"\b(put_two|store_quick|store_pair|store_where|TENFOLD_ISA_BF16)\b")
    declared = re.compile(r"\bTENFOLD_ISA_DECLARE_(BF16|AMX)\b|\bTENFOLD_ISA_AMX\b")
    checked = 0
    for path in sorted((ROOT / "csrc").rglob("*_isa.cpp")):
        source = path.read_text()
        if of_bf16.search(source) is None:
            continue
        headers = re.findall(r'^#include "(.+)"', source, re.MULTILINE)
        texts = [source, *((ROOT / "csrc" / name).read_text() for name in headers)]
        assert any(map(declared.search, texts)), path
        checked += 1
    assert checked > 15


def test_isa_objects_define_no_weak_symbol(tmp_path):
    """The linker keeps one copy of a weak symbol: the AVX-512 one could serve every CPU."""
    objects = isa_objects(ROOT / "build")
    if not objects:  # a wheel from elsewhere: compile these objects as the build does
        configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DTENFOLD_CUDA=OFF",
                     f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
        env = {**os.environ, "TENFOLD_CUDA": "OFF"}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        subprocess.run(configure, check=True, capture_output=True, env=env)
        listed = subprocess.run(["ninja", "-C", tmp_path, "-t", "targets", "all"], check=True,
                                capture_output=True, text=True, env=env).stdout  # fmt: skip
        wanted = sorted(set(re.findall(r"^(\S+_isa\.cpp\.o):", listed, re.MULTILINE)))
        subprocess.run(["ninja", "-C", tmp_path, *wanted], check=True, capture_output=True, env=env)
        objects = isa_objects(tmp_path)
    built = {re.search(r"tenfold_(\w+)\.dir", str(p))[1] for p in objects}
    assert {"scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx"} <= built
    weak = {}
    for path in objects:
        bad = [f[-1] for f in nm("--defined-only", str(path)) if f[-2] in "WVu"]
        if bad:
            weak[str(path)] = bad
    assert weak == {}


def ops_with_cuda_sources() -> set[str]:
    text = "".join(path.read_text() for path in (ROOT / "csrc").glob("*/cuda/*.cu"))
    return set(re.findall(r'm\.impl\("(\w+)"', text))


class TestImport:
    def test_cuda_kernels_are_registered_without_a_gpu(self):
        ops = [
            "collapse_heads",
            "dare_merge",
            "dare_merge_",
            "delta_gram",
            "delta_gram_",
            "dha_attention",
            "dha_attention_backward",
            "dha_cache_append_",
            "dha_decode",
            "fir_down2",
            "fir_down2_",
            "fir_up2_cat",
            "fir_up2_cat_",
            "first_stop",
            "fuse_heads",
            "fuse_heads_backward",
            "fusion_mse",
            "fusion_mse_backward",
            "gae",
            "gated_gelu",
            "gated_gelu_",
            "gn1_gelu",
            "gn1_gelu_",
            "grad_norm",
            "grouped_gemm",
            "grouped_gemm_wgrad",
            "head_cka",
            "kv_compact_",
            "kv_gather",
            "last_token_reward",
            "linear_cross_entropy",
            "linear_logprob",
            "linear_merge",
            "linear_merge_",
            "linear_wgrad_rows",
            "lm_weight",
            "load_balance_loss",
            "ma_ppo_policy_loss",
            "ma_ppo_prepare",
            "ma_ppo_value_loss",
            "macro_gae",
            "macro_pool",
            "macro_segment_fixed",
            "macro_segment_lengths",
            "macro_segment_ppl",
            "macro_segment_starts",
            "markov_onestep",
            "markov_onestep_tuples",
            "markov_scan",
            "mask_popcount",
            "mask_prefix",
            "mask_random",
            "mask_topk",
            "masked_adamw_",
            "masked_adamw_8bit_",
            "masked_copy_",
            "moe_combine",
            "moe_gate",
            "moe_gate_linear",
            "moe_lora_swiglu_mlp",
            "moe_permute",
            "moe_sort",
            "moe_swiglu_mlp",
            "nacl_evict",
            "nacl_select",
            "outer_dot",
            "pack_mask",
            "pair_pack",
            "pairwise_logsigmoid",
            "patch_mask",
            "patch_mse",
            "patch_mse_",
            "patch_mse_backward",
            "patch_mse_backward_",
            "patchify_batch",
            "patchify_u8",
            "patchify_u8_",
            "proxy_scores",
            "ragged_decode",
            "rms_norm",
            "rms_norm_",
            "router_seed_loss",
            "segment_mean",
            "selective_logprob",
            "sequence_nll",
            "shift_right",
            "slerp_merge",
            "slerp_merge_",
            "span_corrupt",
            "span_corruption",
            "span_mask",
            "span_restore",
            "swiglu",
            "swiglu_",
            "template_scale",
            "t5_attention",
            "t5_attention_backward",
            "ties_merge",
            "ties_merge_",
            "trace_token_class",
            "unpack_mask",
            "unpatchify",
            "vdiff_loss",
            "vdiff_noise",
            "vdiff_noise_",
            "vdiff_noise_rng",
            "vdiff_noise_rng_",
            "vdiff_step",
            "vdiff_step_",
            "weighted_linear_ce",
            *INNER,
        ]
        code = (
            "import tenfold, torch; has = torch._C._dispatch_has_kernel_for_dispatch_key;"
            "assert not torch.cuda.is_available();"
            f"print(*[n for n in {ops} if has('tenfold::' + n, 'CUDA')])"
        )
        registered = set(output(code, CUDA_VISIBLE_DEVICES="").split())
        built = bool(_load.native.build_cuda())
        assert registered == (ops_with_cuda_sources() if built else set())

    def test_every_op_has_a_cpu_kernel_a_fake_and_a_face(self):
        schemas = torch._C._jit_get_all_schemas()
        names = {
            s.name.split("::")[1] for s in schemas if s.name.startswith("tenfold::")
        } - CPU_ONLY
        assert names == set(tenfold.ops.__all__) | INNER
        for name in names:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tenfold::{name}", "CPU"), name
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tenfold::{name}", "Meta"), name

    def test_adds_less_than_a_fifth_of_a_second_to_import_torch(self):
        # Of the processor, not of the clock: other tests run beside this one. Files are in memory after the first.
        code = (
            "import torch, time; t = time.process_time(); import tenfold;"
            "print(time.process_time() - t)"
        )
        fresh_output(code)  # the first import writes bytecode
        seconds = [float(fresh_output(code)) for _ in range(3)]
        assert statistics.median(seconds) < 0.2, seconds

    def test_is_lazy(self):
        heavy = ["transformers", "matplotlib", "typer", "rich", "scipy", "kvpress", "pytest",
                 "safetensors", "tenfold.nacl", "tenfold.cli", "tenfold._bench",
                 "tenfold.testing"]  # fmt: skip
        code = f"import torch, sys, tenfold; print(*[m for m in {heavy} if m in sys.modules])"
        assert fresh_output(code) == ""

    def test_works_without_the_pybind11_module(self):
        code = (
            "import sys; sys.modules['tenfold._C'] = None\n"
            "import tenfold, torch\n"
            "tenfold.set_cpu_capability('scalar')\n"
            "print(type(tenfold._load.native).__name__, tenfold.cpu_capability(),\n"
            "      tenfold.__version__, tenfold.ops.template_scale(torch.ones(3), 2.0).sum())\n"
            "try: tenfold.ops.template_scale(torch.ones(3), float('nan'))\n"
            "except ValueError: print('ValueError')"
        )
        version = tenfold.__version__
        assert output(code).split() == ["_Ctypes", "scalar", version, "tensor(6.)", "ValueError"]

    def test_forced_capability(self):
        for name in tenfold.cpu_capabilities():
            code = "import tenfold; print(tenfold.cpu_capability())"
            assert output(code, TENFOLD_CPU_CAPABILITY=name) == name


class TestLoaderErrors:
    """Each failure is one sentence: what was found, what is needed, the command that fixes it."""

    def message(self, code: str, **env: str) -> str:
        done = run(code, **env)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("tenfold._load.LoadError: "), done.stderr
        return last

    def test_a_broken_library_warns_and_never_breaks_the_import(self, tmp_path):
        broken = tmp_path / "_ops.so"
        broken.write_bytes(b"text")
        done = run(
            "import tenfold; print(tenfold.__version__, tenfold.load_error is not None)",
            TENFOLD_OPS_PATH=str(broken),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [tenfold.__version__, "True"]
        assert "RuntimeWarning" in done.stderr and str(broken) in done.stderr

    def test_named_library_does_not_exist(self, tmp_path):
        missing = tmp_path / "_ops.so"
        assert f"{missing} does not exist" in self.message(
            "import tenfold.ops", TENFOLD_OPS_PATH=str(missing)
        )

    @pytest.mark.parametrize("kind", ["no library at all", "a torch without one of the functions"])
    def test_broken_library(self, tmp_path, kind):
        broken = tmp_path / "_ops.so"
        data = OPS.read_bytes()
        assert data.count(b"torch_parallel_for\0") == 1
        renamed = data.replace(b"torch_parallel_for\0", b"torch_parallel_fox\0")
        broken.write_bytes(b"text" if kind == "no library at all" else renamed)
        said = self.message("import tenfold.ops", TENFOLD_OPS_PATH=str(broken))
        for word in (str(broken), torch.__version__, "pip install", "tenfold doctor"):
            assert word in said

    def test_old_torch(self):
        said = self.message("import torch; torch.__version__ = '2.9.1'; import tenfold.ops")
        assert "torch >= 2.10" in said and "2.9.1" in said and "pip install" in said

    def test_package_without_library(self, tmp_path):
        copy = tmp_path / "tenfold"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        # Only the copy may be found: neither the installed package nor an editable install's hook.
        code = (
            "import sys, torch\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]\n"
            "rest = [p for p in sys.path if 'site-packages' not in p]\n"
            f"sys.path[:] = [{str(tmp_path)!r}, *rest]\n"
            "import tenfold.ops"
        )
        said = self.message(code, TENFOLD_OPS_PATH="", PYTHONPATH="")
        for word in ("_ops.so", str(copy), torch.__version__, "pip install --no-build-isolation"):
            assert word in said


class TestMetadata:
    @pytest.fixture
    def meta(self):
        """Where tenfold is not installed (a checkout on PYTHONPATH) only these tests fail."""
        return importlib.metadata.metadata("tenfold")

    def test_name_licence_python_and_version(self, meta):
        assert meta["License-Expression"] == "Apache-2.0"
        assert meta["Requires-Python"] == ">=3.11"
        assert meta["Version"] == tenfold.__version__

    def test_dependencies(self, meta):
        required = importlib.metadata.requires("tenfold") or []
        hard = {r for r in required if "extra ==" not in r}
        # As pyproject.toml has them; else what is installed is older than it.
        assert hard == set(
            tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        )
        names = {re.split(r"[<>=!~]", r)[0] for r in hard}
        assert names == {"torch", "numpy", "safetensors", "typer", "rich"} and "torch>=2.10" in hard
        assert {
            "hf",
            "train",
            "pixel",
            "audio",
            "reward",
            "eval",
            "report",
            "parse",
            "bench",
            "gptfluence",
            "ernie-code",
            "dev",
            "all",
        } == (set(meta.get_all("Provides-Extra")))
        hosts = ("kvpress", "verl", "openrlhf", "skyrl", "trl")
        assert [r for r in required if r.lower().startswith(hosts)] == []

    def test_command_and_typing_marker(self):
        scripts = importlib.metadata.entry_points(group="console_scripts", name="tenfold")
        assert [s.value for s in scripts] == ["tenfold.cli.main:app"]
        assert (PACKAGE / "py.typed").is_file()

    def test_bench_kit_is_in_the_package_without_results(self):
        import tenfold._bench

        folder = Path(tenfold._bench.__file__).parent
        assert (folder / "harness.py").is_file()
        if PACKAGE not in folder.parents:  # an editable install points at the source folder
            assert folder == ROOT / "bench"
        else:
            assert not (folder / "results").exists()

    def test_size(self):
        """What a wheel holds, compressed as a wheel compresses it."""
        files = {p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        files |= {OPS, *OPS.parent.glob("_C*.so")}
        size = sum(len(zlib.compress(p.read_bytes())) for p in files)
        assert 100_000 < size < 20 * 2**20
        for wheel in (ROOT / "dist").glob("*.whl"):
            assert wheel.stat().st_size < 20 * 2**20


@pytest.mark.parametrize("name", tenfold.ops.__all__)
def test_public_faces_are_typed_and_documented(name):
    face = getattr(tenfold.ops, name)
    hints = typing.get_type_hints(face)
    assert set(hints) == {*inspect.signature(face).parameters, "return"}
    assert face.__doc__ and len(face.__doc__.splitlines()) > 3


def test_outside_project_compiles_and_exports():
    """``examples/outside`` takes nothing from tenfold but ``torch.ops.tenfold.*``."""
    project = ROOT / "examples" / "outside"
    sources = "".join(p.read_text() for p in (project / "src").rglob("*.py"))
    assert not re.search(r"from tenfold|import tenfold\.|(?<!ops\.)\btenfold\.\w", sources)
    done = subprocess.run(
        [sys.executable, "-m", "kvtrim"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(project / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^(eager|torch\.compile|torch\.export)", done.stdout, re.MULTILINE)) == 5
