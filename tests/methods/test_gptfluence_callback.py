# SPDX-License-Identifier: Apache-2.0
"""Recording in transformers' Trainer: what is in the batches, that training is the same, checkpoints, cost."""

import time

import gptfluence_models as tiny
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tenfold.gptfluence import DynamicsCallback, FunctionMetric, LossMetric, read_run

ITEMS, TESTS = tiny.items(12), tiny.rows(4, seed=7)


def arguments(folder, **changes):
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "seed": 3,
                "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(settings | changes))


class Watch(Trainer):
    """What Trainer itself puts into batches."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = getattr(self, "seen", [])
        assert set(inputs) <= {"input_ids", "labels"}
        self.seen.append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *args, **kwargs)


def train(
    folder, *, record=True, kind=Watch, resume=None, callbacks=(), rows=ITEMS, model=None, **changes
):
    options = {k: changes.pop(k) for k in ("every", "ids", "initial", "subset") if k in changes}
    model = model or tiny.tiny(3)
    callback = DynamicsCallback(folder / "run", list("wxyz"), [LossMetric(TESTS)], **options)
    trainer = kind(model=model, args=arguments(folder / "out", **changes), train_dataset=rows,
                   callbacks=[*([callback] if record else []), *callbacks])  # fmt: skip
    if record:
        callback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def seen_ids(batches):
    """Numbers of the rows in these batches."""
    table = {tuple(r["input_ids"].tolist()): i for i, r in enumerate(ITEMS)}
    return [[table[tuple(row)] for row in batch.tolist()] for batch in batches]


def recorded_ids(run):
    return [[run.train_ids[i] for i in batch if i >= 0] for batch in run.order.tolist()]


@pytest.mark.parametrize("changes", [
    {}, {"dataloader_num_workers": 1}, {"max_steps": 5, "per_device_train_batch_size": 5},
    {"remove_unused_columns": True},
])  # fmt: skip
def test_batches_and_losses(tmp_path, changes):
    trainer, callback = train(tmp_path, **changes)
    run = read_run(tmp_path / "run")
    assert recorded_ids(run) == [[], *seen_ids(trainer.seen)]
    assert (
        run.test_ids == tuple("wxyz")
        and len(run.steps) == len(run.order)
        and callback.recorder.finished
    )
    last = LossMetric(TESTS)(trainer.model.eval(), range(4))["loss"]
    torch.testing.assert_close(run.values["loss"][-1], last)
    first = LossMetric(TESTS)(tiny.tiny(3).eval(), range(4))["loss"]
    torch.testing.assert_close(run.values["loss"][0], first)


def test_training_is_the_same(tmp_path):
    plain, _ = train(tmp_path / "a", record=False, model=tiny.tiny(3, dropout=0.2))
    recorded, _ = train(tmp_path / "b", model=tiny.tiny(3, dropout=0.2), subset=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, recorded.seen))
    for a, b in zip(plain.model.parameters(), recorded.model.parameters()):
        assert torch.equal(a, b)


def test_accumulated_batches_are_one_step(tmp_path):
    trainer, _ = train(
        tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    batches = seen_ids(trainer.seen)
    assert recorded_ids(read_run(tmp_path / "run")) == [
        [],
        *(batches[i] + batches[i + 1] for i in (0, 2, 4)),
    ]


@pytest.mark.parametrize("ids", ["name", [f"e{i}" for i in range(12)]])
def test_ids_and_intervals(tmp_path, ids):
    trainer, _ = train(tmp_path, ids=ids, every=4, initial=False)
    run = read_run(tmp_path / "run")
    assert recorded_ids(run) == [[f"e{i}" for i in batch] for batch in seen_ids(trainer.seen)]
    assert run.steps.tolist() == [0, 4, 5]


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", callbacks=[Kill()], **options)
    train(tmp_path / "part", resume=str(tmp_path / "part" / "out" / "checkpoint-3"), **options)
    whole, part = (read_run(tmp_path / n / "run") for n in ("whole", "part"))
    assert recorded_ids(whole) == recorded_ids(part)
    torch.testing.assert_close(whole.values["loss"], part.values["loss"])


def test_early_ends_and_evaluation(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer, _ = train(tmp_path, callbacks=[Stop()], every=4)
    run = read_run(tmp_path / "run")
    assert run.steps.tolist() == [0, 2] and len(run.order) == 3
    trainer.args.prediction_loss_only = True
    assert trainer.evaluate(ITEMS[:4])["eval_loss"] > 0


def test_what_it_refuses(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ITEMS)

    def attach(rows, **options):
        callback = DynamicsCallback(
            tmp_path / "r", [0], [FunctionMetric("m", lambda m, t: torch.zeros(len(t)))], **options
        )
        trainer = Trainer(
            model=tiny.tiny(),
            args=arguments(tmp_path / "o"),
            train_dataset=rows,
            callbacks=[callback],
        )
        return callback, trainer

    callback, trainer = attach(Stream())
    with pytest.raises(TypeError, match="needs a map-style training set, got Stream"):
        callback.attach(trainer)
    callback, trainer = attach(ITEMS, ids=[1, 2])
    with pytest.raises(ValueError, match="there are 2 ids for 12 training examples"):
        callback.attach(trainer)
    with pytest.raises(RuntimeError, match=r"call DynamicsCallback.attach\(trainer\)"):
        attach(ITEMS)[1].train()


def test_the_cost_beside_the_evaluations(tmp_path):
    """Less than 2 % of the training, at a few milliseconds per step."""
    from tenfold.training import tiny as models

    model = models.make_model(0, layers=2, heads=2, head_dim=32)
    items = [{"input_ids": torch.randint(0, 256, (64,))} for _ in range(64)]
    items = [i | {"labels": i["input_ids"]} for i in items]
    metric = FunctionMetric("m", lambda m, tests: torch.zeros(len(tests)))
    callback = DynamicsCallback(tmp_path / "run", range(200), [metric])
    trainer = Trainer(model=model, args=arguments(tmp_path / "out", max_steps=60, per_device_train_batch_size=8),
                      train_dataset=items, callbacks=[callback])  # fmt: skip
    callback.attach(trainer)
    start = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - start
    spent = callback.recorder.seconds
    assert spent["recording"] < 0.02 * (total - spent["evaluation"]), (spent, total)
