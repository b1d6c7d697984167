# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation of one half; the reference model shares what is frozen."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.hft.baselines import merge_lora, prepared
from tenfold.hft.config import HFTConfig
from tenfold.hft.plan import Plan
from tenfold.hft.record import TuneRecord
from tenfold.hft.session import Session
from tenfold.hft.training import HalfTrainer
from tenfold.training.batches import Batches, Data
from tenfold.training.loop import Callback, Pieces, kept_random_state
from tenfold.training.recipe import even_pieces
from tenfold.training.sharding import mesh_of


def make_reference(model: nn.Module, plan: Plan | None = None) -> Any:
    """The policy as it is now, in eval mode; tensors that the Plan freezes are the policy's own."""
    shared = {}
    if plan is not None:
        frozen = set(plan.frozen)
        shared = {id(p): p for n, p in model.named_parameters() if n in frozen}
    reference = copy.deepcopy(model, dict(shared)).eval()
    for parameter in reference.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return reference


def sequence_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the log-probabilities of the labels (-100: left out), per row [B]."""
    flat = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return -flat.sum(1)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of -log sigmoid(beta * margin), and what is reported.

    policy, reference [2, B]: log-probabilities of the chosen and the rejected answers.
    """
    ratios = policy - reference
    margin = ratios[0] - ratios[1]
    loss = -F.logsigmoid(beta * margin).mean()
    metrics = {"accuracy": (margin > 0).float().mean(), "margin": beta * margin.detach().mean()}
    return loss, metrics


class _DpoTrainer(HalfTrainer):
    """Pairs count equally, however many tokens they have."""

    def pieces(self, batch: dict[str, Tensor], rows: int | None) -> Pieces:
        return even_pieces(batch, rows)


class _DpoSession(Session):
    trainer_class = _DpoTrainer


def _both(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities [2, B] of chosen and rejected answers, in one forward."""
    ids = torch.cat([batch["input_ids"], batch["rejected_input_ids"]])
    labels = torch.cat([batch["labels"], batch["rejected_labels"]])
    inputs = {"input_ids": ids}
    if "attention_mask" in batch:
        inputs["attention_mask"] = torch.cat(
            [batch["attention_mask"], batch["rejected_attention_mask"]]
        )
    logits = model(**inputs, use_cache=False).logits
    return sequence_log_probs(logits, labels).view(2, -1)


def dpo(
    model: Any,
    data: Data,
    config: HFTConfig | None = None,
    *,
    work_dir: str | None = None,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> TuneRecord:
    """Trains a policy on preference pairs, in place: half of it; the reference is the policy at the start.

    Args:
        model: a causal LM. data: a dict of [R, S] tensors ``input_ids`` and ``labels`` (the chosen
            answers), ``rejected_input_ids`` and ``rejected_labels``, and optional attention masks.
        config: default the preset ``"dpo"``. The rest as in :func:`tenfold.hft.sft`.

    Returns:
        The record; ``accuracy`` and ``margin`` of every step are in its curve.
    """
    config = (config or HFTConfig.from_preset("dpo")).with_changes(**changes)
    if not callable(data):
        missing = {"input_ids", "labels", "rejected_input_ids", "rejected_labels"} - set(data)
        if missing:
            raise ValueError(f"data of DPO needs {', '.join(sorted(missing))}, too")
    session = _DpoSession("dpo", model, config, [Batches(data, config.sequence_length, config.seed)],
                          work_dir, callback, quiet)  # fmt: skip
    with kept_random_state():
        module = prepared(model, config)
        reference: Any = None
        if config.method != "lora":
            plan = None
            if (
                config.share_reference
                and config.draws()[0] in ("round", "never")
                and config.soft_freeze is None
                and mesh_of(session.accelerator)
                is None  # in shards, what is frozen is no longer there whole
            ):
                plan = _first_plan(session, module)
            reference = make_reference(module, plan).to(session.accelerator.device)

        def loss_of(
            policy: Any, batch: dict[str, Tensor], step: int
        ) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                if reference is not None:
                    known = _both(reference, batch)
                else:  # without its adapters, the policy is the reference
                    inner = session.accelerator.unwrap_model(policy)
                    with inner.disable_adapter():
                        known = _both(inner, batch)
            return dpo_loss(_both(policy, batch), known, config.beta)

        session.round(0, module, loss_of)
    session.finish(module)
    if config.method == "lora":
        merge_lora(module)
    return session.record


def _first_plan(session: Session, module: nn.Module) -> Plan:
    from tenfold.hft.training import Draws

    session.trainer.begin(Draws(session.config))
    return session.trainer.plan(session.trainer.draws.at(0), module)
