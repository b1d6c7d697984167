# SPDX-License-Identifier: Apache-2.0
"""Decoding time and cache bytes of one model at several head budgets, measured end to end.

    python -m tenfold.dha.speed --context 4096 8192 --json decode.json

The models have random weights: time and bytes depend on shapes alone. All use the same attention
(``"tenfold"``); only the number of key and value heads differs, with maps in no order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from tenfold.dha.layout import HeadLayout
from tenfold.dha.model import DhaLlamaConfig, DhaLlamaForCausalLM

# The attention of SmolLM2-1.7B (32 heads of 64), fewer layers, a narrow vocabulary.
SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 32, "head_dim": 64, "vocab_size": 512,
}  # fmt: skip


def random_layout(layers: int, heads: int, budget: float, seed: int = 0) -> HeadLayout:
    """Equal head counts everywhere, query heads assigned in random order; 1.0: identity (MHA)."""
    if budget == 1.0:
        return HeadLayout.identity(layers, heads)
    count = max(1, round(budget * heads))
    made = torch.Generator().manual_seed(seed)
    grouped = torch.arange(heads) * count // heads

    def shuffled() -> list[list[int]]:
        return [grouped[torch.randperm(heads, generator=made)].tolist() for _ in range(layers)]

    return HeadLayout.from_maps(shuffled(), shuffled())


def make_model(layout: HeadLayout, dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    """A random model of this layout; ``shape`` overrides :data:`SHAPE`."""
    config = DhaLlamaConfig(
        **(SHAPE | shape | layout.config_fields()), max_position_embeddings=1 << 17,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DhaLlamaForCausalLM(config).to(dtype).eval()


def filled_cache(model: Any, length: int) -> DynamicCache:
    """A cache of ``length`` random tokens: what a prompt of that length leaves."""
    cache, config = DynamicCache(), model.config
    made = torch.Generator().manual_seed(1)
    for layer, heads in enumerate(zip(config.key_heads, config.value_heads)):
        keys, values = (
            torch.randn(1, n, length, config.head_dim, generator=made).to(model.dtype)
            for n in heads
        )
        cache.update(keys, values, layer)
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the storages that the cache's tensors hold."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@torch.no_grad()
def decode_times(models: Sequence[Any], length: int, tokens: int = 12) -> list[list[float]]:
    """Seconds of each new token after ``length`` tokens; the models take turns."""
    caches = [filled_cache(m, length) for m in models]
    times: list[list[float]] = [[] for _ in models]
    for step in range(tokens + 1):
        for model, cache, spent in zip(models, caches, times):
            new = torch.full((1, 1), step % 7)
            start = time.perf_counter()
            model(input_ids=new, past_key_values=cache, use_cache=True)
            if step:  # the first token pays for what the call sets up
                spent.append(time.perf_counter() - start)
    return times


def measure(
    lengths: Sequence[int], budgets: Sequence[float] = (1.0, 0.5, 0.25), tokens: int = 12,
    dtype: torch.dtype = torch.float32, **shape: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per context length and budget: bytes and median milliseconds per token."""
    layers, heads = (SHAPE | shape)["num_hidden_layers"], (SHAPE | shape)["num_attention_heads"]
    models = [make_model(random_layout(layers, heads, b), dtype, **shape) for b in budgets]
    rows = []
    for length in lengths:
        times = decode_times(models, length, tokens)
        for model, budget, spent in zip(models, budgets, times):
            rows.append({
                "context": length, "budget": budget, "dtype": str(dtype).removeprefix("torch."),
                "cache_bytes": cache_bytes(filled_cache(model, length)),
                "ms_per_token": round(1e3 * statistics.median(spent), 3),
                "speedup": round(statistics.median(times[0]) / statistics.median(spent), 3),
            })  # fmt: skip
    return rows


def main() -> None:
    """Prints the rows and writes them."""
    parser = argparse.ArgumentParser(prog="python -m tenfold.dha.speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where the rows are written")
    chosen = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += measure(chosen.context, tokens=chosen.tokens, dtype=dtype)
    for row in rows:
        print(row)
    if chosen.json:
        setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "model": SHAPE}
        text = json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n"
        chosen.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
