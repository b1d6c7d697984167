# SPDX-License-Identifier: Apache-2.0
"""Where a training step's time and memory go: full fine-tuning against half, in one run.

    python -m tenfold.hft.speed --json step.json

The methods take turns, step by step. Forward, backward and optimiser (with clipping) are timed apart. What
a step holds is counted on the tensors themselves: gradients, optimiser states, and the activations that
autograd saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tenfold.hft.freeze import apply
from tenfold.optim import MaskedAdamW
from tenfold.training.checks import one_of

PARTS = ("forward", "backward", "optimizer")
CLIP, RATE = 1.0, 1e-5
# name -> (share that is trained, MaskedAdamW instead of torch's fused AdamW)
METHODS: dict[str, tuple[float, bool]] = {
    "full, torch AdamW": (1.0, False), "full": (1.0, True),
    "half, torch AdamW": (0.5, False), "half": (0.5, True),
}  # fmt: skip
TORCH = ", torch AdamW"


@dataclass
class Runner:
    """One method on its own copy of the model."""

    name: str
    model: Any
    optimizer: Any
    fraction: float
    times: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})
    saved: int = 0
    gap: float = 0.0

    def step(self, ids: torch.Tensor, count: bool) -> None:
        """A step; ``count``: count the saved activations instead of timing."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        marks = [time.perf_counter()]
        if count:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        if not isinstance(self.optimizer, MaskedAdamW):
            trained = [p for p in self.model.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained, CLIP, foreach=True)
        self.optimizer.step()
        marks.append(time.perf_counter())
        self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.optimizer.zero_grad()
        if count:
            self.saved = sum(seen.values())
            return
        for part, a, b in zip(PARTS, marks, marks[1:]):
            self.times[part].append(b - a)

    def row(self) -> dict[str, Any]:
        """Median seconds per part, and bytes."""
        median = {p: statistics.median(t) for p, t in self.times.items()}
        states = sum(t.nbytes for s in self.optimizer.state.values() for t in s.values())
        whole = [sum(x) for x in zip(*self.times.values())]
        return {"method": self.name, "trained": self.fraction, **median,
                "step": statistics.median(whole), "spread": [min(whole), max(whole)],
                "gradient_bytes": self.gradients, "state_bytes": states,
                "activation_bytes": self.saved, "gap": self.gap}  # fmt: skip


def runners(
    model: Any, seed: int = 0, state_dtype: str = "fp32", methods: Sequence[str] = tuple(METHODS)
) -> list[Runner]:
    """A runner for each of some methods of ``METHODS``."""
    import copy

    made = []
    for name in methods:
        one_of("methods", name, tuple(METHODS))
        ratio, ours = METHODS[name]
        own = copy.deepcopy(model).train()
        plan = apply(own, ratio=ratio, seed=seed)
        trained = [p for p in own.parameters() if p.requires_grad]
        optimizer: Any = (
            MaskedAdamW(trained, lr=RATE, max_grad_norm=CLIP, state_dtype=state_dtype)
            if ours else torch.optim.AdamW(trained, lr=RATE, fused=True)
        )  # fmt: skip
        made.append(Runner(name, own, optimizer, plan.fraction))
    return made


@torch.no_grad()
def _compare(methods: Sequence[Runner]) -> None:
    """``gap`` of a runner with MaskedAdamW: the largest difference of a weight from torch's runner."""
    by = {r.name: r for r in methods}
    for runner in methods:
        twin = by.get(runner.name + TORCH)
        if twin is not None:
            pairs = zip(runner.model.parameters(), twin.model.parameters())
            runner.gap = max(float((a - b).abs().max()) for a, b in pairs)


def measure(
    model: Any,
    rows: int = 4,
    length: int = 128,
    steps: int = 8,
    seed: int = 0,
    state_dtype: str = "fp32",
    methods: Sequence[str] = tuple(METHODS),
) -> list[dict[str, Any]]:
    """One row per method: seconds of forward, backward and optimiser, bytes, and ``gap``.

    ``gap``, of MaskedAdamW beside torch's: the largest difference of a weight after the first step, whose
    gradients are the same. ``speedup`` is that of the whole step against the first method.

    Raises ValueError for an unknown method.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(
        0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)
    )
    made = runners(model, seed, state_dtype, methods)
    for runner in made:
        runner.step(ids, count=True)
    _compare(made)
    for at in range(steps):
        # In another order every time, or the same method would always follow the same.
        for runner in made[at % len(made) :] + made[: at % len(made)]:
            runner.step(ids, count=False)
    found = [r.row() for r in made]
    return [r | {"speedup": found[0]["step"] / r["step"]} for r in found]


COLUMNS = ("method", "trained", "forward ms", "backward ms", "optimizer ms", "step ms", "speed",
           "gradients MB", "states MB", "activations MB")  # fmt: skip


def table_rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of a table, for ``COLUMNS``."""
    return [
        [r["method"], f"{100 * r['trained']:.1f} %", *(f"{1e3 * r[p]:.1f}" for p in PARTS),
         f"{1e3 * r['step']:.1f}", f"{r['speedup']:.2f}x",
         *(f"{r[k] / 1e6:.1f}" for k in ("gradient_bytes", "state_bytes", "activation_bytes"))]
        for r in found
    ]  # fmt: skip


def main() -> None:
    """Prints the rows and writes them."""
    from tenfold.data import load_model

    parser = argparse.ArgumentParser(prog="python -m tenfold.hft.speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, nargs="+", default=[128])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="where the rows are written")
    chosen = parser.parse_args()
    rows = []
    for dtype in chosen.dtype:
        model, _ = load_model(chosen.model, getattr(torch, dtype))
        for length in chosen.length:
            about = {"dtype": dtype, "rows": chosen.rows, "length": length}
            rows += [r | about for r in measure(model, chosen.rows, length, chosen.steps)]
            for row in rows[-4:]:
                print(row, flush=True)
    if chosen.json:
        setting = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "model": chosen.model,
        }
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
