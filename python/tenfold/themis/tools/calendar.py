# SPDX-License-Identifier: Apache-2.0
"""``Calendar.week_day``, ``Calendar.target_day``, ``Calendar.day_difference``: dates of the Gregorian calendar."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Any

from tenfold.themis.tools.base import BadArguments, Tool

# Not `calendar.day_name`, which speaks the language of the machine.
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def read_date(text: str) -> datetime.date:
    """``YYYY-MM-DD``. BadArguments: another form, or no day of the calendar."""
    found = re.fullmatch(r"\s*([0-9]{4})-([0-9]{2})-([0-9]{2})\s*", text)
    try:
        if found is not None:
            return datetime.date(*map(int, found.groups()))
    except ValueError:
        pass
    raise BadArguments(f"a date is YYYY-MM-DD and a day that exists, got {text.strip()[:40]!r}")


def _two(text: str, what: str) -> tuple[str, str]:
    parts = text.split(",")
    if len(parts) != 2:
        raise BadArguments(f"this tool takes {what}, got {text[:60]!r}")
    return parts[0], parts[1]


class Calendar(Tool):
    """Weekday of a date; the date so many days later (or, negative, earlier); days between two dates."""

    names = ("Calendar.week_day", "Calendar.target_day", "Calendar.day_difference")

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """A weekday's English name, ``YYYY-MM-DD``, or a number of days."""
        if name == self.names[0]:
            return _DAYS[read_date(arguments).weekday()]
        if name == self.names[1]:
            day, offset = _two(arguments, "YYYY-MM-DD, days")
            start = read_date(day)
            if not re.fullmatch(r"\s*[-+]?[0-9]{1,7}\s*", offset):
                raise BadArguments(f"the days must be a whole number, got {offset.strip()[:40]!r}")
            try:
                return (start + datetime.timedelta(days=int(offset))).isoformat()
            except OverflowError:
                raise BadArguments("the day is outside the years 1 to 9999") from None
        first, second = _two(arguments, "YYYY-MM-DD, YYYY-MM-DD")
        return str(abs((read_date(first) - read_date(second)).days))
