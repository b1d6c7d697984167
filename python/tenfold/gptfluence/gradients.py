# SPDX-License-Identifier: Apache-2.0
"""Influence by gradients: scores <grad l(z), grad l(z')>, and the trajectories that they predict (section 3.7).

TracIn-CP at step t: ``L_t = L_{t-1} - eta_t mean_or_sum_i <grad l(z_i), grad l(z')>`` at the first stored model at
or after it. Grad-Dot:
the same with the last model for all steps; Grad-cosine: with cosines of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold import ops
from tenfold.training.checks import one_of

Batch = Mapping[str, Tensor]
LossOf = Callable[[Any, Batch], Tensor]


def lm_losses(model: Any, batch: Batch) -> Tensor:
    """Mean loss [N] of a causal LM's target tokens, per row; differentiable through the published op."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    total, count = ops.sequence_nll(logits[:, :-1], batch["labels"][:, 1:])
    return total / count.clamp_min(1)


def _gradients(
    model: nn.Module, batch: Batch, loss_of: LossOf, names: Sequence[str] | None, vectorized: bool
) -> Tensor:  # fmt: skip
    """[N, P]: the flat gradient of each row's loss, row by row, or all at once by vmap."""
    chosen = {
        n: p for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)
    }  # fmt: skip
    if not chosen:
        raise ValueError(
            "no parameter of the model is trained"
            + ("" if names is None else f" and among {list(names)}")
        )
    if vectorized:
        return _vectorized(model, batch, loss_of, chosen)
    rows = len(next(iter(batch.values())))
    made = torch.empty(rows, sum(p.numel() for p in chosen.values()))
    for row in range(rows):
        loss = loss_of(model, {k: v[row : row + 1] for k, v in batch.items()}).sum()
        parts = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
        flat = [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(chosen.values(), parts)
        ]
        made[row] = torch.cat(flat)
    return made


def _vectorized(
    model: nn.Module, batch: Batch, loss_of: LossOf, chosen: dict[str, nn.Parameter]
) -> Tensor:
    from torch.func import functional_call, grad, vmap

    values = {n: p.detach() for n, p in chosen.items()}

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        def called(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, parameters, args, kwargs)

        return loss_of(called, {k: v[None] for k, v in row.items()}).sum()

    made = vmap(grad(loss), in_dims=(None, 0))(values, dict(batch))
    return torch.cat([g.flatten(1) for g in made.values()], 1)


def gradient_scores(
    model: nn.Module,
    train: Batch,
    test: Batch,
    loss_of: LossOf = lm_losses,
    *,
    parameters: Sequence[str] | None = None,
    cosine: bool = False,
    vectorized: bool = False,
) -> Tensor:
    """Scores float32 [M, Q] of one state of a model: products (or cosines) of the rows' gradients.

    Args:
        model: in whatever mode it is to be differentiated (call ``eval()`` for no dropout). train, test: batches of
            M and Q rows.
        loss_of: (model, batch) -> losses [N]. parameters: names; default: all that train.
        vectorized: by vmap, which needs a loss of plain torch operations, and all gradients at once.

    Memory: (M + Q) times the number of these parameters. For the head of a large model, use :func:`last_layer_scores`.
    """
    ours, theirs = (_gradients(model, b, loss_of, parameters, vectorized) for b in (train, test))
    if cosine:
        ours, theirs = (nn.functional.normalize(g, dim=1) for g in (ours, theirs))
    return ours @ theirs.T


@torch.no_grad()
def last_layer(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(J [N, T, V], X [N, T, D]) of a causal LM's rows: gradients at its head's output, and the head's inputs.

    J is ``(p - onehot) / targets`` where there is a target, 0 elsewhere; J^T X is the gradient of the mean loss in
    the head's weight.
    """
    head, seen = model.get_output_embeddings(), []
    handle = head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        logits = model(
            **{k: v for k, v in batch.items() if k != "labels"}, use_cache=False
        ).logits.float()
    finally:
        handle.remove()
    labels = batch["labels"][:, 1:]
    there = labels != -100
    J = logits[:, :-1].softmax(-1)
    J.scatter_add_(2, labels.clamp_min(0)[..., None], -torch.ones_like(J[..., :1]))
    share = there / there.sum(1, keepdim=True).clamp_min(1)
    return (J * share[..., None]).contiguous(), seen[0][:, :-1].float().contiguous()


def last_layer_scores(
    model: Any,
    train: Batch,
    test: Batch,
    *,
    approx: str | None = None,
    cosine: bool = False,
    batch_size: int = 16,
) -> Tensor:
    """Scores float32 [M, Q] by the gradient of the head's weight alone, which is never formed.

    Args:
        approx: None: exact, ``sum_{t,s} <J_t, J'_s><x_t, x'_s>``; ``"sum"``: ``<sum_t J_t, sum_s J'_s> <sum_t x_t,
            sum_s x'_s>`` over the tokens with a target, as
            the published code has it, which is another quantity. cosine: divided by both gradients' lengths.
            batch_size: rows at a time.
    """
    if approx is not None:
        one_of("approx", approx, ("sum",))
    ours, theirs = (_parts(model, b, batch_size, approx) for b in (train, test))
    made = torch.cat([torch.cat([ops.outer_dot(*a, *b) for b in theirs], 1) for a in ours])
    if cosine:
        lengths = [
            torch.cat([ops.outer_dot(*p, *p, paired=True) for p in parts]).sqrt()
            for parts in (ours, theirs)
        ]
        made = made / (lengths[0][:, None] * lengths[1]).clamp_min(1e-30)
    return made


def _parts(model: Any, batch: Batch, size: int, approx: str | None) -> list[tuple[Tensor, Tensor]]:
    rows = len(next(iter(batch.values())))
    made = []
    for at in range(0, rows, size):
        part = {k: v[at : at + size] for k, v in batch.items()}
        J, X = last_layer(model, part)
        if approx == "sum":
            there = (part["labels"][:, 1:] != -100).float()
            J, X = J.sum(1, keepdim=True), (X * there[..., None]).sum(1, keepdim=True)
        made.append((J.contiguous(), X.contiguous()))
    return made


def gradient_curve(
    order: Tensor,
    first: Tensor,
    rates: Tensor,
    scores: Tensor | Mapping[int, Tensor],
    reduce: str = "mean",
    start: int = 0,
) -> Tensor:
    """The trajectory [T + 1, Q] that scores predict for one run.

    Args:
        order: int [T, B], rows of the scores, -1: none. first: [Q]. rates: [T], the learning rates.
        scores: [M, Q] for all steps, or by stored model, under the number of steps that it had made; step t (from 0
            on) takes the first
            stored after it, else the last. reduce: over a batch, ``"mean"`` or ``"sum"``, as the training loss.
        start: steps that were made before the first batch of ``order``.
    """
    one_of("reduce", reduce, ("mean", "sum"))
    there = order >= 0
    weights = there / there.sum(1, keepdim=True).clamp_min(1) if reduce == "mean" else there.float()
    weights = weights * rates[:, None]
    stored = sorted(scores) if isinstance(scores, Mapping) else []
    changes = []
    for t, (rows, weight) in enumerate(zip(order.clamp_min(0).long(), weights)):
        matrix = (
            scores
            if isinstance(scores, Tensor)
            else scores[next((s for s in stored if s > t + start), stored[-1])]
        )
        changes.append(weight.to(matrix.dtype) @ matrix[rows])
    steps = torch.stack(changes) if changes else first.new_zeros(0, len(first))
    return torch.cat([first[None], first - steps.cumsum(0)])


def fit_scale(curves: Tensor, truth: Tensor) -> float:
    """The factor of the changes from the first measurement that fits best: a least-squares scalar over [R, S, Q].

    From training runs it is a fit; from the runs that are predicted, an oracle, which may even be negative.
    """
    known = truth.isfinite() & truth[:, :1].isfinite() & curves.isfinite()
    moved, true = (curves - curves[:, :1])[known].double(), (truth - truth[:, :1])[known].double()
    over = float(moved @ moved)
    return float(moved @ true) / over if over else 0.0


def scaled(curves: Tensor, factor: float) -> Tensor:
    """Curves [R, S, Q] whose changes from the first value are multiplied."""
    return curves[:, :1] + factor * (curves - curves[:, :1])


class GradientTracker:
    """Keeps scores of the states of one run: called after steps, on the way.

    Args:
        score: model -> [M, Q], for instance ``lambda m: gradient_scores(m, train, test)``. every: steps between
            stored states.
    """

    def __init__(self, score: Callable[[Any], Tensor], every: int = 1) -> None:
        self.score, self.every = score, every
        self.scores: dict[int, Tensor] = {}

    def step(self, model: nn.Module, step: int, keep: bool = False) -> None:
        """``step`` steps have been made; ``keep``: stored in any case. The model's mode stays."""
        if step % self.every and not keep:
            return
        was = model.training
        model.eval()
        try:
            self.scores[step] = self.score(model)
        finally:
            model.train(was)
