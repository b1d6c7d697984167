# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one prompt under one eviction rule, measured while it runs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.integrations import transformers as hf
from tenfold.nacl.cache import cache_bytes
from tenfold.nacl.press import Prefill, Press, continuing


def resident_bytes(device: torch.device | None = None) -> int:
    """Memory in use now: of the process (Linux) on the CPU, of torch's tensors on a GPU; 0 if unknown."""
    gc.collect()
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed blocks that the C library still holds do not count
    with contextlib.suppress(OSError), open("/proc/self/statm") as fields:
        return int(fields.read().split()[1]) * 4096
    return 0


@dataclass
class Speed:
    """What one prompt cost. ``prefill_s`` contains ``evict_s``; bytes are those of the KV cache.

    ``resident_bytes`` is how much the process grew by holding the cache (prompt only).
    """

    prompt_tokens: int
    kept_tokens: int
    prefill_s: float
    evict_s: float
    decode_ms: float
    cache_bytes: int
    resident_bytes: int
    tokens: list[int]

    @property
    def evict_share(self) -> float:
        """Eviction time as a share of the rest of the prefill."""
        return self.evict_s / max(self.prefill_s - self.evict_s, 1e-12)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure_generation(
    model: Any, press: Press, input_ids: Tensor, new_tokens: int = 32, stop: bool = False
) -> Speed:
    """Greedy generation of ``new_tokens`` with every step timed; ``decode_ms`` is the median step.

    Args:
        input_ids: [1, L]. stop: end at the model's end-of-text token.
    """
    ends = model.generation_config.eos_token_id if stop else None
    ends = set(ends) if isinstance(ends, list) else {ends}
    device = input_ids.device
    before = resident_bytes(device)
    with press(model):
        cache = press.new_cache(model)
        _wait(device)
        start = time.perf_counter()
        logits = hf.forward(model, input_ids, cache, logits_to_keep=1).logits
        _wait(device)
        prefill = time.perf_counter() - start
        tokens = [int(logits[0, -1].argmax())]
        del logits
        held, resident = cache_bytes(cache), resident_bytes(device) - before
        kept = next(iter(press.kept.values())).shape[-1] if press.kept else input_ids.shape[1]
        steps = []
        while len(tokens) < new_tokens and tokens[-1] not in ends:
            start = time.perf_counter()
            new = torch.tensor([tokens[-1:]], device=device)
            tokens.append(int(hf.forward(model, new, cache).logits[0, -1].argmax()))
            steps.append(time.perf_counter() - start)
    return Speed(
        prompt_tokens=input_ids.shape[1], kept_tokens=kept, prefill_s=prefill,
        evict_s=press.stats.evict_seconds, decode_ms=1e3 * statistics.median(steps or [0.0]),
        cache_bytes=held, resident_bytes=resident, tokens=tokens,
    )  # fmt: skip


@torch.no_grad()
def measure_prefilled(
    model: Any, press: Press, prefill: Prefill, prefill_s: float, new_tokens: int = 32
) -> Speed:
    """As :func:`measure_generation`, from a prompt [1, L] that was run once for many rules.

    Exact: attention has seen the whole prompt before a rule evicts, so no rule changes the prefill.

    Args:
        prefill: of the prompt, with the queries that the rule looks at.
        prefill_s: seconds that it took; the rule's own eviction is added.
    """
    length, device = prefill.cache.get_seq_length(), prefill.logits.device
    before = resident_bytes(device)
    cache = press.evict_prefilled(model, prefill)
    if not press.kept:  # nothing evicted: a copy, so that what holding it takes can be measured
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    _wait(device)
    held, resident = cache_bytes(cache), resident_bytes(device) - before
    kept = next(iter(press.kept.values())).shape[-1] if press.kept else length
    tokens, steps = [int(prefill.logits[0].argmax())], []
    with continuing(press, model):
        while len(tokens) < new_tokens:
            start = time.perf_counter()
            new = torch.tensor([tokens[-1:]], device=device)
            at = torch.tensor([[length + len(tokens) - 1]], device=device)
            logits = hf.forward(model, new, cache, position_ids=at).logits
            tokens.append(int(logits[0, -1].argmax()))
            steps.append(time.perf_counter() - start)
    return Speed(
        prompt_tokens=length, kept_tokens=kept, prefill_s=prefill_s + press.stats.evict_seconds,
        evict_s=press.stats.evict_seconds, decode_ms=1e3 * statistics.median(steps or [0.0]),
        cache_bytes=held, resident_bytes=resident, tokens=tokens,
    )  # fmt: skip
