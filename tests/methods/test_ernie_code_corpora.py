# SPDX-License-Identifier: Apache-2.0
"""Packaged corpora: real functions and messages, nothing of the tests in the training data; readers of users' files."""

import ast
import csv
import gzip
import io
import json
import textwrap

import pytest

from tenfold.data import translations
from tenfold.data.code import SourceFile, functions, held_out, source_files
from tenfold.data.duplicates import jaccard, near_duplicates, shingles
from tenfold.data.records import read_parallel, read_records
from tenfold.data.translations import message_sites
from tenfold.ernie_code import corpora
from tenfold.ernie_code.languages import NAMES, is_code, name_of, prompt
from tenfold.ernie_code.pairs import Pair, read_bugs2fix, read_pairs

PACKAGES = ("stdlib/json", "stdlib/email", "stdlib/asyncio", "stdlib/http", "stdlib/logging")
SOURCE = '''
def plain(x):
    """Doubles a number.

    More about it.
    """

    return 2 * x

class A:
    @property
    async def method(self,
                     y=1):
        "One line."
# a comment at the margin
        return y

    def text(self):
        """Its string would change."""
        return """a
        b"""

    def empty(self):
        """Nothing but this."""

    def bare(self):
        return 1

def one(): "doc"; return 1
'''


def test_functions_of_a_file():
    found = list(functions(SourceFile("m.py", "python", SOURCE)))
    assert [f.name for f in found] == ["plain", "A.method"]
    assert found[0].code == "def plain(x):\n    return 2 * x\n"
    assert found[0].docstring == "Doubles a number.\n\nMore about it."
    assert found[0].summary == "Doubles a number." and found[0].file == "m.py"
    assert found[1].code.startswith("async def method(self,\n                 y=1):\n# a comment")
    assert found[1].code.endswith("\n    return y\n")
    assert list(functions(SourceFile("bad.py", "python", "def f(:"))) == []


def test_functions_of_the_standard_library_are_the_same_programs():
    checked = 0
    for file in source_files(packages=PACKAGES[:3]):
        tree = ast.parse(file.text)
        dumps = {
            ast.dump(ast.Module(n.body[1:], []))
            for n in ast.walk(tree)
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for function in functions(file):
            (made,) = ast.parse(function.code).body
            assert ast.dump(ast.Module(made.body, [])) in dumps
            checked += 1
    assert checked > 200


def test_source_files():
    names = [f.name for f in source_files(packages=["stdlib/json"])]
    assert names == sorted(names) and "stdlib/json/decoder.py" in names
    script = source_files("javascript")
    assert len(script) >= 10 and not any("vendor" in f.name or ".min." in f.name for f in script)
    assert any("function" in f.text for f in script)
    assert source_files(packages=["no_such_package"]) == []
    with pytest.raises(ValueError, match="language must be one of python, javascript"):
        source_files("cobol")


def test_near_duplicates():
    base = "def f(a, b):\n    total = a + b\n    for i in range(10):\n        total += i\n    return total\n"
    other = "class Reader:\n    def read(self, path):\n        with open(path) as f:\n            return f.read()\n"
    near = base.replace("return total", "return  total  # sum")
    assert near_duplicates([base, other, near, other + " "]) == [None, None, 0, 1]
    assert near_duplicates([base, near], threshold=1.0) == [None, None]
    assert jaccard(shingles(base), shingles(base.replace("\n", "\n\n"))) == 1.0
    assert near_duplicates(["", "", "a"]) == [None, 0, None]
    with pytest.raises(ValueError, match="threshold must be in"):
        near_duplicates([], threshold=0)


def test_code_pairs_share_nothing_across_the_split():
    train, held = corpora.code_pairs(packages=PACKAGES, share=0.2)
    assert len(train) > 200 and len(held) > 40
    files = [{p.origin.split(":")[0] for p in part} for part in (train, held)]
    assert not files[0] & files[1]
    assert all(held_out(f, 0.2) for f in files[1]) and not any(held_out(f, 0.2) for f in files[0])
    sets = [shingles(p.target) for p in train]
    for pair in held:
        own = shingles(pair.target)
        assert max(jaccard(own, s) for s in sets) < 0.8
        assert ast.parse(pair.target) and len(pair.source.split()) >= 3
        assert ast.get_docstring(ast.parse(pair.target).body[0]) is None
    texts, held_texts = corpora.code_text(packages=PACKAGES, share=0.2)
    for text in held_texts:
        assert text not in texts
    assert {p.name for p in train + held} == {"English-Python"}
    again = corpora.code_pairs(packages=PACKAGES[::-1], share=0.2, limit=5)
    assert len(again[0]) == len(again[1]) == 5


def test_messages_are_aligned_and_split_by_their_english():
    assert len(corpora.DEFAULT_LANGUAGES) >= 20 and set(corpora.DEFAULT_LANGUAGES) <= set(NAMES)
    assert set(NAMES) - {"en"} <= set(translations.languages())
    languages = ("de", "fr", "ru", "ja", "el")
    train, held = corpora.split_messages(languages)
    assert len(train) > 400 and 30 < len(held) < len(train) / 4
    english = [{m.source for m in part} for part in (train, held)]
    assert not english[0] & english[1]
    for code in languages:
        seen = {m.targets.get(code) for m in train} - {None}
        assert not seen & {m.targets.get(code) for m in held}
    known = {m.source: m.targets for m in train + held}
    assert known["This field cannot be null."]["de"] == "Dieses Feld darf nicht null sein."
    cross = corpora.message_pairs(held, "fr", "ru")
    assert len(cross) > 20 and {p.name for p in cross} == {"French-Russian"}
    for pair in cross:
        assert known[pair.origin]["fr"].strip() == pair.source
        assert known[pair.origin]["ru"].strip() == pair.target


def test_statements_that_say_a_message():
    sites = dict(message_sites())
    assert len(sites) > 150
    for message, code in sites.items():
        # A statement alone is a program; `return` needs a function around it.
        tree = ast.parse("def f():\n" + textwrap.indent(code, " "))
        strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        assert len(code) <= 300 and strings.count(message) == 1
    train, held = corpora.split_messages(("de", "ja"))
    pairs = corpora.site_pairs(held, "de")
    trained = {p.target for p in corpora.site_pairs(train, "en")}
    assert len(pairs) >= 5 and {p.name for p in pairs} == {"German-Python"}
    assert not trained & {p.target for p in pairs}


def test_packaged():
    made = corpora.packaged(
        ("de", "fr", "ja"), code=("python", "javascript"), packages=PACKAGES, limit=30,
        zero_shot=[("de", "ja"), ("fr", "python")],
    )  # fmt: skip
    for part in (made.text, made.held_text, made.pairs, made.held_pairs):
        assert all(len(rows) <= 30 for rows in part.values())
    # Functions and statements of sites are both there.
    sites = {p.origin for p in corpora.site_pairs(corpora.split_messages(("de", "fr", "ja"))[0], "en")}  # fmt: skip
    assert len({p.origin for p in made.pairs["English-Python"]} & sites) == 15
    names = {"English", "Python", "JavaScript", "German", "French", "Japanese"}
    assert set(made.text) == set(made.held_text) == names
    assert set(made.pairs) == {"English-Python", "German-English", "French-English", "Japanese-English"}  # fmt: skip
    assert set(made.held_pairs) - set(made.pairs) == {"German-Japanese", "French-Python"}
    for part in (made.text, made.pairs, made.held_pairs):
        assert all(part.values())
    for name, pairs in [*made.pairs.items(), *made.held_pairs.items()]:
        assert {p.name for p in pairs} == {name}
    assert not {p.origin for p in made.pairs["German-English"]} & {
        p.origin for p in made.held_pairs["German-Japanese"]
    }
    for language, documents in made.text.items():
        assert not set(documents) & set(made.held_text[language])


def test_languages():
    assert prompt("de", "Python") == "translate German to Python: \n"
    assert is_code("Python") and is_code("JavaScript") and not is_code("German")
    assert not any(is_code(code) or is_code(name) for code, name in NAMES.items())
    assert name_of("zh_Hans") == "Chinese" and name_of("Klingon") == "Klingon"


def write(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


ROWS = [
    {"code": 'def f():\r\n    return ","\n', "docstring": "Gibt ein Komma zurück.", "repo": "x"},
    {"code": "g", "docstring": "Zwei\nZeilen", "repo": "y"},
]


def test_readers(tmp_path):
    lines = "\n".join(json.dumps(r) for r in ROWS) + "\n\n"
    table = io.StringIO()
    writer = csv.DictWriter(table, ROWS[0])
    writer.writeheader()
    writer.writerows(ROWS)
    files = {
        "a.jsonl": lines, "b.jsonl.gz": lines, "c.json": json.dumps(ROWS), "d.json": lines, "e.csv": table.getvalue()
    }  # fmt: skip
    for name, text in files.items():
        path = write(tmp_path / name, text)
        assert list(read_records(path)) == ROWS, name
        pairs = list(read_pairs(path, "German", "Python", layout="codesearchnet"))
        assert [(p.source, p.target) for p in pairs] == [(r["docstring"], r["code"]) for r in ROWS]
        assert pairs[0].turned() == Pair(pairs[0].target, pairs[0].source, "Python", "German", f"{path}:0")  # fmt: skip
    tabs = write(tmp_path / "f.tsv", "source\ttarget\na b\tc\n")
    assert list(read_pairs(tabs, "A", "B")) == [Pair("a b", "c", "A", "B", f"{tabs}:0")]


def test_layouts(tmp_path):
    record = {"code_tokens": ["a", "="], "docstring_tokens": ["Set", "a"]}
    tokens = write(tmp_path / "a.jsonl", json.dumps(record))
    (pair,) = read_pairs(tokens, "English", "Python", layout="codesearchnet")
    assert (pair.source, pair.target) == ("Set a", "a =")
    rows = [{"intent": "i", "rewritten_intent": r, "snippet": "s"} for r in ("r", None)]
    conala = write(tmp_path / "b.json", json.dumps(rows))
    named = list(read_pairs(conala, "Spanish", "Python", layout="conala"))
    assert [(p.source, p.target) for p in named] == [("r", "s"), ("i", "s")]
    named = list(read_pairs(conala, "X", "Y", source_field="snippet", target_field="intent"))
    assert [(p.source, p.target) for p in named] == [("s", "i")] * 2
    buggy, fixed = write(tmp_path / "b.buggy", "a ;\nb ;\n"), write(tmp_path / "b.fixed", "a\nb\n")
    made = list(read_bugs2fix(buggy, fixed))
    assert made[1] == Pair("b ;", "b", "Java", "Java", f"{buggy}:1")


def test_bad_files(tmp_path):
    def said(name, text, match, **options):
        path = write(tmp_path / name, text)
        with pytest.raises(ValueError, match=match):
            list(read_pairs(path, "A", "B", **options))

    said("a.jsonl", '{"source": "a", "target": "b"}\n{"source"\n', r"a\.jsonl, line 2")
    said("b.jsonl", "[1]\n", r"line 1: list, not an object")
    said("c.json", "[1]", r"element 0 is int, not an object")
    said("d.json", "[{]", r"d\.json, line 1")
    said("e.csv", "source,target\na,b,c\n", r"e\.csv, line 2: 2 fields")
    said("f.csv", "source,target\na\n", r"f\.csv, line 2")
    said("g.txt", "", r"records are read from files \.jsonl.*got '\.txt'")
    said("h.jsonl", '{"x": 1}\n', r"record 0 has no field source; it has x")
    said("h.jsonl", '{"x": 1}\n', r"layout must be one of codesearchnet", layout="bugs")
    one, two = write(tmp_path / "one", "a\nb\n"), write(tmp_path / "two", "a\n")
    with pytest.raises(ValueError, match="only one of them has a line 2"):
        list(read_parallel(one, two))
