# SPDX-License-Identifier: Apache-2.0
"""One training loop for all methods: accelerate for devices and ranks, exact resumption, a bar.

A step's batch is a function of (stage, step), and so is the learning rate; everything else that a step
reads is in accelerate's state (weights, optimiser, random generators of every rank). So a run that is
killed anywhere and started again on the same work folder gives the same bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.training import sharding
from tenfold.training.batches import Batches
from tenfold.training.errors import TrainingError
from tenfold.training.sharding import Sharded
from tenfold.training.store import WorkFolder

Metrics = dict[str, float]
Pieces = list[tuple[dict[str, Tensor], float]]
LossOf = Callable[[Any, dict[str, Tensor], int], tuple[Tensor, dict[str, Tensor]]]


# What a bar shows of a step's metrics, where they are there: name, label, digits.
_SHOWN = (("loss", "loss", 3), ("mse", "mse", 4), ("objective/scores", "score", 3),
          ("objective/kl", "KL", 2))  # fmt: skip


SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # accelerate's names

# What the loop reads of a method's settings: seed, mixed_precision, micro_batch_size, checkpoint_every.
Settings = Any


@dataclass(frozen=True)
class Progress:
    """What callbacks are told after every step: ``step`` of ``steps`` is done, with these numbers."""

    stage: str
    step: int
    steps: int
    metrics: Metrics


Callback = Callable[[Progress], None]


def make_accelerator(config: Settings, device: torch.device) -> Any:
    """accelerate's view of this process, which trains on ``device`` if it is the only one.

    Several have the device of their rank, and shard the model where accelerate's settings ask for FSDP2
    (:mod:`~tenfold.training.sharding`; a single process has it whole). ModuleNotFoundError says how to install
    accelerate; ValueError: a configuration that shards the model otherwise.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ModuleNotFoundError(
            "training needs accelerate; install it with `pip install 'tenfold[train]'`"
        )
    from accelerate import Accelerator

    sharded = sharding.asked()
    cpu = {"cpu": True} if device.type == "cpu" else {}
    with sharding.unasked():
        accelerator = Accelerator(mixed_precision=config.mixed_precision, **cpu)
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    if kind in SHARDED:
        # Losses without logits, sampling, evaluation and what is saved read the weights of the bare model.
        raise ValueError(
            f"accelerate is configured for {kind}, and this trainer shards models by its own FSDP2 only: launch it "
            "with torchrun, or with one of examples/accelerate, in a process without another Accelerator"
        )
    if sharded and accelerator.num_processes > 1:
        sharding.shard_by(accelerator, config.mixed_precision)
    if accelerator.num_processes == 1:
        # On its own, accelerate takes the first GPU, or what an earlier call in this process took.
        accelerator.state.device = device
    return accelerator


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """The caller's random generators come out as they went in."""
    devices = range(torch.cuda.device_count())
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def warm_cosine(step: int, steps: int, warmup: float, final: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to ``final``."""
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    at = (step - warm) / max(1, steps - warm)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * at))


def save_checkpoint(
    accelerator: Any, folder: WorkFolder, stage: str, step: int, curve: list[Metrics], model: Any = None,
    optimizer: Any = None,
) -> None:  # fmt: skip
    """Stores accelerate's state and the curve of a stage after so many steps, instead of older ones.

    Of a sharded ``model`` its shards and those of the optimiser's states, too.
    """
    final = folder.path / f"{stage}-{step}"
    temporary = folder.path / f".{final.name}"
    accelerator.save_state(str(temporary), safe_serialization=True)
    if isinstance(model, Sharded):
        model.save(temporary, optimizer)
    accelerator.wait_for_everyone()
    if folder.main:
        (temporary / "curve.json").write_text(json.dumps(curve))
        temporary.rename(final)
        folder.drop_checkpoints(stage, but=final)
    accelerator.wait_for_everyone()


def load_checkpoint(
    accelerator: Any, folder: WorkFolder | None, stage: str, model: Any = None, optimizer: Any = None, **kwargs: Any
) -> tuple[int, list[Metrics]]:  # fmt: skip
    """(steps done, their metrics) of a stage's newest checkpoint, which is loaded; (0, []) without one.

    ``kwargs`` go to ``load_state``. ValueError: a checkpoint of a sharded model for one that is not, or the reverse.
    """
    found = folder.checkpoint(stage) if folder else None
    if found is None:
        return 0, []
    step, path = found
    sharded = any(path.glob("shards-*.pt"))
    if sharded != isinstance(model, Sharded):
        how = ("with", "without") if sharded else ("without", "with")
        raise ValueError(
            f"{path} was written {how[0]} FSDP2, and this run is {how[1]}: go on as it was begun"
        )
    if isinstance(model, Sharded):
        model.load(path, optimizer)
    accelerator.load_state(str(path), **kwargs)
    return step, json.loads((path / "curve.json").read_text())


def release(accelerator: Any, model: Any) -> None:
    """Undoes what was done to a module for training, over ranks or in shards; all ranks must call."""
    if isinstance(model, Sharded):
        model.undo()
    else:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()


@contextlib.contextmanager
def progress_bar(
    stage: str, steps: int, done: int, shown: bool
) -> Iterator[Callable[[Metrics], None]]:
    """A bar on stderr; the function it gives is called with the metrics of every step."""
    if not shown:
        yield lambda metrics: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(stage, total=steps, completed=done)

        def advance(metrics: Metrics) -> None:
            parts = [f"{label} {metrics[k]:.{n}f}" for k, label, n in _SHOWN if k in metrics]
            bar.update(task, advance=1, description=f"{stage}: {', '.join(parts)}")

        yield advance


def _pieces(batch: dict[str, Tensor], rows: int | None) -> Pieces:
    """The batch in pieces of ``rows`` rows, each with its share of the tokens that are predicted.

    A piece's loss is the mean of its tokens, so these shares make the sum the mean of the batch. Pieces
    that predict nothing are left out.
    """
    size = len(batch["input_ids"])
    if rows is None or rows >= size:
        return [(batch, 1.0)]
    counts = (batch["labels"][:, 1:] != -100).sum(1).split(rows)
    tokens = torch.stack([c.sum() for c in counts]).tolist()
    parts = [{k: v[at : at + rows] for k, v in batch.items()} for at in range(0, size, rows)]
    shared = [(p, n / sum(tokens)) for p, n in zip(parts, tokens) if n]
    return shared or [(batch, 1.0)]


class Trainer:
    """Runs a method's stages on this process's device, as one of ``accelerator.num_processes``.

    A method says in a subclass what its optimiser is, how gradients are clipped, and, if that changes
    on the way, what trains.
    """

    error: type[RuntimeError] = TrainingError

    def __init__(
        self,
        accelerator: Any,
        config: Settings,
        batches: Batches,
        folder: WorkFolder | None,
        callback: Callback | None = None,
        quiet: bool = True,
    ) -> None:
        self.accelerator, self.config, self.batches = accelerator, config, batches
        self.folder, self.callback = folder, callback
        self.quiet = quiet or not accelerator.is_main_process
        self._model: Any = None

    def whole(self) -> Any:
        """A context for what follows a step: inside, the module has all of its weights on every rank.

        Without FSDP2 it always has. All ranks must enter.
        """
        return sharding.whole(self._model)

    def rank_rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's share of a batch. Raises ValueError if the ranks do not divide it."""
        ranks, size = self.accelerator.num_processes, len(next(iter(batch.values())))
        if size % ranks:
            raise ValueError(f"a batch of {size} rows cannot be shared by {ranks} ranks equally")
        each = size // ranks
        at = slice(
            self.accelerator.process_index * each, (self.accelerator.process_index + 1) * each
        )
        return {k: v[at].to(self.accelerator.device) for k, v in batch.items()}

    def _seed(self, stage: str) -> None:
        mixed = self.config.seed * 1_000_003 + sum(stage.encode()) * 1009
        torch.manual_seed(mixed + self.accelerator.process_index)

    def _forward(
        self, model: Any, batch: dict[str, Tensor], loss_of: Callable[..., Any], step: int
    ) -> Metrics:
        """Forward and backward of one batch, in pieces of ``micro_batch_size`` rows."""
        pieces = self.pieces(batch, self.config.micro_batch_size)
        if isinstance(model, Sharded):
            # A piece that counts nothing keeps a rank with fewer of them in step with the others.
            missing = sharding.most(len(pieces), self.accelerator.device) - len(pieces)
            pieces = [*pieces, *[(pieces[0][0], 0.0)] * missing]
        sums: dict[str, Tensor] = {}
        for i, (part, share) in enumerate(pieces, 1):
            last = i == len(pieces)
            with contextlib.nullcontext() if last else sharding.unsynced(self.accelerator, model):
                with self.accelerator.autocast():
                    loss, metrics = sharding.computed(model, loss_of, part, step)
                self.accelerator.backward(loss * share)
            for name, value in ({"loss": loss.detach()} | metrics).items():
                sums[name] = sums.get(name, 0) + share * value
        if isinstance(model, Sharded):
            model.finish_backward()
        names = sorted(sums)
        mean = torch.stack([sums[n].float() for n in names])
        mean = self.accelerator.reduce(mean, "mean")
        return dict(zip(names, mean.tolist()))

    # What a method defines.

    def pieces(self, batch: dict[str, Tensor], rows: int | None) -> Pieces:
        """A batch in parts of ``rows`` rows, each with its share of the loss: that of its tokens."""
        return _pieces(batch, rows)

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of what trains; groups have ``peak``, their learning rate's largest value."""
        raise NotImplementedError

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step as a share of its peak."""
        return 1.0

    def clip(self, optimizer: Any) -> None:
        """Clips the gradients, before the optimiser's step."""

    def apart(self, module: nn.Module) -> Iterable[nn.Module]:
        """Submodules inside of blocks whose outputs a loss uses beside those of the blocks (FSDP2 must know)."""
        return ()

    def enter(self, stage: str, step: int, module: nn.Module) -> None:
        """Called before the optimiser is made: ``step`` is the first that will be taken."""

    def changes(self, stage: str, step: int) -> bool:
        """Does something else train from ``step`` on? Then the model is unwrapped, and ``change`` called."""
        return False

    def change(self, stage: str, step: int, module: nn.Module, optimizer: Any) -> None:
        """Goes over to what trains from ``step`` on."""

    def after_backward(self, module: nn.Module) -> None:
        """Called between backward and clipping."""

    def _start(self, stage: str) -> int:
        found = self.folder.checkpoint(stage) if self.folder else None
        return found[0] if found else 0

    def _prepare(self, stage: str, module: nn.Module) -> tuple[Any, Any]:
        accelerator, mesh = self.accelerator, sharding.mesh_of(self.accelerator)
        start = self._start(stage)
        if mesh is None:
            self.enter(stage, start, module)
            model, optimizer = accelerator.prepare(module, self.make_optimizer(module))
            return model, optimizer
        self._model = Sharded(module, mesh, self.config.mixed_precision, self.apart(module))
        self.enter(stage, start, module)
        return self._model, self.make_optimizer(module)

    def _release(self, model: Any) -> None:
        """The module is the caller's again."""
        self._model = None
        release(self.accelerator, model)

    def _rewrap(self, stage: str, step: int, model: Any, module: nn.Module, optimizer: Any) -> Any:
        accelerator = self.accelerator
        if isinstance(model, Sharded):
            self.change(stage, step, module, optimizer)
            model.changed()
            return model, optimizer
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        inner = optimizer.optimizer
        del model, optimizer
        accelerator.free_memory()
        self.change(stage, step, module, inner)
        return accelerator.prepare(module, inner)

    def run(
        self,
        stage: str,
        module: nn.Module,
        steps: int,
        batch_size: int,
        loss_of: LossOf,
        after_step: Callable[[nn.Module, int, Metrics], bool] | None = None,
    ) -> list[Metrics]:
        """Trains ``module`` in place for ``steps`` steps, or until ``after_step`` returns True.

        Returns the metrics of every step. Raises :attr:`error` if the loss is not a number.
        """
        if steps == 0:
            return []
        accelerator, config = self.accelerator, self.config
        self._seed(stage)
        module.to(accelerator.device)
        model, optimizer = self._prepare(stage, module)
        first, curve = load_checkpoint(accelerator, self.folder, stage, model, optimizer)
        stopped = bool(curve and curve[-1].get("stopped"))
        model.train()
        with progress_bar(stage, steps, first, not self.quiet) as advance:
            for step in range(first, steps):
                if stopped:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * self.rate(step, steps)
                batch = self.rank_rows(self.batches.take(stage, step, batch_size))
                metrics = self._forward(model, batch, loss_of, step)
                if not math.isfinite(metrics["loss"]):
                    self._release(model)  # all ranks are here
                    raise self.error(
                        f"{stage}: the loss became {metrics['loss']} at step {step + 1}; training "
                        "stopped. Lower the learning rates, or look at the data"
                    )
                self.after_backward(module)
                self.clip(optimizer)
                optimizer.step()
                optimizer.zero_grad()
                stopped = after_step(module, step + 1, metrics) if after_step else False
                if stopped:
                    metrics["stopped"] = 1.0
                curve.append(metrics)
                if step + 1 < steps and not stopped and self.changes(stage, step + 1):
                    model, optimizer = self._rewrap(stage, step + 1, model, module, optimizer)
                due = (step + 1) % config.checkpoint_every == 0
                if self.folder is not None and due and step + 1 < steps:
                    save_checkpoint(
                        accelerator, self.folder, stage, step + 1, curve, model, optimizer
                    )
                advance(metrics)
                if self.callback is not None:
                    self.callback(Progress(stage, step + 1, steps, metrics))
        self._release(model)
        return curve


def is_main_process() -> bool:
    """Is this the only process, or rank 0 of several?"""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return True
