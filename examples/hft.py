# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes half of SmolLM2-135M, then all of it, on two tasks: what is learnt, forgotten and paid.

python examples/hft.py [--steps 20] [--tasks german,docstring] [--methods full,hft,lora] [--json FILE]

A few minutes on two cores. The one line that an own training loop needs is `plan = hft.apply(model)`.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from tenfold import hft
from tenfold.data import smollm2
from tenfold.hft.demo import text_rows
from tenfold.optim import MaskedAdamW
from tenfold.training.batches import lm_loss
from tenfold.training.tasks import encoder, make_tasks


def own_loop(model, rows, steps: int = 3) -> None:
    """Without any trainer: freeze, build the optimiser, train."""
    plan = hft.apply(model, ratio=0.5, seed=0)
    optimizer = MaskedAdamW(model.parameters(), lr=1e-5, state_dtype="fp32", max_grad_norm=1.0)
    for step in range(steps):
        batch = {k: v[4 * step : 4 * step + 4] for k, v in rows.items()}
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"own loop: {100 * plan.fraction:.1f} % of the parameters trained, gradient norm "
          f"{float(optimizer.last_grad_norm):.2f}")  # fmt: skip
    hft.release(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=20, help="per task")
    parser.add_argument("--tasks", default="german,docstring")
    parser.add_argument("--methods", default="full,hft")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep-layers", type=int, help="the model's first layers alone, for a quick try"
    )
    parser.add_argument("--out", type=Path, help="where the report is written")
    parser.add_argument("--json", type=Path, help="where the result is written")
    chosen = parser.parse_args()

    runs = []
    for method in chosen.methods.split(","):
        model, tokenizer = smollm2(layers=chosen.keep_layers)
        end = tokenizer.eos_token_id
        tasks = make_tasks(chosen.tasks.split(","), encoder(tokenizer), 96, end, end, train=128, test=32,
                           seed=chosen.seed)  # fmt: skip
        text = text_rows(tokenizer)
        if not runs:
            own_loop(model, tasks[0].train)
            model, _ = smollm2(layers=chosen.keep_layers)
        before = lm_loss(model, text)
        record = hft.continual(
            model, tasks, method=method, steps=chosen.steps, batch_size=4,
            learning_rate=chosen.learning_rate, schedule="constant", warmup=0.1, seed=chosen.seed,
            quiet=False,
        )  # fmt: skip
        found = record.summary("log_prob")
        after = lm_loss(model, text)
        print(f"{method}: OP {found['op']:.3f}, BWT {found['bwt']:+.3f} nats per answer token; loss of "
              f"other text {before:.3f} -> {after:.3f}; {sum(record.seconds.values()):.0f} s")  # fmt: skip
        runs.append((record, {"before": before, "after": after}))
    if chosen.out:
        print(
            "report:",
            hft.write_report([r for r, _ in runs], chosen.out / "index.html", "SmolLM2-135M"),
        )
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "model": "smollm2-135m-instruct", "runs": [r.to_json() | {"text_loss": t} for r, t in runs],
            "torch": torch.__version__, "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
