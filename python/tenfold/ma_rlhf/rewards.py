# SPDX-License-Identifier: Apache-2.0
"""What responses are worth: functions in TRL's and OpenRLHF's styles, reward models, weighted sums of them.

TRL's style: ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, given what its
signature names; None means that the function does not judge that response. OpenRLHF's style, known by a
parameter ``queries``: ``f(queries, prompts, labels)``, which gives a tensor or a dict with ``rewards``
and possibly ``extra_logs``.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

RewardFunction = Callable[..., Any]
LABELS = ("labels", "label")


@dataclass(frozen=True)
class Answers:
    """What is judged: n responses.

    Attributes:
        prompts: as the data set has them; texts: what the policy read; completions: its answers as text.
        ids, mask: prompts and responses with padding on both sides, [n, P + R]. prompt: P.
        columns: of the data set, lists of n.
    """

    prompts: list[Any]
    texts: list[str]
    completions: list[str]
    ids: Tensor
    mask: Tensor
    prompt: int
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def tokens(self) -> list[list[int]]:
        """The tokens of every response."""
        ids, mask = (x[:, self.prompt :].cpu() for x in (self.ids, self.mask))
        return [row[on].tolist() for row, on in zip(ids, mask)]


@dataclass(frozen=True)
class Judged:
    """Scores float32 [n] (NaN: no function judged the row), parts [n, F] of ``names``, and what else is logged."""

    score: Tensor
    parts: Tensor
    logs: dict[str, float]


class ModelReward:
    """A reward model as a reward.

    Args:
        model: called with ``input_ids`` and ``attention_mask`` [n, S], right-padded; gives scores [n], or an
            output with ``logits`` [n, 1] (transformers' sequence classifiers).
        tokenizer: of the reward model, None where it reads the policy's tokens.
        micro_batch_size: rows per forward. limit: tokens that it reads, the last ones of longer texts.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, micro_batch_size: int | None = None,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model.eval(), tokenizer
        self.micro_batch_size, self.limit = micro_batch_size, limit
        self.__name__ = type(model).__name__

    @torch.no_grad()
    def judge(self, answers: Answers) -> list[float]:
        """Scores of all rows."""
        if self.tokenizer is None:
            rows = [row[on] for row, on in zip(answers.ids, answers.mask)]
        else:
            both = [t + c for t, c in zip(answers.texts, answers.completions)]
            rows = [torch.tensor(self.tokenizer(t)["input_ids"]) for t in both]
        rows = [r if self.limit is None else r[-self.limit :] for r in rows]
        device = next(self.model.parameters()).device
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        made: list[float] = []
        size = self.micro_batch_size or len(rows)
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            ids = nn.utils.rnn.pad_sequence(part, True, 0 if pad is None else pad).to(device)
            lengths = torch.tensor([len(r) for r in part], device=device)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            out = self.model(input_ids=ids, attention_mask=mask.long())
            scores = out if isinstance(out, Tensor) else out.logits
            if scores.numel() != len(part):
                raise ValueError(
                    f"the reward model {self.__name__} must give one score per row, [{len(part)}], got "
                    f"{list(scores.shape)}"
                )
            made += scores.float().flatten().tolist()
        return made


class Rewards:
    """The weighted sum of one or more rewards.

    Args:
        functions: a reward or a list of them: callables (also coroutines) of either style, or modules.
        weights: one per reward, default 1.

    Raises:
        TypeError: neither a callable nor a module. ValueError: none, or another number of weights.
    """

    def __init__(self, functions: Any, weights: Sequence[float] | None = None) -> None:
        found = list(functions) if isinstance(functions, list | tuple) else [functions]
        if not found:
            raise ValueError("reward needs at least one function")
        for f in found:
            if not callable(f) and not isinstance(f, ModelReward):
                raise TypeError(
                    "reward must be a callable, an nn.Module, a ModelReward, or a list of these; got "
                    f"{type(f).__name__}"
                )
        self.functions = [ModelReward(f) if isinstance(f, nn.Module) else f for f in found]
        self.weights = [1.0] * len(found) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(found) or not all(map(math.isfinite, self.weights)):
            raise ValueError(f"reward_weights must be {len(found)} finite numbers, got {weights}")
        self.names: list[str] = []
        for i, f in enumerate(self.functions):
            name = getattr(f, "__name__", type(f).__name__)
            self.names.append(f"{name}_{i}" if name in self.names else name)

    def modules(self) -> list[nn.Module]:
        """Reward models among the functions."""
        return [f.model for f in self.functions if isinstance(f, ModelReward)]

    def initial_critic(self) -> nn.Module | None:
        """The reward model that a critic can begin as: the only reward, and it reads the policy's tokens."""
        only = self.functions[0]
        fits = len(self.functions) == 1 and isinstance(only, ModelReward) and only.tokenizer is None
        return only.model if fits else None  # type: ignore[union-attr]

    def __call__(self, answers: Answers) -> Judged:
        """Scores of some answers. ValueError where a function does not give one number per row."""
        rows = len(answers.completions)
        logs: dict[str, float] = {}
        parts = torch.full((rows, len(self.functions)), math.nan)
        for i, f in enumerate(self.functions):
            made = f.judge(answers) if isinstance(f, ModelReward) else _called(f, answers)
            if isinstance(made, Mapping):
                extra = made.get("extra_logs") or {}
                logs |= {f"rewards/{self.names[i]}/{k}": _mean(v) for k, v in extra.items()}
                made = made.get("rewards")
            parts[:, i] = _numbers(made, rows, self.names[i])
        there = ~parts.isnan()
        weights = torch.tensor(self.weights)
        score = torch.where(there, parts * weights, 0.0).sum(1)
        return Judged(torch.where(there.any(1), score, math.nan), parts, logs)


def _called(f: RewardFunction, answers: Answers) -> Any:
    parameters = inspect.signature(f).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given: dict[str, Any]
    if "queries" in parameters:
        name = next((n for n in LABELS if n in answers.columns), None)
        labels = answers.columns[name] if name else [None] * len(answers.texts)
        given = {"queries": [t + c for t, c in zip(answers.texts, answers.completions)],
                 "prompts": answers.texts, "labels": labels}  # fmt: skip
    else:
        chats = [not isinstance(p, str) for p in answers.prompts]
        completions = [
            [{"role": "assistant", "content": c}] if chat else c
            for c, chat in zip(answers.completions, chats)
        ]
        given = {"prompts": answers.prompts, "completions": completions,
                 "completion_ids": answers.tokens()} | answers.columns  # fmt: skip
    made = f(**{k: v for k, v in given.items() if anything or k in parameters})
    return asyncio.run(made) if inspect.iscoroutine(made) else made


def _numbers(made: Any, rows: int, name: str) -> Tensor:
    if isinstance(made, Tensor):
        made = made.detach().float().cpu().flatten()
    elif made is not None and hasattr(made, "__len__"):
        made = torch.tensor([math.nan if x is None else float(x) for x in made])
    if not isinstance(made, Tensor) or len(made) != rows:
        what = f"{len(made)} numbers" if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(
            f"the reward {name} must give one number (or None) per response, {rows}; got {what}"
        )
    return made


def _mean(value: Any) -> float:
    return float(torch.as_tensor(value, dtype=torch.float32).mean())
