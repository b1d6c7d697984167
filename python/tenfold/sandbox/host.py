# SPDX-License-Identifier: Apache-2.0
"""Runs untrusted Python programs in processes of their own, with limits, and without network and files.

What it protects from, on Linux: a program that loops, forks, hogs memory, floods its output or the disk,
opens sockets, reads the environment, memory or files of the process that runs it, writes outside its folder or
changes files' modes there, signals other processes, or leaves something running. What it does not: it shares the
kernel, so a kernel bug is a way out; memory is limited per process, so that all together may take ``processes``
times ``memory_bytes``; names, sizes and times of files can be asked for, though no content; side channels; and
``assert`` tests run in the program's own interpreter, which a program that looks for them can cheat.
For hostile programs rather than a policy's mistakes, use a virtual machine around all this.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenfold.sandbox.folders import remove
from tenfold.training.checks import integers, positive

PURPOSES = ("network", "processes", "signals", "files", "disk")
MECHANISMS = ("namespaces", "landlock", "seccomp", "drop")
KINDS = ("done", "value", "assertion", "raised", "syntax", "timeout", "output")
_MAX_ERROR = 2000
_JAIL = Path(__file__).with_name("jail")
_SYSTEM = ("/usr/lib", "/lib", "/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
           "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")  # fmt: skip


class SandboxError(RuntimeError):
    """The sandbox itself cannot be had here; the message says what is missing."""


@dataclass(frozen=True)
class Limits:
    """Of one run.

    Attributes:
        cpu_seconds: per process, whole seconds. wall_seconds: of the whole run.
        memory_bytes: address space per process. processes: processes and threads at a time.
        file_bytes: largest file. disk_bytes: all files together, where the folder can be a memory file
            system. open_files. output_bytes: of standard output and of standard error; more ends the run.
    """

    cpu_seconds: int = 4
    wall_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    processes: int = 8
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    open_files: int = 64
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        integers(self, {"cpu_seconds": 1, "memory_bytes": 64 << 20, "processes": 1, "file_bytes": 0,
                        "disk_bytes": 1 << 16, "open_files": 16, "output_bytes": 1})  # fmt: skip
        positive("wall_seconds", self.wall_seconds)


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        kind: ``done``, ``value`` (of a call), ``assertion`` (of the test), ``raised`` (or died), ``syntax``,
            ``timeout`` (CPU or wall clock), ``output`` (too much of it).
        value: of a call, as JSON. error: what was raised. stdout, stderr: as far as they were kept.
        exit: status, 128 + n after signal n. seconds, cpu_seconds, memory_bytes: used, the latter two 0
            where the run was ended from outside.
        nonce: what proves that a test ran to its end. protection: by purpose, what was in force.
    """

    kind: str
    value: Any = None
    error: str = ""
    stdout: str = ""
    stderr: str = ""
    exit: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    nonce: str = ""
    protection: Mapping[str, str] = field(default_factory=dict)


def _open_to_others(path: Path) -> bool:
    """Can a user who owns nothing here read this (and get there)?"""
    try:
        if not path.stat().st_mode & stat.S_IROTH:
            return False
        return all(p.stat().st_mode & stat.S_IXOTH for p in path.resolve().parents)
    except OSError:
        return False


def _reopened(data: bytes) -> int:
    """A descriptor from which the data can be read, and nothing written."""
    handle, name = tempfile.mkstemp()
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.unlink(name)


class Sandbox:
    """Runs programs one at a time per call; calls may be made from several threads.

    Args:
        limits: of every run.
        python: the interpreter (CPython >= 3.11 that is not a virtual environment's), default the one
            below this process. packages: programs may import what is installed in this environment.
        readable: further files and folders that programs may read.
        require: purposes (of ``PURPOSES``) without a means for which no program is run. Give fewer only
            where something around this process protects you.
        without: mechanisms (of ``MECHANISMS``) not to use, where one of them misbehaves.

    Raises:
        ValueError: an unknown purpose or mechanism, a missing interpreter. SandboxError: not on Linux.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        python: str | None = None,
        packages: bool = False,
        readable: Sequence[str] = (),
        require: Sequence[str] = ("network", "processes", "signals", "files"),
        without: Sequence[str] = (),
    ) -> None:
        for name, given, allowed in (
            ("require", require, PURPOSES),
            ("without", without, MECHANISMS),
        ):
            unknown = sorted(set(given) - set(allowed))
            if unknown:
                raise ValueError(f"{name} may hold {', '.join(allowed)}; got {', '.join(unknown)}")
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"programs can be confined on Linux only, not on {sys.platform}")
        self.limits = limits or Limits()
        base = os.path.realpath(python or sys.executable)
        if not os.access(base, os.X_OK):
            raise ValueError(f"python must be an interpreter that can be run, got {python!r}")
        self._command = [
            sys.executable if packages and python is None else base,
            "-I",
            "-X",
            "utf8",
        ]
        self._command += [str(_JAIL)] if packages else ["-S", str(_JAIL)]
        prefix = Path(base).parents[1]
        here = sysconfig.get_paths()
        paths = [*_SYSTEM, str(prefix / "lib"), str(prefix / "lib64"), *readable]
        if python is None:
            paths += [here["stdlib"], here["platstdlib"]]
        if packages:
            paths += [here["purelib"], here["platlib"]]
        self._spec = {
            "limits": asdict(self.limits), "readable": sorted(set(paths)), "require": list(require),
            "without": list(without), "parent": os.getpid(),
            "droppable": _open_to_others(prefix / "lib") and _open_to_others(Path(base))
            and _open_to_others(Path(tempfile.gettempdir())),
        }  # fmt: skip

    def run(self, source: str, mode: str = "stdio", stdin: str = "", **task: Any) -> Run:
        """Runs a program once, in an empty folder that is removed afterwards.

        Args:
            source: Python. mode: ``"stdio"``; ``"compile"`` (nothing runs); ``"call"`` with ``function`` and
                ``arguments`` (JSON), on the function or the method of ``class Solution``; ``"assert"`` with
                ``test``, statements that run after it, and ``nonce``.

        Raises:
            SandboxError: a required means is missing, or the sandbox failed.
        """
        folder = tempfile.mkdtemp(prefix="tenfold-run-")
        task = {"source": source, "mode": mode} | task
        spec = self._spec | {"folder": folder, "task": task, "parent": os.getpid()}
        try:
            return self._run(json.dumps(spec).encode(), stdin.encode("utf-8", "replace"), folder)
        finally:
            remove(folder)

    def protection(self) -> dict[str, str]:
        """By purpose, what protects here (``none``: nothing does); found by running an empty program."""
        return dict(self.run("", "compile").protection)

    def _run(self, spec: bytes, stdin: bytes, folder: str) -> Run:
        given = {"spec": _reopened(spec), "input": _reopened(stdin)}
        pipes = {"status": os.pipe(), "result": os.pipe()}
        words = [str(d) for d in (given["spec"], pipes["status"][1], pipes["result"][1])]
        try:
            process = subprocess.Popen(
                [*self._command, *words], stdin=given["input"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                cwd=folder, env={}, start_new_session=True, bufsize=0,
                pass_fds=(given["spec"], pipes["status"][1], pipes["result"][1]),
            )  # fmt: skip
        except BaseException:
            os.close(pipes["status"][0])
            os.close(pipes["result"][0])
            raise
        finally:
            for descriptor in (*given.values(), pipes["status"][1], pipes["result"][1]):
                os.close(descriptor)
        assert process.stdout is not None and process.stderr is not None
        sources = {"stdout": process.stdout.fileno(), "stderr": process.stderr.fileno(),
                   "status": pipes["status"][0], "result": pipes["result"][0]}  # fmt: skip
        try:
            got, overflow, late = self._collect(sources)
        finally:
            self._end(process)
            process.stdout.close()
            process.stderr.close()
            os.close(sources["status"])
            os.close(sources["result"])
        return self._judge(got, overflow, late)

    def _collect(self, sources: Mapping[str, int]) -> tuple[dict[str, bytes], bool, bool]:
        """Reads everything until all ends are closed; (what came, was it too much, was it too late)."""
        got = {name: b"" for name in sources}
        # The keeper keeps the time; this is for when it cannot.
        deadline = time.monotonic() + self.limits.wall_seconds + 5.0
        with selectors.DefaultSelector() as selector:
            for name, descriptor in sources.items():
                selector.register(descriptor, selectors.EVENT_READ, name)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    return got, False, True
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fd)
                    got[key.data] += data
                    if key.data != "status" and len(got[key.data]) > self.limits.output_bytes:
                        got[key.data] = got[key.data][: self.limits.output_bytes]
                        return got, True, False
        return got, False, False

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """The keeper ends what it keeps; if it does not within two seconds, it is ended, too."""
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _judge(self, got: Mapping[str, bytes], overflow: bool, late: bool) -> Run:
        text: dict[str, Any] = {n: got[n].decode("utf-8", "replace") for n in ("stdout", "stderr")}
        if overflow or late:
            return Run("output" if overflow else "timeout", **text)
        if not got["status"]:
            raise SandboxError(f"the sandbox's keeper died: {text['stderr'][-2000:]}")
        state: dict[str, Any] = {}
        for line in got["status"].splitlines():
            state |= json.loads(line)
        if "broken" in state:
            raise SandboxError(f"the sandbox could not be closed: {state['broken']}")
        if state["refused"]:
            raise SandboxError(
                f"no means here to protect: {', '.join(state['refused'])} (found: {state['protection']}). "
                "Run programs elsewhere, or take these out of `require` if something else protects you"
            )
        try:
            result = json.loads(got["result"]) if got["result"] else {}
        except (ValueError, RecursionError):  # the program wrote there itself
            result = {}
        if not isinstance(result, dict):
            result = {}
        kind = result.get("kind", "done" if state["exit"] == 0 else "raised")
        if kind not in KINDS:  # the program wrote this, too
            kind = "raised"
        # SIGXCPU; SIGKILL, if the program ignored that. The limit counts finer than the time used.
        spent = state["exit"] == 152 or state["cpu_seconds"] >= self.limits.cpu_seconds
        if state["ended"] == "time" or (spent and not result):
            kind = "timeout"
        error = str(result.get("error", ""))[:_MAX_ERROR].encode("utf-8", "replace").decode()
        if kind == "raised" and not error:
            error = f"ended with status {state['exit']}"
        return Run(
            kind, result.get("value"), error, **text, exit=state["exit"], seconds=state["seconds"],
            cpu_seconds=state["cpu_seconds"], memory_bytes=state["memory_bytes"],
            nonce=str(result.get("nonce", "")), protection=state["protection"],
        )  # fmt: skip
