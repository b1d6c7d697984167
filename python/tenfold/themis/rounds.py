# SPDX-License-Identifier: Apache-2.0
"""One run of the tool loop: batched, with one KV cache from prompt to score.

A row is a query's: it writes until ``<start_observation>`` or the end token, is interpreted, gets an observation or
``<start_work>`` appended as token ids, and goes on; in the end one decode step on the end token gives its reward.
Rows do so at their own pace: one waits for its tool while others write, and a finished one's place is taken by the
next query. What a row gives is a function of its query, the tools' answers and the seed: not of the rows beside it.
"""

from __future__ import annotations

import concurrent.futures as cf
import hashlib
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tenfold.rlhf.generation import choose
from tenfold.rlhf.trunks import plain_face
from tenfold.themis.decoding import Rows, make_rows
from tenfold.themis.interpreter import next_move
from tenfold.themis.judgement import FINISH, CallRecord, Judgement
from tenfold.themis.traces import Query, Trace
from tenfold.training.checks import one_of

if TYPE_CHECKING:
    from tenfold.themis.loop import ToolLoop

# Tokens that are kept free behind an observation, for what is made of it.
RESERVE = 32
# Time that is kept for scoring before a deadline, in forwards of the current pace.
_MARGIN = 2.0
# Seconds of one wait: the platform's clocks take no deadline in the far future.
PATIENCE = 60.0


@dataclass
class _Row:
    """A query on its way. ``ids[:len(tokens)]`` were fed to the model, the rest is pending."""

    index: int
    query: Query
    example: Mapping[str, Any]
    deadline: float
    ids: list[int]
    prompt: int
    draws: torch.Tensor | None
    slot: int = -1
    start: int = 0  # first token of the round
    rounds: int = 0
    written: int = 0
    calls: list[CallRecord] = field(default_factory=list)
    call: tuple[str, str] = ("", "")
    waiting: cf.Future | None = None
    finish: str = ""


class Run:
    """One call of ``judge``."""

    def __init__(self, loop: ToolLoop, count: int) -> None:
        self.loop, self.format = loop, loop.format
        self.queue: deque[_Row] = deque()
        self.live: list[_Row] = []
        self.made: dict[int, Judgement] = {}
        self.places = min(loop.batch_size, max(count, 1))
        self.rows: Rows = make_rows(loop.model, self.places)
        self.pace = 0.0  # seconds of a forward of one token each
        self.patience = PATIENCE

    def begin(
        self, index: int, query: Query, example: Mapping[str, Any], deadline: float, seed: int
    ) -> None:
        """Puts a query into the queue, or says what is wrong with it."""
        loop = self.loop
        try:
            ids = list(self.format.prompt(query))
            if loop.max_length is not None and len(ids) + 2 > loop.max_length:
                raise ValueError(
                    f"the prompt has {len(ids)} tokens, which leaves no room in {loop.max_length}"
                )
        except ValueError as wrong:
            self.made[index] = Judgement(math.nan, [], "", Trace(), (), "error", 0, 0, str(wrong))
            return
        draws = None
        if loop.temperature > 0:
            mixed = hashlib.sha256(f"{seed} {ids}".encode()).digest()[:7]
            made = torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
            draws = torch.rand(loop.max_iterations * loop.max_new_tokens, generator=made)
        judged = {"question": query.question, "answer": query.answer}
        judged |= {} if query.context is None else {"context": query.context}
        # Data sets have columns of these names, too: the answer that is known to be right, for one.
        given = dict(example) | judged
        row = _Row(index, query, given, deadline, ids, len(ids), draws, start=len(ids))
        self.queue.append(row)

    def to_the_end(self) -> list[Judgement]:
        """All judgements."""
        while self.queue or self.live:
            self._observe()
            self._expire()
            # What has no time left comes before prompts, which may take long to read.
            self._step([r for r in self.live if r.finish == "deadline"])
            self._admit()
            fed = [r for r in self.live if r.waiting is None]
            if not fed:
                self._wait()
            # One token each is another forward than many: padding the former to the latter would cost more.
            single = [r for r in fed if self._pending(r) == 1]
            self._step([r for r in fed if self._pending(r) > 1])
            begin = time.monotonic()
            self._step(single)
            if single:
                took = time.monotonic() - begin
                self.pace = took if self.pace == 0 else 0.7 * self.pace + 0.3 * took
        return [self.made[i] for i in sorted(self.made)]

    def _pending(self, row: _Row) -> int:
        return len(row.ids) - len(self.rows.tokens[row.slot])

    # Places.

    def _admit(self) -> None:
        late = time.monotonic()
        for row in [r for r in self.queue if r.deadline <= late]:
            self.queue.remove(row)
            text = "the deadline had passed before the row was begun"
            self.made[row.index] = self._judgement(row, "deadline", math.nan, text)
        if not self.queue:
            if self.live and 2 * len(self.live) <= self.places:
                self.rows.keep([r.slot for r in self.live])
                for i, row in enumerate(self.live):
                    row.slot = i
                self.places = len(self.live)
            return
        taken = {r.slot for r in self.live}
        new = []
        for slot in range(self.places):
            if slot not in taken and self.queue:
                row = self.queue.popleft()
                row.slot = slot
                self.rows.crop(slot, 0)
                new.append(row)
        self._share(new)
        self.live += new

    def _share(self, new: list[_Row]) -> None:
        """Reads what the prompts of several answers to a question begin with once."""
        owners = {(r.query.question, r.query.context): r for r in self.live}
        lead: dict[int, tuple[_Row, int]] = {}
        takers = []
        for row in new:
            owner = owners.setdefault((row.query.question, row.query.context), row)
            common = _common(owner, row)
            if owner is row or common == 0:
                continue
            takers.append((owner, row, common))
            if not self.rows.tokens[owner.slot]:  # new, too: it has read nothing yet
                lead[owner.index] = owner, max(common, lead.get(owner.index, (owner, 0))[1])
        if lead:
            self.rows.feed(
                [r.slot for r, _ in lead.values()], [r.ids[:n] for r, n in lead.values()]
            )
        for owner, row, common in takers:
            self.rows.share(owner.slot, row.slot, common)

    # Tools and time.

    def _observe(self) -> None:
        for row in self.live:
            if row.waiting is None or not row.waiting.done():
                continue
            said, row.waiting = row.waiting.result(), None
            name, arguments = row.call
            row.calls.append(
                CallRecord(
                    name,
                    arguments,
                    said.text,
                    said.status,
                    said.seconds,
                    getattr(said, "cached", False),
                )
            )
            limit = None
            if self.loop.max_length is not None:
                limit = max(0, self.loop.max_length - len(row.ids) - 1 - RESERVE)
            row.ids += self.format.observation_ids(said.text, limit=limit) if limit != 0 else []
            row.start = len(row.ids)
            if row.rounds >= self.loop.max_iterations:
                self._end(row, "max_rounds")
            elif limit == 0:
                self._end(row, "length")
            elif name in self.loop.force_work:
                row.ids.append(self.format.ids.work)

    def _expire(self) -> None:
        late = time.monotonic() + _MARGIN * self.pace
        for row in self.live:
            if not row.finish and row.deadline <= late:
                row.waiting = None
                self._end(row, "deadline")

    def _wait(self) -> None:
        if not self.live:
            return
        calls = [r.waiting for r in self.live if r.waiting is not None]
        first = min(r.deadline for r in self.live)
        left = max(0.0, first - time.monotonic() - _MARGIN * self.pace)
        cf.wait(calls, min(left, self.patience), cf.FIRST_COMPLETED)

    # Writing.

    def _step(self, group: list[_Row]) -> None:
        if not group:
            return
        chunks = [r.ids[len(self.rows.tokens[r.slot]) :] for r in group]
        logits = self.rows.feed([r.slot for r in group], chunks)
        draws = torch.zeros(len(group), device=logits.device)
        if self.loop.temperature > 0:
            draws = torch.tensor([float(r.draws[r.written]) if not r.finish else 0.0 for r in group],  # type: ignore[index]
                                 device=logits.device)  # fmt: skip
        loop = self.loop
        chosen = choose(logits, draws, loop.temperature, loop.top_k, loop.top_p).tolist()
        for row, token in zip(group, chosen):
            if row.finish:
                self._judge(row)
            else:
                self._take(row, token)

    def _take(self, row: _Row, token: int) -> None:
        special, loop = self.format.ids, self.loop
        row.written += 1
        if token in (special.eos, special.observation):
            self._interpret(row)
            return
        row.ids.append(token)
        if self._full(row) or len(row.ids) - row.start >= loop.max_new_tokens:
            self._end(row, "length")

    def _full(self, row: _Row) -> bool:
        """Is there room for the end token alone?"""
        limit = self.loop.max_length
        return limit is not None and len(row.ids) + 1 >= limit

    def _interpret(self, row: _Row) -> None:
        loop, special = self.loop, self.format.ids
        move = next_move(self.format, row.ids[row.start :], loop.toolbox.names)
        row.rounds += 1
        if move.kind == "call":
            del row.ids[row.start + move.keep :]
            self.rows.crop(row.slot, min(len(row.ids), len(self.rows.tokens[row.slot])))
            row.ids.append(special.observation)
            row.call = (move.tool, move.arguments)
            limit = None if row.deadline == math.inf else row.deadline
            row.waiting = loop.toolbox.submit(
                move.tool, move.arguments, row.example, deadline=limit
            )
        elif move.kind == "work":
            row.ids.append(special.work)
            row.start = len(row.ids) - 1
            if row.rounds >= loop.max_iterations:
                self._end(row, "max_rounds")
            elif self._full(row):
                self._end(row, "length")
        else:
            self._end(row, "rationale" if move.kind == "rationale" else "no_rationale")

    def _end(self, row: _Row, finish: str) -> None:
        """The next forward gives the reward."""
        one_of("finish", finish, FINISH)
        row.finish = finish
        row.ids.append(self.format.ids.eos)

    def _judge(self, row: _Row) -> None:
        found = self.rows.rewards[row.slot]
        pooling = getattr(plain_face(self.loop.model), "pooling", "last")
        reward = found[-1] if pooling == "last" else sum(found) / len(found)
        self.made[row.index] = self._judgement(row, row.finish, reward)
        self.live.remove(row)

    def _judgement(self, row: _Row, finish: str, reward: float, message: str = "") -> Judgement:
        return Judgement(
            reward, list(row.ids), self.format.decode(row.ids), self.format.read(row.ids), tuple(row.calls), finish,
            row.prompt, row.written, message,
        )  # fmt: skip


def _common(a: _Row, b: _Row) -> int:
    """How many tokens two prompts begin with alike; at least one of ``b`` is left to read."""
    most = min(a.prompt, b.prompt - 1)
    return next((i for i in range(most) if a.ids[i] != b.ids[i]), most)
