# SPDX-License-Identifier: Apache-2.0
"""The benchmark kit: what it records, whether that still holds, and the GPU ledger."""

import copy
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tenfold
from bench import gpu_status, report, results, runner, sources
from bench.case import (
    provider,
)
from bench.harness import measure
from bench_cases import CEILINGS, CPU, OPTIONS, ROOT, case, the_record


@pytest.fixture
def record():
    return the_record()


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

    def test_in_a_sentence(self, tree):
        assert report.ledger(tree) == (
            "CUDA kernels: `alpha`: never run on an H200; `beta`: never run on an H200."
        )

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
