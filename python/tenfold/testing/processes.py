# SPDX-License-Identifier: Apache-2.0
"""Python processes for tests, forked from one that has already imported what takes seconds.

An interpreter that imports torch and transformers has used three to six seconds before it does anything.
``python`` and ``ranks`` run a program as ``python program ...`` would, in a process of its own with its own
environment, output and exit status, but as a copy of a server that has loaded those and nothing of tenfold.
A server is started on first use, one for a process of pytest, and ends with it. POSIX only.

What a test of imports or of their time needs is a new interpreter: ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOADED = ("torch", "numpy", "transformers.models.llama.modeling_llama", "accelerate")


# -- in the server -----------------------------------------------------------------------------------


def _become(task: Mapping[str, Any]) -> None:
    """Makes a forked copy of the server look like a new interpreter."""
    for number, name in enumerate((os.devnull, task["out"], task["err"])):
        opened = os.open(name, os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(task["env"])
    os.chdir(task["cwd"])
    sys.argv = task["argv"]
    sys.path[:] = [str(Path(task["argv"][0]).parent), *task["path"]]


def _wait(pids: Sequence[int], timeout: float) -> list[int]:
    """Exit statuses; once one of several has failed the others are ended, as torchrun does."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while left := [p for p in pids if p not in codes]:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > end
        if late or codes.get(pid):
            for other in left:
                if other != pid:
                    os.kill(other, signal.SIGKILL if late else signal.SIGTERM)
        if not pid:
            time.sleep(0.01)
    return [codes[p] for p in pids]


def _serve() -> str:
    """Forks what it is told to; returns in a forked process only, with the program to run."""
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for task in request["tasks"]:
            pid = os.fork()
            if pid == 0:
                _become(task)
                return task["argv"][0]
            pids.append(pid)
        print(json.dumps(_wait(pids, request["timeout"])), flush=True)
    sys.exit()


def _run(program: str) -> None:
    """Runs a forked process's program to its end, which is the process's: what the server has loaded is not torn down.

    (Some of it, Triton for one, would complain on stderr.)
    """
    status: Any = 0
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    # As an interpreter ends, which has no public name: it waits for threads that are not daemons.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


# -- in the tests ------------------------------------------------------------------------------------


class Server:
    """A process with ``modules`` loaded, started in ``environment``."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, *modules], env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self,
        argv: Sequence[Any],
        environments: Sequence[Mapping[str, str]] = (),
        cwd: str | Path | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess:
        """A process for each environment (default: the server's), at the same time.

        The result has the first exit status that is not 0, and what all of them have written.
        """
        argv, (to, back) = [str(a) for a in argv], (self.process.stdin, self.process.stdout)
        assert to is not None and back is not None
        with tempfile.TemporaryDirectory() as folder:
            tasks = [
                {"argv": argv, "env": dict(env), "cwd": str(cwd or os.getcwd()), "path": sys.path,
                 "out": f"{folder}/{i}.out", "err": f"{folder}/{i}.err"}
                for i, env in enumerate(environments or [self.environment])
            ]  # fmt: skip
            to.write(json.dumps({"tasks": tasks, "timeout": timeout}) + "\n")
            to.flush()
            answer = back.readline()
            assert answer, f"the server has ended with status {self.process.wait()}"
            codes = json.loads(answer)
            out, err = ("".join(Path(str(t[k])).read_text(errors="replace") for t in tasks)
                        for k in ("out", "err"))  # fmt: skip
        return subprocess.CompletedProcess(argv, next((c for c in codes if c), 0), out, err)


@functools.cache
def _server(*modules: str) -> Server:
    return Server(modules, os.environ)


def python(
    *argv: Any,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    loaded: Sequence[str] = LOADED,
) -> subprocess.CompletedProcess:
    """``python script.py arguments``, or ``python -c code``, with modules that are there already."""
    with contextlib.ExitStack() as stack:
        if argv[0] == "-c":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "code.py").write_text(argv[1])
            argv = (folder / "code.py", *argv[2:])
        return _server(*loaded).run(argv, [os.environ if env is None else env], cwd)


def ranks(
    script: str | Path, *arguments: Any, count: int = 2, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """A script as ``count`` gloo ranks of one thread, started as torchrun starts them, in its folder.

    ``env``: what is in their environment beside this process's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                           "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
                           "ACCELERATE_USE_CPU": "true"} | dict(env or {})  # fmt: skip
    each = [common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]
    return _server(*LOADED).run([script, *arguments], each, Path(script).parent)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # for accelerate, which collects garbage after every run
    _run(_serve())
