# SPDX-License-Identifier: Apache-2.0
"""The tool loop fed as it goes: a row's place is given to the next request when it is done, and answers do not wait
for the other rows of a batch, whose tools may be slow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from tenfold.rlhf.trunks import plain_face
from tenfold.themis.judgement import Judgement
from tenfold.themis.loop import ToolLoop
from tenfold.themis.rounds import PATIENCE, Run
from tenfold.themis.waiting import Request

# Seconds of one wait for tools while there are free places, for which requests may come.
_SOON = 0.01
Take = Callable[[int], Sequence[tuple[Request, float]]]
Deliver = Callable[[Request, Judgement], None]


class _Made(dict[int, Judgement]):
    """Hands judgements over instead of keeping them."""

    def __init__(self, run: _Stream) -> None:
        super().__init__()
        self.run = run

    def __setitem__(self, index: int, judgement: Judgement) -> None:
        self.run.deliver(self.run.requests.pop(index), judgement)


class _Stream(Run):
    def __init__(self, loop: ToolLoop, take: Take, deliver: Deliver) -> None:
        super().__init__(loop, loop.batch_size)
        self.take, self.deliver = take, deliver
        self.requests: dict[int, Request] = {}
        self.count = 0
        self.made = _Made(self)

    def add(self, taken: Sequence[tuple[Request, float]]) -> None:
        """Puts requests, with the times at which their traces have to end, into the queue."""
        for request, end in taken:
            self.requests[self.count] = request
            self.count += 1
            self.begin(self.count - 1, request.query, request.example or {}, end, 0)

    def _expire(self) -> None:
        """Rows whose callers have gone, or were told that it is too late, give up their places, too."""
        for row in [r for r in self.live if self.requests[r.index].state == "answered"]:
            if row.waiting is not None:
                row.waiting.cancel()
            del self.requests[row.index]
            self.live.remove(row)
        super()._expire()

    def _wait(self) -> None:
        self.patience = _SOON if len(self.live) < self.places else PATIENCE
        super()._wait()

    def _admit(self) -> None:
        room = self.places - len(self.live) - len(self.queue)
        if room > 0:
            self.add(self.take(room))
        # Without a queue, the loop would give up places that the next requests need.
        if any(row.deadline > time.monotonic() for row in self.queue):
            super()._admit()
        elif self.queue:
            late = "the deadline had passed before the row was begun"
            while self.queue:
                row = self.queue.popleft()
                self.made[row.index] = self._judgement(row, "deadline", math.nan, late)


@torch.inference_mode()
def stream(
    loop: ToolLoop, first: Sequence[tuple[Request, float]], take: Take, deliver: Deliver
) -> None:
    """Judges requests until there are no more.

    Args:
        first: requests, and times of ``time.monotonic()`` at which their traces have to end.
        take: called between steps with the number of free places; more of them, or none.
        deliver: called with every request and its judgement, once it is there; not with those that somebody else
            has answered meanwhile.
    """
    module = plain_face(loop.model)
    was = getattr(module, "training", False)
    if was:
        module.eval()
    try:
        run = _Stream(loop, take, deliver)
        run.add(first)
        run.to_the_end()
    finally:
        if was:
            module.train()
