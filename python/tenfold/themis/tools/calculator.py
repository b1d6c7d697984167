# SPDX-License-Identifier: Apache-2.0
"""``calculator``: is the arithmetic in an answer right, and does its final number follow from it?

The input holds the answer's calculations, ``<<expression=value>>value``, separated by commas. Each is worked out
by :mod:`tenfold.themis.tools.arithmetic`; the value of the last one is held against the number that the answer
states after ``####``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tenfold.themis.tools.arithmetic import NUMBER, NotArithmetic, evaluate, read_number
from tenfold.themis.tools.base import BadArguments, Tool, field_of
from tenfold.training.checks import not_negative

_ITEM = re.compile(r"<<([^<>]*)>>")
# A sign and a currency in any order, and no digits after it that would belong to it.
_VALUE = rf"(?P<sign>[-+−$€£\s]*)(?P<number>{NUMBER})(?![,.]?[0-9])"
_STATED = re.compile(rf"[*_ ]*{_VALUE}(?:\s*/\s*(?P<below>{NUMBER}))?")
_MAX_VALUE = 200  # characters in which a number must stand
_AFTER = re.compile(rf"{_VALUE}(?!\s*[-+*/^=])")


@dataclass(frozen=True)
class Verdicts:
    """What is said of the five cases. A released model wants the exact words of its training data.

    Templates of ``str.format`` with ``{final}`` and ``{stated}``, and ``{final_value!r}`` and ``{stated_value!r}``
    for the numbers themselves (``stated_value`` is a float).
    """

    right: str = "The calculation is right, and the final answer follows from it."
    differs: str = "The calculation is right, but it gives {final} and the answer says {stated}."
    matches: str = "The calculation is wrong, but the final answer is what it should give."
    wrong: str = "The calculation is wrong, and so is the final answer."
    missing: str = "The answer states no final number, so there is no valid answer."

    def __post_init__(self) -> None:
        example = {"final": "1", "stated": "2", "final_value": 1, "stated_value": 2.0}
        for field in fields(self):
            text = getattr(self, field.name)
            try:
                text.format(**example)
            except (AttributeError, KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"the verdict {field.name} may hold {', '.join(f'{{{n}}}' for n in example)}, got {text!r}"
                ) from error


@dataclass(frozen=True)
class Checked:
    """``case``: a field of :class:`Verdicts`. final, stated: numbers, if there are any. errors: one per wrong item."""

    case: str
    final: float | None
    stated: float | None
    errors: tuple[str, ...]


def stated_answer(answer: str) -> float | None:
    """The number after the last ``####`` of an answer: negative, grouped by commas, a fraction, with a currency."""
    tail = answer.rpartition("####")
    line = tail[2][: _MAX_VALUE + 1].split("\n", 1)[0]
    found = _STATED.match(line) if tail[1] else None
    if found is None or found.end() > _MAX_VALUE:  # it may have been cut off
        return None
    below = read_number(found["below"]) if found["below"] else 1
    if below == 0:
        return None
    value = _signed(found) / below
    return value if math.isfinite(value) else None


def _signed(found: re.Match[str]) -> float:
    value = read_number(found["number"])
    return -value if found["sign"].count("-") + found["sign"].count("−") == 1 else value


def _shown(value: float) -> str:
    return f"{value:.12g}"


class Calculator(Tool):
    """See the module. Needs ``answer`` of the example.

    Args:
        tolerance: numbers that differ by at most so much are equal; 12 digits always suffice. exact: they must be
            equal as floats, as in the reference code. verdicts: what is said.
    """

    names = ("calculator",)

    def __init__(
        self,
        *,
        tolerance: float = 1e-6,
        exact: bool = False,
        verdicts: Verdicts | None = None,
    ) -> None:
        not_negative("tolerance", tolerance)
        self.tolerance, self.exact, self.verdicts = tolerance, exact, verdicts or Verdicts()

    def _equal(self, a: float, b: float) -> bool:
        if self.exact:
            return float(a) == float(b)
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=self.tolerance)

    def _item(self, inside: str, after: str) -> tuple[float | None, str]:
        """(value of the expression, what is wrong with the item)."""
        expression, equals, written = inside.rpartition("=")
        if not equals:
            return None, f"{inside!r} has no ="
        if "<<" in after or ">>" in after:
            return None, f"{after.strip()[:40]!r} is half a calculation"
        try:
            value = evaluate(expression)
        except NotArithmetic as error:
            return None, f"{expression!r}: {error}"
        # The text after >> counts; where there is none, what stands inside does.
        text = after.strip(" \t\n,;") or written
        found = _AFTER.match(text) if len(text) <= _MAX_VALUE else None
        if found is None:
            return value, f"{text[:40]!r} is no number"
        said = _signed(found)
        return value, "" if self._equal(value, said) else f"{expression} is not {_shown(said)}"

    def check(self, arguments: str, answer: str) -> Checked:
        """Works the items out and compares. BadArguments: there is no item."""
        parts = _ITEM.split(arguments)
        if len(parts) < 3:
            raise BadArguments("calculator takes <<expression=value>>value, separated by commas")
        errors = []
        final: float | None = None
        if parts[0].strip(" \t\n,;"):
            errors.append(f"{parts[0]!r} is no calculation")
        for inside, after in zip(parts[1::2], parts[2::2]):
            final, wrong = self._item(inside, after)
            if wrong:
                errors.append(wrong)
        stated = stated_answer(answer)
        if stated is None:
            return Checked("missing", final, None, tuple(errors))
        same = final is not None and self._equal(final, stated)
        case = ("differs", "right") if not errors else ("wrong", "matches")
        return Checked(case[same], final, stated, tuple(errors))

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """One of five verdicts."""
        made = self.check(arguments, str(field_of(example, "answer")))
        final, stated = made.final, made.stated
        return str(getattr(self.verdicts, made.case)).format(
            final="nothing" if final is None else _shown(final),
            stated="nothing" if stated is None else _shown(stated),
            final_value=final, stated_value=None if stated is None else float(stated),
        )  # fmt: skip

    def key(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """Arguments and the stated number."""
        return json.dumps([arguments, stated_answer(str(field_of(example, "answer")))])
