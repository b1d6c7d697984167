"""Programs: the reward's table (check 16), tests of all forms, and what a program cannot do to its host."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tenfold.ma_rlhf import sandbox as sandbox_module
from tenfold.ma_rlhf.programs import (
    AssertTest,
    CallTest,
    ProgramResult,
    ProgramReward,
    StdioTest,
    extract_code,
    parse_tests,
    program_reward,
    run_program,
    same_output,
)
from tenfold.ma_rlhf.rewards import Answers, Rewards
from tenfold.ma_rlhf.sandbox import Limits, Sandbox, SandboxError

QUICK = Limits(
    cpu_seconds=1, wall_seconds=5.0, memory_bytes=256 << 20, processes=4, output_bytes=1 << 16
)
SANDBOX = Sandbox(QUICK)
DOUBLE = [{"input": f"{i}\n", "output": f"{2 * i}\n"} for i in range(1, 5)]


def result(*outcomes):
    return ProgramResult(outcomes, ("",) * len(outcomes))


class TestReward:
    def test_check_16(self):
        """Syntax error -1; exception -.6; 0/4, 1/4, 4/4 tests -> -.3, .025, 1.0."""
        reward = ProgramReward(SANDBOX, workers=2)
        programs = [
            "print(2 * int(input())", "raise ValueError", "input(); print(-1)",
            "n = int(input()); print(2 if n == 1 else 0)", "print(2 * int(input()))",
        ]  # fmt: skip
        made = reward([""] * 5, programs, tests=[DOUBLE] * 5)
        assert made == pytest.approx([-1.0, -0.6, -0.3, 0.025, 1.0], abs=1e-12)
        assert [r.passed for r in reward.last] == [0, 0, 0, 1, 4]
        assert reward.metrics() == pytest.approx({
            "tests/pass": 5 / 16, "tests/fail": 7 / 16, "tests/raised": 4 / 16, "tests/timeout": 0.0,
            "tests/output": 0.0, "solved": 0.2, "syntax": 0.2,
        })  # fmt: skip

    @pytest.mark.parametrize(
        "outcomes, want",
        [
            (("raised", "fail"), {"none_passed": -0.6, "any": -0.6, "all": -0.3, "never": -0.3}),
            (("raised", "pass"), {"none_passed": 0.35, "any": -0.6, "all": 0.35, "never": 0.35}),
            (("raised", "raised"), {"none_passed": -0.6, "any": -0.6, "all": -0.6, "never": -0.3}),
            (("timeout", "output"), dict.fromkeys(("none_passed", "any", "all", "never"), -0.3)),
            (("syntax",), dict.fromkeys(("none_passed", "any", "all", "never"), -1.0)),
        ],
    )
    def test_precedence(self, outcomes, want):
        for rule, value in want.items():
            assert program_reward(result(*outcomes), rule) == pytest.approx(value, abs=1e-12)

    def test_order_is_kept_by_parallel_workers(self):
        programs = [f"import time; time.sleep({0.02 * (8 - i)}); print({i})" for i in range(8)]
        tests = [[{"input": "", "output": str(i)}] for i in range(8)]
        assert ProgramReward(SANDBOX, workers=8)([""] * 8, programs, tests=tests) == [1.0] * 8

    def test_in_the_trainers_hands(self):
        """As one reward of several, its tests from a column of the data set."""
        rewards = Rewards([ProgramReward(SANDBOX), lambda completions: [0.5] * len(completions)])
        assert rewards.names[0] == "program_reward"
        none = torch.zeros(2, 2, dtype=torch.int64)
        answers = Answers(["a", "b"], ["a", "b"], ["print(2 * int(input()))", "1 +"], none, none.bool(), 1,
                          {"tests": [DOUBLE[:1]] * 2})  # fmt: skip
        made = rewards(answers)
        assert made.score.tolist() == [1.5, -0.5] and made.parts[:, 0].tolist() == [1.0, -1.0]

    def test_bad_input(self):
        reward = ProgramReward(SANDBOX)
        with pytest.raises(ValueError, match="column `tests`"):
            reward(["a"], ["b"])
        with pytest.raises(ValueError, match="equally many, got 1, 2 and 1"):
            reward(["a"], ["b", "c"], tests=[DOUBLE])
        with pytest.raises(ValueError, match="a program without tests has no reward"):
            reward(["a"], ["b"], tests=[[]])
        with pytest.raises(TypeError, match="a completion must be text or a list of chat messages"):
            reward(["a"], [3], tests=[DOUBLE])
        with pytest.raises(ValueError, match="precedence must be one of none_passed, any"):
            ProgramReward(SANDBOX, precedence="some")
        with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
            ProgramReward(SANDBOX, workers=0)
        with pytest.raises(ValueError, match="max_timeouts must be >= 1"):
            run_program("", DOUBLE, SANDBOX, max_timeouts=0)


class TestForms:
    def test_parse(self):
        assert parse_tests(DOUBLE)[0] == StdioTest("1\n", "2\n")
        apps = {"inputs": [["1", "2"], "3"], "outputs": ["3", ["6"]]}
        assert parse_tests(json.dumps(apps)) == [StdioTest("1\n2", "3"), StdioTest("3", "6")]
        calls = {"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[3]]}
        assert parse_tests(calls) == [CallTest("f", (1, [2]), ([3], 3))]
        assert parse_tests(["assert f(1) == 2"]) == [AssertTest("assert f(1) == 2")]
        assert parse_tests("assert f(1) == 2") == [AssertTest("assert f(1) == 2")]

    @pytest.mark.parametrize(
        "value, error, text",
        [
            ({"inputs": []}, ValueError, "a dict needs inputs and outputs"),
            ({"inputs": [1], "outputs": []}, ValueError, "1 inputs, but 0 outputs"),
            ([{"input": ""}], ValueError, "number 0 must be a test"),
            (3, TypeError, "tests must be a list, a dict or JSON text, got int"),
        ],
    )
    def test_parse_errors(self, value, error, text):
        with pytest.raises(error, match=text):
            parse_tests(value)

    def test_calls(self):
        solution = "class Solution:\n    def pairs(self, n):\n        return {(i, i * i) for i in range(n)}"
        tests = [
            CallTest("pairs", (3,), ([(0, 0), (1, 1), (2, 4)],)),
            CallTest("pairs", (1,), ([],)),
        ]
        made = run_program(solution, tests, SANDBOX)
        assert made.outcomes == ("pass", "fail") and made.errors[1] == "returned [[0, 0]], not []"
        assert run_program(
            "def f(d): return {1: d}", [CallTest("f", (2,), ({1: 2},))], SANDBOX
        ).solved
        missing = run_program("x = 1", [CallTest("f", (), (1,))], SANDBOX)
        assert missing.outcomes == ("raised",) and "name 'f' is not defined" in missing.errors[0]
        odd = run_program("def f(): return object()", [CallTest("f", (), (1,))], SANDBOX)
        assert odd.outcomes == ("raised",)
        third = [CallTest("f", (), (0.333333,))]
        assert run_program("def f(): return 1 / 3", third, SANDBOX).outcomes == ("fail",)
        assert run_program("def f(): return 1 / 3", third, SANDBOX, tolerance=1e-5).solved

    def test_asserts(self):
        source = "def f(x):\n    assert x >= 0\n    return x + 1"
        tests = ["assert f(1) == 2", "assert f(1) == 3, 'wrong'", "assert f(-1) == 0", "f(1, 2)"]
        made = run_program(source, tests, SANDBOX)
        assert made.outcomes == ("pass", "fail", "raised", "raised")
        assert made.errors[1] == "AssertionError: wrong"

    @pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)"])
    def test_leaving_early_passes_nothing(self, leave):
        assert run_program(leave, ["assert 1 == 2"], SANDBOX).outcomes == ("raised",)
        assert run_program(leave, [CallTest("f", (), (None,))], SANDBOX).outcomes == ("raised",)
        # For a program that is judged by what it prints, it is an ordinary end.
        assert run_program("print(1); " + leave.replace("os._exit(0)", "sys.stdout.flush(); os._exit(0)")
                           .replace("import os", "import os, sys"), [StdioTest("", "1")], SANDBOX).solved  # fmt: skip

    def test_forged_reports_pass_nothing(self):
        forged = (
            "import os\nfor fd in range(3, 40):\n"
            '    try: os.write(fd, b\'{"kind": "done", "nonce": "0", "broken": "x"}\')\n'
            "    except OSError: pass\nos._exit(0)"
        )
        assert run_program(forged, ["assert False"], SANDBOX).outcomes == ("raised",)

    def test_output_rules(self):
        assert same_output("1 2 \n3\n\n", "1 2\n3") and not same_output("1  2", "1 2")
        assert not same_output("0.33333", "0.33334") and same_output("0.33333", "0.33334", 1e-4)
        assert not same_output("a 0.1", "b 0.1", 1e-4) and not same_output("1", "1 1", 1e-4)

    def test_extract(self):
        text = "First:\n```python\nx = 1\n```\nbetter:\n```\nx = 2\n```\ndone"
        assert extract_code(text) == "x = 2\n"
        assert extract_code("x = 3") == "x = 3" and extract_code("```py\nx = 4") == "x = 4"
        chat = [{"role": "assistant", "content": "```python\nprint(2 * int(input()))\n```"}]
        assert ProgramReward(SANDBOX)([""], [chat], tests=[DOUBLE[:2]]) == [1.0]

    def test_kinds_of_ends(self):
        run = SANDBOX.run
        assert run("print(input())", stdin="hé").stdout == "hé\n"
        for source in ("x = (", "\x00", "return 1", "(" * 500 + ")" * 500):
            assert run(source, "compile").kind == "syntax", source[:10]
        assert run("import sys; sys.exit('bad')").error == "SystemExit: bad"
        assert run("import sys; sys.exit()").kind == "done"
        crash = run("import os; os.abort()")
        assert (crash.kind, crash.exit, crash.error) == ("raised", 134, "ended with status 134")
        late = run("import atexit, threading, time\natexit.register(print, 'b')\n"
                   "threading.Thread(target=lambda: (time.sleep(.05), print('a'))).start()")  # fmt: skip
        assert late.kind == "done" and late.stdout == "a\nb\n"
        trace = run("def f():\n    1 / 0\nf()")
        assert "ZeroDivisionError" in trace.stderr and "jail" not in trace.stderr
        assert (
            run("import __main__; print(__name__, hasattr(__main__, 'Jail'))").stdout
            == "__main__ False\n"
        )


# With an interpreter that every user may run, root gives programs user ids of their own.
PYTHONS = [None]
if os.path.realpath("/usr/bin/python3").endswith(("3.11", "3.12", "3.13", "3.14")):
    PYTHONS.append("/usr/bin/python3")


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """Makes sandboxes of a folder that no other test's have: (sandbox, () -> its processes)."""
    mark = tmp_path / "jail"
    mark.symlink_to(sandbox_module._JAIL)
    monkeypatch.setattr(sandbox_module, "_JAIL", mark)

    def left():
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(mark).encode() in path.read_bytes().split(b"\0"):
                    found.append(path)
        return found

    return lambda limits, **options: (Sandbox(limits, **options), left)


def blocked(source, error="PermissionError", sandbox=SANDBOX):
    """The program is stopped by that error."""
    run = sandbox.run(source)
    assert run.kind == "raised" and run.error.startswith(error), run


class TestEscapes:
    def test_protection(self):
        found = SANDBOX.protection()
        assert set(found) == {"network", "processes", "signals", "files", "disk"}
        assert "none" not in found.values()

    def test_loops_and_sleeps_end(self):
        start = time.monotonic()
        assert SANDBOX.run("while True: pass").kind == "timeout"
        short = Sandbox(replace(QUICK, wall_seconds=0.5))
        assert short.run("import time; time.sleep(60)").kind == "timeout"
        stubborn = (
            "import signal\nfor s in (15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
        )
        assert short.run(stubborn).kind == "timeout" and SANDBOX.run(stubborn).kind == "timeout"
        assert time.monotonic() - start < 15
        slow = [StdioTest("", "")] * 3
        made = run_program("while True: pass", slow, SANDBOX, max_timeouts=1)
        assert made.outcomes == ("timeout",) * 3 and made.errors[1:] == ("not run",) * 2
        assert program_reward(made) == pytest.approx(-0.3)

    @pytest.mark.parametrize("python", PYTHONS)
    def test_fork_bomb(self, python, marked):
        sandbox, left = marked(QUICK, python=python)
        count = "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(30)\n"
        run = sandbox.run(count + "        n += 1\nexcept OSError: print(n)")
        # Descendants end with the program: the run does not wait for their sleep.
        assert run.kind == "done" and int(run.stdout) < QUICK.processes
        bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        short, _ = marked(replace(QUICK, wall_seconds=1.0), python=python)
        assert short.run(bomb).kind == "timeout"
        assert not left()

    def test_memory(self):
        run = SANDBOX.run("x = bytearray(1 << 30)")
        assert run.kind == "raised" and run.error.startswith("MemoryError")
        grow = "x = []\nwhile True: x.append(bytearray(1 << 20))"
        assert SANDBOX.run(grow).memory_bytes < 300 << 20
        blocked("import os; os.memfd_create('x')")

    def test_output(self):
        run = SANDBOX.run("while True: print('x' * 1000)")
        assert run.kind == "output" and len(run.stdout) == QUICK.output_bytes
        run = SANDBOX.run("import sys\nwhile True: print('x' * 1000, file=sys.stderr)")
        assert run.kind == "output" and len(run.stderr) == QUICK.output_bytes
        big = run_program("def f(): return 'x' * 10**6", [CallTest("f", (), ("",))], SANDBOX)
        assert big.outcomes == ("output",)
        deep = "import os\nfor fd in range(3, 40):\n    try: os.write(fd, b'[' * 50000)\n    except OSError: pass"
        assert SANDBOX.run(deep).kind == "done"

    def test_network(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            blocked(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
        blocked("import socket; socket.socket(socket.AF_UNIX)")
        blocked("import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")

    def test_environment(self, monkeypatch):
        monkeypatch.setenv("TENFOLD_SECRET", "42")
        run = SANDBOX.run("import os; print('TENFOLD_SECRET' in os.environ, os.getcwd() != '/')")
        assert run.stdout == "False True\n"
        blocked(f"open('/proc/{os.getpid()}/environ').read()")
        blocked("import os; open(f'/proc/{os.getppid()}/environ').read()", "")

    def test_files(self, tmp_path):
        secret = tmp_path / "secret.txt"
        secret.write_text("42")
        tmp_path.chmod(0o777)
        blocked(f"open({str(secret)!r}).read()")
        blocked(f"open({str(tmp_path / 'new')!r}, 'w')")
        blocked(f"import os; os.unlink({str(secret)!r})")
        blocked("import os; os.listdir('/')")
        blocked("import os; os.execv('/bin/sh', ['sh', '-c', 'echo'])")
        assert secret.read_text() == "42" and not (tmp_path / "new").exists()
        look = "print('root' in open('/etc/passwd').read())"
        blocked(look)
        assert Sandbox(QUICK, readable=["/etc/passwd"]).run(look).stdout == "True\n"
        inside = "open('a', 'w').write('1'); import os; os.mkdir('d'); print(os.listdir('.'))"
        assert sorted(eval(SANDBOX.run(inside).stdout)) == ["a", "d"]
        assert SANDBOX.run("import os; print(os.listdir('.'))").stdout == "[]\n"

    def test_disk(self):
        run = SANDBOX.run("open('a', 'wb').write(bytes(32 << 20))")
        assert run.kind == "raised" and "Errno 27" in run.error
        fill = "for i in range(64): open(str(i), 'wb').write(bytes(4 << 20))"
        if SANDBOX.protection()["disk"] == "memory file system":
            assert "No space left" in SANDBOX.run(fill).error

    def test_signals(self):
        run = SANDBOX.run(f"import os; os.kill({os.getpid()}, 0)")
        assert run.error.startswith(("ProcessLookupError", "PermissionError"))
        blocked("import os; os.kill(os.getppid(), 9)", "")
        assert SANDBOX.run("import os, signal; os.kill(os.getpid(), 9)").exit == 137

    def test_kernel_surface(self):
        call = "import ctypes; l = ctypes.CDLL(None, use_errno=True); r = l.{}; print(r, ctypes.get_errno())"
        for name in ("unshare(0x10000000)", "ptrace(0, 0, 0, 0)", "syscall(425, 1, 0)"):
            assert SANDBOX.run(call.format(name)).stdout == "-1 1\n", name
        # Threads are no new processes.
        thread = (
            "import threading; t = threading.Thread(target=print, args=('x',)); t.start(); t.join()"
        )
        assert SANDBOX.run(thread).stdout == "x\n"

    def test_folders_are_removed(self, tmp_path, monkeypatch):
        import tempfile

        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        Sandbox(QUICK).run("open('a', 'w').write('x')")
        assert not list(tmp_path.iterdir())

    def test_killed_trainer_leaves_nothing(self, tmp_path, marked):
        _, left = marked(QUICK)
        code = (
            "import pathlib; from tenfold.ma_rlhf import sandbox as s\n"
            f"s._JAIL = pathlib.Path({str(sandbox_module._JAIL)!r})\n"
            "s.Sandbox(s.Limits(cpu_seconds=30, wall_seconds=30)).run('import time; time.sleep(29)')"
        )
        trainer = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}
        )
        deadline = time.monotonic() + 30
        while len(left()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(left()) >= 2
        trainer.kill()
        trainer.wait()
        deadline = time.monotonic() + 5
        while left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left()


class TestFallbacks:
    """Every mechanism taken away: either another one does its work, or no program runs."""

    @pytest.mark.parametrize("python", PYTHONS)
    def test_without_namespaces(self, python, marked):
        sandbox, left = marked(QUICK, without=("namespaces",), python=python)
        found = sandbox.protection()
        assert (found["network"], found["signals"], found["files"]) == (
            "seccomp", "seccomp", "Landlock")  # fmt: skip
        blocked("import socket; socket.socket()", sandbox=sandbox)
        blocked("import os; os.kill(os.getppid(), 9)", sandbox=sandbox)
        assert sandbox.run("import signal; signal.raise_signal(15)").exit == 143
        daemon = (
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(30)\nprint('x')"
        )
        run = sandbox.run(daemon)
        if found["processes"] == "limit":
            assert (run.kind, run.stdout) == ("done", "x\n")
        else:
            assert run.error.startswith("PermissionError")
        assert not left()

    def test_without_seccomp(self):
        sandbox = Sandbox(QUICK, without=("seccomp",), require=("network", "signals", "files"))
        assert sandbox.protection()["network"] == "namespace"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            blocked(
                f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", "", sandbox
            )

    def test_what_is_required_and_missing(self):
        with pytest.raises(SandboxError, match=r"no means here to protect: files \("):
            Sandbox(QUICK, without=("landlock",)).run("")
        with pytest.raises(
            SandboxError, match=r"network, processes, signals, files|network, signals, files"
        ):
            Sandbox(QUICK, without=("landlock", "namespaces", "seccomp")).run("")
        bare = Sandbox(QUICK, without=("landlock", "namespaces", "seccomp"), require=())
        assert bare.run("print(1)").stdout == "1\n"

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"require may hold network, .*; got net"):
            Sandbox(require=("net",))
        with pytest.raises(ValueError, match=r"without may hold namespaces, .*; got x"):
            Sandbox(without=("x",))
        with pytest.raises(ValueError, match="python must be an interpreter"):
            Sandbox(python="/nowhere/python")
        with pytest.raises(ValueError, match="cpu_seconds must be >= 1"):
            Limits(cpu_seconds=0)
        with pytest.raises(ValueError, match="wall_seconds must be a positive number"):
            Limits(wall_seconds=-1)

    def test_installed_packages(self):
        assert Sandbox(QUICK).run("import numpy").error.startswith("ModuleNotFoundError")
        roomy = Sandbox(Limits(cpu_seconds=10, memory_bytes=2 << 30), packages=True)
        assert roomy.run("import numpy; print(numpy.arange(3).sum())").stdout == "3\n"
