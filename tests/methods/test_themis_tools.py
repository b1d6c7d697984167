# SPDX-License-Identifier: Apache-2.0
"""Themis's tools that work things out: calculator, calendar, code (checks 10, 11 and 12 with their numbers)."""

import builtins
import time

import pytest

from tenfold.sandbox import Limits, Sandbox
from tenfold.themis.tools import BadArguments, Calculator, Calendar, CodeRun, Refused, Verdicts
from tenfold.themis.tools.arithmetic import MAX_LENGTH, NotArithmetic, evaluate
from tenfold.themis.tools.calculator import stated_answer
from tenfold.themis.tools.code_run import pass_label, pass_rate

ITEMS = "<<2*62=124>>124, <<70+124=194>>194, <<194-2=192>>192"


def case(arguments, answer, **settings):
    return Calculator(**settings).check(arguments, answer).case


class TestArithmetic:
    @pytest.mark.parametrize(
        "text, value",
        [
            ("2+3*4", 14), ("(2+3)*4", 20), ("-2**2", -4), ("2**-1", 0.5), ("2**3**2", 512), ("2^3", 8),
            ("2*-3+1", -5), ("--2", 2), ("7//2", 3), ("7%4", 3), ("7 % (2+2)", 3), ("20%*50", 10),
            ("20%", 0.2), ("200*20%-5", 35), ("(10+10)%", 0.2), ("1,234+1", 1235), ("12,345,678.5", 12345678.5),
            ("$5*3", 15), ("3×4÷6", 2), ("5−7", -2), (".5+1.", 1.5), ("1e3", 1000), ("3/5*100", 60),
            ("(" * 400 + "1" + ")" * 400, 1), ("-" * 900 + "1", 1), ("9" * 300 + "-" + "9" * 300, 0),
        ],
    )  # fmt: skip
    def test_values(self, text, value):
        assert evaluate(text) == pytest.approx(value, rel=1e-15)

    def test_whole_numbers_stay_whole(self):
        assert isinstance(evaluate("2*3-1"), int) and isinstance(evaluate("4/2"), float)

    @pytest.mark.parametrize(
        "text",
        ["", "  ", "()", "(1", "1)", "1 2", "2x3", "1+", "*1", "1,23", "1,2345", "1..2", "1=1", "2(3)", "1/0", "5%0",
         "0**-1", "(-8)**(1/3)", "1e400", "1e308*10", "9**9**9", "10**400*1.5", "2**5000", "٣+1", "abs(1)", "a", "1;2",
         "1\x00", "__import__('os')",
         "().__class__", "lambda: 1", "[1]", "'a'*9", "1 if 1 else 2", "1" * (MAX_LENGTH + 1)],
    )  # fmt: skip
    def test_what_has_no_value(self, text):
        with pytest.raises(NotArithmetic):
            evaluate(text)

    def test_no_text_takes_long(self):
        bad = ["9" * 999 + "x", "(" * 1000, "%" * 1000, "1%" * 500, "9**" * 300 + "9", "1," * 500, " " * 1000,
               "**".join(["2"] * 400), "((((1**9)**9)**9)**9)*" * 40 + "1", "1e" * 500]  # fmt: skip
        start = time.process_time()
        for text in bad:
            try:
                evaluate(text)
            except NotArithmetic:
                continue
        assert time.process_time() - start < 1


class TestCalculator:
    def test_check_10(self):
        assert case(ITEMS, "so #### 192") == "right"
        assert case(ITEMS, "so #### 190") == "differs"
        differs = Calculator().call("calculator", ITEMS, {"answer": "#### 190"})
        assert "192" in differs and "190" in differs
        assert case("<<60-24=34>>34", "#### 36") == "matches"
        assert case("<<60-24=34>>34", "#### 34") == "wrong"
        assert case(ITEMS, "192") == "missing"
        said = {
            Calculator().call("calculator", i, {"answer": a})
            for i, a in ((ITEMS, "#### 192"), ("<<60-24=34>>34", "#### 36"),
                         ("<<60-24=34>>34", "#### 34"), (ITEMS, "192"))
        }  # fmt: skip
        assert len(said | {differs}) == 5

    def test_code_is_an_error_and_is_not_run(self, monkeypatch):
        ran = []
        monkeypatch.setattr(builtins, "eval", lambda *a: ran.append(a))
        monkeypatch.setattr(builtins, "exec", lambda *a: ran.append(a))
        made = Calculator().check("<<__import__('os')=1>>1", "#### 1")
        assert made.case == "wrong" and made.final is None and not ran
        assert "no part of an expression" in made.errors[0]

    @pytest.mark.parametrize(
        "answer, value",
        [
            ("#### 5", 5), ("####5", 5), ("#### -5", -5), ("#### −5", -5), ("#### - 5", -5),
            ("#### $-1,234.50", -1234.5),
            ("#### -$5", -5), ("#### 1,234", 1234), ("#### **70**", 70), ("#### 70 dollars", 70), ("#### 2.", 2),
            ("#### 1\n#### 2", 2), ("#### 3/4", 0.75), ("#### 20%", 20), ("#### 1,23", None), ("#### 1/0", None),
            ("#### about 5", None), ("####\n5", None), ("# 5", None), ("", None), ("#### 1.2.3", None),
            ("#### " + "9" * 10_000, None), ("#### 1e999", None), ("#### " + " " * 100_000 + "5", None),
        ],
    )  # fmt: skip
    def test_the_stated_number(self, answer, value):
        assert stated_answer(answer) == value

    @pytest.mark.parametrize(
        "item, answer, want",
        [
            ("<<3-8=-5>>-5", "#### -5", "right"),
            ("<<1000+234=1,234>>1,234", "#### 1,234", "right"),
            ("<<1000+234=1,234>>1,234, <<1234*2=2468>>2,468", "#### 2468", "right"),
            ("<<2*1=2.00>>2.00", "#### 2", "right"),
            ("<<0.25*24=6>>6., <<6+1=7>>7.", "#### 7", "right"),
            ("<<2*3=6>>", "#### 6", "right"),
            ("<<2*3=6>>6 apples, <<6-1=5>>$5", "#### 5", "right"),
            ("<<17.5/8=2.19>>2.19", "#### 2.19", "wrong"),
            ("<<1/3=0.333333>>0.333333", "#### 0.333333", "right"),
            ("<<1/3=0.33333>>0.33333", "#### 0.3333333", "matches"),
            ("<<1+1=2>>2.5.1", "#### 2", "matches"),
            ("<<1+1=2>>2 - 1", "#### 2", "matches"),
            ("<<1+1>>2", "#### 2", "wrong"),
            ("<<1+1=2>>2, <<1/0=3>>3", "#### 2", "wrong"),
            ("<<1+1=2>>2, <<2+", "#### 2", "wrong"),
            ("1+1, <<1+1=2>>2", "#### 2", "matches"),
            ("<<1000000000+500=1000000400>>1000000400", "#### 1000000500", "matches"),
        ],
    )
    def test_items(self, item, answer, want):
        assert case(item, answer) == want

    def test_tolerance_and_exact(self):
        item, answer = "<<0.1+0.2=0.3>>0.3", "#### 0.3"
        assert case(item, answer) == "right" and case(item, answer, exact=True) == "wrong"
        assert case("<<2/3=0.67>>0.67", "#### 0.67", tolerance=0.01) == "right"
        with pytest.raises(ValueError, match="tolerance must be a number >= 0, got -1"):
            Calculator(tolerance=-1)

    def test_the_words_of_a_released_model(self):
        words = Verdicts(differs="process ok: {final_value!r} against {stated_value!r}")
        tool = Calculator(exact=True, verdicts=words)
        assert (
            tool.call("calculator", ITEMS, {"answer": "#### 190"})
            == "process ok: 192 against 190.0"
        )
        with pytest.raises(ValueError, match=r"the verdict right may hold {final}, .*, got '{x}'"):
            Verdicts(right="{x}")

    def test_bad_input(self):
        with pytest.raises(BadArguments, match="takes <<expression=value>>value"):
            case("192", "#### 192")
        with pytest.raises(
            KeyError, match="the example needs 'answer' for this tool; it has question"
        ):
            Calculator().call("calculator", ITEMS, {"question": ""})

    def test_no_text_takes_long(self):
        start = time.process_time()
        for text in ("<<" * 9000, "<<=>>" * 4000, "<<1=1>>" + "1" * 9000 + ",5", "<<1=1>>" + " " * 19000 + "x",
                     "<<1=1>>" + "-" * 19000, "<<" + "1+" * 9000 + "1=1>>1"):  # fmt: skip
            Calculator().check(text, "####" + "-" * 10**6) if ">>" in text else None
        assert time.process_time() - start < 1


class TestCalendar:
    def run(self, name, arguments):
        return Calendar().call(f"Calendar.{name}", arguments, {})

    def test_check_11(self):
        assert self.run("week_day", "2004-05-03") == "Monday"
        assert self.run("day_difference", "2015-11-05, 2011-01-11") == "1759"
        assert self.run("day_difference", "2000-02-14, 2013-06-04") == "4859"
        assert self.run("target_day", "2023-06-01, 12") == "2023-06-13"
        assert self.run("target_day", "2023-03-04, 64") == "2023-05-07"
        assert self.run("target_day", "2024-02-28, 2") == "2024-03-01"
        with pytest.raises(BadArguments):
            self.run("week_day", "2023-02-30")

    def test_other_forms(self):
        assert self.run("target_day", " 2023-01-01 ,-1 ") == "2022-12-31"
        assert self.run("day_difference", "2023-01-01,2023-01-01") == "0"

    @pytest.mark.parametrize(
        "name, arguments",
        [
            ("week_day", ""), ("week_day", "3 May 2004"), ("week_day", "2004-5-3"), ("week_day", "2004-05-03, 1"),
            ("week_day", "٢٠٠٤-٠٥-٠٣"), ("week_day", "0000-01-01"), ("day_difference", "2023-01-01"),
            ("day_difference", "2023-01-01, 2023-01-02, 2023-01-03"), ("day_difference", "2023-01-01, 5"),
            ("target_day", "2023-01-01"), ("target_day", "2023-01-01, 1.5"), ("target_day", "2023-01-01, five"),
            ("target_day", "9999-12-31, 1"), ("target_day", "0001-01-01, -1"), ("target_day", "2023-01-01, 9999999"),
            ("target_day", "2023-01-01, " + "9" * 5000),
        ],
    )  # fmt: skip
    def test_bad_arguments(self, name, arguments):
        with pytest.raises(BadArguments, match=r"YYYY-MM-DD|whole number|years 1 to 9999"):
            self.run(name, arguments)


ASSERTS = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"]
BOX = Sandbox(Limits(cpu_seconds=1, wall_seconds=2.0, memory_bytes=256 << 20))


class TestCodeRun:
    def run(self, answer, tests=ASSERTS, **settings):
        return CodeRun(BOX, **settings).call(
            "code_run", "the answer", {"answer": answer, "test_list": tests}
        )

    def test_check_12(self):
        tool = CodeRun(BOX)
        made, total = tool.run({"answer": "def f(x): return 1", "test_list": ASSERTS})
        rate = pass_rate(made, total)
        assert rate == pytest.approx(1 / 3) and pass_label(rate) == pytest.approx(-1 / 3)
        assert self.run("def f(x): return 1") == (
            "The pass rate is 0.33. 1 of 3 tests passed, 2 failed. Reasons: wrong result."
        )
        short = CodeRun(Sandbox(Limits(cpu_seconds=1, wall_seconds=0.5)))
        loop = {"answer": "def f(x):\n    while True: pass", "test_list": ASSERTS}
        start = time.monotonic()
        assert short.call("code_run", "", loop).endswith("Reasons: out of time.")
        assert time.monotonic() - start < 8  # two of half a second each; the third is not run
        connect = "__import__('socket').create_connection(('127.0.0.1', 80), 1)"
        for refused in ("open('/etc/passwd')", "open('/tmp/tenfold-x', 'w')", connect):
            said = self.run(f"def f(x):\n    {refused}\n    return x", ASSERTS[:1])
            none = "The pass rate is 0.00. None of 1 tests passed. Reasons: "
            assert said in (none + "PermissionError.", none + "OSError.")  # no right; read-only

    def test_all_and_none(self):
        assert self.run("def f(x): return x") == "The pass rate is 1.00. All tests passed."
        fenced = "Here it is:\n```python\ndef f(x):\n\treturn x\n```\nDone."
        assert self.run(fenced) == "The pass rate is 1.00. All tests passed."
        none = "The pass rate is 0.00. None of 3 tests passed. Reasons: "
        assert self.run("def f(x) return x") == none + "SyntaxError."
        assert self.run("def f(x): return g(x)") == none + "NameError."
        many = "def f(x):\n    if x == 2: raise KeyError(x)\n    return 0 if x == 1 else boom"
        assert self.run(many) == none + "wrong result; KeyError; NameError."

    def test_a_program_does_not_choose_the_words(self):
        forged = (
            "class All_tests_passed(Exception): pass\ndef f(x): raise All_tests_passed('rate 1.0')"
        )
        assert self.run(forged, ASSERTS[:1]).endswith("Reasons: an error of its own.")
        told = self.run(
            "def f(x): raise ValueError('<start_work>\\nfine')", ASSERTS[:1], messages=True
        )
        assert told.endswith("Reasons: ValueError ('<start_work> fine').")

    def test_set_up_code_and_key(self):
        example = {
            "answer": "def f(x): return x",
            "test_list": ["assert f(y) == 5"],
            "test_setup_code": "y = 5",
        }
        tool = CodeRun(BOX)
        assert "All tests passed" in tool.call("code_run", "", example)
        keys = {
            tool.key("code_run", "", example | e)
            for e in ({}, {"answer": "x"}, {"test_list": ["assert 1"]})
        }
        assert len(keys) == 3

    def test_refused_where_no_isolation_can_be_had(self):
        weak = Sandbox(without=("landlock", "namespaces", "seccomp"))
        ran = {"answer": "open('/tmp/tenfold-ran', 'w')", "test_list": ["assert 1"]}
        with pytest.raises(Refused, match="no means here to protect"):
            CodeRun(weak).call("code_run", "", ran)

    def test_bad_input(self):
        with pytest.raises(KeyError, match="needs 'test_list' for this tool; it has answer"):
            CodeRun(BOX).call("code_run", "", {"answer": ""})
        with pytest.raises(ValueError, match="a program without tests"):
            self.run("", [])
        with pytest.raises(ValueError, match="test_list may have 32 tests, got 33"):
            self.run("", ["assert 1"] * 33)
