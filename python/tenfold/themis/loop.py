# SPDX-License-Identifier: Apache-2.0
"""The tool loop: a reward model writes, calls tools, reads what they say, and judges."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from tenfold.rlhf.trunks import plain_face
from tenfold.themis.judgement import FINISH, CallRecord, Judgement
from tenfold.themis.model import check_embeddings
from tenfold.themis.rounds import Run
from tenfold.themis.traces import Query, TraceFormat
from tenfold.training.checks import integers, not_negative

__all__ = ["FINISH", "CallRecord", "Judgement", "ToolLoop"]


class ToolLoop:
    """Judges answers.

    Args:
        model: a :class:`~tenfold.themis.model.ThemisRewardModel`; a causal LM without value head writes traces and
            gives NaN; anything with a method ``make_rows`` (:class:`~tenfold.themis.decoding.Rows`).
        format: of the model's traces. toolbox: what it may call.
        max_iterations: rounds of writing. max_new_tokens: of one round. max_length: of a row, with its end token
            (None: what the model's positions can hold).
        temperature (0: the likeliest token), top_p, top_k (0: all): of sampling.
        batch_size: rows at a time. force_work: tools after which the rationale must follow.

    Raises:
        ValueError: settings; a model without embeddings for the special tokens.
    """

    def __init__(
        self, model: Any, format: TraceFormat, toolbox: Any, *, max_iterations: int = 3,
        max_new_tokens: int = 1024, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
        max_length: int | None = None, batch_size: int = 16,
        force_work: Collection[str] = ("wiki_search",),
    ) -> None:  # fmt: skip
        self.model, self.format, self.toolbox = model, format, toolbox
        self.max_iterations, self.max_new_tokens, self.batch_size = (
            max_iterations,
            max_new_tokens,
            batch_size,
        )
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        face = plain_face(model)
        text = face.config.get_text_config() if hasattr(face, "config") else None
        held = getattr(text, "max_position_embeddings", None)
        self.max_length = held if max_length is None else max_length
        self.force_work = frozenset(force_work)
        integers(self, {"max_iterations": 1, "max_new_tokens": 1, "batch_size": 1, "top_k": 0, "max_length": 2},
                 ("max_length",))  # fmt: skip
        not_negative("temperature", temperature)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if held is not None and self.max_length > held:
            raise ValueError(
                f"max_length must be at most {held}, the model's positions, got {max_length}"
            )
        if not hasattr(face, "make_rows"):
            check_embeddings(face, format)

    @torch.inference_mode()
    def judge(
        self,
        queries: Sequence[Query],
        examples: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        deadlines: Sequence[float | None] | None = None,
        seed: int = 0,
    ) -> list[Judgement]:
        """Judgements in the order of the queries.

        Args:
            examples: what tools may read beside arguments and the query (whose ``answer`` they cannot replace).
            deadlines: points of ``time.monotonic()``; then the trace is scored as it stands.
            seed: of sampling; a row's draws depend on it and its prompt.

        What is wrong with one query (text with special tokens, too long) is that query's ``"error"``.
        """
        for name, given in (("examples", examples), ("deadlines", deadlines)):
            if given is not None and len(given) != len(queries):
                raise ValueError(f"{name} must be one per query, {len(queries)}, got {len(given)}")
        module = plain_face(self.model)
        was = getattr(module, "training", False)
        if was:
            module.eval()
        try:
            run = Run(self, len(queries))
            for i, query in enumerate(queries):
                example = (examples[i] if examples else None) or {}
                limit = deadlines[i] if deadlines else None
                run.begin(i, query, example, math.inf if limit is None else limit, seed)
            return run.to_the_end()
        finally:
            if was:
                module.train()
