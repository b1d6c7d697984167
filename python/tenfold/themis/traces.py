# SPDX-License-Identifier: Apache-2.0
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

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tenfold.themis.tokens import SPECIALS, PieceEncoder, begin_ids, special_ids
from tenfold.themis.trace_reader import TraceReader
from tenfold.themis.trace_text import escape_lines
from tenfold.themis.trace_types import (
    ANSWER,
    EOS,
    FAILURE,
    IGNORE,
    NO_TOOL,
    OBSERVATION,
    RATIONALE,
    TOOL,
    Encoded,
    Generated,
    Query,
    SpecialIds,
    Step,
    Trace,
)
from tenfold.themis.truncate import caps, head

__all__ = [
    "ANSWER", "EOS", "FAILURE", "IGNORE", "NO_TOOL", "OBSERVATION", "RATIONALE", "SPECIALS", "TOOL", "Encoded",
    "Generated", "Query", "SpecialIds", "Step", "Trace", "TraceFormat", "prepare_tokenizer",
]  # fmt: skip

# A piece of a row: ids, the class of its tokens as targets, and whether it may be cut.
_Piece = tuple[list[int], int, bool]


class TraceFormat(TraceReader):
    """Text to token ids and back.

    Args:
        tokenizer: a transformers tokenizer with the tokens of ``SPECIALS`` (:func:`prepare_tokenizer` adds them) and
            an end token. max_length: of a row, in tokens; what is too long is cut from context and observations.
        escape: texts that hold special tokens are encoded as ordinary text; else they are a ValueError.

    Attributes:
        ids: of the special tokens. exact: the tokenizer gives text back as it was, so that :meth:`parse` is exact.

    Raises:
        KeyError: special tokens are missing from the tokenizer. ValueError: it has no end token; max_length.
    """

    def __init__(
        self, tokenizer: Any, *, max_length: int | None = 512, escape: bool = False
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [name for name in SPECIALS if name not in vocabulary]
        if missing:
            raise KeyError(
                f"the tokenizer has no tokens {', '.join(missing)}; "
                "tenfold.themis.traces.prepare_tokenizer(tokenizer, model) adds them"
            )
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                "the tokenizer has no end token (eos_token_id), so that no row could end"
            )
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be >= 1 or None, got {max_length}")
        pad = tokenizer.pad_token_id
        tool, observation, work = (vocabulary[name] for name in SPECIALS)
        ids = SpecialIds(tool, observation, work, eos, eos if pad is None else pad)
        encoder = PieceEncoder(tokenizer, special_ids(tokenizer) | set(ids[:4]))
        super().__init__(ids, encoder, begin_ids(tokenizer))
        self.max_length, self.escape = max_length, escape
        # What texts must not hold. That they never become special tokens, these or others, is the encoder's work.
        named = {*SPECIALS, tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token} - {None}
        self._raw = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))))
        self._label = dict(zip(_LABELS, self._encoder.encode(_LABELS)))

    def prompt(self, query: Query, *, room: int = 0) -> list[int]:
        """What a model goes on from: the user's part, ``### ASSISTANT:`` and ``<start_tool>``.

        ``room``: tokens that are kept free for the trace, within ``max_length``. Raises ValueError as
        :meth:`assemble` does.
        """
        texts = self._encode(_query_texts(query))
        pieces = self._query(query, iter(texts))
        return self._join([*pieces, ([self.ids.tool], TOOL, False)], room, query)[0]

    def assemble(self, query: Query, trace: Trace) -> Encoded:
        """The row of a trace, with its end token.

        Raises:
            ValueError: text that holds special tokens (unless ``escape``) or is not Unicode; a call without an
                observation that is not the last; a row that is longer than ``max_length`` even without context and
                observations.
        """
        return self.assemble_all([(query, trace)])[0]

    def assemble_all(self, rows: Sequence[tuple[Query, Trace]]) -> list[Encoded]:
        """:meth:`assemble` of many, tokenised in one call."""
        fields = [(*_query_texts(q), *_trace_texts(t)) for q, t in rows]
        encoded = iter(self._encode([f for row in fields for f in row]))
        made = []
        for query, trace in rows:
            pieces = self._query(query, encoded)
            assistant_at = len(pieces) - 1
            pieces += self._trace(trace, encoded)
            ids, classes, starts, cut = self._join(pieces, 0, query)
            answer = starts[assistant_at - 2], starts[assistant_at - 1]
            made.append(Encoded(ids, classes, answer, starts[assistant_at], cut))
        return made

    def _encode(self, fields: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Ids of (name, text) fields, each with the space before it."""
        for name, text in fields:
            found = None if self.escape else self._raw.search(text)
            if found is not None:
                raise ValueError(
                    f"{name} holds the special token {found[0]!r} at character {found.start()}; remove it, or use "
                    "escape=True, which encodes it as ordinary text"
                )
        texts = [" " + escape_lines(text) for _, text in fields]
        # The rows of a pair share their question and much of their traces: each text is tokenised once.
        unique = list(dict.fromkeys(texts))
        ids = dict(zip(unique, self._encoder.encode(unique)))
        return [ids[text] for text in texts]

    def _query(self, query: Query, texts: Iterator[list[int]]) -> list[_Piece]:
        """The user's part; its last three pieces are the answer, its line's end, and ``### ASSISTANT:``."""
        label = self._label
        pieces = [(self._begin + label["### USER:\n"], IGNORE, False)]
        if query.context is not None:
            pieces += [
                (label["Context:"], IGNORE, False),
                (next(texts), IGNORE, True),
                (label["\n"], IGNORE, False),
            ]
        pieces += [(label["Question:"], IGNORE, False), (next(texts), IGNORE, False),
                   (label["\nAnswer:"], IGNORE, False), (next(texts), ANSWER, False), (label["\n"], ANSWER, False),
                   (label["### ASSISTANT:\n"], TOOL, False)]  # fmt: skip
        return pieces

    def _trace(self, trace: Trace, texts: Iterator[list[int]]) -> list[_Piece]:
        label, ids = self._label, self.ids
        pieces: list[_Piece] = []
        for step in trace.steps:
            pieces += [([ids.tool, *label[" Thought:"]], TOOL, False), (next(texts), TOOL, False),
                       (label["\nAction:"], TOOL, False), (next(texts), TOOL, False),
                       (label["\nAction Input:"], TOOL, False), (next(texts), TOOL, False),
                       (label["\n"], TOOL, False)]  # fmt: skip
            if step.observation is not None:
                pieces += [([ids.observation], TOOL, False), (label[" Observation:"], OBSERVATION, False),
                           (next(texts), OBSERVATION, True), (label["\n"], OBSERVATION, False)]  # fmt: skip
        if trace.closing is not None:
            pieces += [([ids.tool, *label[" Thought:"]], TOOL, False), (next(texts), TOOL, False),
                       (label["\nFinished.\n"], TOOL, False)]  # fmt: skip
        if trace.rationale is not None:
            pieces += [([ids.work], TOOL, False), (label[" Work:"], RATIONALE, False),
                       (next(texts), RATIONALE, False)]  # fmt: skip
        return [*pieces, ([ids.eos], EOS, False)]

    def _join(
        self, pieces: list[_Piece], room: int, query: Query
    ) -> tuple[list[int], list[int], list[int], int]:
        """(ids, classes, first columns of the pieces, tokens cut)."""
        total = sum(len(p[0]) for p in pieces)
        excess = 0 if self.max_length is None else total + room - self.max_length
        if excess > 0:
            pieces = self._cut(pieces, excess, total + room, query)
        ids: list[int] = []
        classes: list[int] = []
        starts = []
        for piece, kind, _ in pieces:
            starts.append(len(ids))
            ids += piece
            classes += [kind] * len(piece)
        return ids, classes, starts, total - len(ids)

    def _cut(self, pieces: list[_Piece], excess: int, total: int, query: Query) -> list[_Piece]:
        kept = caps([len(ids) if cuttable else 0 for ids, _, cuttable in pieces], excess)
        if kept is None:
            least = total - sum(len(ids) for ids, _, cuttable in pieces if cuttable)
            raise ValueError(
                f"a row needs {least} tokens without context and observations, and max_length is {self.max_length}; "
                f"neither answer nor rationale is cut. The question is {query.question[:80]!r}"
            )
        decode = self._encoder.decode
        return [(head(p[0], n, decode), p[1], True) if p[2] else p for p, n in zip(pieces, kept)]

    def observation_ids(self, text: str, *, limit: int | None = None) -> list[int]:
        """`` Observation: {text}`` and a line break, to append after ``<start_observation>``.

        Always escaped: a tool's text is never an error (halves of surrogate pairs become question marks). ``limit``:
        tokens at most; the text's end is cut.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = self._encoder.encode([" " + escape_lines(text)])[0]
        before, after = self._label[" Observation:"], self._label["\n"]
        if limit is not None:
            ids = head(ids, max(0, limit - len(before) - len(after)), self._encoder.decode)
        return [*before, *ids, *after]

    def plain(self, query: Query) -> list[int]:
        """A row of a reward model without tools: ``[Context,] Question, Answer`` and the end token."""
        pieces = self._query(query, iter(self._encode(_query_texts(query))))
        pieces[0] = (self._begin, IGNORE, False)
        return self._join([*pieces[:-2], ([self.ids.eos], IGNORE, False)], 0, query)[0]


_LABELS = ("### USER:\n", "Context:", "Question:", "\nAnswer:", "\n", "### ASSISTANT:\n", " Thought:", "\nAction:",
           "\nAction Input:", "\nFinished.\n", " Observation:", " Work:")  # fmt: skip


def _query_texts(query: Query) -> list[tuple[str, str]]:
    context = [] if query.context is None else [("context", query.context)]
    return [*context, ("question", query.question), ("answer", query.answer)]


def _trace_texts(trace: Trace) -> list[tuple[str, str]]:
    texts = []
    for i, step in enumerate(trace.steps):
        texts += [("thought", step.thought), ("tool", step.tool), ("arguments", step.arguments)]
        if step.observation is not None:
            texts.append(("observation", step.observation))
        elif i + 1 < len(trace.steps) or trace.closing is not None or trace.rationale is not None:
            raise ValueError(
                f"steps[{i}] has no observation, but the trace goes on; only the last step of a trace that breaks "
                "off there may be without one"
            )
    if trace.closing is not None:
        texts.append(("closing", trace.closing))
    return texts if trace.rationale is None else [*texts, ("rationale", trace.rationale)]


def prepare_tokenizer(tokenizer: Any, model: Any = None) -> int:
    """Adds the tokens of ``SPECIALS`` that are missing; how many were added.

    ``model``: a transformers model whose embeddings get rows for them, if it has too few (it may have more).
    """
    missing = [name for name in SPECIALS if name not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": missing}, replace_extra_special_tokens=False
        )
    if model is not None and model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return len(missing)
