# SPDX-License-Identifier: Apache-2.0
"""DHA on SmolLM2-135M-Instruct: a quarter of its (already grouped) cache less, in a few minutes.

The model has 9 query and 3 KV heads. At a budget of 25 % of MHA's heads, 45 of its 180 key and value
heads go: which ones, the search decides. All training is on Python's documentation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tenfold.data import long_documents
from tenfold.dha.config import DhaConfig
from tenfold.dha.record import ConversionRecord
from tenfold.dha.report import add_section
from tenfold.report import Page
from tenfold.training.batches import lm_loss, token_rows
from tenfold.training.loop import Progress

LENGTH = 128
SETTINGS: dict[str, Any] = {
    "budget": 0.25, "gqa": "group", "init": "aligned", "search_steps": 6, "fusion_steps": 30, "recovery_steps": 10,
    "sequence_length": LENGTH, "batch_size": 2, "recovery_batch_size": 2, "omega_lr": 0.12,
    "margin_end": 0.6,
    # So few steps leave a little to average away; a real conversion goes on to 1e-3.
    "collapse_mse": 0.1,
}  # fmt: skip
PROMPT = "What is the capital of France?"
STEPS = 6 + 30 + 10 + 3
COLUMNS = ("model", "heads", "cache bytes/token", "loss", "ms/token", "answer")


@dataclass
class Demo:
    """What the demo found: one row per model, and the conversion."""

    rows: list[dict[str, Any]]
    record: ConversionRecord
    setting: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {"setting": self.setting, "models": self.rows, "losses": self.record.losses,
                "key_heads": self.record.key_heads, "value_heads": self.record.value_heads}  # fmt: skip


@torch.no_grad()
def measure_generation(
    model: Any, tokenizer: Any, prompt: str, new_tokens: int, special: bool = False
) -> dict[str, Any]:
    """Greedy continuation of ``prompt``: text, cache bytes as held by its tensors, time per token."""
    from transformers import DynamicCache

    from tenfold.integrations import transformers as hf

    ids = tokenizer(prompt, add_special_tokens=special, return_tensors="pt").input_ids.to(
        model.device
    )
    stop = model.generation_config.eos_token_id
    stops = set(stop) if isinstance(stop, list) else {stop}
    cache, feed = DynamicCache(config=model.config), ids
    said: list[int] = []
    times: list[float] = []
    while len(said) < new_tokens:
        start = time.perf_counter()
        logits = hf.forward(model, feed, cache).logits[:, -1]
        times.append(time.perf_counter() - start)
        said.append(int(logits.argmax(-1)))
        if said[-1] in stops:
            break
        feed = torch.tensor([said[-1:]], device=model.device)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    tokens = cache.layers[0].keys.shape[2]
    steps = sorted(times[1:]) or times
    return {
        "text": tokenizer.decode(said, skip_special_tokens=True), "prompt_tokens": ids.shape[1],
        "new_tokens": len(said), "cache_bytes": held, "bytes_per_token": held // tokens,
        "ms_per_token": 1e3 * steps[len(steps) // 2],
    }  # fmt: skip


def real_rows(tokenizer: Any, length: int = LENGTH) -> tuple[Any, Any]:
    """(training, evaluation) rows of Python's documentation; the evaluation is other modules."""
    texts = [d.text[:20_000] for d in long_documents(("docs",), limit=40)]
    return token_rows(tokenizer, texts[:32], length), token_rows(tokenizer, texts[32:], length)[:16]


def _row(name: str, model: Any, tokenizer: Any, held: Any, heads: int) -> dict[str, Any]:
    turn = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    found = measure_generation(model, tokenizer, prompt, 24)
    return {"model": name, "heads": heads, "loss": lm_loss(model, held)} | found


def run_demo(model: Any, tokenizer: Any, step: Callable[[str], None] = lambda text: None) -> Demo:
    """Converts, and converts once more by averaging; ``step`` is told after each piece."""
    from tenfold.dha.conversion import convert

    train, held = real_rows(tokenizer)

    def heads(made: Any) -> int:
        return sum(made.config.key_heads) + sum(made.config.value_heads)

    def told(progress: Progress) -> None:
        step(f"{progress.stage}: loss {progress.metrics.get('lm', progress.metrics['loss']):.2f}")

    before = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads
    rows = [_row("parent (GQA 9:3)", model, tokenizer, held, before)]
    step("parent")
    config = DhaConfig.from_preset("small", **SETTINGS)
    ours = convert(model, data=train, config=config, eval_rows=held, callback=told)
    rows.append(_row("DHA", ours, tokenizer, held, heads(ours)))
    step("DHA")
    pooled = convert(model, config=config, method="cka_mean", sizes=(1,), recovery_steps=0)
    rows.append(
        _row("mean-pooled to 1 head (MQA), untrained", pooled, tokenizer, held, heads(pooled))
    )
    step("mean pooling")
    setting = (
        f"SmolLM2-135M-Instruct, float32, {torch.get_num_threads()} threads; "
        f"{config.search_steps} + {config.fusion_steps} + {config.recovery_steps} steps of "
        f"{config.batch_size} x {LENGTH} tokens."
    )
    return Demo(rows, ours.conversion, setting, config.to_json())


def table_rows(demo: Demo) -> list[list[str]]:
    """The rows of the table, for ``COLUMNS``."""
    return [
        [r["model"], str(r["heads"]), str(r["bytes_per_token"]), f"{r['loss']:.3f}",
         f"{r['ms_per_token']:.1f}", " ".join(r["text"].split())[:70]]
        for r in demo.rows
    ]  # fmt: skip


def add_demo_section(demo: Demo, page: Page) -> None:
    """DHA's part of the report page."""
    add_section(demo.record, page, "DHA: fewer key and value heads")
    page.heading("Before and after")
    page.text(
        "The loss is that of text that no stage has seen. A demo of a few dozen steps, not a study: "
        "docs/methods/dha.md has one."
    )
    page.text(demo.setting, soft=True)
    page.table(COLUMNS, table_rows(demo), [1])
