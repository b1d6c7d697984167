# SPDX-License-Identifier: Apache-2.0
"""What a tool is, and what comes of a call.

A tool gets the name and the text that a model wrote, and the example that is judged: a mapping with ``question``,
``answer`` (the text judged), ``context`` where there is one, and whatever its data set gives (``id``,
``test_list``). It returns a text. A :class:`~tenfold.themis.tools.toolbox.Toolbox` runs it: with a limit of time,
and with whatever the tool returns or raises made an :class:`Observation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Status = Literal["ok", "bad_args", "unknown_tool", "timeout", "failed", "refused", "limited"]
STATUSES: tuple[str, ...] = get_args(Status)
# A model has no use for longer arguments, and a parser need not be asked.
MAX_ARGUMENTS = 20_000
CUT = " [...]"  # ends a text that was longer
_MAX_ERROR = 300


class BadArguments(ValueError):
    """The model's text is none that this tool takes; says what it takes."""


class Refused(RuntimeError):
    """The tool declines to run here: no isolation, no key."""


@dataclass(frozen=True)
class Observation:
    """What the model is told of a call, and what the record keeps.

    Attributes:
        text: the tool's; for every status but ``ok`` the fixed failure sentence, which models are trained on.
        status: ``ok``; ``bad_args``; ``unknown_tool``; ``timeout`` (of the tool, or the deadline passed);
            ``failed`` (the tool raised, or the toolbox was closed); ``refused`` (no isolation, no key);
            ``limited`` (never begun: rate limit, queue or hanging calls).
        seconds: from the call to the answer, waiting included. cached: from a :class:`ToolCache`.
        error: what went wrong; for the record, never shown to a model.
    """

    text: str
    status: Status = "ok"
    seconds: float = 0.0
    cached: bool = False
    error: str = ""

    @property
    def ok(self) -> bool:
        """Did the tool answer?"""
        return self.status == "ok"


class Tool:
    """Base of all tools. Calls may come from several threads at a time.

    Attributes:
        names: action names that it answers to. timeout: seconds for one attempt. retries: further attempts
            after a failure (not after bad arguments, a refusal or a time-out). deterministic: the same key gives
            the same text on any day, so that a cache may answer for it.
    """

    names: tuple[str, ...] = ()
    timeout: float = 10.0
    retries: int = 0
    deterministic: bool = True

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """The observation's text.

        Raises:
            BadArguments: of the model's making. Refused: it must not run here. Anything else: it failed.
        """
        raise NotImplementedError

    def key(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """What the text depends on besides ``name``: by it results are cached. Default: the arguments."""
        return arguments


def field_of(example: Mapping[str, Any], name: str) -> Any:
    """``example[name]``; KeyError says what a tool needs it for what is missing."""
    if name not in example:
        there = ", ".join(map(str, example)) or "nothing"
        raise KeyError(f"the example needs {name!r} for this tool; it has {there}")
    return example[name]


def plain_text(value: Any, max_chars: int) -> str:
    """Whatever a tool returned as a text of at most so many characters that can be encoded.

    A longer one ends with ``CUT``. Bytes are decoded. Raises what the value's own ``__str__`` raises; LookupError
    for None.
    """
    if value is None:
        raise LookupError("the tool returned nothing")
    if isinstance(value, bytes | bytearray | memoryview):
        value = bytes(value[: 4 * max_chars + 4]).decode("utf-8", "replace")
    text = str.__str__(value) if isinstance(value, str) else str.__str__(str(value))
    if len(text) > max_chars:
        text = text[: max_chars - len(CUT)] + CUT
    # Half a surrogate pair is no character: tokenizers refuse it.
    return text.encode("utf-8", "replace").decode("utf-8")


def error_text(error: BaseException) -> str:
    """What was raised, for the record; an error's own ``__str__`` may raise, too."""
    try:
        return plain_text(f"{type(error).__name__}: {error}", _MAX_ERROR)
    except Exception:
        return type(error).__name__
