# SPDX-License-Identifier: Apache-2.0
"""Drafts whose truth is a rule: arithmetic, the calendar, a table of weather."""

from __future__ import annotations

import datetime
import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass

from tenfold.themis.synthetic import Draft, Judged, Recorder, Useless
from tenfold.themis.tools import Weather, invented_table
from tenfold.themis.tools.arithmetic import evaluate

NAMES = ("Ada", "Bo", "Chidi", "Dana", "Emre", "Fay", "Goro", "Hana", "Igor", "Jin", "Kofi", "Lena", "Mira", "Nils",
         "Omar", "Pia", "Quinn", "Rosa", "Sven", "Tara")  # fmt: skip
THINGS = ("apples", "beads", "books", "buttons", "candles", "cards", "coins", "eggs", "marbles", "pens", "plums",
          "shells", "stamps", "stickers")  # fmt: skip
CITIES = ("Accra", "Ankara", "Bergen", "Bogota", "Cairo", "Cusco", "Dakar", "Delhi", "Geneva", "Hanoi", "Havana",
          "Izmir", "Jakarta", "Kyoto", "Lagos", "Lima", "Lisbon", "Lyon", "Malmo", "Manila", "Medan", "Mumbai",
          "Nairobi", "Osaka", "Oslo", "Porto", "Quito", "Riga", "Seoul", "Tirana", "Turin", "Zagreb")  # fmt: skip
FIRST, LAST = datetime.date(2023, 4, 1), datetime.date(2023, 7, 31)  # of the weather
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Story:
    """A word problem: ``lines`` are (what is counted, expression over a to d and earlier results r1, r2, ...)."""

    text: str
    lines: tuple[tuple[str, str], ...]


_STORIES = (
    Story(
        "{who} buys {a} boxes of {thing} with {b} in each box and gives {c} {thing} to {friend}. "
        "How many {thing} does {who} have left?",
        (("The boxes hold", "{a}*{b}"), ("After the gift {who} has", "{r1}-{c}")),
    ),
    Story(
        "{who} has {a} {thing}. {friend} has {b} times as many, and then finds {c} more. "
        "How many {thing} do they have together?",
        (
            ("{friend} first has", "{b}*{a}"),
            ("Then {friend} has", "{r1}+{c}"),
            ("Together they have", "{r2}+{a}"),
        ),
    ),
    Story(
        "A shop sells {a} {thing} on each of {b} days and {c} {thing} on each of {d} days. "
        "How many {thing} does it sell in all?",
        (
            ("In the first days it sells", "{a}*{b}"),
            ("In the others it sells", "{c}*{d}"),
            ("In all it sells", "{r1}+{r2}"),
        ),
    ),
    Story(
        "{who} shares {a} {thing} equally among {b} children and keeps none. {friend} gives each "
        "child {c} more. How many {thing} does each child have?",
        (
            ("From {who} each child gets", "{a}/{b}"),
            ("With those of {friend} each child has", "{r1}+{c}"),
        ),
    ),
    Story(
        "{who} saves {a} dollars a week for {b} weeks and spends {c} dollars on {thing}. {friend} "
        "adds {d} dollars. How much money does {who} have?",
        (
            ("{who} saves", "{a}*{b}"),
            ("After the {thing} there is", "{r1}-{c}"),
            ("With the gift there is", "{r2}+{d}"),
        ),
    ),
    Story(
        "A crate holds {a} rows of {b} {thing}. There are {c} crates, and {d} {thing} are broken. "
        "How many {thing} are whole?",
        (("A crate holds", "{a}*{b}"), ("The crates hold", "{r1}*{c}"), ("Whole are", "{r2}-{d}")),
    ),
    Story(
        "{who} reads {a} pages on Monday, {b} pages more on Tuesday, and on Wednesday as many as on "
        "both days together. How many pages does {who} read in three days?",
        (
            ("On Tuesday {who} reads", "{a}+{b}"),
            ("On Wednesday {who} reads", "{a}+{r1}"),
            ("In all {who} reads", "{a}+{r1}+{r2}"),
        ),
    ),
    Story(
        "{a} buses carry {b} people each, and {c} people get off. The others go on in vans of {d}. "
        "How many vans are needed?",
        (
            ("The buses carry", "{a}*{b}"),
            ("There go on", "{r1}-{c}"),
            ("Vans that are needed:", "{r2}/{d}"),
        ),
    ),
)


def _shown(value: float) -> int:
    if value != int(value) or value < 1:
        raise Useless("a number that is not whole")
    return int(value)


def _solve(
    story: Story, values: Mapping[str, object], slip: tuple[int, int] | None
) -> tuple[list[str], list[str], int]:
    """(lines, items, last value); ``slip``: at which line, and by how much, the value is wrong."""
    known = dict(values)
    lines, items, value = [], [], 0
    for i, (lead, template) in enumerate(story.lines):
        expression = template.format(**known)
        value = _shown(evaluate(expression) + (slip[1] if slip and slip[0] == i else 0))
        known[f"r{i + 1}"] = value
        items.append(f"<<{expression}={value}>>{value}")
        spaced = (
            expression.replace("*", " * ")
            .replace("+", " + ")
            .replace("-", " - ")
            .replace("/", " / ")
        )
        lines.append(f"{lead.format(**known)} {spaced} = {items[-1]}.")
    return lines, items, value


def calculator(draw: random.Random) -> Draft:
    """A word problem; the wrong answer has a slip in one line, or a final number that does not follow."""
    story = draw.choice(_STORIES)
    who, friend = draw.sample(NAMES, 2)
    values = {"who": who, "friend": friend, "thing": draw.choice(THINGS), "a": draw.randint(3, 30),
              "b": draw.randint(2, 12), "c": draw.randint(2, 25), "d": draw.randint(2, 9)}  # fmt: skip
    lines, items, final = _solve(story, values, None)
    by = draw.choice([-10, -3, -2, -1, 1, 2, 3, 10])
    place = draw.randrange(len(lines) + 1)
    if place == len(lines):
        bad_lines, bad_items, bad_final = lines, items, _shown(final + by)
    else:
        bad_lines, bad_items, bad_final = _solve(story, values, (place, by))
    good, bad = (
        "\n".join([*ls, f"#### {n}"]) for ls, n in ((lines, final), (bad_lines, bad_final))
    )
    inputs = {good: ", ".join(items), bad: ", ".join(bad_items)}
    thought = draw.choice(("I need to check the calculation with the calculator.",
                           "The calculator can tell whether each step is right."))  # fmt: skip

    def judge(call: Recorder, answer: str, right: bool) -> Judged:
        said = call(thought, "calculator", inputs[answer])
        verdict = "so the answer is correct" if right else "so the answer is not correct"
        return Judged(f'The calculator says: "{said}" Each step was looked at, {verdict}.')

    return Draft(story.text.format(**values), good, bad, judge)


def _day(draw: random.Random, first: datetime.date, last: datetime.date) -> datetime.date:
    return first + datetime.timedelta(days=draw.randint(0, (last - first).days))


def _compare(what: str, found: str, said: str) -> Judged:
    if found == said:
        return Judged(
            f"The tool gives {found} for {what}. The answer says {said}, which is the same, so it is correct."
        )
    return Judged(
        f"The tool gives {found} for {what}. The answer says {said}, which differs, so it is not correct."
    )


def calendar(draw: random.Random) -> Draft:
    """One of three questions about dates."""
    first = _day(draw, datetime.date(1990, 1, 1), datetime.date(2035, 12, 31))
    kind = draw.randrange(3)
    if kind == 0:
        name, arguments = "Calendar.week_day", f"{first}"
        question = draw.choice(("What day of the week is {}?", "Which weekday is {}?")).format(
            first
        )
        pattern, what = f"{first} is a {{}}.", f"the weekday of {first}"
        good = WEEKDAYS[first.weekday()]
        bad = draw.choice([d for d in WEEKDAYS if d != good])
    elif kind == 1:
        days = draw.randint(2, 400)
        name, arguments = "Calendar.target_day", f"{first}, {days}"
        question = draw.choice(
            ("What day is {} days after {}?", "Which date comes {} days after {}?")
        ).format(days, first)
        pattern, what = f"{days} days after {first} is {{}}.", f"{days} days after {first}"
        right = first + datetime.timedelta(days=days)
        good, bad = (
            str(right),
            str(right + datetime.timedelta(days=draw.choice([-30, -7, -2, -1, 1, 2, 7, 30]))),
        )
    else:
        second = _day(draw, datetime.date(1990, 1, 1), datetime.date(2035, 12, 31))
        name, arguments = "Calendar.day_difference", f"{first}, {second}"
        question = draw.choice(("How many days are there between {} and {}?",
                                "How many days apart are {} and {}?")).format(first, second)  # fmt: skip
        pattern, what = (
            f"There are {{}} days between {first} and {second}.",
            f"the days between {first} and {second}",
        )
        days = abs((first - second).days)
        good, bad = str(days), str(_shown(days + draw.choice([-100, -10, -2, -1, 1, 2, 10, 100])))

    def judge(call: Recorder, answer: str, right: bool) -> Judged:
        return _compare(
            what, call(f"I need to look up {what}.", name, arguments), good if right else bad
        )

    return Draft(question, pattern.format(good), pattern.format(bad), judge, asks=what)


@functools.cache
def weather_table() -> Mapping[str, Weather]:
    """Invented weather of all ``CITIES`` from ``FIRST`` to ``LAST``, by ``City, YYYY-MM-DD``."""
    days = [str(FIRST + datetime.timedelta(days=i)) for i in range((LAST - FIRST).days + 1)]
    return invented_table(CITIES, days)


# What can be asked for: how the table calls it, and how a value is written.
_PROPERTIES = {
    "overall weather": lambda w: w.overall,
    "temperature": lambda w: f"{w.celsius}(C)",
    "wind speed": lambda w: f"{w.wind_kph}(kph)",
    "precipitation": lambda w: f"{w.rain_mm}(mm)",
    "visibility": lambda w: f"{w.sight_km}(km)",
    "humidity": lambda w: f"{w.humidity}",
    "UV index": lambda w: f"{w.uv}",
}


def _values(draw: random.Random, city: str, day: datetime.date) -> tuple[str, str, str]:
    """(property, its value there and then, another place's and day's).

    Where the two are equal the whole draft is given up, and not only the other value: so both have one distribution,
    and no value looks wrong in itself.
    """
    table = weather_table()
    name = draw.choice(tuple(_PROPERTIES))
    other = table[f"{draw.choice(CITIES)}, {_day(draw, FIRST, LAST)}"]
    good, bad = (_PROPERTIES[name](w) for w in (table[f"{city}, {day}"], other))
    if good == bad:
        raise Useless("the wrong value is right")
    return name, good, bad


def weather(draw: random.Random) -> Draft:
    """A property of the weather of a city on a day."""
    city, day = draw.choice(CITIES), _day(draw, FIRST, LAST)
    name, good, bad = _values(draw, city, day)
    question = draw.choice(("What is the {} in {} on {}?", "Tell me the {} in {} on {}.")).format(
        name, city, day
    )
    pattern = f"The {name} in {city} on {day} is {{}}."

    def judge(call: Recorder, answer: str, right: bool) -> Judged:
        call(
            f"I need to look up the weather in {city} on {day}.",
            "history_weather",
            f"{city}, {day}",
        )
        return _compare(f"the {name}", good, good if right else bad)

    return Draft(question, pattern.format(good), pattern.format(bad), judge, asks=pattern)


def multi(draw: random.Random) -> Draft:
    """The same, some days after a date."""
    city, days = draw.choice(CITIES), draw.randint(2, 60)
    first = _day(draw, FIRST, LAST - datetime.timedelta(days=days))
    day = first + datetime.timedelta(days=days)
    name, good, bad = _values(draw, city, day)
    when = f"{days} days after {first}"
    pattern = f"The {name} in {city} {when} is {{}}."

    def judge(call: Recorder, answer: str, right: bool) -> Judged:
        date = call(f"I need to find the day {when}.", "Calendar.target_day", f"{first}, {days}")
        call(
            f"I need to look up the weather in {city} on {date}.",
            "history_weather",
            f"{city}, {date}",
        )
        return _compare(f"the {name} on {date}", good, good if right else bad)

    return Draft(
        f"What is the {name} in {city} {when}?", pattern.format(good), pattern.format(bad), judge
    )
