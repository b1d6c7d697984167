# SPDX-License-Identifier: Apache-2.0
"""Scores against sacrebleu, against formulas written out, and by hand."""

import ast
import math
import random
import sys
import types

import pytest
import sacrebleu

from tenfold.data.code import functions, source_files
from tenfold.ernie_code import codebleu, metrics
from tenfold.ernie_code.codebleu import code_bleu, data_flow, parse, python_tokens, subtrees
from tenfold.ernie_code.metrics import mconala_tokens, smoothed_bleu, summary_tokens, token_bleu


def sentences(count, seed=0, words=6):
    draw = random.Random(seed)
    made = [" ".join(draw.choices("abcdefgh"[:words], k=draw.randrange(1, 14))) for _ in range(2 * count)]  # fmt: skip
    return made[:count], made[count:]


def published(hypothesis, reference):
    """The script's own arithmetic, with its smallest float instead of exceptions."""
    tiny, total = sys.float_info.min, 0.0
    for n in range(1, 5):
        grams = [tuple(hypothesis[i : i + n]) for i in range(max(0, len(hypothesis) - n + 1))]
        wanted = [tuple(reference[i : i + n]) for i in range(max(0, len(reference) - n + 1))]
        correct = sum(min(grams.count(g), wanted.count(g)) for g in set(grams))
        smooth = 1 if n > 1 else 0
        total += math.log(correct + smooth + tiny) - math.log(len(grams) + smooth + tiny)
    return math.exp(total / 4 + min(0, 1 - (len(reference) + 1) / (len(hypothesis) + 1)))


def test_smoothed_bleu():
    assert smoothed_bleu(["the cat"], ["The cat"]) == pytest.approx(100)
    # 4 words of 4 match, 2 of 3 pairs, 1 of 2 triples, 0 of 1: (1 * 3/4 * 2/3 * 1/2)^(1/4), lengths 4 and 5.
    want = 100 * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    assert smoothed_bleu(["a b c e"], ["a b c d e"]) == pytest.approx(want)
    own, wanted = sentences(200)
    expected = [published(summary_tokens(p), summary_tokens(r)) for p, r in zip(own, wanted)]
    assert smoothed_bleu(own, wanted) == pytest.approx(100 * sum(expected) / 200, rel=1e-12)
    assert smoothed_bleu([""], ["a b"]) == pytest.approx(100 * published([], ["a", "b"]))
    assert smoothed_bleu(["x"], ["y"]) == 0
    made = summary_tokens("Don't use foo_bar(x)!  Größe 漢字")
    assert made == [
        "don",
        "'",
        *["t", "use", "foo", "_", "bar", "(", "x", ")", "!", "größe", "漢字"],
    ]


def test_token_bleu_is_sacrebleus():
    for words in (2, 4, 8):
        own, wanted = sentences(40, words, words)
        split = [[t.split() for t in texts] for texts in (own, wanted)]
        for smoothing, theirs, value in (("none", "none", None), ("epsilon", "floor", 0.1)):
            options = {"smooth_method": theirs, "smooth_value": value}
            made = sacrebleu.corpus_bleu(own, [wanted], tokenize="none", force=True, **options)
            assert token_bleu(*split, smoothing) == pytest.approx(made.score, rel=1e-9)
    assert token_bleu([[]], [["a"]]) == 0 and token_bleu([["a"]], [["b"]]) == 0
    with pytest.raises(ValueError, match="smoothing must be one of"):
        token_bleu([["a"]], [["a"]], "add")


def test_sacrebleu_and_rouge():
    own, wanted = ["the cat sat on a mat", "hello there"], ["the cat sat on the mat", "hello"]
    assert metrics.bleu(own, wanted) == sacrebleu.corpus_bleu(own, [wanted]).score
    assert metrics.chrf(own, wanted) == sacrebleu.corpus_chrf(own, [wanted]).score
    # 5 of 6 words in order on both sides; 1 of 2 and 1 of 1.
    assert metrics.rouge_l(own, wanted) == pytest.approx(100 * (5 / 6 + 2 / 3) / 2)
    assert metrics.rouge_l(["Привет, мир"], ["привет мир"]) == pytest.approx(100)
    assert metrics.rouge_l(["配列を返す"], ["配列を返す。"]) == pytest.approx(100)
    assert 0 < metrics.rouge_l(["配列を"], ["配列を返す"]) < 100
    assert metrics.exact_match(["a  b\n", "x"], [" a b", "y"]) == 50


def test_mconala():
    made = mconala_tokens("print(\"aB\", x_1['k'])")
    assert made == ["print", *"(`", "a", "B", *"`,", "x_1", *"[`k`])"]
    assert mconala_tokens("a  =\n b") == ["a", "=", "b"]
    assert metrics.mconala_bleu(["x = 'a'", "y(1)"], ['x = "a"', "y(1)"]) == pytest.approx(100)
    assert metrics.mconala_bleu(["x"], ["y"]) == 0


def test_code_bleu_of_real_functions():
    code = [f.code for file in source_files(packages=["stdlib/json"]) for f in functions(file)]
    made = code_bleu(code, code)
    assert set(made) == {"codebleu", *codebleu.PARTS}
    assert all(v == pytest.approx(100) for v in made.values())
    turned = code_bleu(code, code[::-1])
    assert all(0 <= turned[k] < 70 for k in turned)


def test_code_bleu_parts_by_hand():
    reference = "def f(a, b):\n    c = a + b\n    return c\n"
    renamed = "def g(x, y):\n    z = x + y\n    return z\n"
    made = code_bleu([renamed], [reference])
    assert made["syntax_match"] == made["dataflow_match"] == 100
    assert made["ngram_match"] < 50
    # The keywords count for more: `def` and `return` are right, six names are not.
    assert made["weighted_ngram_match"] > made["ngram_match"]
    assert made["codebleu"] == pytest.approx(sum(made[p] for p in codebleu.PARTS) / 4)
    edges = list(data_flow(ast.parse(reference)))
    # a and b are read, c is made of them, c is read.
    assert edges == [
        ("var_0", "comesFrom", ("var_0",)), ("var_1", "comesFrom", ("var_1",)),
        ("var_2", "computedFrom", ("var_0", "var_1")), ("var_2", "comesFrom", ("var_2",)),
    ]  # fmt: skip
    other = "def f(a, b):\n    c = a + a\n    return c\n"
    made = code_bleu([other], [reference])
    assert made["syntax_match"] == 100 and made["dataflow_match"] == pytest.approx(100 * 2 / 4)
    # Sub is not Add: BinOp and the three nodes around it are others.
    minus = code_bleu([reference.replace("+", "-")], [reference])
    whole = len(subtrees(ast.parse(reference)))
    assert minus["syntax_match"] == pytest.approx(100 * (whole - 4) / whole)


def test_code_bleu_of_broken_code():
    reference = "def f(a, b):\n    c = a + b\n    return c\n"
    # The head does not parse: the assignment and `return` are left, with what is in them.
    made = code_bleu([reference.replace("):", ":")], [reference])
    assert 0 < made["syntax_match"] < 100 and 0 < made["dataflow_match"] < 100
    nothing = code_bleu(["(((("], [reference])
    assert nothing["syntax_match"] == nothing["dataflow_match"] == 0
    for code, want in (
        ("x = (\ny = 1\n", "y = 1"),
        ("    a()\n        b()\n    c()\n", "a()\nif _:\n    b()\nc()"),
        ("if x:\ny()\n", "y()"),
        ("s = '''a\nb\n", "b"),
        ("return x", "return x"),
    ):
        assert ast.unparse(parse(code)) == want
    for code in ("", "def (", "x = '\0'", "(" * 2000, "# only a comment"):
        assert parse(code) is None


def test_data_flow_of_statements():
    def flow(code):
        return list(data_flow(ast.parse(code)))

    v = [f"var_{i}" for i in range(9)]
    assert flow("x = 1\nx += 2\n") == [(v[0], "computedFrom", (v[0],))]
    made = flow("for i in xs:\n    print(i)\n")
    assert made == [(v[1], "computedFrom", (v[0],)), (v[1], "comesFrom", (v[1],))]
    made = flow("ys = [x + 1 for x in xs]")
    assert made == [
        (v[1], "computedFrom", (v[0],)), (v[1], "comesFrom", (v[1],)), (v[2], "computedFrom", (v[1], v[0]))
    ]  # fmt: skip
    assert flow("with open(p) as f:\n    f.read()\n")[-1] == (v[2], "comesFrom", (v[2],))
    assert flow("a.b = c") == [] and flow("d[k] = v") == []
    assert flow("pass") == []


def test_code_without_data_flow_and_other_cases():
    made = code_bleu(["print(1)"], ["print(1)"])
    assert math.isnan(made["dataflow_match"]) and made["codebleu"] == pytest.approx(100)
    made = code_bleu(["x"], ["y = 2"], weights=(1, 0, 0, 0))
    assert made["codebleu"] == pytest.approx(made["ngram_match"])
    assert python_tokens("x **= 'a b' # c") == ["x", "**=", "'a b'", "#", "c"]
    with pytest.raises(ValueError, match="'java' needs the package codebleu"):
        code_bleu(["x"], ["y"], "java", backend="ast")
    with pytest.raises(ValueError, match="weights must be four numbers"):
        code_bleu(["x"], ["y"], weights=(1, 1))
    with pytest.raises(ValueError, match="backend must be one of"):
        code_bleu(["x"], ["y"], backend="z")


def test_the_package_where_it_is_installed(monkeypatch):
    package, asked = types.ModuleType("codebleu"), []

    def calc_codebleu(references, predictions, lang, weights):
        asked.append((references, predictions, lang, weights))
        return {"codebleu": 0.5, **{f"{p}_score": 0.25 for p in codebleu.PARTS}}

    package.calc_codebleu = calc_codebleu
    monkeypatch.setitem(sys.modules, "codebleu", package)
    made = code_bleu(["p"], ["r"], "Java")
    assert asked == [(["r"], ["p"], "java", codebleu.WEIGHTS)]
    assert made["codebleu"] == 50 and made["syntax_match"] == 25
    monkeypatch.setitem(sys.modules, "codebleu", None)
    with pytest.raises(ModuleNotFoundError, match="pip install codebleu"):
        code_bleu(["p"], ["r"], backend="package")


def test_scores_by_task():
    code = ["x = 1\n", "y = f(x)\n"]
    for task, names in metrics.TASKS.items():
        made = metrics.scores(code, code, task)
        assert list(made) == list(names)
        assert made.get("exact_match", 100) == 100 and all(0 < v <= 100.0001 for v in made.values())  # fmt: skip
    assert list(metrics.scores(code, code, ["bleu"])) == ["bleu"]
    with pytest.raises(ValueError, match="names must be one of"):
        metrics.scores(code, code, "x")
    for name in metrics.SCORES:
        for own, wanted in ((["a"], ["a", "b"]), ([], [])):
            with pytest.raises(ValueError, match="as many and not none"):
                metrics.scores(own, wanted, [name])


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ModuleNotFoundError, match=r"sacrebleu.*tenfold\[ernie-code\]"):
        metrics.bleu(["a"], ["a"])
