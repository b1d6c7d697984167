# SPDX-License-Identifier: Apache-2.0
"""Which settings of NACL matter, on the packaged model: the study behind the defaults.

python examples/nacl_ablation.py [--length 1024] [--seeds 1] [--depths 10] [--out bench/results/nacl_ablation]

Facts hidden in real texts (one, and one of two) and perplexity, at 20 % and 50 % of the cache. Every line
changes the default in one respect. Finished cells are kept in OUT/cells.jsonl: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from tenfold.data import smollm2
from tenfold.nacl import NaclConfig
from tenfold.nacl import eval as study

VARIANTS = {
    "default": {},
    "8 proxies": {"max_proxy": 8},
    "128 proxies": {"max_proxy": 128},
    "no pooling": {"pool_kernel": 1},
    "pooling 5 wide": {"pool_kernel": 5},
    "pooling 7 wide": {"pool_kernel": 7},
    "average pooling": {"pool": "avg"},
    "10 % random": {"random_ratio": 0.1},
    "30 % random": {"random_ratio": 0.3},
    "30 % random by log-score": {"random_ratio": 0.3, "re_logits": "log_score"},
    "30 % random, temperature 0.1": {"random_ratio": 0.3, "re_temperature": 0.1},
    "60 % random": {"random_ratio": 0.6},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--length", type=int, default=1024, help="prompt tokens")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--keep-layers", type=int, help="the model's first layers alone, for a quick try"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/nacl_ablation"))
    chosen = parser.parse_args()
    model, tokenizer = smollm2(layers=chosen.keep_layers)
    specs = [
        study.nacl_spec(name, budget, NaclConfig(), **VARIANTS[name])
        for name in chosen.only
        for budget in (0.2, 0.5)
    ] + study.method_specs(["full", "nacl@paper_20"], [0.2, 0.5])
    places = [(i + 0.5) / chosen.depths for i in range(chosen.depths)]
    sizes, seeds = [chosen.length], range(chosen.seeds)
    cases = itertools.chain(
        study.retrieval_cases(tokenizer, sizes, seeds, places),
        study.retrieval_cases(tokenizer, sizes, seeds, places, 2),
        study.perplexity_cases(tokenizer, sizes, range(4)),
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    study.run(model, tokenizer, cases, specs, chosen.out / "cells.jsonl",
              lambda c: print(f"{c.task} {c.length} {c.depth:.2f}", flush=True))  # fmt: skip
    rows = study.summary(study.read_cells(chosen.out / "cells.jsonl"))
    study.write_json(
        {"setting": study.setup_name(model), "rows": rows}, chosen.out / "summary.json"
    )
    for row in rows:
        print(row["task"], row["budget"], row["method"], row["accuracy"], row["perplexity"])


if __name__ == "__main__":
    main()
