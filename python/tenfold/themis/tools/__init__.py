"""Tools that a reward model may call while it judges an answer, and the box that runs them."""

from tenfold.themis.tools.base import STATUSES, BadArguments, Observation, Refused, Status, Tool
from tenfold.themis.tools.cache import ToolCache
from tenfold.themis.tools.rate import Rate
from tenfold.themis.tools.toolbox import Toolbox

__all__ = [
    "STATUSES",
    "BadArguments",
    "Observation",
    "Rate",
    "Refused",
    "Status",
    "Tool",
    "ToolCache",
    "Toolbox",
]
