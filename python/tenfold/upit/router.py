# SPDX-License-Identifier: Apache-2.0
"""Router initialisation (S4): one vector per layer, trained in front of the FFNs of an expert as a dense model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold import ops
from tenfold.optim import MaskedAdamW
from tenfold.training.batches import Batches, Data
from tenfold.training.errors import TrainingError
from tenfold.training.loop import Callback, Progress, kept_random_state, progress_bar
from tenfold.upit.language import inner, lm_loss
from tenfold.upit.options import RouterConfig

Batch = dict[str, Tensor]


def equal_steps(sizes: Sequence[int], config: RouterConfig | None = None) -> int:
    """Steps that every expert gets, whatever the size of its bucket: ``epochs`` of a bucket of mean size.

    Steps in proportion to the buckets starve experts of small ones: their vectors stay short.

    Raises:
        ValueError: no bucket, or an empty one (its expert is named).
    """
    config = config or RouterConfig()
    if not sizes or min(sizes) < 1:
        empty = [str(i) for i, size in enumerate(sizes) if size < 1]
        raise ValueError(f"every expert needs seed data; empty: {', '.join(empty) or 'all'}")
    mean = sum(sizes) / len(sizes)
    return max(1, math.ceil(config.epochs * mean / config.batch_size))


def ffn_modules(model: nn.Module) -> list[nn.Module]:
    """The FFNs of a dense Llama-type model in their order; TypeError if there are none."""
    names = ("gate_proj", "up_proj", "down_proj")
    found = [
        m for m in model.modules() if all(isinstance(getattr(m, n, None), nn.Module) for n in names)
    ]
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no FFN with {', '.join(names)}; supported: Llama, Mistral, SmolLM and alike"
        )
    return found


@contextlib.contextmanager
def ffn_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that holds, after a forward inside the context, the input [B, S, d] of every FFN in turn."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
             for m in ffn_modules(model)]  # fmt: skip
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def seed_loss(
    hidden: Sequence[Tensor], vectors: Tensor, mask: Tensor | None, target: Tensor | None
) -> Tensor:
    """L_aux: the mean over layers and tokens that count; hidden: L of [B, S, d], vectors [L, d]."""
    if len(hidden) != len(vectors):
        raise ValueError(f"vectors of {len(vectors)} layers for a model of {len(hidden)}")
    losses = [ops.router_seed_loss(h, r, mask, target) for h, r in zip(hidden, vectors)]
    return torch.stack(losses).mean()


class _Cache:
    """FFN inputs of single rows of the data, made once while they fit into so many bytes."""

    def __init__(self, model: Any, most: int) -> None:
        self.model, self.most, self.used = model, most, 0
        self.rows: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[Tensor]:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        keys = [b"".join(v[i].cpu().contiguous().numpy().tobytes() for v in inputs.values())
                for i in range(len(batch["input_ids"]))]  # fmt: skip
        missing = [i for i, key in enumerate(keys) if key not in self.rows]
        fresh: dict[bytes, Tensor] = {}
        if missing:
            with ffn_inputs(self.model) as seen:
                inner(self.model).base_model(
                    **{k: v[missing] for k, v in inputs.items()}, use_cache=False
                )
            made = torch.stack(seen, 1)  # [B, L, S, d]
            for i, rows in zip(missing, made):
                fresh[keys[i]] = rows
                size = rows.numel() * rows.element_size()
                if self.used + size <= self.most and keys[i] not in self.rows:
                    self.rows[keys[i]] = rows.clone()
                    self.used += size
        found = torch.stack([self.rows.get(key, fresh.get(key)) for key in keys], 1)  # type: ignore[arg-type]
        return list(found)


def _joined(own: Batch, others: Batch | None) -> tuple[Batch, Tensor | None]:
    """One batch, and the target of its tokens [B, S]: tokens of others have 0, and no loss of the language model."""
    if others is None:
        return own, None
    length = max(own["input_ids"].shape[1], others["input_ids"].shape[1])
    padded = any(b["input_ids"].shape[1] < length for b in (own, others))
    made = {}
    for name in {**own, **others, **({"attention_mask": None} if padded else {})}:
        fill = -100 if name == "labels" else 0
        parts = [b.get(name, torch.ones_like(b["input_ids"])) for b in (own, others)]
        if name == "labels":
            parts[1] = torch.full_like(others["input_ids"], -100)
        made[name] = torch.cat(
            [nn.functional.pad(p, (0, length - p.shape[1]), value=fill) for p in parts]
        )
    target = torch.zeros(made["input_ids"].shape, device=made["input_ids"].device)
    target[: len(own["input_ids"])] = 1
    return made, target


def _groups(model: Any, vectors: nn.Parameter, config: RouterConfig) -> list[dict[str, Any]]:
    rate = config.router_learning_rate or config.learning_rate
    groups: list[dict[str, Any]] = [{"params": [vectors], "lr": rate, "weight_decay": 0.0}]
    if config.train == "joint":
        trained = [p for p in model.parameters() if p.requires_grad]
        for decays in (True, False):
            some = [p for p in trained if (p.ndim > 1) == decays]
            decay = config.weight_decay if decays else 0.0
            groups.append({"params": some, "lr": config.learning_rate, "weight_decay": decay})
    return [g for g in groups if g["params"]]


def train_router(
    model: Any,
    tokenized_bucket: Data,
    *,
    config: RouterConfig | None = None,
    steps: int,
    seed: int = 0,
    negatives: Data | None = None,
    callback: Callback | None = None,
    quiet: bool = True,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Trains the routing vectors of one expert on its bucket of seed data.

    Args:
        model: the expert as a dense causal LM (Llama-type FFNs). With ``train="joint"`` it is trained in place,
            as far as its parameters require gradients; hooks are gone when this returns.
        tokenized_bucket: rows [R, S], or a dict of ``input_ids`` with optional ``labels`` (-100: no loss) and
            ``attention_mask`` (0: a token that does not count for the vectors either).
        steps: of the optimiser, the same for all experts (:func:`equal_steps`). seed: of the start and the order.
        negatives: rows of other buckets, with ``config.negatives``.
        callback: told loss, lm_loss and aux_loss after every step. quiet: no progress bar.

    Returns:
        The vectors, float32 [L, d], and the parameters that were trained with them by name (the model's own
        tensors), None with ``train="router"``.

    Raises:
        ValueError: settings, data, negatives missing. TypeError: a model without such FFNs. TrainingError: a
            loss that is not a number.

    Source:
        UpIT (arXiv 2410.01610), router initialisation.
    """
    config = config or RouterConfig()
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if config.negatives != (negatives is not None):
        what = (
            "needs negatives=, rows of other buckets"
            if config.negatives
            else "has negatives=False, but got some"
        )
        raise ValueError(f"the router's configuration {what}")
    for name, data in (("tokenized_bucket", tokenized_bucket), ("negatives", negatives)):
        if isinstance(data, Tensor) and data.ndim != 2:
            raise ValueError(f"{name} must be rows [R, S], got {list(data.shape)}")
    own = Batches(tokenized_bucket, 2, seed)
    others = Batches(negatives, 2, seed + 1) if negatives is not None else None
    device, was = next(model.parameters()).device, model.training
    layers, width = len(ffn_modules(model)), model.config.hidden_size
    start = (
        torch.randn(layers, width, generator=torch.Generator().manual_seed(seed)) * config.init_std
    )
    vectors = nn.Parameter(start.to(device))
    joint = config.train == "joint"
    cache = None if joint else _Cache(model, config.cache_bytes)
    groups = _groups(model, vectors, config)
    optimizer = MaskedAdamW(groups, betas=config.betas, masks={}, state_dtype="fp32",
                            max_grad_norm=config.max_grad_norm)  # fmt: skip
    with kept_random_state(), progress_bar("router", steps, 0, not quiet) as advance:
        torch.manual_seed(seed)
        model.train(joint)
        try:
            for step in range(steps):
                size = config.batch_size
                more = others.take("negatives", step, size) if others is not None else None
                batch, target = _joined(own.take("router", step, size), more)
                metrics = _step(model, batch, target, vectors, config, cache, device)
                if not math.isfinite(metrics["loss"]):
                    raise TrainingError(
                        f"router initialisation: the loss became {metrics['loss']} at step {step + 1}; lower the "
                        "learning rates, or look at the data"
                    )
                optimizer.step()
                optimizer.zero_grad()
                advance(metrics)
                if callback is not None:
                    callback(Progress("router", step + 1, steps, metrics))
        finally:
            model.train(was)
            optimizer.zero_grad()
    made = vectors.detach().float().cpu()
    if config.normalize == "unit":
        made = made / made.norm(dim=1, keepdim=True).clamp_min(1e-12)
    trained = (
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad} if joint else None
    )
    return made, trained


def _step(
    model: Any, batch: Batch, target: Tensor | None, vectors: nn.Parameter, config: RouterConfig,
    cache: _Cache | None, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """Forward and backward of one batch, in pieces; each counts by its share of the tokens it is a mean of."""
    rows = len(batch["input_ids"])
    each = config.micro_batch_size or rows
    every = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
    wanted = batch["labels"][:, 1:] != -100
    totals = [max(1, int(x.sum())) for x in (every, wanted)]
    sums = torch.zeros(3, dtype=torch.float64)
    for at in range(0, rows, each):
        part = {k: v[at : at + each].to(device) for k, v in batch.items()}
        mask = part.get("attention_mask")
        goal = None if target is None else target[at : at + each].to(device)
        shares = [int(x[at : at + each].sum()) / t for x, t in zip((every, wanted), totals)]
        if cache is not None:
            aux = seed_loss(cache(part), vectors, mask, goal)
            loss, lm = aux * shares[0], torch.zeros(())
        else:
            with ffn_inputs(model) as hidden:
                lm = lm_loss(model, part)
            aux = seed_loss(hidden, vectors, mask, goal)
            loss = config.alpha * shares[1] * lm + (1 - config.alpha) * shares[0] * aux
        loss.backward()
        found = [loss.detach(), shares[1] * lm.detach(), shares[0] * aux.detach()]
        sums += torch.stack([x.double().cpu() for x in found])
    return dict(zip(("loss", "lm_loss", "aux_loss"), sums.tolist()))
