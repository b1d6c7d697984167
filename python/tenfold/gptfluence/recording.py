# SPDX-License-Identifier: Apache-2.0
"""Making runs to learn from: one model fine-tuned many times, on other examples in another order each time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.gptfluence.config import RecordConfig
from tenfold.gptfluence.curricula import Curriculum, make_curricula
from tenfold.gptfluence.gradients import lm_losses
from tenfold.gptfluence.ids import Id
from tenfold.gptfluence.metrics import GenerationMetric, LossMetric, Metric, padded, trimmed
from tenfold.gptfluence.recorder import Recorder
from tenfold.gptfluence.runs import read_run
from tenfold.training.batches import Batches, model_digest
from tenfold.training.loop import Metrics, Pieces, kept_random_state, make_accelerator
from tenfold.training.recipe import AdamWTrainer
from tenfold.training.store import WorkFolder

STAGE = "run"
Watch = Callable[[Any, int], None]


def lm_step(model: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loop's step: the mean over rows of each row's mean loss, as the tests' metric is."""
    return lm_losses(model, batch).mean(), {}


def rows_of_samples(
    samples: Sequence[Mapping[str, str]], tokenizer: Any, length: int
) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` (-100 for prompt and padding) and ``attention_mask`` [N, L] of prompts and answers."""
    from tenfold.training.tasks import encoder, rows_of_pairs

    end = tokenizer.eos_token_id
    pairs = [(s["prompt"], s["answer"]) for s in samples]
    return trimmed(rows_of_pairs(pairs, encoder(tokenizer), length, end, end or 0))


def metrics_of(
    rows: Mapping[str, Tensor],
    config: RecordConfig,
    tokenizer: Any = None,
    samples: Sequence[Mapping[str, str]] = (),
) -> list[Metric]:
    """The loss of the tests, and BLEU and ROUGE-L where ``config.generate`` asks for them."""
    made: list[Metric] = [LossMetric(rows)]
    if config.generate:
        prompts, answers = [s["prompt"] for s in samples], [s["answer"] for s in samples]
        made.append(GenerationMetric(tokenizer, prompts, answers, max_new_tokens=config.generate))
    return made


class _Order:
    """The loop's data: the rows of the curriculum's steps, empty places left out."""

    def __init__(self, rows: Mapping[str, Tensor], curriculum: Curriculum) -> None:
        self.rows, self.curriculum, self.steps = rows, curriculum, curriculum.steps

    def __call__(self, stage: str, step: int, size: int) -> dict[str, Tensor]:
        at = self.curriculum.order[self.steps[step]]
        return trimmed({k: v[at[at >= 0]] for k, v in self.rows.items()})


def record_run(
    model: Any,
    rows: Mapping[str, Tensor],
    ids: Sequence[Id],
    curriculum: Curriculum,
    recorder: Recorder,
    config: RecordConfig,
    *,
    watch: Watch | None = None,
    work_dir: str | Path | None = None,
) -> None:
    """Trains ``model`` in place along one curriculum, and records it.

    Args:
        rows: ``input_ids``, ``labels``, ``attention_mask`` [M, L] of all examples. ids: of them.
        watch: called with (model, number of steps made), from 0 on: a ``GradientTracker``'s ``step``.
        work_dir: of checkpoints; a run that was killed goes on there exactly.
    """
    accelerator = make_accelerator(config, next(model.parameters()).device)
    folder = WorkFolder(work_dir, accelerator.is_main_process) if work_dir else None
    if folder:
        accelerator.wait_for_everyone()
        folder.claim(
            {"config": config.to_json(), "model": model_digest(model), "run": curriculum.run}
        )
        accelerator.wait_for_everyone()
    model.to(accelerator.device)
    found = folder.checkpoint(STAGE) if folder else None
    done = found[0] if found else 0
    if not done:
        recorder.begin(model)
        if watch:
            watch(model, 0)

    trainer = _RecordedTrainer(
        accelerator, config, Batches(_Order(rows, curriculum), 0, config.seed), folder
    )
    trainer.curriculum, trainer.steps = curriculum, curriculum.steps
    trainer.begin = (lambda: recorder.begin(model, done)) if done else None

    steps = curriculum.steps

    def after(module: Any, step: int, metrics: Metrics) -> bool:
        at = curriculum.order[steps[step - 1]]
        with trainer.whole():
            recorder.step(module, [ids[i] for i in at[at >= 0].tolist()])
            if folder and step % config.checkpoint_every == 0:
                recorder.flush()
            if watch:
                watch(module, step)
        return False

    with kept_random_state():
        trainer.run(STAGE, model, len(steps), config.batch_size, lm_step, after)
    recorder.finish(model)
    if folder:
        accelerator.wait_for_everyone()
        folder.drop_checkpoints(STAGE)
        folder.release()


class _RecordedTrainer(AdamWTrainer):
    """The loop, along a curriculum: an example counts 1 / B, also where places of its batch are empty.

    So leaving one out takes its part away and makes the others' no larger, as in the sums of a simulator.
    """

    begin: Callable[[], None] | None = None
    curriculum: Curriculum
    steps: Sequence[int] = ()

    def pieces(self, batch: dict[str, Tensor], rows: int | None) -> Pieces:
        """Micro-batches; all together count as much of a batch as there is."""
        there = len(batch["input_ids"]) * self.accelerator.num_processes / self.config.batch_size
        return [(part, share * there) for part, share in super().pieces(batch, rows)]

    def rate(self, step: int, steps: int) -> float:
        """The schedule of the whole curriculum, empty steps included."""
        return super().rate(self.steps[step], len(self.curriculum.order))

    def enter(self, stage: str, step: int, module: Any) -> None:
        """Opens the recorder's folder at the step from which the run goes on."""
        if self.begin:
            self.begin()


def record_runs(
    model: Any,
    rows: Mapping[str, Tensor],
    tests: Mapping[str, Tensor],
    out: str | Path,
    config: RecordConfig | None = None,
    *,
    ids: Sequence[Id] | None = None,
    test_ids: Sequence[Id] | None = None,
    groups: Sequence[Hashable] | None = None,
    tokenizer: Any = None,
    test_samples: Sequence[Mapping[str, str]] = (),
    watch: Callable[[int], Watch | None] | None = None,
    step: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> list[Path]:
    """Records many fine-tunings of one model; finished runs are kept, a run that was killed goes on.

    Args:
        model: a transformers causal LM, which is not changed: every run trains a copy. rows, tests: ``input_ids``,
            ``labels`` and
            ``attention_mask`` [N, L] of the examples and of the tests. out: a folder per run comes into it.
        ids, test_ids: default: their numbers. groups: what each example is of, for ``concentration``.
        tokenizer, test_samples: for BLEU and ROUGE-L (``config.generate``). watch: run number -> what is called
        after its steps, or None.
        step: told after each run. changes: fields of the settings.

    Returns the runs' folders. Raises ValueError for settings that do not fit the data, and folders of other runs.
    """
    config = (config or RecordConfig.from_preset("small")).with_changes(**changes)
    rows, tests = padded(rows), padded(tests)
    count, asked = len(rows["input_ids"]), len(tests["input_ids"])
    names = list(range(count)) if ids is None else list(ids)
    test_names = list(range(asked)) if test_ids is None else list(test_ids)
    if len(names) != count or len(test_names) != asked:
        raise ValueError(
            f"there are {count} examples and {asked} tests, but {len(names)} and {len(test_names)} ids"
        )
    metrics = metrics_of(tests, config, tokenizer, test_samples)
    about = {"config": config.to_json(), "model": model_digest(model)}
    made = []
    for curriculum in make_curricula(config, groups if groups is not None else count):
        folder = Path(out) / f"{curriculum.run:03d}"
        made.append(folder)
        if _finished(folder, about):
            step(f"run {curriculum.run} was there")
            continue
        recorder = Recorder(
            folder,
            test_names,
            metrics,
            every=config.every,
            subset=config.subset,
            seed=config.seed,
            about=about | {"run": curriculum.run},
        )
        record_run(
            copy.deepcopy(model),
            rows,
            names,
            curriculum,
            recorder,
            config,
            watch=watch(curriculum.run) if watch else None,
            work_dir=folder / "work",
        )
        step(f"run {curriculum.run}")
    return made


def _finished(folder: Path, about: Mapping[str, Any]) -> bool:
    """Is the run of this folder over? ValueError if it is another's."""
    state = WorkFolder(folder, main=False).load("curves")
    if state is None or not state["finished"]:
        return False
    there = read_run(folder).about
    # More runs of the same settings may be added.
    mine: dict[str, Any] = {"config": dict(about["config"]), "model": about["model"]}
    theirs: dict[str, Any] = {"config": dict(there.get("config", {})), "model": there.get("model")}
    for settings in (mine["config"], theirs["config"]):
        settings.pop("runs", None)
    if mine != theirs:
        raise ValueError(
            f"{folder} has a run of other settings or of another model; give another folder"
        )
    return True


def learning_rates(config: RecordConfig, steps: int) -> Tensor:
    """[T]: the learning rate of every step, for TracIn."""
    from tenfold.training.recipe import scheduled

    shares = [scheduled(t, steps, config.schedule, config.warmup) for t in range(steps)]
    return config.learning_rate * torch.tensor(shares)
