# SPDX-License-Identifier: Apache-2.0
"""How well a language model does on rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def score(model: Any, rows: dict[str, Tensor], batch_size: int = 16) -> dict[str, float]:
    """Mean loss (nats) per answer token, its negative ``log_prob``, and greedy token ``accuracy``."""
    device, was = next(model.parameters()).device, model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    labels = rows.get("labels", rows["input_ids"])
    for at in range(0, len(labels), batch_size):
        part = {k: v[at : at + batch_size].to(device) for k, v in rows.items() if k != "labels"}
        want = labels[at : at + batch_size].to(device)[:, 1:]
        logits = model(**part, use_cache=False).logits[:, :-1].float()
        used = want != -100
        loss = F.cross_entropy(logits[used], want[used], reduction="sum")
        right = (logits[used].argmax(-1) == want[used]).sum()
        totals += torch.stack([loss, right, used.sum()]).double().cpu()
    model.train(was)
    loss, right, count = totals.tolist()
    return {"log_prob": -loss / max(1.0, count), "accuracy": right / max(1.0, count)}
