# SPDX-License-Identifier: Apache-2.0
"""S3: which samples seed which expert's router: a random share of the data, each to the expert that likes it best.

"Best" is the lowest mean negative log-likelihood of the response, which orders as the perplexity does and does not
overflow. Later checkpoints are often better at everything; ``min_bucket`` and ``assign="relative"`` are against that.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.training.checks import one_of
from tenfold.upit.checkpoints import State, load_expert
from tenfold.upit.config import ASSIGNS

Rows = dict[str, Tensor]
Buckets = list[list[int]]


def as_rows(data: Any, length: int) -> Rows:
    """``input_ids``, ``labels`` and ``attention_mask`` [R, S] of any data with rows. TypeError for a function."""
    from tenfold.training.batches import Batches

    made = Batches(data, length, 0)
    if made.rows() is None:
        raise TypeError("seed samples are rows; data given as a function have none")
    rows: Rows = dict(data) if isinstance(data, Mapping) else {"input_ids": data if data.ndim == 2 else
                                                              data[: made.rows() * length].view(-1, length)}  # type: ignore[operator]  # fmt: skip
    mask = rows.get("attention_mask")
    rows["attention_mask"] = torch.ones_like(rows["input_ids"]) if mask is None else mask
    if rows.get("labels") is None:
        rows["labels"] = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    return rows


def select(rows: Rows, index: Sequence[int] | Tensor) -> Rows:
    """Some of the rows."""
    at = torch.as_tensor(index, dtype=torch.int64)
    return {k: v[at] for k, v in rows.items()}


def sample_rows(labels: Tensor, fraction: float, seed: int) -> list[int]:
    """Numbers of a random share of the rows, ascending; of those at least one that has a response.

    Samples without response tokens (labels that are all -100 after the first position) are left out, with a warning.

    Raises:
        ValueError: none has a response.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    total = len(labels)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    drawn = order[: max(1, round(fraction * total))].sort().values
    good = (labels[drawn][:, 1:] != -100).any(1)
    if not bool(good.any()):
        raise ValueError(
            f"none of the {len(drawn)} seed samples has response tokens (labels other than -100)"
        )
    if not bool(good.all()):
        warnings.warn(f"{int((~good).sum())} of {len(drawn)} seed samples have no response tokens and are left out",
                      stacklevel=2)  # fmt: skip
    return [int(i) for i in drawn[good]]


@torch.inference_mode()
def mean_nll(model: Any, rows: Rows, batch_size: int = 16) -> Tensor:
    """Mean negative log-likelihood (nats) of each row's response tokens, float32 [R], on the CPU."""
    device, found = next(model.parameters()).device, []
    model.eval()
    for at in range(0, len(rows["input_ids"]), batch_size):
        part = {k: v[at : at + batch_size] for k, v in rows.items()}
        width = int(part["attention_mask"].any(0).nonzero().max()) + 1  # padding that all share
        part = {k: v[:, :width].to(device) for k, v in part.items()}
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"],
                       use_cache=False).logits  # fmt: skip
        total, count = ops.sequence_nll(logits[:, :-1], part["labels"][:, 1:].contiguous())
        found.append((total / count).cpu())
    return torch.cat(found)


def nll_matrix(
    experts: Sequence[str | Path | State],
    rows: Rows,
    *,
    base: Any = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Mean response NLL of every row under every expert, float32 [R, n]; one expert is in memory at a time.

    Args:
        experts: folders of models or of LoRA adapters, or state dicts; the last two need ``base``.
        progress: called with the number of each expert that is done.
    """
    columns = []
    for number, expert in enumerate(experts):
        model = load_expert(expert, base, dtype, device)
        columns.append(mean_nll(model, rows, batch_size))
        del model
        if progress is not None:
            progress(number)
    return torch.stack(columns, 1)


def _others_best(nll: Tensor) -> Tensor:
    """[N, n]: the lowest loss among the other experts."""
    low = nll.topk(min(2, nll.shape[1]), 1, largest=False, sorted=True).values
    first = torch.where(nll == low[:, :1], low[:, -1:], low[:, :1])
    # Where two share the lowest, the best of the others is the same value.
    return first


def _capped(scores: Tensor, capacity: int) -> Buckets:
    """Rows to their best expert with room; those that gain most by their best come first."""
    count = scores.shape[1]
    ranked = scores.sort(dim=1, stable=True)
    gap = ranked.values[:, 1] - ranked.values[:, 0] if count > 1 else scores[:, 0]
    buckets: Buckets = [[] for _ in range(count)]
    for row in torch.argsort(-gap, stable=True).tolist():
        for expert in ranked.indices[row].tolist():
            if len(buckets[expert]) < capacity:
                buckets[expert].append(row)
                break
    return [sorted(b) for b in buckets]


def _filled(buckets: Buckets, nll: Tensor, least: int) -> Buckets:
    """Short buckets take rows from long ones: those of least ``NLL_i - min over others``, each row once."""
    margin = nll - _others_best(nll)
    home = {row: i for i, bucket in enumerate(buckets) for row in bucket}
    sizes = [len(b) for b in buckets]
    moved: set[int] = set()
    for i in range(len(buckets)):
        for row in torch.argsort(margin[:, i], stable=True).tolist():
            if sizes[i] >= least:
                break
            donor = home.get(row)
            # A row moves once, and never makes its own bucket short.
            if donor is None or donor == i or row in moved or sizes[donor] <= least:
                continue
            home[row] = i
            moved.add(row)
            sizes[donor] -= 1
            sizes[i] += 1
    return [sorted(r for r, e in home.items() if e == i) for i in range(len(buckets))]


def assign_buckets(
    nll: Tensor,
    assign: str = "argmin",
    min_bucket: int | None = None,
    capacity: int | None = None,
    seed: int = 0,
) -> Buckets:
    """Numbers of the rows of each expert's bucket, ascending.

    Args:
        nll: [N, n] mean losses. assign: ``"argmin"``: lowest loss, equal ones to the lower expert; ``"relative"``:
            less each expert's mean; ``"random"`` (in equal numbers).
        min_bucket: short buckets get the rows of smallest ``NLL_i - min over j != i of NLL_j`` from longer ones
            (None: max(8, N / 4n), but not more than N / n).
        capacity: most rows of a bucket; what is over goes to the next best expert.

    Raises:
        ValueError: losses that are not finite; sizes that N rows do not allow; an empty bucket (with
            ``min_bucket=0``).
    """
    one_of("assign", assign, ASSIGNS)
    if nll.ndim != 2 or 0 in nll.shape:
        raise ValueError(f"nll must be [samples, experts], got {list(nll.shape)}")
    nll = nll.detach().double().cpu()
    rows, count = nll.shape
    bad = (~nll.isfinite()).nonzero()
    if len(bad):
        raise ValueError(
            f"the loss of sample {int(bad[0, 0])} under expert {int(bad[0, 1])} is {float(nll[tuple(bad[0])])}"
        )
    least = min(max(8, rows // (4 * count)), rows // count) if min_bucket is None else min_bucket
    if least * count > rows:
        raise ValueError(
            f"min_bucket {least} of {count} experts needs {least * count} samples, got {rows}"
        )
    if capacity is not None and (capacity * count < rows or capacity < least):
        raise ValueError(
            f"capacity {capacity} of {count} experts must hold {rows} samples and min_bucket {least}"
        )
    if assign == "random":
        order = list(range(rows))
        random.Random(f"{seed}:buckets").shuffle(order)
        buckets = [sorted(order[i::count]) for i in range(count)]
    else:
        scores = nll - nll.mean(0) if assign == "relative" else nll
        buckets = _capped(scores, rows if capacity is None else capacity)
        buckets = _filled(buckets, nll, least)
    empty = [i for i, b in enumerate(buckets) if not b]
    if empty:
        raise ValueError(
            f"expert {empty[0]} has no seed samples; use min_bucket, assign='relative' or more data"
        )
    return buckets
