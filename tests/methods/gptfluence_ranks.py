# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks: python gptfluence_ranks.py FOLDER trainer|loop [STEP], after which the last is killed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import gptfluence_models as tiny
import ranks
import torch

from tenfold.gptfluence import DynamicsCallback, LossMetric, RecordConfig, record_runs

TESTS = tiny.rows(5, seed=7)
CONFIG = RecordConfig.from_preset(
    "small", runs=1, examples=8, epochs=2.0, batch_size=4, learning_rate=1e-2, checkpoint_every=1
)


def loop(folder, step=None):
    """Our own loop: ranks share batches and tests."""
    kill = ranks.killed_after(step)
    record_runs(
        tiny.tiny(3), tiny.rows(12), TESTS, folder, CONFIG,
        watch=lambda run: lambda model, done: kill(SimpleNamespace(stage="run", step=done)),
    )  # fmt: skip


def trainer(folder):
    """transformers' Trainer under DDP."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        seed=3,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        learning_rate=1e-2,
    )
    callback = DynamicsCallback(folder / "run", range(5), [LossMetric(TESTS)])
    made = Trainer(
        model=tiny.tiny(3), args=args, train_dataset=tiny.items(12), callbacks=[callback]
    )
    callback.attach(made)
    made.train()


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
    ranks.leave()
    torch.save({}, Path(sys.argv[1]) / "done")
