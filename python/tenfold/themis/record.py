# SPDX-License-Identifier: Apache-2.0
"""Judgements and evaluations as JSON: what the endpoint sends, logs keep, and reports read."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tenfold.themis.judgement import CallRecord, Judgement
from tenfold.themis.traces import Query, Step, Trace
from tenfold.themis.waiting import Scored


def judgement_json(found: Judgement, *, trace: bool = True) -> dict[str, Any]:
    """A judgement as JSON holds it: no token ids; a missing reward is None.

    ``trace``: with the text, the steps and the rationale, and not only the tools that were called.
    """
    made: dict[str, Any] = {
        "reward": _number(found.reward), "finish": found.finish, "message": found.message,
        "prompt_tokens": found.prompt_tokens, "new_tokens": found.new_tokens,
        "calls": [asdict(c) if trace else {"tool": c.tool, "status": c.status, "seconds": c.seconds,
                                                 "cached": c.cached}
                  for c in found.calls],
    }  # fmt: skip
    if isinstance(found, Scored):
        made |= {"score": _number(found.score), "seconds": round(found.seconds, 6)}
    if trace:
        made |= {"text": found.text, "trace": asdict(found.trace)}
    return made


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def read_judgement(value: Mapping[str, Any]) -> Scored:
    """What :func:`judgement_json` made, without token ids. ValueError for anything else."""
    try:
        given = value.get("trace") or {}
        steps = tuple(Step(**s) for s in given.get("steps", ()))
        calls = tuple(
            CallRecord(c["tool"], c.get("arguments", ""), c.get("observation", ""), c["status"],
                       float(c["seconds"]), bool(c.get("cached"))) for c in value["calls"]
        )  # fmt: skip
        reward = _float(value["reward"])
        return Scored(
            reward, [], value.get("text", ""), Trace(steps, given.get("closing"), given.get("rationale")),
            calls, value["finish"], value["prompt_tokens"], value["new_tokens"], value.get("message", ""),
            _float(value.get("score", reward)), float(value.get("seconds", 0.0)),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no judgement: {type(error).__name__} {error}") from None


class JudgementLog:
    """A ``log`` of a scorer: one line of JSON per answer, with question, answer and trace. From any thread.

    Args:
        path: the file; lines are added to it.
    """

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._lock = threading.Lock()

    def __call__(self, query: Query, found: Judgement) -> None:
        """Adds a line."""
        line = json.dumps(asdict(query) | judgement_json(found), ensure_ascii=False)
        with self._lock:
            self._file.write(line.encode("utf-8", "replace").decode() + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
