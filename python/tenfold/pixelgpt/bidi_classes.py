# SPDX-License-Identifier: Apache-2.0
"""Properties of characters for the bidirectional algorithm.

Classes are those of Python's ``unicodedata``; the paired brackets, which it does not have, are listed here.
"""

from __future__ import annotations

import re
import unicodedata

# Letters of the right-to-left blocks, and controls that can turn text around. Without any of them
# every level is zero.
_TURNS = re.compile(
    "[\u0590-\u08ff\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufefe"
    "\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
# Letters and marks of Hebrew and Arabic with neutral characters, without digits and controls: in a paragraph from right
# to left all of it has the paragraph's level.
_RIGHT = re.compile(
    "[ !-/:-@\\[-`{-~\u00ab\u00bb\u2010-\u2027\u0591-\u05f4\u0606-\u061b\u061d-\u065f\u066a\u066d-\u06dc\u06de-\u06ef"
    "\u06fa-\u070d\u0710-\u074a\u074d-\u07b1\u08a0-\u08c7\u08d3-\u08e1\u08e3-\u08ff\ufb1d-\ufb4f\ufb50-\ufbc1"
    "\ufbd3-\ufd8f\ufd92-\ufdc7\ufdf0-\ufdff\ufe70-\ufefc]*"
)
# Opening brackets whose closing one is the next code point, and the others.
_NEXT = (
    0x28, 0x0F3A, 0x0F3C, 0x169B, 0x2045, 0x207D, 0x208D, 0x2308, 0x230A, 0x2329, *range(0x2768, 0x2775, 2),
    0x27C5, *range(0x27E6, 0x27EF, 2), *range(0x2983, 0x298C, 2), *range(0x2991, 0x2998, 2), 0x29D8, 0x29DA,
    0x29FC, *range(0x2E22, 0x2E29, 2), *range(0x2E55, 0x2E5C, 2), *range(0x3008, 0x3011, 2),
    *range(0x3014, 0x301B, 2), *range(0xFE59, 0xFE5E, 2), 0xFF08, 0xFF5F, 0xFF62,
)  # fmt: skip
_OTHER = {0x5B: 0x5D, 0x7B: 0x7D, 0x298D: 0x2990, 0x298F: 0x298E, 0xFF3B: 0xFF3D, 0xFF5B: 0xFF5D}
CLOSING = {chr(o): chr(c) for o, c in ({o: o + 1 for o in _NEXT} | _OTHER).items()}
OPENING = {c: o for o, c in CLOSING.items()}
# Two brackets are canonically equivalent to others.
SAME = {"\u2329": "\u3008", "\u232a": "\u3009"}


def turns(text: str) -> bool:
    """Can any of the text run right to left?"""
    return not text.isascii() and _TURNS.search(text) is not None


def all_right(text: str) -> bool:
    """Has every character the paragraph's level, if that is 1? (False where it is not plain to see.)"""
    return _RIGHT.fullmatch(text) is not None


def bidi_class(char: str) -> str:
    """The character's class; unassigned code points have that of their block."""
    found = unicodedata.bidirectional(char)
    if found:
        return found
    code = ord(char)
    if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF or 0xE0000 <= code <= 0xE0FFF:
        return "BN"
    if 0x20A0 <= code <= 0x20CF:
        return "ET"
    arabic = ((0x0600, 0x07BF), (0x0860, 0x08FF), (0xFB50, 0xFDCF), (0xFDF0, 0xFDFF), (0xFE70, 0xFEFF),
              (0x10D00, 0x10D3F), (0x10EC0, 0x10EFF), (0x10F30, 0x10F6F), (0x1EC70, 0x1ECBF),
              (0x1ED00, 0x1ED4F), (0x1EE00, 0x1EEFF))  # fmt: skip
    if any(a <= code <= b for a, b in arabic):
        return "AL"
    right = (
        (0x0590, 0x05FF),
        (0x07C0, 0x085F),
        (0xFB1D, 0xFB4F),
        (0x10800, 0x10FFF),
        (0x1E800, 0x1EFFF),
    )
    return "R" if any(a <= code <= b for a, b in right) else "L"
