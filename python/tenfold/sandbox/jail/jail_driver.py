# SPDX-License-Identifier: Apache-2.0
"""Runs one program on one task and reports what came of it, inside the sandbox's innermost process.

A task is a dict: ``source``, ``mode`` and what the mode needs:

    compile                         nothing runs
    stdio                           the program is ``__main__``; its input is on standard input
    call    function, arguments     the value of ``function(*arguments)``, as JSON
    assert  test, nonce             ``test`` runs after the program, in its namespace

The report, JSON on a file descriptor: ``kind`` (syntax, raised, done, value, assertion), ``error``, ``value``.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import types
from collections.abc import Callable

_FLUSHED = ("stdout", "stderr")


def _print_trace(error: BaseException, limit: int | None = None) -> None:
    try:
        import traceback  # few programs need it, and it takes as long to load as all the rest

        traceback.print_exception(error, limit=limit)
    except BaseException:  # no memory or no files left: the report says what was raised
        return


def report(result: int, values: dict) -> None:
    """Writes the one report and closes the descriptor."""
    data = json.dumps(values).encode()
    try:
        while data:
            data = data[os.write(result, data) :]
        os.close(result)
    except OSError:
        pass


def _plain(value: object) -> object:
    """What ``json`` does not know: sets as sorted lists, arrays as lists."""
    if isinstance(value, set | frozenset):
        try:
            return sorted(value)
        except TypeError:
            return sorted(value, key=repr)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} cannot be compared")


def _find(namespace: dict, name: str) -> Callable:
    """The function, or the method of ``class Solution`` that has its name."""
    if name in namespace:
        return namespace[name]
    if "Solution" in namespace and hasattr(namespace["Solution"], name):
        return getattr(namespace["Solution"](), name)
    raise NameError(f"name {name!r} is not defined")


def _work(task: dict, code: types.CodeType, dumps: Callable[[object], str]) -> dict:
    mode = task["mode"]
    module = types.ModuleType("__main__" if mode == "stdio" else "solution")
    sys.modules[module.__name__] = module
    space = module.__dict__
    if mode == "assert":
        test = compile(task["test"], "<test>", "exec")
        nonce = task["nonce"]
    exec(code, space)
    if mode == "call":
        value = _find(space, task["function"])(*task["arguments"])
        return {"kind": "value", "value": json.loads(dumps(value))}
    if mode == "assert":
        exec(test, space)
        return {"kind": "done", "nonce": nonce}
    return {"kind": "done"}


def _failure(error: BaseException) -> dict:
    """An assertion of the test itself fails; everything else was raised."""
    first = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename == __file__:
        first = first.tb_next
    _print_trace(error.with_traceback(first))
    last = first
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    in_test = last is not None and last.tb_frame.f_code.co_filename == "<test>"
    kind = "assertion" if isinstance(error, AssertionError) and in_test else "raised"
    return {"kind": kind, "error": f"{type(error).__name__}: {error}"[:2000]}


def run(task: dict, result: int) -> int:
    """Returns the exit status; the report is written."""
    # Kept here: the program may replace what modules hold.
    dumps = json.JSONEncoder(default=_plain).encode
    say, leave = report, os._exit
    try:
        code = compile(task["source"], "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        _print_trace(error, limit=0)
        say(result, {"kind": "syntax", "error": f"{type(error).__name__}: {error}"[:2000]})
        return 1
    if task["mode"] == "compile":
        say(result, {"kind": "done"})
        return 0
    sys.argv = ["program.py"]
    sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]
    for name in ("jail_keeper", "jail_linux", "jail_driver"):
        sys.modules.pop(name, None)
    status, made = 0, {}
    try:
        made = _work(task, code, dumps)
        threading._shutdown()  # type: ignore[attr-defined]
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        made = {"kind": "raised" if status else "done", "error": f"SystemExit: {error.code}"[:2000]}
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        status = 1
        made = _failure(error)
    try:
        atexit._run_exitfuncs()
    except BaseException as error:
        _print_trace(error)
    for name in _FLUSHED:
        try:
            getattr(sys, name).flush()
        except Exception:
            status = status or 120
    say(result, made)
    leave(status & 0xFF)
    return status
