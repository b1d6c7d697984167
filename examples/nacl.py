# SPDX-License-Identifier: Apache-2.0
"""Asks a question about a long real text with a fifth of the KV cache, and compares with all of it.

python examples/nacl.py [--ratio 0.8] [--length 3000]
"""

from __future__ import annotations

import argparse

import torch

from tenfold.data import smollm2
from tenfold.nacl import FullPress, NaclPress
from tenfold.nacl.eval import retrieval_case
from tenfold.nacl.speed import measure_generation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ratio", type=float, default=0.8, help="share of the cache evicted")
    parser.add_argument("--length", type=int, default=3000, help="prompt tokens")
    chosen = parser.parse_args()

    model, tokenizer = smollm2()
    # A page of Python's documentation with one added sentence, and a question about it at the end.
    case = retrieval_case(tokenizer, chosen.length, depth=0.4, seed=3)
    prompt = torch.tensor([case.prompt])
    print(f"{case.document}, {chosen.length} tokens; the right answer is {case.answer_text}")
    for press in (FullPress(), NaclPress(compression_ratio=chosen.ratio)):
        speed = measure_generation(model, press, prompt, new_tokens=8)
        answer = tokenizer.decode(speed.tokens, skip_special_tokens=True).strip().splitlines()[0]
        print(
            f"{type(press).__name__:10} {answer!r}: {speed.kept_tokens} tokens kept, cache "
            f"{speed.cache_bytes / 1e6:.1f} MB, prefill {speed.prefill_s:.2f} s (eviction "
            f"{1e3 * speed.evict_s:.0f} ms), {speed.decode_ms:.1f} ms per new token"
        )


if __name__ == "__main__":
    main()
