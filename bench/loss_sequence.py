# SPDX-License-Identifier: Apache-2.0
"""Cases of ``sequence_nll``: part of the family ``loss``.

Sums of the negative log-likelihood of whole sequences, of which the first half, the prompt, does not count:
its logits are not read. Scoring, and with the logits' gradient, which is written for all positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider, relative_error
from .gradients import autograd, compiled_gradients, with_gradients
from .loss_logprob import DTYPES

IGNORED = -100
SIZES = ({"b": 8, "s": 64, "v": 49152}, {"b": 4, "s": 64, "v": 128256})


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(s["b"], s["s"], s["v"], generator=made).mul_(2)
    labels = torch.randint(s["v"], (s["b"], s["s"]), generator=made)
    labels[:, : s["s"] // 2] = IGNORED
    return Inputs(logits=logits.to(device, dtype), labels=labels.to(device))


def cross_entropy(i: Inputs) -> tuple[Tensor, Tensor]:
    """One loss per position, of all positions, as scorers have it."""
    flat = F.cross_entropy(i.logits.flatten(0, 1).float(), i.labels.flatten(), reduction="none",
                           ignore_index=IGNORED)  # fmt: skip
    return flat.view(i.labels.shape).sum(1), (i.labels != IGNORED).sum(1)


def rows_that_count(i: Inputs) -> tuple[Tensor, Tensor]:
    """Only those are read; sequence by sequence, so that float32 copies stay small."""
    there = i.labels != IGNORED
    sums = []
    for logits, labels, some in zip(i.logits, i.labels, there):
        rows = logits[some]
        chosen = rows.gather(1, labels[some][:, None])[:, 0].float()
        sums.append((rows.float().logsumexp(1) - chosen).sum())
    return torch.stack(sums), there.sum(1)


def _case(s: Shape, dtype: torch.dtype, gradient: bool) -> Case:
    def ours(i: Inputs) -> tuple[Tensor, Tensor]:
        return ops.sequence_nll(i.logits, i.labels)

    def summed(form: Any) -> Any:
        return lambda i: form(i)[0].sum()

    forms = {"eager:rows": rows_that_count, "peer:cross_entropy": cross_entropy}
    first = s == SIZES[0]
    if gradient:
        providers = [autograd("tenfold", summed(ours), "logits"),
                     *(autograd(name, summed(form), "logits") for name, form in forms.items()),
                     *([compiled_gradients(summed(cross_entropy), "logits")] if first else [])]  # fmt: skip
        defined = with_gradients(summed(lambda i: reference.sequence_nll(i.logits, i.labels)), "logits")  # fmt: skip
    else:
        providers = [provider("tenfold", ours), *(provider(n, form) for n, form in forms.items()),
                     *([compiled(cross_entropy)] if first else [])]  # fmt: skip

        def defined(i: Inputs) -> Any:
            return reference.sequence_nll(i.logits, i.labels)

    return Case(
        op="sequence_nll", variant="gradient" if gradient else "", shape=s, dtype=dtype,
        inputs=_inputs, traffic="copy" if gradient else "read",
        bytes=lambda s, size: size * s["b"] * s["s"] * s["v"] * (3 if gradient else 1) // 2,
        providers=providers, reference=defined, agree=relative_error,
        tolerance=1e-4 if dtype == torch.float32 else 1e-2,
        quick=first and dtype == torch.bfloat16 and not gradient, memory=True,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for gradient in (False, True):
        for dtype in DTYPES:
            for s in SIZES:
                yield _case(s, dtype, gradient)
