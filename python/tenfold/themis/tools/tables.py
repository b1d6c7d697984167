# SPDX-License-Identifier: Apache-2.0
"""Tools that answer from a table: translations and past weather, replayed from files or made in advance."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.themis.tools.base import BadArguments, Refused, Tool
from tenfold.themis.tools.calendar import read_date

Source = Mapping[str, Any] | str | os.PathLike[str]


def read_table(source: Source, name: str) -> dict[str, str]:
    """Texts by key, of a mapping or a JSON file; a value is a text, or a mapping with ``answer`` or ``text``.

    Entries without a text (None: the service of the time had none) are left out.

    Raises:
        ValueError: another form; names the key. OSError: no such file.
    """
    if not isinstance(source, Mapping):
        try:
            source = json.loads(Path(source).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name}: {source} is no JSON: {error}") from None
        if not isinstance(source, Mapping):
            raise ValueError(
                f"{name}: the file must hold texts by key, got {type(source).__name__}"
            )
    found = {}
    for key, value in source.items():
        if isinstance(value, Mapping):
            value = value.get("answer", value.get("text"))
        if isinstance(value, Weather):
            value = value.text(*_place(str(key)))
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name}: {key!r} must have a text, got {type(value).__name__}")
        found[_plain(str(key))] = value
    return found


def _plain(text: str) -> str:
    return " ".join(text.split())


class Translate(Tool):
    """``translate``: a text's English, as a table has it.

    Args:
        table: English by text (white space does not count), a mapping or a JSON file; default the packaged
            catalogues of ``languages``. by_id: English by the example's ``id``, which goes before the table: what a
            service once said of each example. languages: of the packaged catalogues.
    """

    names = ("translate",)

    def __init__(
        self,
        table: Source | None = None,
        *,
        by_id: Source | None = None,
        languages: Sequence[str] = ("de", "es", "fr"),
    ) -> None:
        self._table = None if table is None else read_table(table, "translate")
        self._by_id = {} if by_id is None else read_table(by_id, "translate by id")
        self.languages = tuple(languages)
        self._lock = threading.Lock()

    def table(self) -> dict[str, str]:
        """English by text. Refused: it is the packaged one, and that is not installed."""
        from tenfold.data.models import MissingData
        from tenfold.data.translations import translations

        with self._lock:
            if self._table is None:
                try:
                    self._table = {
                        _plain(text): english
                        for language in reversed(self.languages)
                        for english, text in reversed(translations(language))
                    }
                except MissingData as error:
                    raise Refused(str(error)) from error
            return self._table

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """The English text; LookupError where the tables have none."""
        known = self._by_id.get(str(example.get("id", "")))
        if known is not None:
            return known
        if not arguments.strip():
            raise BadArguments("translate takes a text, got none")
        try:
            return self.table()[_plain(arguments)]
        except KeyError:
            raise LookupError("no translation of this text is known") from None

    def key(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """The text, and the id where that decides."""
        given = str(example.get("id", ""))
        return json.dumps([given if given in self._by_id else "", _plain(arguments)])


@dataclass(frozen=True)
class Weather:
    """A day's weather: temperature in degrees Celsius, wind in km/h and mph, and so on."""

    overall: str
    celsius: float
    wind_kph: float
    wind_mph: float
    rain_mm: float
    rain_inch: float
    sight_km: float
    sight_miles: float
    humidity: float
    uv: float

    def text(self, city: str, date: str) -> str:
        """A header line and a line of what can be asked for."""
        return (
            f"Weather in {city} on {date}:\n"
            f"overall weather: {self.overall}; temperature: {self.celsius}(C); "
            f"wind speed: {self.wind_kph}(kph), {self.wind_mph}(mph); "
            f"precipitation: {self.rain_mm}(mm), {self.rain_inch}(inch); "
            f"visibility: {self.sight_km}(km), {self.sight_miles}(miles); "
            f"humidity: {self.humidity}; UV index: {self.uv}."
        )


_SKIES = ("Sunny", "Partly cloudy", "Cloudy", "Overcast", "Mist", "Light rain", "Moderate rain", "Heavy rain",
          "Light snow", "Thunder")  # fmt: skip


def invented_weather(city: str, date: str, seed: int = 0) -> Weather:
    """Weather that never was, the same for the same place, day and seed: for data whose truth is a table."""
    digest = hashlib.sha256(f"{seed}\n{city}\n{date}".encode()).digest()
    draw = [int.from_bytes(digest[i : i + 2], "big") / 65536 for i in range(0, 16, 2)]
    overall = _SKIES[int(draw[0] * len(_SKIES))]
    wet = "rain" in overall or "snow" in overall or overall == "Thunder"
    kph = round(2 + 40 * draw[2], 1)
    mm = round(0.1 + 30 * draw[3], 1) if wet else 0.0
    km = round(2 + 8 * draw[4], 1)
    return Weather(
        overall, round(45 * draw[1] - 5, 1), kph, round(kph / 1.609344, 1), mm, round(mm / 25.4, 2), km,
        float(int(km / 1.609344)), float(20 + int(80 * draw[5])), float(1 + int(11 * draw[6])),
    )  # fmt: skip


def invented_table(
    cities: Sequence[str], dates: Sequence[str], seed: int = 0
) -> dict[str, Weather]:
    """:func:`invented_weather` by ``City, YYYY-MM-DD``, as :class:`HistoryWeather` takes it."""
    return {f"{c}, {d}": invented_weather(c, d, seed) for c in cities for d in dates}


def _place(arguments: str) -> tuple[str, str]:
    city, comma, date = arguments.rpartition(",")
    if not comma or not city.strip():
        raise BadArguments(f"history_weather takes City, YYYY-MM-DD, got {arguments[:60]!r}")
    return _plain(city), read_date(date).isoformat()


class HistoryWeather(Tool):
    """``history_weather``: a past day's weather, replayed.

    Args:
        table: by ``City, YYYY-MM-DD``, a text or a :class:`Weather`; a mapping or a JSON file.
    """

    names = ("history_weather",)

    def __init__(self, table: Source = {}) -> None:  # noqa: B006  (never changed)
        self._table = read_table(table, "history_weather")

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """The text of that place and day; LookupError where the table has none."""
        city, date = _place(arguments)
        try:
            return self._table[f"{city}, {date}"]
        except KeyError:
            raise LookupError(f"no weather of {city[:60]} on {date} is known") from None

    def key(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """The input without superfluous white space."""
        return re.sub(r"\s*,\s*", ", ", _plain(arguments))
