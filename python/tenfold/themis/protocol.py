# SPDX-License-Identifier: Apache-2.0
"""Bodies of scoring requests: their forms, what is refused, and the answers to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.themis.record import judgement_json
from tenfold.themis.rewards import answer_in
from tenfold.themis.scorer import Scored
from tenfold.themis.traces import Query
from tenfold.themis.wire import HttpError

if TYPE_CHECKING:
    from tenfold.themis.serve import Limits

_ITEM = ("question", "answer", "context", "example")
_OPTIONS = ("deadline", "trace")
_REMOTE = ("query", "prompts", "labels")


@dataclass(frozen=True)
class Asked:
    """A request that can be judged. ``form``: ``"one"``, ``"many"`` or ``"remote"`` (OpenRLHF's)."""

    form: str
    queries: list[Query]
    examples: list[Mapping[str, Any] | None]
    deadline: float | None = None
    trace: bool = True

    def reply(self, found: Sequence[Scored], missing: float | None = None) -> dict[str, Any]:
        """The body of the answer. HttpError 503 where OpenRLHF's form needs a number and there is none."""
        if self.form == "remote":
            return _remote_reply(found, missing)
        made = [judgement_json(f, trace=self.trace) for f in found]
        return made[0] if self.form == "one" else {"results": made}


def parse_score(body: dict[str, Any], limits: Limits) -> Asked:
    """A body of ``POST /score``. HttpError 400 or 413 says what is wrong with it."""
    if "query" in body or "prompts" in body:
        return _remote(body, limits)
    options = _ITEM + _OPTIONS if "items" not in body else ("items", *_OPTIONS)
    _known(body, options, "the body")
    deadline, trace = body.get("deadline"), body.get("trace", True)
    if not isinstance(trace, bool):
        raise HttpError(400, f"trace must be true or false, got {type(trace).__name__}")
    if deadline is not None:
        number = isinstance(deadline, int | float) and not isinstance(deadline, bool)
        if not number or not 0 < deadline <= limits.deadline:
            raise HttpError(
                400, f"deadline must be seconds in (0, {limits.deadline:g}], got {deadline!r}"[:200]
            )
    items = body.get("items", [body])
    if not isinstance(items, list):
        raise HttpError(400, f"items must be a list, got {type(items).__name__}")
    _few(items, "items", limits)
    queries: list[Query] = []
    examples: list[Mapping[str, Any] | None] = []
    for i, item in enumerate(items):
        where = f"items[{i}]" if "items" in body else "the body"
        if not isinstance(item, dict):
            raise HttpError(400, f"{where} must be an object, got {type(item).__name__}")
        if "items" in body:
            _known(item, _ITEM, where)
        example = item.get("example")
        if example is not None and not isinstance(example, dict):
            raise HttpError(
                400, f"{where}: example must be an object, got {type(example).__name__}"
            )
        context = item.get("context")
        queries.append(Query(
            _text(item.get("question"), f"{where}: question", limits),
            _text(item.get("answer"), f"{where}: answer", limits),
            None if context is None else _text(context, f"{where}: context", limits),
        ))  # fmt: skip
        examples.append(example)
    return Asked("many" if "items" in body else "one", queries, examples, deadline, trace)


def _remote(body: dict[str, Any], limits: Limits) -> Asked:
    """OpenRLHF's form: ``query`` is prompt and response in one; what is shared among servers may be empty."""
    _known(body, _REMOTE, "the body")
    columns: dict[str, Any] = {name: body.get(name) for name in _REMOTE}
    for name, values in columns.items():
        if not isinstance(values, list) and not (name == "labels" and values is None):
            raise HttpError(400, f"{name} must be a list, got {type(values).__name__}")
    texts, prompts = columns["query"], columns["prompts"]
    labels = columns["labels"] or [None] * len(texts)
    if not len(texts) == len(prompts) == len(labels):
        raise HttpError(
            400, f"query, prompts and labels must be equally many, got {len(texts)}, {len(prompts)} and {len(labels)}"
        )  # fmt: skip
    _few(texts, "query", limits)
    queries = []
    for i, (text, prompt) in enumerate(zip(texts, prompts)):
        _text(text, f"query[{i}]", limits)
        _text(prompt, f"prompts[{i}]", limits)
        try:
            queries.append(Query(prompt, answer_in(text, prompt)))
        except ValueError as error:
            raise HttpError(400, f"query[{i}]: {error}") from None
    return Asked("remote", queries, [None if x is None else {"label": x} for x in labels])


def _remote_reply(found: Sequence[Scored], missing: float | None) -> dict[str, Any]:
    scores = [f.score if math.isfinite(f.score) else missing for f in found]
    if None in scores:
        at = scores.index(None)
        raise HttpError(
            503, f"answer {at} has no reward ({found[at].finish}: {found[at].message})", {"Retry-After": "1"}
        )  # fmt: skip
    rewards = [f.reward if math.isfinite(f.reward) else missing for f in found]
    logs = {"themis_calls": [float(len(f.calls)) for f in found],
            "themis_finished": [float(f.finish == "rationale") for f in found]}  # fmt: skip
    return {"rewards": scores, "scores": rewards, "extra_logs": logs}


def _known(given: dict[str, Any], allowed: Sequence[str], where: str) -> None:
    unknown = [k for k in given if k not in allowed]
    if unknown:
        raise HttpError(
            400, f"{where} has unknown fields {', '.join(map(repr, unknown[:5]))}; known: {', '.join(allowed)}"[:500]
        )  # fmt: skip


def _few(items: list[Any], name: str, limits: Limits) -> None:
    if len(items) > limits.batch:
        raise HttpError(413, f"{name} has {len(items)} entries, at most {limits.batch} are taken")


def _text(value: Any, name: str, limits: Limits) -> str:
    if not isinstance(value, str):
        raise HttpError(400, f"{name} must be a text, got {type(value).__name__}")
    if len(value) > limits.text:
        raise HttpError(413, f"{name} has {len(value)} characters, at most {limits.text} are taken")
    return value
