# SPDX-License-Identifier: Apache-2.0
"""DHA on SmolLM2-135M-Instruct: a quarter of its (already grouped) cache less, in a few minutes.

The model has 9 query and 3 KV heads. At a budget of 25 % of MHA's heads, 45 of its 180 key and value
heads go: which ones, the search decides. All training is on Python's documentation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops
from tenfold.data import long_documents
from tenfold.data.models import given_or_smollm2
from tenfold.dha.config import DhaConfig
from tenfold.dha.record import ConversionRecord
from tenfold.dha.report import add_section
from tenfold.report import Card, Headline, Page, Speedup, TextTable, speedup
from tenfold.training.batches import lm_loss, token_rows
from tenfold.training.loop import Progress
from tenfold.training.threads import threads_text

LENGTH = 96
SETTINGS: dict[str, Any] = {
    "budget": 0.25, "gqa": "group", "init": "aligned", "search_steps": 3, "fusion_steps": 16, "recovery_steps": 6,
    "sequence_length": LENGTH, "batch_size": 1, "recovery_batch_size": 1, "omega_lr": 0.1,
    "learning_rate": 1e-4,  # a batch is a hundred tokens
    "margin_base": 0.5, "margin_end": 0.4,  # there is no time to wait before fusing
    # So few steps leave a little to average away; a real conversion goes on to 1e-3.
    "collapse_mse": 0.1,
}  # fmt: skip
PROMPT = "What is the capital of France?"
HELD = 4  # rows that losses are measured on
CONTEXT = 768  # tokens in the cache whose reading is timed
STEPS = sum(SETTINGS[f"{stage}_steps"] for stage in ("search", "fusion", "recovery")) + 3
COLUMNS = ("model", "heads", "cache bytes/token", "loss", "ms/token", "answer")
DECODE_COLUMNS = ("a new token's attention", "op", "against", "speed-up", "largest difference")


@dataclass
class Decoding:
    """Attention of one new token in all layers of the converted model, over the cache of a real text.

    ``gap``: largest difference of the two ways' results.
    """

    speed: Speedup
    context: int
    layers: int
    gap: float


@dataclass
class Demo:
    """What the demo found: one row per model (parent, DHA, mean-pooled), the conversion, and times."""

    rows: list[dict[str, Any]]
    record: ConversionRecord
    decoding: Decoding
    model: str = ""
    setting: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {"setting": self.setting, "models": self.rows, "losses": self.record.losses,
                "key_heads": self.record.key_heads, "value_heads": self.record.value_heads,
                "decoding": asdict(self.decoding)}  # fmt: skip


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


def _row(name: str, model: Any, tokenizer: Any, heads: int, loss: float) -> dict[str, Any]:
    turn = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    found = measure_generation(model, tokenizer, prompt, 24)
    return {"model": name, "heads": heads, "loss": loss} | found


@torch.no_grad()
def measure_decoding(model: Any, ids: Tensor) -> Decoding:
    """Times ``ops.dha_decode`` against transformers' way: heads expanded to the queries', and SDPA.

    Args:
        model: converted. ids: [1, L], the text in the cache; its last token is the new one.
    """
    from tenfold.integrations import transformers as hf

    queries: dict[int, Tensor] = {}

    def keep(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        hidden = hf.hidden_states(args, kwargs)[:, -1:]
        queries[module.layer_idx] = hf.queries(module, hidden, kwargs, 1)

    modules = hf.attention_layers(model)
    hooks = [m.register_forward_hook(keep, with_kwargs=True) for m in modules]
    try:
        out = model(ids, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    cache = out.past_key_values.layers
    lens = torch.tensor([ids.shape[1]], dtype=torch.int32, device=ids.device)
    layers = [(queries[m.layer_idx], cache[m.layer_idx], m.key_map, m.value_map) for m in modules]

    def ours() -> list[Tensor]:
        return [ops.dha_decode(q, c.keys, c.values, k, v, lens)[0] for q, c, k, v in layers]

    def plain() -> list[Tensor]:
        return [
            F.scaled_dot_product_attention(q, c.keys[:, k], c.values[:, v]) for q, c, k, v in layers
        ]

    gap = max(float((a - b).abs().max()) for a, b in zip(ours(), plain()))
    speed = speedup("dha_decode", "heads expanded and SDPA", ours, plain, rounds=25)
    return Decoding(speed, ids.shape[1], len(layers), gap)


def run_demo(
    step: Callable[[str], None] = lambda text: None,
    seed: int = 0,
    model: tuple[Any, Any] | None = None,
) -> Demo:
    """Converts, and converts once more by averaging.

    Args:
        step: told after each piece.
        seed: of the conversion: the order of its data, and the search for groups.
        model: (model, tokenizer); default SmolLM2-135M-Instruct.

    Raises:
        TypeError: ``model`` is not a pair. MissingData: no model here. ConversionError: the heads did not fuse.
    """
    from tenfold.dha.conversion import convert

    name, parent, tokenizer = given_or_smollm2(model)
    train, held = real_rows(tokenizer)
    held = held[:HELD]

    def heads(made: Any) -> int:
        return sum(made.config.key_heads) + sum(made.config.value_heads)

    def told(progress: Progress) -> None:
        step(f"{progress.stage}: loss {progress.metrics.get('lm', progress.metrics['loss']):.2f}")

    layers, queries, kv = (
        getattr(parent.config, f"num_{n}")
        for n in ("hidden_layers", "attention_heads", "key_value_heads")
    )
    config = DhaConfig.from_preset("small", **SETTINGS, seed=seed)
    ours = convert(parent, data=train, config=config, eval_rows=held, callback=told)
    losses = ours.conversion.losses
    rows = [
        _row(f"parent (GQA {queries}:{kv})", parent, tokenizer, 2 * layers * kv, losses["parent"]),
        _row("DHA", ours, tokenizer, heads(ours), losses["final"]),
    ]
    step("answers of parent and DHA")
    pooled = convert(parent, config=config, method="cka_mean", sizes=(1,), recovery_steps=0)
    name_of_pooled = "mean-pooled to 1 head (MQA), untrained"
    rows.append(_row(name_of_pooled, pooled, tokenizer, heads(pooled), lm_loss(pooled, held)))
    step("mean pooling")
    text = torch.as_tensor(train).flatten()[:CONTEXT][None]
    decoding = measure_decoding(ours, text.to(next(ours.parameters()).device))
    step("reading the cache")
    setting = (
        f"{name}, {str(parent.dtype).removeprefix('torch.')}, {threads_text()}; "
        f"{config.search_steps} + {config.fusion_steps} + {config.recovery_steps} steps of "
        f"{config.batch_size} x {LENGTH} tokens."
    )
    return Demo(rows, ours.conversion, decoding, name, setting, config.to_json())


def table_rows(demo: Demo) -> list[list[str]]:
    """The rows of the table, for ``COLUMNS``."""
    return [
        [r["model"], str(r["heads"]), str(r["bytes_per_token"]), f"{r['loss']:.3f}",
         f"{r['ms_per_token']:.1f}", " ".join(r["text"].split())[:70]]
        for r in demo.rows
    ]  # fmt: skip


def decode_rows(found: Decoding) -> list[list[str]]:
    """Rows for ``DECODE_COLUMNS``."""
    what = f"all {found.layers} layers, {found.context:,} tokens"
    return [[what, *found.speed.cells, f"{found.gap:.1e}"]]


def headline(found: Demo) -> Headline:
    """DHA's line in the demo's table."""
    parent, ours = found.rows[:2]
    steps = sum(map(len, found.record.curves.values()))
    return Headline(
        f"{found.model}, {steps} steps on Python's docs",
        f"{ours['heads']} of {parent['heads']} key and value heads; loss {parent['loss']:.2f} before, "
        f"{ours['loss']:.2f} after",
        found.decoding.speed,
    )


def tables(found: Demo) -> list[TextTable]:
    """What the demo shows on a terminal."""
    share = 100 * found.record.config["budget"]
    title = f"{found.model} at {share:g} % of MHA's key and value heads"
    return [
        TextTable(title, COLUMNS, table_rows(found), prose=True),
        TextTable("Reading the cache", DECODE_COLUMNS, decode_rows(found.decoding)),
    ]


def add_demo_section(demo: Demo, page: Page) -> None:
    """DHA's part of the report page."""
    add_section(demo.record, page, "DHA: fewer key and value heads")
    speed = demo.decoding.speed
    page.heading("Reading the cache")
    page.cards([Card(speed.times, "faster attention of a new token", f"than {speed.against}")])
    page.table(DECODE_COLUMNS, decode_rows(demo.decoding))
    page.text(
        "ops.dha_decode reads the shared heads where they are; transformers' other implementations get a copy of "
        "keys and values for every query head. The cache is that of documentation; the last token is the new one.",
        soft=True,
    )
    page.heading("Before and after")
    page.text(
        "The loss is that of text that no stage has seen. A demo of a few dozen steps, not a study: "
        "docs/methods/dha.md has one."
    )
    page.text(demo.setting, soft=True)
    page.table(COLUMNS, table_rows(demo), [1])
