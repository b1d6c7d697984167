# SPDX-License-Identifier: Apache-2.0
"""Programs on tests: all forms of tests, what counts as passed, and how programs end."""

import json

import pytest

from tenfold.sandbox import (
    AssertTest,
    CallTest,
    Limits,
    Sandbox,
    StdioTest,
    extract_code,
    parse_tests,
    run_program,
)
from tenfold.sandbox.programs import same_output

SANDBOX = Sandbox(Limits(cpu_seconds=1, wall_seconds=5.0, memory_bytes=256 << 20, processes=4))
DOUBLE = [{"input": f"{i}\n", "output": f"{2 * i}\n"} for i in range(1, 5)]


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
