# SPDX-License-Identifier: Apache-2.0
"""The text between special tokens: labels at line starts, fields that cannot be taken for labels, and reading both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# Words that mean something at the beginning of a line. Lines of fields that begin so are escaped.
_LABELS = (
    r"(?:### USER:|### ASSISTANT:|Context:|Question:|Answer:|Thought:|Action:|Action Input:|Observation:|Work:"
    r"|Finished)"
)
_TO_ESCAPE = re.compile(rf"(?<=\n)(?=\\*{_LABELS})")
_TO_UNESCAPE = re.compile(rf"(?<=\n)\\(?=\\*{_LABELS})")
_RAW = re.compile(rf"(?<=\n){_LABELS}")

# A context or an observation of which nothing was left has not even its space.
_PROMPT = re.compile(
    r"### USER:\n(?:Context:(?: |(?=\nQuestion: ))(?P<context>.*?)\n)?"
    r"Question: (?P<question>.*?)\nAnswer: (?P<answer>.*)\n### ASSISTANT:\n",
    re.DOTALL,
)
_CALL = re.compile(
    r" Thought: (?P<thought>.*?)\nAction: (?P<tool>.*?)\nAction Input: (?P<arguments>.*)\n",
    re.DOTALL,
)
_CLOSING = re.compile(r" Thought: (?P<closing>.*)\nFinished\.\n", re.DOTALL)
_OBSERVATION = re.compile(r" Observation:(?: |(?=\n\Z))(?P<observation>.*)\n", re.DOTALL)
_WORK = re.compile(r" Work: (?P<rationale>.*)", re.DOTALL)
_SEGMENTS = {
    "prompt": (_PROMPT,),
    "tool": (_CALL, _CLOSING),
    "observation": (_OBSERVATION,),
    "work": (_WORK,),
}

# Lenient forms, for what models write.
# Models may write anything: each of these takes time in proportion to the text, and no more.
_LABEL = re.compile(
    r"^[ \t]*(Thought:|Action:|Action Input:|Observation:|Work:|Finished\b)[ \t]*", re.MULTILINE
)
_THOUGHT = re.compile(r"^[ \t]*Thought:[ \t]*", re.MULTILINE)
_FINISHED = re.compile(r"^[ \t]*Finished\b\.?[ \t]*$", re.MULTILINE)
_WORK_LINE = re.compile(r"^[ \t]*Work:[ \t]*", re.MULTILINE)


def escape_lines(text: str) -> str:
    """Puts a backslash before lines, but for the first, that begin with a label, or with backslashes and a label."""
    return _TO_ESCAPE.sub(r"\\", text) if "\n" in text else text


def unescape_lines(text: str) -> str:
    """Undoes :func:`escape_lines`; ValueError for text that it does not make."""
    if "\n" not in text:
        return text
    raw = _RAW.search(text)
    if raw is not None:
        raise ValueError(f"a field holds the line {raw[0]!r}, which is not escaped")
    return _TO_UNESCAPE.sub("", text)


def read_segment(kind: str, text: str) -> dict[str, str | None]:
    """The fields of the text after a special token (``tool``, ``observation``, ``work``) or before all (``prompt``).

    ValueError if the text is not exactly what a row has there.
    """
    for pattern in _SEGMENTS[kind]:
        found = pattern.fullmatch(text)
        if found is not None:
            return {
                k: None if v is None else unescape_lines(v) for k, v in found.groupdict().items()
            }
    raise ValueError(f"the {kind} part of a row is malformed: {text[:200]!r}")


def read_written(text: str) -> tuple[str, str | None, str | None, bool, str | None]:
    """(thought, tool, arguments, finished, rationale) of text without special tokens that a model wrote.

    As in a row if it is just so. Else the last action with an input counts, and the thought that is nearest before
    it; what is missing is None.
    """
    exact = _as_in_a_row("tool", text)
    if exact is not None:
        finished = "closing" in exact
        thought = exact["closing" if finished else "thought"] or ""
        return thought, exact.get("tool"), exact.get("arguments"), finished, None
    work = _WORK_LINE.search(text)
    rationale = None if work is None else _lenient(text[work.end() :])
    before = text if work is None else text[: work.start()]
    actions = _actions(before)
    end = _FINISHED.search(before)
    stop = actions[-1].start if actions else end.start() if end else len(before)
    begin = actions[-2].end if len(actions) > 1 else 0
    thought = _thought(before[begin:stop])
    if not actions:
        return thought, None, None, end is not None, rationale
    last = actions[-1]
    return thought, _lenient(last.tool), _lenient(last.arguments), end is not None, rationale


class _Action(NamedTuple):
    start: int
    end: int
    tool: str
    arguments: str


def _actions(text: str) -> list[_Action]:
    """Actions with an input: what stands between the two labels, and up to the next label that is no input."""
    marks = list(_LABEL.finditer(text))
    found: list[_Action] = []
    action: re.Match[str] | None = None
    given: re.Match[str] | None = None
    for mark in (*marks, None):
        if (
            action is not None
            and given is not None
            and (mark is None or mark[1] != "Action Input:")
        ):
            end = len(text) if mark is None else mark.start()
            tool = text[action.end() : given.start()]
            found.append(_Action(action.start(), end, tool, text[given.end() : end]))
            action = given = None
        if mark is None:
            break
        if mark[1] == "Action:" and action is None:
            action = mark
        elif mark[1] == "Action Input:" and action is not None and given is None:
            given = mark
    return found


def _thought(text: str) -> str:
    at: Sequence[re.Match[str]] = list(_THOUGHT.finditer(text))
    return _lenient(text[at[-1].end() :] if at else text)


def read_after(kind: str, text: str) -> str:
    """The one field of an ``observation`` or ``work`` part: as in a row if it is just so, else whatever is there."""
    exact = _as_in_a_row(kind, text)
    if exact is not None:
        return next(iter(exact.values())) or ""
    label = "Observation:" if kind == "observation" else "Work:"
    return _lenient(text).removeprefix(label).strip()


def _as_in_a_row(kind: str, text: str) -> dict[str, str | None] | None:
    if kind == "tool" and not text.endswith("\n"):
        return None  # as the pattern would say, after it had tried every way to split the text
    try:
        return read_segment(kind, text)
    except ValueError:
        return None


def _lenient(text: str) -> str:
    """Unescaped, whatever it is, and without white space around it."""
    return _TO_UNESCAPE.sub("", text).strip()
