# SPDX-License-Identifier: Apache-2.0
"""Values of arithmetic expressions that a model wrote: read, never run as code.

Numbers (``1,234.5``, ``.5``, ``1e3``, ``$40``), ``+ - * / // ( )``, ``**`` or ``^`` for powers, ``%`` as percent sign
(``20%``) or, before a number or a bracket, as remainder. Two stacks and no recursion: depth costs nothing,
length and the size of powers are limited, so that no text takes long.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

MAX_LENGTH = 1000
_MAX_BITS = 4096  # of a power of integers

# Groups of three after a comma, or none: "1,23" is no number. Digits are ASCII's. Each text can be read in one
# way only, so that a match takes linear time.
NUMBER = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?"
    r"|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
)
_TOKEN = re.compile(rf"\s*(?:(?P<number>{NUMBER})|(?P<sign>\*\*|//|[-+*/%^()]))")
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "$": "", "€": "", "£": ""})  # fmt: skip
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, "neg": 3, "pos": 3, "**": 4}


class NotArithmetic(ValueError):
    """The text has no value: it is no expression, or divides by zero, or grows out of bounds."""


def _power(a: float, b: float) -> float:
    if isinstance(a, int) and isinstance(b, int) and b >= 0:
        if abs(a) > 1 and b * a.bit_length() > _MAX_BITS:
            raise NotArithmetic("a power grows out of bounds")
        return a**b
    value = float(a) ** float(b)
    if isinstance(value, complex):
        raise NotArithmetic("a root of a negative number")
    return value


_BINARY: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": _power,
}


def read_number(text: str) -> float:
    """One number without a sign, in the form of ``NUMBER``; int where it is whole."""
    plain = text.replace(",", "")
    return int(plain) if plain.isdigit() else float(plain)


def _apply(sign: str, values: list[float]) -> None:
    if sign in ("neg", "pos"):
        values.append(-values.pop() if sign == "neg" else values.pop())
        return
    right, left = values.pop(), values.pop()
    values.append(_BINARY[sign](left, right))


def _reduce(values: list[float], signs: list[str], binds: int) -> None:
    while signs and signs[-1] != "(" and _BINDS[signs[-1]] >= binds:
        _apply(signs.pop(), values)


def _parse(text: str) -> float:
    values: list[float] = []
    signs: list[str] = []
    open_end, at = True, 0  # open_end: an operand must follow
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise NotArithmetic(f"{text[at : at + 20]!r} is no part of an expression")
        at, sign = token.end(), token["sign"]
        if sign == "^":
            sign = "**"
        if sign is None:
            if not open_end:
                raise NotArithmetic("two numbers without an operation between them")
            values.append(read_number(token["number"]))
            open_end = False
        elif open_end:
            if sign == "(":
                signs.append(sign)
            elif sign in "+-":  # binds less than a power after it, more than what stands before it
                signs.append("neg" if sign == "-" else "pos")
            else:
                raise NotArithmetic(f"{sign!r} where a number must be")
        elif sign == ")":
            _reduce(values, signs, 0)
            if not signs:
                raise NotArithmetic("a bracket is closed that was not opened")
            signs.pop()
        elif sign == "%" and not re.match(r"\s*[0-9.(]", text[at:]):
            values.append(values.pop() / 100)
        elif sign == "(":
            raise NotArithmetic("a bracket without an operation before it")
        else:
            # Powers are taken from the right.
            _reduce(values, signs, _BINDS[sign] + (sign == "**"))
            signs.append(sign)
            open_end = True
    if open_end:
        raise NotArithmetic("the expression ends where a number must be")
    _reduce(values, signs, 0)
    if signs:
        raise NotArithmetic("a bracket is not closed")
    return values.pop()


def evaluate(text: str) -> float:
    """The value of an expression: int where all is whole, else float; finite.

    Raises:
        NotArithmetic: it has none, or is longer than ``MAX_LENGTH`` characters. Nothing is ever executed.
    """
    if len(text) > MAX_LENGTH:
        raise NotArithmetic(f"an expression may have {MAX_LENGTH} characters, got {len(text)}")
    try:
        value = _parse(text.translate(_SPELLINGS).rstrip())
        if not math.isfinite(float(value)):
            raise NotArithmetic("the value is not finite")
    except ArithmeticError as error:
        raise NotArithmetic(f"{type(error).__name__}: {error}") from None
    return value
