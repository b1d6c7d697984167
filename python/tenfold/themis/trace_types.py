# SPDX-License-Identifier: Apache-2.0
"""What traces consist of; :mod:`tenfold.themis.traces` makes token ids of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# What stands for the result of a tool that gave none.
FAILURE = "The tool gave no result, so its answer is not known."
# What a trace says that needs no (further) tool.
NO_TOOL = "Do I need to use a tool? No"
# Classes of tokens as targets; those of `tenfold.ops.trace_token_class`.
IGNORE, ANSWER, TOOL, OBSERVATION, RATIONALE, EOS = range(6)


@dataclass(frozen=True)
class Step:
    """One tool call; ``observation`` is None while it was not run."""

    thought: str
    tool: str
    arguments: str
    observation: str | None = None


@dataclass(frozen=True)
class Trace:
    """Tool calls, the thought that no (further) tool is needed, and the rationale; each may be missing."""

    steps: tuple[Step, ...] = ()
    closing: str | None = None
    rationale: str | None = None


@dataclass(frozen=True)
class Query:
    """What is judged: an answer to a question, with or without a context."""

    question: str
    answer: str
    context: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A row of tokens.

    ``classes[t]``: of token t as a target (``IGNORE`` .. ``EOS``). ``answer``: columns [start, end) of the answer's
    text. ``assistant``: the first column of ``### ASSISTANT:``. ``cut``: tokens left out of context and observations.
    """

    ids: list[int]
    classes: list[int]
    answer: tuple[int, int]
    assistant: int
    cut: int = 0


class SpecialIds(NamedTuple):
    """Token ids; ``pad`` may equal ``eos``, since rows carry a mask."""

    tool: int
    observation: int
    work: int
    eos: int
    pad: int


@dataclass(frozen=True)
class Generated:
    """What a model wrote, read leniently (:meth:`TraceFormat.parse_steps`).

    ``tool`` and ``arguments``: of the last action that has an input, None without one; ``thought``: before it.
    ``finished``: there is a line ``Finished``. ``work``: there is ``<start_work>``, or a line that begins with
    ``Work:``; ``rationale``: the text after that.
    """

    thought: str = ""
    tool: str | None = None
    arguments: str | None = None
    finished: bool = False
    work: bool = False
    rationale: str | None = None
