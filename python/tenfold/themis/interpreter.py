# SPDX-License-Identifier: Apache-2.0
"""What a model wrote in one round, and so what comes next (Themis, section 5 step 3)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tenfold.themis.traces import TraceFormat


@dataclass(frozen=True)
class Move:
    """What comes next.

    Attributes:
        kind: ``"call"`` (call ``tool``, append the observation, go on); ``"rationale"`` (the trace is complete);
            ``"work"`` (append ``<start_work>`` and go on: it says that it is finished); ``"stop"`` (it says nothing
            that could be gone on from).
        keep: how many tokens of the round stay; what follows an action other than its observation does not.
        tool, arguments, thought: of a call. known: is there such a tool?
    """

    kind: str
    keep: int
    tool: str = ""
    arguments: str = ""
    thought: str = ""
    known: bool = True


def next_move(
    format: TraceFormat, ids: Sequence[int], names: Collection[str] | None = None
) -> Move:
    """Reads a round.

    Args:
        format: of the model's traces. ids: what it generated since the prompt, or since the last observation, without
            the end token and without the ``<start_observation>`` that it stopped at. names: of the tools there are.

    An action counts up to the first ``<start_observation>`` or ``<start_work>``, a rationale from the latter on.
    """
    special = format.ids
    until = next(
        (i for i, t in enumerate(ids) if t in (special.observation, special.work)), len(ids)
    )
    said = format.parse_steps(ids[:until])
    if said.tool is not None and said.arguments is not None:
        known = names is None or said.tool in names
        return Move("call", until, said.tool, said.arguments, said.thought, known)
    if special.work in ids or said.work:
        return Move("rationale", len(ids))
    return Move("work" if said.finished else "stop", len(ids))
