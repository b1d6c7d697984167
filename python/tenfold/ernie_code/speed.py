# SPDX-License-Identifier: Apache-2.0
"""A whole training step of mT5-small on tenfold's ops against transformers' own, in one run: time and peak of memory.

python -m tenfold.ernie_code.speed [--preset mt5-small] [--batch 4] [--inputs 512] [--targets 114]
                                    [--fresh-head] [--autocast] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.ernie_code.config import PRESETS, model_config
from tenfold.ernie_code.model import build_model
from tenfold.integrations import t5
from tenfold.training.allocator import keep_freed_memory

COLUMNS = ("a training step", "transformers", "tenfold", "ratio")


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class _Peak:
    """The most memory of the process above that at the beginning, looked at every few milliseconds."""

    def __enter__(self) -> _Peak:
        self.start = self.most = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.most = max(self.most, _resident())

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, _resident())

    @property
    def bytes(self) -> int:
        return self.most - self.start


def compare(
    config: Any, batch_size: int = 4, inputs: int = 256, targets: int = 64, repeats: int = 3, seed: int = 0,
    autocast: bool = False, head_std: float = 1.0, keep_memory: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Seconds and bytes of forward and backward with ``labels``: both take turns on the same weights.

    Gradients are there already, as in all steps but the first; on the CPU bytes are what the process takes above its
    beginning, on a GPU the allocator's peak. Medians, after a turn that is not counted; ratios are the median ratio of
    a turn. head_std: of the head's weights; with mT5's 1 a fresh model's probabilities are so far apart that most are
    subnormal numbers, on which arithmetic takes a hundred times as long. keep_memory: for the times, from here on the
    process keeps what is freed (``tenfold.training.allocator``).

    Returns ``{"seconds": {"stock", "tenfold", "ratio"}, "bytes": {...}, "loss": {...}}``.
    """
    model = build_model(config, seed=seed, kernels="stock", head_std=head_std)
    made = torch.Generator().manual_seed(seed)
    size = model.shared.num_embeddings
    ids = torch.randint(3, size, (batch_size, inputs), generator=made)
    labels = torch.randint(3, size, (batch_size, targets), generator=made)
    mask = torch.ones_like(ids)
    mask[-1, inputs // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return compare_steps(model, batch, repeats, autocast, keep_memory)


def compare_steps(
    model: Any, batch: dict[str, Tensor], repeats: int = 3, autocast: bool = False, keep_memory: bool = False
) -> dict[str, Any]:  # fmt: skip
    """:func:`compare` on a stock T5's own weights (gradients are overwritten) and a batch with labels."""
    model.train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    times: dict[str, list[float]] = {"stock": [], "tenfold": []}
    taken: dict[str, list[int]] = {"stock": [], "tenfold": []}
    losses: dict[str, float] = {}

    def step(name: str, count: bool) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        with _Peak() as peak:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            seconds = time.perf_counter() - start
        losses[name] = float(loss.detach())
        if count:
            times[name].append(seconds)
            taken[name].append(peak.bytes)

    def turns(count: int) -> None:
        for turn in range(count + 1):
            step("stock", turn > 0)
            with t5.patch(model):
                step("tenfold", turn > 0)

    turns(repeats)
    bytes_taken = {name: statistics.median(values) for name, values in taken.items()}
    saved = [a / max(b, 1) for a, b in zip(taken["stock"], taken["tenfold"])]
    if keep_memory:
        keep_freed_memory()
        for list_of in times.values():
            list_of.clear()
        turns(repeats)
    quicker = [a / b for a, b in zip(times["stock"], times["tenfold"])]
    found = {
        "loss": losses,
        "seconds": {n: statistics.median(v) for n, v in times.items()}
        | {"ratio": statistics.median(quicker)},
        "bytes": bytes_taken | {"ratio": statistics.median(saved)},
    }
    return found


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    s, b = found["seconds"], found["bytes"]
    return [
        ["time", f"{1000 * s['stock']:.0f} ms", f"{1000 * s['tenfold']:.0f} ms", f"{s['ratio']:.2f}"],
        ["memory taken", f"{b['stock'] / 1e6:.0f} MB", f"{b['tenfold'] / 1e6:.0f} MB", f"{b['ratio']:.2f}"],
    ]  # fmt: skip


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", default="mt5-small", choices=tuple(PRESETS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument(
        "--fresh-head", action="store_true", help="a head as mT5 begins with, not as it ends"
    )
    parser.add_argument("--out", type=Path, help="JSON")
    chosen = parser.parse_args()
    config = model_config(chosen.preset, dropout_rate=0.0)
    found = compare(
        config,
        chosen.batch,
        chosen.inputs,
        chosen.targets,
        chosen.repeats,
        autocast=chosen.autocast,
        head_std=1.0 if chosen.fresh_head else config.d_model**-0.5,
        keep_memory=True,
    )
    setting = {"preset": chosen.preset, "batch": chosen.batch, "inputs": chosen.inputs, "targets": chosen.targets,
               "autocast": chosen.autocast, "fresh_head": chosen.fresh_head, "threads": torch.get_num_threads(),
               "torch": torch.__version__}  # fmt: skip
    print(json.dumps(setting))
    for row in table_rows(found):
        print("  ".join(row))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps({"setting": setting} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
