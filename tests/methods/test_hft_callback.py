# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with HalfFineTuneCallback: optimisers, new draws, checkpoints, refusals."""

import json

import hft_models as tiny
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tenfold import hft
from tenfold.hft.callback import HalfFineTuneCallback, optimizer_cls_and_kwargs

ROWS = [{"input_ids": r, "labels": r} for r in tiny.rows(24, 12)]


def arguments(folder, **changes):
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [],
                "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True,
                "weight_decay": 0.1, "seed": 3}  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(settings | changes))


def trainer(folder, model, callback, optimizer="masked_adamw", callbacks=(), **changes):
    args = arguments(folder, **changes)
    kind = (
        {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs(args, optimizer)} if optimizer else {}
    )
    return Trainer(
        model=model, args=args, train_dataset=ROWS, callbacks=[callback, *callbacks], **kind
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


class Watch(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(
            frozenset(n for n, p in kwargs["model"].named_parameters() if p.requires_grad)
        )


@pytest.mark.parametrize("optimizer", ["masked_adamw", "masked_adamw_8bit", None])
def test_one_round(tmp_path, optimizer):
    model = tiny.tiny(3)
    before, plan = weights(model), hft.select(model, 0, 7)
    made = trainer(tmp_path, model, HalfFineTuneCallback(seed=7), optimizer)
    made.train()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (n in plan.frozen), n
    held = {id(p) for g in made.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if n in plan.trained}


def test_given_optimizers(tmp_path):
    for kind in (torch.optim.AdamW, hft_optimizer):
        model = tiny.tiny(2)
        before, plan = weights(model), hft.select(model)
        optimizer = kind(model.parameters(), lr=1e-2)  # before the callback draws
        made = Trainer(model=model, args=arguments(tmp_path), train_dataset=ROWS,
                       callbacks=[HalfFineTuneCallback()], optimizers=(optimizer, None))  # fmt: skip
        made.train()
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (n in plan.frozen), n


def hft_optimizer(parameters, lr):
    from tenfold.optim import MaskedAdamW

    return MaskedAdamW(parameters, lr=lr)


@pytest.mark.parametrize("optimizer", ["masked_adamw", None])
@pytest.mark.parametrize(
    "rule, want", [("steps:2", [0, 0, 1, 1, 2, 2]), ("epoch", [0, 0, 0, 1, 1, 1])]
)
def test_new_draws_on_the_way(tmp_path, rule, want, optimizer):
    model, watch = tiny.tiny(3), Watch()
    plans = [frozenset(hft.select(model, r).trained) for r in range(3)]
    changes = {"per_device_train_batch_size": 8 if rule == "epoch" else 4}
    made = trainer(
        tmp_path, model, HalfFineTuneCallback(reselect=rule), optimizer, [watch], **changes
    )
    made.train()
    assert watch.seen == [plans[i] for i in want]
    inner = made.optimizer.optimizer
    assert {n for n, p in model.named_parameters() if p in inner.state} == set(plans[want[-1]])


@pytest.mark.parametrize("strategy", ["category", "element"])
@pytest.mark.parametrize("rule", ["round", "steps:2", "epoch"])
def test_resumes_exactly(tmp_path, rule, strategy):
    def run(folder, resume=None, **saving):
        model = tiny.tiny(2)
        states = "drop" if strategy == "category" else "hand_over"
        callback = HalfFineTuneCallback(strategy, reselect=rule, states=states, seed=2)
        made = trainer(folder, model, callback, **saving)
        made.train(resume_from_checkpoint=resume)
        return weights(model)

    whole = run(tmp_path / "a", save_strategy="steps", save_steps=1)
    plan = json.loads((tmp_path / "a" / "checkpoint-1" / "hft_plan.json").read_text())
    assert plan["strategy"] == strategy and plan["seed"] == 2
    for step in (3, 4):
        again = run(tmp_path / "b", str(tmp_path / "a" / f"checkpoint-{step}"))
        assert all(torch.equal(again[n], whole[n]) for n in whole), step


def test_a_checkpoint_of_another_draw(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, tiny.tiny(1), HalfFineTuneCallback(seed=1), **settings).train()
    with pytest.raises(ValueError, match="drawn with seed 1, this callback has 2"):
        trainer(tmp_path, tiny.tiny(1), HalfFineTuneCallback(seed=2), **settings).train(
            resume_from_checkpoint=True
        )


def test_rounds(tmp_path):
    """Two stages: SFT, then another half."""
    model = tiny.tiny(2)
    for r in range(2):
        before, plan = weights(model), hft.select(model, r)
        trainer(tmp_path, model, HalfFineTuneCallback(round=r)).train()
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (n in plan.frozen), n


def test_parts_need_the_optimizer(tmp_path):
    made = trainer(tmp_path, tiny.tiny(1), HalfFineTuneCallback("element"), None)
    with pytest.raises(RuntimeError, match=r"needs tenfold\.optim.MaskedAdamW"):
        made.train()


def test_several_processes_need_another_wrapper(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(RuntimeError, match="wrap it again"):
        HalfFineTuneCallback(reselect="epoch").on_init_end(
            arguments(tmp_path), None, None, model=tiny.tiny(1)
        )


def test_bad_settings(tmp_path):
    for changes, message in (({"strategy": "rows"}, "strategy must be"), ({"ratio": 2}, "ratio must be"),
                             ({"reselect": "often"}, "reselect must be"), ({"states": "x"}, "states must be"),
                             ({"balance": "x"}, "balance must be")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            HalfFineTuneCallback(**changes)
    with pytest.raises(ValueError, match="name must be one of masked_adamw"):
        optimizer_cls_and_kwargs(arguments(tmp_path), "sgd")


def test_a_given_plan(tmp_path):
    model = tiny.tiny(2)
    plan = hft.select(model, 5, 5)
    made = trainer(tmp_path, model, HalfFineTuneCallback(plan=plan.to_json()))
    made.train()
    assert hft.current_plan(model).digest() == plan.digest()
