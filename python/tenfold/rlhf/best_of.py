# SPDX-License-Identifier: Apache-2.0
"""Best-of-n: sample n answers per prompt, keep the one that a reward model scores highest.

Answer j to prompt i depends on weights, seed, i and j alone: not on the batch size, and not on n, so that the
first four of 32 are what n = 4 gives. Curves over n come from one set of N samples per prompt, by the
unbiased estimate of the expected maximum of n of them drawn without replacement:

    E[max of n] = sum_i s_(i) C(i - 1, n - 1) / C(N, n)       with the scores in ascending order
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.rlhf.generation import response_tokens, sampler
from tenfold.rlhf.preferences import encode_texts
from tenfold.training.checks import one_of, positive

SIZES = (1, 4, 8, 16, 32)


def end_tokens(policy: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: the generation settings', else the tokenizer's."""
    found = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return () if found is None else tuple(found) if isinstance(found, list | tuple) else (found,)


def _uniform(seed: int, sample: int, prompts: int, length: int) -> Tensor:
    """Numbers [prompts, length] in [0, 1) of the sample-th answers; a prompt's do not depend on how many follow."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {sample}".encode()).digest()[:7], "big")
    return torch.rand(prompts, length, generator=torch.Generator().manual_seed(mixed))


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return ids, mask


@torch.no_grad()
def sample_answers(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    n: int = 1,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    max_prompt: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 32,
    seed: int = 1234,
) -> list[list[str]]:
    """``n`` answers to each prompt, as text without the end token, [P][n].

    Args:
        policy: a transformers causal LM. prompts: texts; of long ones the last ``max_prompt`` tokens are read.
        temperature (0: the likeliest token), top_k (0: all), top_p: of sampling. batch_size: answers at a time.

    Raises:
        ValueError: no prompts, an empty one, settings.
    """
    if n < 1 or batch_size < 1 or max_new_tokens < 1 or max_prompt < 1:
        raise ValueError(
            "n, batch_size, max_new_tokens and max_prompt must be >= 1, got "
            f"{n}, {batch_size}, {max_new_tokens} and {max_prompt}"
        )
    if temperature != 0:
        positive("temperature", temperature)
    if not prompts:
        raise ValueError("prompts is empty")
    encoded = [list(tokenizer(p)["input_ids"])[-max_prompt:] for p in prompts]
    empty = [i for i, ids in enumerate(encoded) if not ids]
    if empty:
        raise ValueError(f"prompt {empty[0]} has no tokens; an answer needs something to follow")
    ends, pad = end_tokens(policy, tokenizer), tokenizer.pad_token_id or 0
    generate = sampler(eos=ends, pad=pad, temperature=temperature, top_k=top_k, top_p=top_p)
    was, device = policy.training, next(policy.parameters()).device
    policy.eval()
    answers: list[list[str]] = [[] for _ in prompts]
    try:
        for j in range(n):
            draws = _uniform(seed, j, len(prompts), max_new_tokens)
            for at in range(0, len(prompts), batch_size):
                ids, mask = _left_padded(encoded[at : at + batch_size], pad)
                rows = generate(
                    policy, ids.to(device), mask.to(device), draws[at : at + batch_size].to(device)
                )
                kept = response_tokens(rows, ends)[0]
                for i, (row, on) in enumerate(zip(rows.cpu(), kept.cpu()), at):
                    answers[i].append(tokenizer.decode(row[on].tolist(), skip_special_tokens=True))
    finally:
        policy.train(was)
    return answers


@torch.no_grad()
def rm_scores(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    length: int = 1024,
    batch_size: int = 16,
) -> Tensor:
    """Scores [N] float32 of answers: of prompt, answer and end token, cut to ``length`` tokens (spec 3.11).

    Args:
        model: called with ``input_ids`` and ``attention_mask``, gives scores [B]. tokenizer: its own.
    """
    ids, mask = encode_texts(tokenizer, prompts, answers, length)
    was, device = model.training, next(model.parameters()).device
    model.eval()
    scores = torch.empty(len(ids), dtype=torch.float32)
    # Rows of like length together: less padding.
    order = mask.sum(1).argsort(stable=True)
    for part in order.split(batch_size):
        width = int(mask[part].sum(1).max())
        found = model(ids[part, :width].to(device), mask[part, :width].to(device))
        scores[part] = found.float().cpu()
    model.train(was)
    return scores


def expected_max(scores: Tensor, n: int) -> Tensor:
    """The unbiased estimate [P] of the expected maximum of n scores, from [P, N]; float64.

    Raises ValueError unless 1 <= n <= N.
    """
    if scores.ndim != 2 or not 1 <= n <= scores.shape[1]:
        raise ValueError(
            f"n must be between 1 and the number of samples, got {n} with scores {list(scores.shape)}"
        )
    total = scores.shape[1]
    weights = [math.comb(i - 1, n - 1) / math.comb(total, n) for i in range(1, total + 1)]
    ordered = scores.double().sort(1).values
    return (ordered * torch.tensor(weights, dtype=torch.float64, device=scores.device)).sum(1)


def best_of_n_kl(n: int) -> float:
    """Upper bound of the KL divergence (nats) of best-of-n from its policy: log n - (n - 1) / n."""
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class BestOfN:
    """Samples and their scores.

    Attributes:
        prompts: P texts. answers: [P][N]. scores: float32 [P, N].
    """

    prompts: list[str]
    answers: list[list[str]]
    scores: Tensor

    def best(self, n: int | None = None) -> list[tuple[str, float]]:
        """(answer, score) of the best of the first ``n`` samples (default: all); of equal ones the first."""
        total = self.scores.shape[1]
        n = total if n is None else n
        if not 1 <= n <= total:
            raise ValueError(f"n must be between 1 and {total}, got {n}")
        at = self.scores[:, :n].argmax(1).tolist()
        return [(row[i], float(s[i])) for row, i, s in zip(self.answers, at, self.scores)]

    def curve(
        self, sizes: Sequence[int] = SIZES, estimate: str = "unbiased"
    ) -> dict[int, tuple[float, float]]:
        """(mean, standard error over prompts) of the best score, by n; sizes above N are left out.

        ``estimate``: ``"unbiased"`` uses all samples for every n, ``"prefix"`` the first n alone.
        """
        one_of("estimate", estimate, ("unbiased", "prefix"))
        found = {}
        for n in sizes:
            if n > self.scores.shape[1]:
                continue
            values = (
                expected_max(self.scores, n)
                if estimate == "unbiased"
                else self.scores[:, :n].amax(1).double()
            )
            error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            found[n] = (float(values.mean()), error)
        return found


def best_of_n(
    policy: Any,
    tokenizer: Any,
    reward_model: nn.Module,
    prompts: Sequence[str],
    n: int = 16,
    *,
    reward_tokenizer: Any = None,
    length: int = 1024,
    score_batch_size: int = 16,
    **sampling: Any,
) -> BestOfN:
    """Samples ``n`` answers per prompt and scores them.

    Args:
        policy, tokenizer, prompts, sampling: of :func:`sample_answers`. reward_model, length: of
            :func:`rm_scores`; reward_tokenizer: where it is not the policy's.
    """
    answers = sample_answers(policy, tokenizer, prompts, n, **sampling)
    flat = [a for row in answers for a in row]
    repeated = [p for p in prompts for _ in range(n)]
    scores = rm_scores(
        reward_model,
        reward_tokenizer or tokenizer,
        repeated,
        flat,
        length=length,
        batch_size=score_batch_size,
    )
    return BestOfN(list(prompts), answers, scores.view(len(prompts), n))
