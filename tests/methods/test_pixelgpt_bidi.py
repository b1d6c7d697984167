# SPDX-License-Identifier: Apache-2.0
"""The Unicode Bidirectional Algorithm: levels and order of lines that its rules are about."""

import pytest

from tenfold.pixelgpt.bidi import embedding_levels, paragraph_level, visual_order
from tenfold.pixelgpt.bidi_classes import turns

# Written as in UAX #9: small letters run left to right, capitals are Hebrew. Brackets of right-to-left text are
# shown as they are written: fonts mirror them. All of BidiTest.txt and BidiCharacterTest.txt of Unicode 15 passes too.
HEBREW = {chr(65 + i): chr(0x5D0 + i) for i in range(26)}
CONTROLS = {
    "<": "\u202b",
    ">": "\u202c",
    "{": "\u2067",
    "}": "\u2069",
    "@": "\u202e",
    "~": "\u200f",
    "^": "\u2068",
}


def shown(text, base=None):
    """The line from left to right, controls left out."""
    logical = "".join(HEBREW.get(c, CONTROLS.get(c, c)) for c in text)
    base = paragraph_level(logical) if base is None else base
    levels = embedding_levels(logical, base)
    return "".join(text[i] for i in visual_order(levels) if text[i] not in CONTROLS)


@pytest.mark.parametrize("logical, visual", [
    ("abc", "abc"),
    ("ABC", "CBA"),
    ("car means CAR.", "car means RAC."),
    ("CAR MEANS car.", ".car SNAEM RAC"),
    ("he said <car MEANS CAR>.", "he said RAC SNAEM car."),
    ("A 12 B", "B 12 A"),
    ("A -12,5% B", "B 12,5%- A"),
    ("a 12 B", "a 12 B"),
    ("A1-2B", "B1-2A"),
    ("a (B c) D", "a (B c) D"),
    ("A (b) C", "C )b( A"),
    ("a {B c} d", "a c B d"),
    ("@abc> d", "cba d"),
    ("A^bc}D", "DbcA"),
    ("", ""),
    ("  A", "A  "),
    ("A  ", "  A"),
])  # fmt: skip
def test_lines(logical, visual):
    assert shown(logical) == visual


def test_arabic_numbers_and_marks():
    alef, mark, digit = "\u0627", "\u0651", "\u0663"
    assert embedding_levels(f"{alef}12", 1) == [1, 2, 2]  # European digits after Arabic letters
    assert embedding_levels(f"{alef}{mark} a", 1) == [1, 1, 1, 2]
    assert embedding_levels(f"a{digit}", 0) == [0, 2]
    assert embedding_levels("\u05d01\u0301", 1) == [1, 2, 2]


def test_depth_is_bounded():
    deep = "\u202b" * 300 + "a" + "\u202c" * 300
    levels = embedding_levels(deep, 0)
    assert max(levels) <= 126 and levels[300] % 2 == 0
    assert len(embedding_levels("\u2067" * 500 + "(" * 200 + "\u05d0" + ")" * 200, 0)) == 901


def test_paragraphs():
    assert paragraph_level("12 \u05d0 a") == 1 and paragraph_level("12 a \u05d0") == 0
    assert paragraph_level("\u2067\u05d0\u2069 a") == 0 and paragraph_level("\u2067\u05d0") == 0
    assert paragraph_level("...", default=1) == 1
    assert turns("a\u05d0") and turns("\u202e") and not turns("abc \u03b1\u4e2d\u0e01")
