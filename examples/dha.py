# SPDX-License-Identifier: Apache-2.0
"""Converts SmolLM2-135M (9 query, 3 KV heads) to fewer key and value heads and lets both answer.

python examples/dha.py [--budget 0.25] [--steps 30] [--out FOLDER] [--json FILE]

A few minutes on two cores. --json writes the result with the text that both models say.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from tenfold.data import smollm2
from tenfold.dha import convert
from tenfold.dha.demo import SETTINGS, measure_generation, real_rows

PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")


def say(model, tokenizer, question: str) -> dict:
    turn = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return measure_generation(model, tokenizer, prompt, new_tokens=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--budget", type=float, default=0.25, help="share of MHA's heads kept")
    parser.add_argument("--search", type=int, default=SETTINGS["search_steps"])
    parser.add_argument("--steps", type=int, default=SETTINGS["fusion_steps"], help="of fusion")
    parser.add_argument("--recovery", type=int, default=SETTINGS["recovery_steps"])
    parser.add_argument(
        "--distill", type=float, default=0.5, help="share of the parent in recovery"
    )
    parser.add_argument("--force", action="store_true", help="collapse heads that have not fused")
    parser.add_argument(
        "--keep-layers", type=int, help="the model's first layers alone, for a quick try"
    )
    parser.add_argument("--out", type=Path, help="where the converted model is saved")
    parser.add_argument("--json", type=Path, help="where the result is written")
    chosen = parser.parse_args()

    model, tokenizer = smollm2(layers=chosen.keep_layers)
    rows, held = real_rows(tokenizer)
    settings = SETTINGS | {
        "budget": chosen.budget, "search_steps": chosen.search, "fusion_steps": chosen.steps,
        "recovery_steps": chosen.recovery, "force": chosen.force, "distill": chosen.distill,
    }  # fmt: skip
    small = convert(model, data=rows, config="small", eval_rows=held, quiet=False, **settings)
    record = small.conversion
    print(f"{100 * record.ratio:.1f} % of MHA's heads; the parent has 33.3 %")
    print("loss: " + ", ".join(f"{k} {v:.3f}" for k, v in record.losses.items()))
    answers = []
    for question in PROMPTS:
        for name, network in (("parent", model), ("converted", small)):
            found = say(network, tokenizer, question)
            answers.append({"model": name, "question": question} | found)
            print(f"{name:10} {found['bytes_per_token']} bytes per token: {found['text']!r}")
    if chosen.out:
        small.save_pretrained(chosen.out)
        tokenizer.save_pretrained(chosen.out)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "model": "smollm2-135m-instruct", "settings": settings, "losses": record.losses,
            "key_heads": record.key_heads, "value_heads": record.value_heads, "ratio": record.ratio,
            "seconds": record.seconds, "answers": answers, "torch": torch.__version__,
            "machine": platform.machine(), "threads": torch.get_num_threads(),
        }  # fmt: skip
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
