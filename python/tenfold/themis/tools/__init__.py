# SPDX-License-Identifier: Apache-2.0
"""Tools that a reward model may call while it judges an answer, and the box that runs them.

with Toolbox(default_tools()) as toolbox:
    toolbox.run("Calendar.week_day", "2004-05-03").text     # 'Monday'
"""

from tenfold.themis.tools.base import STATUSES, BadArguments, Observation, Refused, Status, Tool
from tenfold.themis.tools.cache import ToolCache
from tenfold.themis.tools.calculator import Calculator, Verdicts
from tenfold.themis.tools.calendar import Calendar
from tenfold.themis.tools.code_run import CodeRun
from tenfold.themis.tools.defaults import default_tools
from tenfold.themis.tools.google_serper import GoogleSerper
from tenfold.themis.tools.rate import Rate
from tenfold.themis.tools.tables import (
    HistoryWeather,
    Translate,
    Weather,
    invented_table,
    invented_weather,
)
from tenfold.themis.tools.toolbox import Toolbox
from tenfold.themis.tools.wiki_search import Bm25, WikiSearch

__all__ = [
    "STATUSES",
    "BadArguments",
    "Bm25",
    "Calculator",
    "Calendar",
    "CodeRun",
    "GoogleSerper",
    "HistoryWeather",
    "Observation",
    "Rate",
    "Refused",
    "Status",
    "Tool",
    "ToolCache",
    "Toolbox",
    "Translate",
    "Verdicts",
    "Weather",
    "WikiSearch",
    "default_tools",
    "invented_table",
    "invented_weather",
]
