# SPDX-License-Identifier: Apache-2.0
"""``convert``: an MHA or GQA Llama becomes a DHA model (paper section 3; arXiv 2406.06567).

search      every layer one group, operators trained on the LM loss -> distances M
grouping    heads that drifted together share; layers get heads by what sharing costs them
fusion      weights and operators trained until the operators of a group coincide
collapse    one head per group
recovery    ordinary training, optionally with the parent as its teacher
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.dha.align import align
from tenfold.dha.config import ConversionError, DhaConfig
from tenfold.dha.fusion import (
    FusionModel,
    attention_layers,
    check_source,
    fusion_mse_by_layer,
    margin,
    mean_mse,
    operator_distances,
    projections,
    working_copy,
)
from tenfold.dha.grouping import Plan, allowed_sizes, head_budget, make_plan
from tenfold.dha.record import ConversionRecord
from tenfold.dha.recovery import train_recovery
from tenfold.dha.training import Trainer
from tenfold.training.batches import Batches, Data, lm_loss, model_digest
from tenfold.training.loop import Callback, Metrics, kept_random_state, make_accelerator
from tenfold.training.store import WorkFolder

EQUAL = 1e-4  # largest error of a logit, as a share of the largest logit, that counts as rounding


def convert(
    model: Any,
    budget: float | None = None,
    data: Data = None,
    config: DhaConfig | str | None = None,
    *,
    work_dir: str | Path | None = None,
    eval_rows: Tensor | None = None,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> Any:
    """Converts a Llama, Mistral or Qwen2 model with MHA or GQA to decoupled-head attention.

        small = convert(model, budget=0.25, data=token_ids, config="small")

    Args:
        model: a causal LM of type Llama, Mistral or Qwen2 with full attention. It is not changed.
        budget: key + value heads kept, as a share of 2 * H per layer; default 0.25 or the config's.
        data: a token stream [n] or rows [R, S] int64, a dict with ``input_ids`` (``labels``,
            ``attention_mask``) [R, S], or a function (stage, step, size) -> rows.
        config: a :class:`DhaConfig`, or the name of a preset (default ``"paper"``).
        work_dir: results and checkpoints; the same call on the same folder goes on where it was, with
            the result that it would have had.
        eval_rows: rows [R, S] on which the parent, the collapsed and the final model are evaluated.
        callback: called with a :class:`Progress` after every step. quiet: no progress bar.
        changes: fields of the config.

    Returns:
        A ``DhaLlamaForCausalLM`` in eval mode, in the parent's dtype, with the numbers of the
        conversion as ``model.conversion`` (a :class:`ConversionRecord`).

    Raises:
        TypeError: a model of another kind. ValueError: settings, budget or sizes that cannot be met,
            naming what can; a work folder of another run. ConversionError (a RuntimeError): the start of
            fusion differs from the parent; collapsing heads that have not fused; a loss that is not a
            number.
    """
    if isinstance(config, str):
        config = DhaConfig.from_preset(config)
    config = config or DhaConfig()
    if budget is not None:
        changes["budget"] = budget
    config = config.with_changes(**changes)
    check_source(model)
    return Conversion(model, data, config, work_dir, eval_rows, callback, quiet).run()


convert_to_dha = convert


def budgets_of(config: DhaConfig, present: float = 1.0) -> list[float]:
    """The budget of every round: one, or with ``progressive`` 1/2, 1/4, ... down to ``budget``.

    present: the share of 2 * H heads that there are; rounds that would remove none are left out.
    """
    rounds, share = [], 0.5
    while config.progressive and config.method == "dha" and share > config.budget:
        if share < present:
            rounds.append(share)
        share /= 2
    return [*rounds, config.budget]


class Conversion:
    """One run of :func:`convert`; ``run`` returns the model, ``record`` has its numbers."""

    def __init__(
        self,
        parent: Any,
        data: Data,
        config: DhaConfig,
        work_dir: str | Path | None = None,
        eval_rows: Tensor | None = None,
        callback: Callback | None = None,
        quiet: bool = True,
    ) -> None:
        self.parent, self.config, self.eval_rows = parent, config, eval_rows
        self.heads = parent.config.num_attention_heads
        self._check_budgets()
        device = next(parent.parameters()).device
        self.accelerator = make_accelerator(config, device)
        self.folder = WorkFolder(work_dir, self.accelerator.is_main_process) if work_dir else None
        if data is None:
            if self._needs_data():
                raise ValueError(
                    "data is needed for search, fusion and recovery; give token ids, or a baseline "
                    "method with recovery_steps=0"
                )
            data = torch.zeros(1, config.sequence_length, dtype=torch.int64)
        self.batches = Batches(data, config.sequence_length, config.seed)
        self.trainer = Trainer(self.accelerator, config, self.batches, self.folder, callback, quiet)
        layers = attention_layers(parent)
        self.record = ConversionRecord(
            config.to_json(), len(layers), self.heads, layers[0].head_dim
        )

    def _needs_data(self) -> bool:
        c = self.config
        searches = c.method in ("dha", "dha_mean") and c.grouping == "search" and c.search_steps > 0
        return searches or (c.method == "dha" and c.fusion_steps > 0) or c.recovery_steps > 0

    def _base_heads(self) -> int:
        """Key heads, and value heads, of a layer before the first round."""
        return self.heads if self.config.gqa == "expand" else self.parent.config.num_key_value_heads

    def _check_budgets(self) -> None:
        """Refuses now what grouping would refuse after the search."""
        base = self._base_heads()
        if self.config.nested and self.config.progressive:
            raise ValueError("nested cannot be combined with progressive: after the first round keys "
                             "and values are grouped from different heads")  # fmt: skip
        components = 2 * self.parent.config.num_hidden_layers
        sizes = [allowed_sizes(base, self.config)] * components
        head_budget(self._grouping_config(), components // 2, self.heads, sizes)

    def _grouping_config(self) -> DhaConfig:
        """The settings with which heads are grouped: a baseline's own, or the user's."""
        own = {"gqa_mean": {"grouping": "contiguous", "allocation": "uniform"},
               "cka_mean": {"grouping": "cka", "allocation": "uniform"}}  # fmt: skip
        return self.config.with_changes(**own.get(self.config.method, {}))

    def _identity(self) -> dict[str, Any]:
        return {"config": self.config.to_json(), "parent": model_digest(self.parent),
                "data": self.batches.digest()}  # fmt: skip

    def run(self) -> Any:
        """All stages; finished ones are read from the work folder."""
        if self.folder:
            self.accelerator.wait_for_everyone()
            self.folder.claim(self._identity())
        with kept_random_state():
            done = self._finished()
            if done is not None:
                return done
            working = working_copy(self.parent, self.config.gqa).to(self.accelerator.device)
            self._evaluate("parent", self.parent)
            self.record.cka = [self._cka(p).cpu() for p in projections(working)]
            present = self._base_heads() / self.heads
            for number, budget in enumerate(budgets_of(self.config, present), 1):
                self._round(working, number, budget)
            model = to_dha(working)
            final_attention = model.config._attn_implementation
            model.set_attn_implementation(self.config.attention)
            del working
            self._evaluate("collapsed", model)
            return self._recover(model, final_attention)

    # -- stages ----------------------------------------------------------------------------------

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        start = time.monotonic()
        result = work()
        spent = self.record.seconds.get(stage, 0.0) + time.monotonic() - start
        self.record.seconds[stage] = round(spent, 3)
        return result

    def _evaluate(self, moment: str, model: Any) -> None:
        if self.eval_rows is not None:
            self.record.losses[moment] = lm_loss(model, self.eval_rows)

    def _cka(self, projection: Any) -> Tensor:
        weight = projection.weight.detach()
        return ops.head_cka(weight.view(projection.base_heads, -1, weight.shape[1]))

    def _round(self, working: Any, number: int, budget: float) -> None:
        """Search, grouping, fusion and collapse to one budget."""
        config = self._grouping_config().with_changes(budget=budget)
        layers = [layer for layer in working.model.layers]
        parts = list(projections(working))
        if self.config.init == "aligned" and config.grouping == "search":
            whole = [torch.arange(p.base_heads)[None] for p in parts]
            align(layers, whole, [p.query_map for p in parts])
        distances = self._timed("search", lambda: self._distances(working, number, config))
        plan = self._timed("grouping", lambda: self._plan(number, distances, config))
        self.record.distances = distances
        self.record.plans.append(plan.to_json())
        self.record.budget_heads = plan.budget
        if self.config.init == "aligned":
            align(layers, plan.groups, [p.query_map for p in parts])
        if self.config.method == "dha":
            self._timed("fusion", lambda: self._fuse(working, number, plan))
        else:
            for projection, groups in zip(parts, plan.groups):
                projection.set_groups(groups)
                assert projection.omega is not None
                projection.omega.data.fill_(1 / groups.shape[1])
        for projection in parts:
            projection.collapse()

    def _plan(self, number: int, distances: list[Tensor], config: DhaConfig) -> Plan:
        name = f"plan-{number}"
        found = self.folder.load(name) if self.folder else None
        if found is not None:
            return Plan.from_json(found)
        plan = make_plan(distances, self.heads, config)
        if self.folder:
            self.folder.save(name, plan.to_json())
        return plan

    def _distances(self, working: Any, number: int, config: DhaConfig) -> list[Tensor]:
        """M [base, base] of every component: searched, from CKA, or none where GQA's order is kept."""
        parts = list(projections(working))
        if config.grouping == "contiguous":
            return [torch.zeros(p.base_heads, p.base_heads) for p in parts]
        if config.grouping == "cka":
            return [(1 - self._cka(p)).clamp(min=0).cpu() for p in parts]
        stage = f"search-{number}"
        stored = self._finished_stage(stage)
        if stored is not None:
            if config.keep_search_weights:
                _load_weights(working, stored)
            return [stored[f"M.{c}"] for c in range(len(parts))]
        kept = {n: p.detach().clone() for n, p in working.state_dict().items()}
        with self._unchanged(working, stage):
            for c, p in enumerate(parts):
                p.set_groups(torch.arange(p.base_heads)[None], self._coefficients(c))
        module = FusionModel(working, 0.0, config.fusion_loss, penalised=False)

        def loss_of(
            model: Any, batch: dict[str, Tensor], step: int
        ) -> tuple[Tensor, dict[str, Tensor]]:
            loss, lm, _, mse = model(batch, 0.0)
            return loss, {"lm": lm, "mse": mse}

        curve = self.trainer.run(stage, module, config.search_steps, config.batch_size, loss_of)
        omegas = [p.full_omega().detach().cpu() for p in parts]
        distances = [operator_distances(o) for o in omegas]
        if not all(bool(m.isfinite().all()) for m in distances):  # the last step's loss cannot tell
            raise ConversionError(
                f"{stage}: the operators are no numbers after the last step. Lower the learning rates, "
                "or look at the data"
            )
        for p in parts:
            p.drop_groups()
        tensors = {f"M.{c}": m for c, m in enumerate(distances)}
        tensors |= {f"omega.{c}": o for c, o in enumerate(omegas)}
        if config.keep_search_weights:
            tensors |= {f"weight.{n}": v for n, v in working.state_dict().items()}
        else:
            working.load_state_dict(kept)
        self._finish(stage, curve, tensors)
        return distances

    def _coefficients(self, component: int) -> str:
        # Only keys are rotated: values keep one coefficient per dimension.
        kind = self.config.coefficients
        return "full" if kind == "tied" and component % 2 else kind

    def _fuse(self, working: Any, number: int, plan: Plan) -> None:
        """Trains weights and operators until each group's operators coincide, or steps are over."""
        config, stage = self.config, f"fusion-{number}"
        with self._unchanged(working, stage):
            for c, (p, groups) in enumerate(zip(projections(working), plan.groups)):
                p.set_groups(groups, self._coefficients(c))
        stored = self._finished_stage(stage)
        if stored is not None:
            _load_weights(working, stored)
        elif any(g.shape[1] > 1 for g in plan.groups):
            module = FusionModel(working, config.lambda_init, config.fusion_loss, penalised=True)
            steps = config.fusion_steps

            def loss_of(
                model: Any, batch: dict[str, Tensor], step: int
            ) -> tuple[Tensor, dict[str, Tensor]]:
                t = margin(step, steps, config.margin_base, config.margin_end)
                loss, lm, penalty, mse = model(batch, t)
                return loss, {"lm": lm, "penalty": penalty, "mse": mse}

            def after_step(_: Any, step: int, metrics: Metrics) -> bool:
                module.clamp_multiplier()
                metrics["lambda"] = float(module.multiplier.detach())
                metrics["mse"] = mean_mse(working)
                return metrics["mse"] < config.stop_mse

            curve = self.trainer.run(stage, module, steps, config.batch_size, loss_of, after_step)
            weights = {f"weight.{n}": v for n, v in working.state_dict().items()}
            self._finish(stage, curve, weights)
        self._check_fused(working)

    def _check_fused(self, working: Any) -> None:
        by_layer = self.record.mse_by_layer = fusion_mse_by_layer(working)
        mse = mean_mse(working)
        if mse > self.config.collapse_mse and not self.config.force:
            each = ", ".join(f"{i}: {value:.2g}" for i, value in enumerate(by_layer))
            raise ConversionError(
                f"the heads have not fused: mean mse {mse:.3g} is above collapse_mse "
                f"{self.config.collapse_mse:g}; collapsing now would lose what they do not share. Mean "
                f"per layer: {each}. Give more fusion_steps or a higher omega_lr (in a work folder of its "
                "own), or collapse with force=True (--force) or a larger collapse_mse: on the same "
                "work folder that goes on from here"
            )

    def _recover(self, model: Any, final_attention: str) -> Any:
        config = self.config
        teacher = self.parent if config.distill > 0 else None
        curve = self._timed("recovery", lambda: train_recovery(self.trainer, model, teacher))
        self.record.curves["recovery"] = curve
        if config.sort_heads:
            from tenfold.dha.layout import sort_query_heads

            sort_query_heads(model)
        model.to(next(self.parent.parameters()).dtype).eval()
        self._evaluate("final", model)
        model.set_attn_implementation(final_attention)
        self.record.key_heads = list(model.config.key_heads)
        self.record.value_heads = list(model.config.value_heads)
        model.conversion = self.record
        if self.folder and self.folder.main:
            model.save_pretrained(self.folder.path / "model")
            self.record.write(self.folder.path / "record.json")
            self.folder.save("done", {})
            self.folder.drop_checkpoints("recovery")
        self.accelerator.wait_for_everyone()
        return model

    # -- the work folder -------------------------------------------------------------------------

    def _finished(self) -> Any | None:
        if self.folder is None or self.folder.load("done") is None:
            return None
        from tenfold.dha.model import DhaLlamaForCausalLM

        dtype = next(self.parent.parameters()).dtype
        model = DhaLlamaForCausalLM.from_pretrained(self.folder.path / "model", dtype=dtype)
        self.record = ConversionRecord.read(self.folder.path / "record.json")
        model.conversion = self.record
        return model.to(self.accelerator.device).eval()

    def _finished_stage(self, stage: str) -> dict[str, Tensor] | None:
        """Tensors of a stage that the work folder has whole; its curve goes into the record."""
        found = self.folder.load(stage) if self.folder else None
        if self.folder is None or found is None:
            return None
        self.record.curves[stage] = found["curve"]
        return self.folder.load_tensors(stage)

    def _finish(self, stage: str, curve: list[Metrics], tensors: dict[str, Tensor]) -> None:
        self.record.curves[stage] = curve
        if self.folder:
            self.folder.save(stage, {"curve": curve}, tensors)
            self.folder.drop_checkpoints(stage)
            self.accelerator.wait_for_everyone()

    def _unchanged(self, working: Any, stage: str) -> Any:
        return (
            _Unchanged(working, stage, self.batches) if self.config.check_equivalence else _Free()
        )


class _Free:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class _Unchanged:
    """Checks that what is done inside leaves the logits alone."""

    def __init__(self, model: Any, stage: str, batches: Batches) -> None:
        self.model, self.stage = model, stage
        ids = batches.take("check", 0, 1)["input_ids"][:, :64]
        self.ids = ids.to(next(model.parameters()).device)

    @torch.no_grad()
    def _logits(self) -> Tensor:
        self.model.eval()
        return self.model(input_ids=self.ids, use_cache=False).logits.float()

    def __enter__(self) -> None:
        self.before = self._logits()

    def __exit__(self, failed: Any, *_: Any) -> None:
        if failed is not None:
            return
        error = float((self._logits() - self.before).abs().max())
        if not error <= EQUAL * (1 + float(self.before.abs().max())):
            raise ConversionError(
                f"{self.stage}: the model with its starting operators is not the parent: max logit "
                f"error {error:.3g}. The operators must start at identity; check_equivalence=False "
                "goes on regardless"
            )


def _load_weights(working: Any, stored: dict[str, Tensor]) -> None:
    weights = {n.removeprefix("weight."): v for n, v in stored.items() if n.startswith("weight.")}
    working.load_state_dict(weights)


def to_dha(working: Any) -> Any:
    """The DHA model that a collapsed working copy is; it shares no memory with it."""
    from tenfold.dha.export import from_mha
    from tenfold.dha.layout import HeadLayout

    parts = list(projections(working))
    maps = [p.query_map.tolist() for p in parts]
    weights = [p.weight.detach().view(p.base_heads, p.head_dim, -1) for p in parts]
    biases: list[Any] = [None, None]
    if parts[0].bias is not None:
        rows = [p.bias.detach().view(p.base_heads, -1) for p in parts]
        biases = [rows[::2], rows[1::2]]
    return from_mha(
        working, HeadLayout.from_maps(maps[::2], maps[1::2]), weights[::2], weights[1::2],
        key_biases=biases[0], value_biases=biases[1],
    )  # fmt: skip
