# SPDX-License-Identifier: Apache-2.0
"""The tools that work without a network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenfold.themis.tools.base import Tool
from tenfold.themis.tools.calculator import Calculator
from tenfold.themis.tools.calendar import Calendar
from tenfold.themis.tools.code_run import CodeRun
from tenfold.themis.tools.google_serper import GoogleSerper
from tenfold.themis.tools.tables import HistoryWeather, Translate
from tenfold.themis.tools.wiki_search import WikiSearch

# Where a folder has what a tool answers from.
FILES = {
    "translate": "translate.json",
    "translate_by_id": "translate_by_id.json",
    "history_weather": "history_weather.json",
    "wiki_search": "wiki_search.jsonl",
}


def default_tools(
    data: Mapping[str, Any] | str | os.PathLike[str] | None = None, *, web: bool = False
) -> list[Tool]:
    """Calculator, calendar, code runner, translator, weather and search.

    Args:
        data: what the last three answer from, by the names of ``FILES`` (a table or passages, see
            :class:`Translate`, :class:`HistoryWeather`, :class:`WikiSearch`), or a folder with any of those files.
            Default: packaged catalogues, no weather, packaged documentation.
        web: with ``google_serper``, which needs a network and a key.

    Raises:
        ValueError: an unknown name. FileNotFoundError: no such folder.
    """
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        folder = Path(data)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"data must be a folder with any of {', '.join(FILES.values())}, got {folder}"
            )
        data = {n: folder / file for n, file in FILES.items() if (folder / file).is_file()}
    unknown = sorted(set(data) - set(FILES))
    if unknown:
        raise ValueError(f"data may hold {', '.join(FILES)}; got {', '.join(map(str, unknown))}")
    tools: list[Tool] = [
        Calculator(),
        Calendar(),
        CodeRun(),
        Translate(data.get("translate"), by_id=data.get("translate_by_id")),
        HistoryWeather(data.get("history_weather", {})),
        WikiSearch(data.get("wiki_search")),
    ]
    return [*tools, GoogleSerper()] if web else tools
