# SPDX-License-Identifier: Apache-2.0
"""What a program cannot do to its host (check 12, the security suite), and that it is told as an observation."""

import contextlib
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sandbox_attacks import ATTACKS, BOMBS

from tenfold.sandbox import Limits, Sandbox, SandboxError, host, run_program
from tenfold.sandbox.folders import remove
from tenfold.themis.tools import CodeRun, Toolbox

QUICK = Limits(
    cpu_seconds=1, wall_seconds=5.0, memory_bytes=256 << 20, processes=4, output_bytes=1 << 16
)
SANDBOX = Sandbox(QUICK)

# With an interpreter that every user may run, root gives programs user ids of their own.
PYTHONS = [None]
if os.path.realpath("/usr/bin/python3").endswith(("3.11", "3.12", "3.13", "3.14")):
    PYTHONS.append("/usr/bin/python3")


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """Makes sandboxes of a folder that no other test's have: (sandbox, () -> its processes)."""
    mark = tmp_path / "jail"
    mark.symlink_to(host._JAIL)
    monkeypatch.setattr(host, "_JAIL", mark)

    def left():
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(mark).encode() in path.read_bytes().split(b"\0"):
                    found.append(path)
        return found

    return lambda limits, **options: (Sandbox(limits, **options), left)


@contextlib.contextmanager
def victim(folder):
    """Things to attack, and the names by which ATTACKS have them; nothing has happened to them at the end."""
    folder.chmod(0o777)
    secret = folder / "secret.txt"
    secret.write_text("the secret")
    secret.chmod(0o666)
    os.utime(secret, (1e9, 1e9))
    before = (secret.stat().st_mode, secret.stat().st_mtime, secret.stat().st_uid)
    limits = resource.getrlimit(resource.RLIMIT_CPU)
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        secret.open() as left_open,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(folder / "s"))
        unix.listen()
        (folder / "s").chmod(0o777)
        os.set_inheritable(left_open.fileno(), True)
        yield {"SECRET": str(secret), "FOLDER": str(folder), "PORT": str(tcp.getsockname()[1]),
               "DATAGRAM": str(udp.getsockname()[1]), "SOCKET": str(folder / "s"),
               "PID": str(os.getpid()), "LEFT_OPEN": str(left_open.fileno())}  # fmt: skip
        for asked in (tcp, unix):
            asked.setblocking(False)
            with pytest.raises(BlockingIOError):
                asked.accept()
        udp.setblocking(False)
        with pytest.raises(BlockingIOError):
            udp.recv(1)
    assert secret.read_text() == "the secret"
    assert (secret.stat().st_mode, secret.stat().st_mtime, secret.stat().st_uid) == before
    assert sorted(os.listdir(folder)) == ["s", "secret.txt"] and not os.listxattr(secret)
    assert resource.getrlimit(resource.RLIMIT_CPU) == limits
    assert not os.path.exists("/dev/shm/tenfold-test")


WAYS = [
    pytest.param({}, ATTACKS | BOMBS, id="default"),
    pytest.param({"without": ("namespaces",), "python": PYTHONS[-1]}, ATTACKS, id="no_namespaces"),
]


@pytest.mark.parametrize("options, attacks", WAYS)
def test_every_attack_is_contained_and_told(options, attacks, tmp_path, monkeypatch):
    """All at once, as a scorer would get them: each is an ordinary observation, in bounded time."""
    monkeypatch.setenv("HIDDEN", "hidden words")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "victim").mkdir()
    box = Sandbox(replace(QUICK, wall_seconds=3.0), **options)
    start = time.monotonic()
    with (
        victim(tmp_path / "victim") as names,
        Toolbox([CodeRun(box)], workers=6) as tools,
    ):
        pattern = re.compile("|".join(names))
        waiting = {}
        for name, (source, _) in attacks.items():
            program = pattern.sub(lambda found: names[found[0]], source)
            example = {"answer": program, "test_list": ["assert done"]}
            waiting[name] = tools.submit("code_run", "the answer", example)
        made = {name: future.result() for name, future in waiting.items()}
        assert tools.threads()["code_run"][1] == 0
    wrong = {}
    for name, seen in made.items():
        reason = attacks[name][1] or ".*"
        text = rf"The pass rate is 0.00. None of 1 tests passed. Reasons: (?:{reason})\."
        if seen.status != "ok" or not re.fullmatch(text, seen.text):
            wrong[name] = seen
    assert not wrong
    assert time.monotonic() - start < 60
    assert not os.listdir(tmp_path / "runs")


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
        short = Sandbox(replace(QUICK, wall_seconds=0.5))
        start = time.monotonic()
        assert short.run("import time; time.sleep(60)").kind == "timeout"
        stubborn = (
            "import signal\nfor s in (15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
        )
        assert short.run(stubborn).kind == "timeout"
        assert time.monotonic() - start < 5
        made = run_program("import time; time.sleep(60)", ["assert 1"] * 3, short, max_timeouts=1)
        assert made.outcomes == ("timeout",) * 3 and made.errors[1:] == ("not run",) * 2

    @pytest.mark.parametrize("python", PYTHONS)
    def test_fork_bomb(self, python, marked):
        sandbox, left = marked(QUICK, python=python)
        count = "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(30)\n"
        run = sandbox.run(count + "        n += 1\nexcept OSError: print(n)")
        # Descendants end with the program: the run does not wait for their sleep.
        assert run.kind == "done" and int(run.stdout) < QUICK.processes
        bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        short, _ = marked(replace(QUICK, wall_seconds=0.4), python=python)
        assert short.run(bomb).kind == "timeout"
        assert not left()

    def test_memory(self):
        grow = "x = []\nwhile True: x.append(bytearray(1 << 20))"
        assert SANDBOX.run(grow).memory_bytes < 300 << 20

    def test_output(self):
        run = SANDBOX.run("while True: print('x' * 1000)")
        assert run.kind == "output" and len(run.stdout) == QUICK.output_bytes
        run = SANDBOX.run("import sys\nwhile True: print('x' * 1000, file=sys.stderr)")
        assert run.kind == "output" and len(run.stderr) == QUICK.output_bytes
        run = SANDBOX.run("def f(): return 'x' * 10**6", "call", function="f", arguments=[])
        assert run.kind == "output"
        deep = "import os\nfor fd in range(3, 40):\n    try: os.write(fd, b'[' * 50000)\n    except OSError: pass"
        assert SANDBOX.run(deep).kind == "done"

    def test_files(self):
        look = "print('root' in open('/etc/passwd').read())"
        assert Sandbox(QUICK, readable=["/etc/passwd"]).run(look).stdout == "True\n"
        inside = (
            "import os\nopen('a', 'w').write('1'); os.mkdir('d'); os.symlink('a', 'b'); os.rename('a', 'c')\n"
            "print(sorted(os.listdir('.')), os.getcwd() != '/')"
        )
        assert SANDBOX.run(inside).stdout == "['b', 'c', 'd'] True\n"
        assert SANDBOX.run("import os; print(os.listdir('.'))").stdout == "[]\n"

    def test_disk(self):
        run = SANDBOX.run("open('a', 'wb').write(bytes(32 << 20))")
        assert run.kind == "raised" and "Errno 27" in run.error
        fill = "for i in range(64): open(str(i), 'wb').write(bytes(4 << 20))"
        if SANDBOX.protection()["disk"] == "memory file system":
            assert "No space left" in SANDBOX.run(fill).error

    def test_what_programs_may_do(self):
        """Threads are no new processes; signals to itself; its own limits."""
        thread = (
            "import threading; t = threading.Thread(target=print, args=('x',)); t.start(); t.join()"
        )
        assert SANDBOX.run(thread).stdout == "x\n"
        assert SANDBOX.run("import os, signal; os.kill(os.getpid(), 9)").exit == 137
        own = "import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 1)); print(r.getrlimit(r.RLIMIT_CPU))"
        assert SANDBOX.run(own).stdout == "(1, 1)\n"

    def test_folders_are_removed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        Sandbox(QUICK).run("open('a', 'w').write('x')")
        assert not list(tmp_path.iterdir())

    def test_deep_and_locked_folders_are_removed(self, tmp_path, monkeypatch):
        """Deeper than Python's stack; on a memory file system where there is one, since others are slow at it."""
        base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
        folder = tempfile.mkdtemp(dir=base)
        monkeypatch.chdir(folder)
        for i in range(1500):
            os.mkdir("d", 0o700)
            os.symlink("/etc", f"s{i}")
            os.chdir("d")
        os.chdir(folder)
        os.chmod("d", 0)
        remove(folder)
        assert not os.path.exists(folder) and os.path.exists("/etc/passwd")

    def test_killed_trainer_leaves_nothing(self, tmp_path, marked):
        _, left = marked(QUICK)
        package = Path(host.__file__).parents[1]
        code = (  # without torch, whose import takes seconds
            "import pathlib, sys, types; t = sys.modules['tenfold'] = types.ModuleType('tenfold')\n"
            f"t.__path__ = [{str(package)!r}]; from tenfold.sandbox import host as s\n"
            f"s._JAIL = pathlib.Path({str(host._JAIL)!r})\n"
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


def test_the_pages_example(capsys):
    page = Path(__file__).parents[2] / "docs" / "sandbox.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(code, {})
    shown = re.findall(r"# (.*)$", code, re.MULTILINE)
    for line, want in zip(capsys.readouterr().out.replace("42\n\n", "42\n").splitlines(), shown):
        assert line == want or line.startswith(want.removesuffix("..."))
