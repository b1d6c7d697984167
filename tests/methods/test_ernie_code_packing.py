# SPDX-License-Identifier: Apache-2.0
"""Documents cut into rows of equal length, in memory and in files."""

import warnings

import numpy as np
import pytest
from ernie_code_data import files, tokenizer

from tenfold.ernie_code.formatting import UnformattedCodeWarning, encode_code
from tenfold.ernie_code.packing import PackedRows, pack, pack_texts


def test_packing():
    documents = [[1, 2, 3], [], [4, 5, 6, 7, 8, 9, 10], [11]]
    assert [r.tolist() for r in pack(documents, 4)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert len(list(pack(documents, 4, keep_last=False))) == 2
    assert next(pack(documents, 8, separator=0)).tolist() == [1, 2, 3, 0, 0, 4, 5, 6]
    with pytest.raises(ValueError, match="length must be >= 1"):
        next(pack(documents, 0))


def test_packed_rows(tmp_path):
    rows = PackedRows(pack([list(range(10))], 4), 4)
    loaded = []
    for name in ("rows.npy", "rows"):
        rows.save(tmp_path / name)
        loaded.append(PackedRows.load(tmp_path / name))
    for made in (rows, *loaded):
        parts = [r["input_ids"].tolist() for r in made]
        assert len(made) == 3 and parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert made[-1]["input_ids"].tolist() == [8, 9] and len(made[1:]) == 2
    with pytest.raises(IndexError, match="row 3 of 3"):
        rows[3]
    with pytest.raises(ValueError, match=r"rows must have 4 tokens.*got 3"):
        PackedRows([np.zeros(3), np.zeros(4)], 4)
    assert len(PackedRows([], 4)) == 0


def test_texts():
    texts = files(8)[:3]
    rows = pack_texts(tokenizer(), texts, 100, code=True, separator=1)
    flat = [i for row in rows for i in row["input_ids"].tolist()]
    assert flat == [i for text in texts for i in [*encode_code(tokenizer(), text), 1]]
    assert {len(row["input_ids"]) for row in rows[:-1]} == {100}
    # More texts than are tokenised at a time.
    many = pack_texts(tokenizer(), (str(i) for i in range(600)), 64)
    assert tokenizer().decode(many.tokens) == "".join(map(str, range(600)))


def test_code_as_text_warns():
    code = "def f(x):\n    return '\\d'\n"
    for texts in (["prose", code, code], (x for x in [code])):
        with pytest.warns(UnformattedCodeWarning, match=r"indented Python.*code=True") as caught:
            pack_texts(tokenizer(), texts, 64)
        assert len(caught) == 1
    prose = ["A title\n  indented text, as of a letter", "x = 1\n", "def f():\n\treturn 1\n", "a\0\n  b"]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack_texts(tokenizer(), prose, 64)
        pack_texts(tokenizer(), [code], 64, code=True)
