# SPDX-License-Identifier: Apache-2.0
"""Themis as the reward of verl, OpenRLHF and TRL, asked over HTTP: ``tenfold themis serve`` judges.

    tenfold themis serve my-themis --port 8760                    # once; TENFOLD_THEMIS_TOKEN for other machines

    export TENFOLD_THEMIS_URL=http://127.0.0.1:8760               # for the trainer's processes
    python -m verl.trainer.main_ppo reward.custom_reward_function.path=pkg://tenfold.integrations.themis \
        reward.custom_reward_function.name=compute_score ...
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url $(python -m tenfold.integrations.themis) ...
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url http://any:TOKEN@host:8760/score ...     # or so

    GRPOTrainer(model, reward_funcs=tenfold.integrations.themis.trl_reward, ...)                      # TRL

Environment: ``TENFOLD_THEMIS_URL``, ``TENFOLD_THEMIS_TOKEN``, ``TENFOLD_THEMIS_DEADLINE`` (seconds, default 60),
``TENFOLD_THEMIS_MISSING`` (the reward of a response that got none; without it that is an error, in TRL None).
No host is imported or changed.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

from tenfold.themis.client import RemoteScorer
from tenfold.themis.rewards import ThemisReward
from tenfold.themis.scorer import Scored
from tenfold.themis.traces import Query

__all__ = ["compute_score", "compute_scores", "reward_func", "scorer", "trl_reward"]


def _number(name: str) -> float | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {text!r}")
    return value


@functools.cache
def _scorer(url: str, token: str | None, deadline: float, process: int) -> RemoteScorer:
    return RemoteScorer(url, token, deadline=deadline)


def scorer() -> RemoteScorer:
    """The scorer that the environment names; one per process. ValueError where none is named."""
    url = os.environ.get("TENFOLD_THEMIS_URL")
    if not url:
        raise ValueError(
            "TENFOLD_THEMIS_URL must say where `tenfold themis serve` listens, as http://127.0.0.1:8760"
        )
    deadline = _number("TENFOLD_THEMIS_DEADLINE")
    token = os.environ.get("TENFOLD_THEMIS_TOKEN") or None
    # A thread pool does not survive a fork.
    return _scorer(url, token, 60.0 if deadline is None else deadline, os.getpid())


def _verl(found: Scored) -> dict[str, Any]:
    """The same keys for every response: verl makes an array of each."""
    score, missing = found.score, _number("TENFOLD_THEMIS_MISSING")
    if not math.isfinite(score):
        if missing is None:
            raise RuntimeError(
                f"a response got no reward ({found.finish}: {found.message}); "
                "TENFOLD_THEMIS_MISSING gives such responses one"
            )
        score = missing
    return {"score": score, "themis_finish": found.finish, "themis_calls": len(found.calls),
            "themis_new_tokens": found.new_tokens}  # fmt: skip


def _asked(solution: str, truth: Any, extra: Any) -> tuple[Query, dict[str, Any]]:
    extra = dict(extra or {})
    if not isinstance(extra.get("question"), str):
        raise ValueError(
            f"extra_info needs the text `question` (what was asked); it has {sorted(map(str, extra))}"
        )
    context = extra.get("context")
    example = {k: v for k, v in extra.items() if isinstance(v, str | int | float | list | dict)}
    example = {k: v for k, v in example.items() if k not in ("question", "context")}
    return Query(extra["question"], solution, context), example | {"ground_truth": truth}


async def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **settings: Any
) -> dict[str, Any]:
    """verl's custom reward function: the score of one response, and what verl logs beside it.

    Args:
        solution_str: the response. extra_info: with ``question`` and perhaps ``context``; its other entries, and
            ``ground_truth``, are what tools may read.

    Raises:
        ValueError: no question, no server named. RemoteError: no answer. RuntimeError: no reward.
    """
    query, example = _asked(solution_str, ground_truth, extra_info)
    return _verl(await scorer().score(query, example))


def compute_scores(
    data_sources: Sequence[str], solution_strs: Sequence[str], ground_truths: Sequence[Any],
    extra_infos: Sequence[Any], **settings: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """:func:`compute_score` of many, for verl's reward manager ``batch``."""
    asked = [_asked(*row) for row in zip(solution_strs, ground_truths, extra_infos)]
    return [_verl(f) for f in scorer().score_many([q for q, _ in asked], [e for _, e in asked])]


def _reward() -> ThemisReward:
    return ThemisReward(scorer(), missing=_number("TENFOLD_THEMIS_MISSING"))


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None = None, **settings: Any
) -> dict[str, Any]:  # fmt: skip
    """OpenRLHF's custom reward function. Errors as of :func:`compute_score`."""
    reward = _reward()
    made = reward.openrlhf(queries, prompts, labels)
    for i, (score, found) in enumerate(zip(made["rewards"].tolist(), reward.last)):
        if not math.isfinite(score):
            raise RuntimeError(f"response {i} got no reward ({found.finish}: {found.message})")
    return made


def trl_reward(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> list[float | None]:
    """A reward function of TRL's trainers. Errors as of :func:`compute_score`."""
    return _reward()(prompts, completions, **columns)


if __name__ == "__main__":
    print(__file__)
