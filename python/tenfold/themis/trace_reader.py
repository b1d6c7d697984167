# SPDX-License-Identifier: Apache-2.0
"""Rows of token ids read again: exactly, and leniently where a model wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from tenfold.themis.tokens import SPECIALS, PieceEncoder
from tenfold.themis.trace_text import read_after, read_segment, read_written
from tenfold.themis.trace_types import Generated, Query, SpecialIds, Step, Trace

# What may come before a part of a row: nothing, a call, its observation, the closing thought.
_AFTER = {
    "tool": ("", "observation"),
    "observation": ("tool",),
    "work": ("", "observation", "closing"),
}


class TraceReader:
    """The reading half of :class:`tenfold.themis.traces.TraceFormat`.

    Attributes:
        ids: of the special tokens. exact: the tokenizer gives text back as it was, so that :meth:`parse` is exact.
    """

    def __init__(self, ids: SpecialIds, encoder: PieceEncoder, begin: list[int]) -> None:
        self.ids, self.exact = ids, encoder.exact
        self._encoder, self._begin = encoder, begin
        self._kinds = dict(zip(ids, ("tool", "observation", "work")))
        self._names = dict(zip(ids, (*SPECIALS, "the end token")))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self._encoder.decode(ids)

    def parse(self, ids: Sequence[int]) -> tuple[Query, Trace]:
        """What :meth:`assemble` made a row of; ValueError for anything that it does not make.

        Where :meth:`assemble` cut context or observations, their beginnings.
        """
        prompt, parts = self._split(ids)
        if not parts or parts[-1] != (self.ids.eos, []):
            raise ValueError("a row must end with the end token")
        if prompt[: len(self._begin)] != self._begin:
            raise ValueError(f"a row must begin with the tokens {self._begin}")
        prompt = prompt[len(self._begin) :]
        strange = self._encoder.forbidden.intersection(chain(prompt, *(part for _, part in parts)))
        if strange:
            raise ValueError(f"special tokens have no place in a text: {sorted(strange)}")
        fields = read_segment("prompt", self.decode(prompt))
        steps: list[Step] = []
        closing = rationale = None
        last = ""
        for token, part in parts[:-1]:
            kind = self._kinds.get(token, "")
            if last not in _AFTER.get(kind, ()):
                raise ValueError(
                    f"{self._names[token]} after {last or 'the prompt'} is not what a row has"
                )
            found = read_segment(kind, self.decode(part))
            last = "closing" if "closing" in found else kind
            if last == "closing":
                closing = found["closing"]
            elif kind == "tool":
                steps.append(Step(**found))  # type: ignore[arg-type]
            elif kind == "observation":
                steps[-1] = replace(steps[-1], observation=found["observation"])
            else:
                rationale = found["rationale"]
        return Query(**fields), Trace(tuple(steps), closing, rationale)  # type: ignore[arg-type]

    def _split(self, ids: Sequence[int]) -> tuple[list[int], list[tuple[int, list[int]]]]:
        """The ids before the first special token of a trace, and (special token, ids after it) of the rest."""
        special = {*self.ids[:4]}
        at = [i for i, token in enumerate(ids) if token in special]
        ends = [*at[1:], len(ids)]
        parts = [(ids[i], list(ids[i + 1 : j])) for i, j in zip(at, ends)]
        return list(ids[: at[0] if at else len(ids)]), parts

    def parse_steps(self, ids: Sequence[int]) -> Generated:
        """What generated tokens say; they go on from :meth:`prompt` or an observation. Never raises.

        Text after an ``<start_observation>`` of the model's own is not read.
        """
        before, parts = self._split(ids)
        made = Generated()
        for token, part in [(self.ids.tool, before), *parts]:
            if token == self.ids.eos:
                break
            if token == self.ids.observation:
                continue
            text = self.decode(part)
            if token == self.ids.work:
                made = replace(made, work=True, rationale=read_after("work", text))
                continue
            thought, tool, arguments, finished, rationale = read_written(text)
            if tool is not None:
                made = replace(made, thought=thought, tool=tool, arguments=arguments)
            elif made.tool is None and thought:
                made = replace(made, thought=thought)
            made = replace(made, finished=made.finished or finished)
            if rationale is not None:
                made = replace(made, work=True, rationale=rationale)
        return made

    def read(self, ids: Sequence[int]) -> Trace:
        """The trace in a row whose trace a model wrote, leniently: what cannot be read is left out. Never raises."""
        _, parts = self._split(ids)
        steps: list[Step] = []
        closing = rationale = None
        for token, part in parts:
            if token == self.ids.observation:
                if part and steps and steps[-1].observation is None:
                    found_text = read_after("observation", self.decode(part))
                    steps[-1] = replace(steps[-1], observation=found_text)
                continue
            found = self.parse_steps([token, *part])
            if found.tool is not None:
                steps.append(Step(found.thought, found.tool, found.arguments or ""))
            elif found.finished:
                closing = found.thought
            rationale = found.rationale if found.work else rationale
        return Trace(tuple(steps), closing, rationale)
