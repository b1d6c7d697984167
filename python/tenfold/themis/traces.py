"""Traces as token ids: what is judged, the tool calls, the rationale, and which token is a target of which loss.

    ### USER:
    [Context: {context}]
    Question: {question}
    Answer: {answer}
    ### ASSISTANT:
    <start_tool> Thought: {thought}
    Action: {tool}
    Action Input: {arguments}
    <start_observation> Observation: {observation}
    ... further calls; then, if it was said that no (further) tool is needed:
    <start_tool> Thought: {closing}
    Finished.
    <start_work> Work: {rationale}<end of sequence>

A row is joined from pieces that are tokenised one by one, by an encoder that knows no special tokens: no text can
become a special token, boundaries are known and never counted afterwards, and the class of every token comes with it.

Fields may hold any text. Where one starts and ends is told by the special tokens and, between them, by words at
the beginning of a line (``Action:``, ``Answer:`` and so on); a line of a field's own that begins with such a word gets
a backslash before it, one that begins with backslashes and such a word one more. So :meth:`TraceFormat.parse` undoes
:meth:`TraceFormat.assemble` exactly, where the tokenizer gives text back as it was (byte-level ones do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tenfold.themis.tokens import SPECIALS
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

    ``classes[t]``: of token t as a target (``IGNORE`` .. ``EOS``). ``answer``: columns [start, end) of the answer's text.
    ``assistant``: the first column of ``### ASSISTANT:``. ``cut``: tokens of context and observations left out.
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


class TraceFormat:
    """Text to token ids and back.

    Args:
        tokenizer: a transformers tokenizer with the tokens of ``SPECIALS`` (:func:`prepare_tokenizer` adds them) and
            an end token. max_length: of a row, in tokens; what is too long is cut from context and observations.
        escape: texts that hold special tokens are encoded as ordinary text; else they are a ValueError.

    Raises:
        KeyError: special tokens are missing from the tokenizer. ValueError: it has no end token; max_length.
    """

    ids: SpecialIds

    def __init__(
        self, tokenizer: Any, *, max_length: int | None = 512, escape: bool = False
    ) -> None:
        raise NotImplementedError

    def prompt(self, query: Query, *, room: int = 0) -> list[int]:
        """What a model goes on from: the user's part, ``### ASSISTANT:`` and ``<start_tool>``.

        ``room``: tokens that are kept free for the trace, within ``max_length``.
        """
        raise NotImplementedError

    def assemble(self, query: Query, trace: Trace) -> Encoded:
        """The row of a trace, with its end token."""
        raise NotImplementedError

    def assemble_all(self, rows: Sequence[tuple[Query, Trace]]) -> list[Encoded]:
        """:meth:`assemble` of many, tokenised in one call."""
        raise NotImplementedError

    def parse(self, ids: Sequence[int]) -> tuple[Query, Trace]:
        """What :meth:`assemble` made a row of; ValueError for anything that it does not make."""
        raise NotImplementedError

    def parse_steps(self, ids: Sequence[int]) -> Generated:
        """What generated tokens say; they go on from :meth:`prompt` or an observation. Never raises."""
        raise NotImplementedError

    def read(self, ids: Sequence[int]) -> Trace:
        """The trace in a row whose trace a model wrote, leniently: what cannot be read is left out. Never raises."""
        raise NotImplementedError

    def observation_ids(self, text: str, *, limit: int | None = None) -> list[int]:
        """`` Observation: {text}`` and a line break, to append after ``<start_observation>``.

        Always escaped: a tool's text is never an error. ``limit``: tokens at most; the text's end is cut.
        """
        raise NotImplementedError

    def plain(self, query: Query) -> list[int]:
        """A row of a reward model without tools: ``[Context,] Question, Answer`` and the end token."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        raise NotImplementedError


def prepare_tokenizer(tokenizer: Any, model: Any = None) -> int:
    """Adds the tokens of ``SPECIALS`` that are missing, and resizes the model's embeddings; how many were added."""
    raise NotImplementedError
