# SPDX-License-Identifier: Apache-2.0
"""The benchmark kit on a GPU: the script, its steps, what proves a run, captured graphs."""

import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tenfold
from bench import gpu, gpu_proof, gpu_status, results, runner, sources, timing
from bench.case import (
    provider,
)
from bench.harness import measure
from bench.timing import Rotation
from bench_cases import (
    CEILINGS,
    CPU,
    LIMITS,
    OPTIONS,
    ROOT,
    case,
    double,
    make_inputs,
    the_record,
)


@pytest.fixture
def record():
    return the_record()


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
