# SPDX-License-Identifier: Apache-2.0
"""Indentation as tokens and back: the spec's strings, texts with every kind of white space, and real files."""

import random
import warnings

import pytest
from ernie_code_data import files, t5_tokenizer, tokenizer

from tenfold.ernie_code.formatting import (
    SPACE,
    UnformattedCodeWarning,
    decode_code,
    decode_text,
    encode_code,
    encode_text,
    encode_texts,
    format_code,
    unformat_code,
    warn_unformatted,
    whitespace_ids,
)
from tenfold.ernie_code.tokenizer import extend_tokenizer

SPEC = "def f(x):\n    if x:\n        return  1\n\treturn 2"
TEXTS = [
    SPEC,
    "package main\n\nfunc main() {\n\tif x {\n\t\ty()\n\t}\n}\n",
    "class A:\n\n    x = 1\n\n\n    y = 2\n    \n",
    "a = 1   \nb = 2\t\n  c  \n",
    "if x:\r\n    y()\r\n\r\n    z()\r\n",
    "    first line indented\n  second",
    "no final newline",
    "",
    "\n",
    "\n\n   ",
    "old\r    mac\r",
    "x = '<|space|>'\n   <|space|> </s> <pad> <unk> <extra_id_0> <extra_id_99>\n<|space|><|space|>x",
    "s = '▁'  # ▁▁ ` `` '' \"\" 12,3\n",
    "# Größe 漢字 हिन्दी العربية 👩‍💻\u00a0\u3000\u200b\x00\x0b\x0c\x1c\u2028\n  é",
]


def test_the_specs_example():
    made = format_code(SPEC)
    assert made == f"def f(x):\n{SPACE * 4}if x:\n{SPACE * 8}return  1\n\treturn 2"
    assert unformat_code(made) == SPEC
    assert format_code("    a\n b   c \n\n   \n") == f"    a\n{SPACE}b   c \n\n{SPACE * 3}\n"


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_round_trip_of_texts(model):
    t = tokenizer(model)
    for text in TEXTS:
        assert decode_code(t, encode_code(t, text)) == text
        assert decode_text(t, encode_text(t, text), mode="exact") == text
        assert decode_text(t, encode_text(t, text)) == text.strip()


def test_round_trip_of_random_texts():
    t, draw = tokenizer(), random.Random(0)
    atoms = [" ", "  ", "    ", "\n", "\t", "\r\n", "\r", "<|space|>", "<|spa", "ce|>", "</s>", "<extra_id_7>",
             "x", "é", "'", "▁"]  # fmt: skip
    made = ["".join(draw.choices(atoms, k=draw.randrange(30))) for _ in range(400)]
    for code in (True, False):
        for text, ids in zip(made, encode_texts(t, made, code=code)):
            assert decode_code(t, ids) == text
    special = set(t.all_special_ids)
    assert not any(special & set(ids) for ids in encode_texts(t, made, code=True))


def test_round_trip_of_real_files():
    t, texts = tokenizer(), files(4)
    assert len(texts) > 35
    spaces = set(whitespace_ids(t).values())
    for text, ids in zip(texts, encode_texts(t, texts, code=True)):
        assert decode_code(t, ids) == text
        assert spaces & set(ids)


def test_indentation_takes_the_longest_tokens():
    t = tokenizer()
    ids = whitespace_ids(t)
    made = encode_code(t, "a\n" + " " * 11 + "b")
    assert made[1:-1] == [ids["\n"], *[ids[SPACE * 4]] * 2, ids[SPACE * 2], ids[SPACE]]
    # The same without our functions: the tokenizer of a checkpoint, called as its card says.
    assert t(format_code(SPEC))["input_ids"] == [*encode_code(t, SPEC), 1]


def test_published_procedure():
    for t in (tokenizer(), t5_tokenizer()):
        extend_tokenizer(t)
        ids = t(format_code(SPEC))["input_ids"]
        want = SPEC if t is tokenizer() else SPEC.replace("return  1", "return 1")
        assert decode_code(t, [0, *ids, 0, 0, -100], mode="published") == want
        assert decode_code(t, [0, *ids, 0, 0, -100]) == want
        # It strips, and drops what follows a token; the exact mode does neither.
        assert decode_code(t, t("  a\n")["input_ids"], mode="published") == "a"
    t = tokenizer()
    assert decode_code(t, encode_code(t, "x\t y\n"), mode="published") == "x\ty"
    assert decode_code(t, encode_code(t, "x\t y\n")) == "x\t y\n"


def test_text_decoding_skips_special_tokens():
    t = tokenizer()
    ids = encode_text(t, "a b")
    first = t.convert_tokens_to_ids("<extra_id_0>")
    assert decode_text(t, [0, *ids, first, 1, 0]) == "a b"
    assert "<extra_id_0>" in decode_code(t, [*ids, first])


def test_errors_and_warnings():
    with pytest.warns(UnformattedCodeWarning, match=r"body.*format_code"):
        assert warn_unformatted("if x:\n    y", "body")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in (format_code(SPEC), "a\n\tb\n", "    a\nb", "a\n    \nb"):
            assert not warn_unformatted(text)
    with pytest.raises(ValueError, match=r"whitespace tokens.*extend_tokenizer"):
        decode_code(t5_tokenizer(), [5])
    with pytest.raises(ValueError, match="mode must be one of exact, published, got 'x'"):
        decode_code(tokenizer(), [5], mode="x")
