# SPDX-License-Identifier: Apache-2.0
"""``tenfold nacl``: generate with an evicted cache; evaluate eviction rules."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tenfold.cli.common import (
    device_of,
    dtype_of,
    err,
    friendly,
    out,
    progress,
    split,
    table,
    write_json,
)

app = typer.Typer(help="NACL: KV-cache eviction with proxy tokens.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="'smollm2', a folder, or a hub id")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON, nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar, no statistics")]
METHOD_HELP = "nacl, nacl@paper_20, nacl@repo, streaming_llm, h2o, tova, snapkv, random, full"


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("give --prompt or --file, not both")
    if file is not None:
        return file.read_text(encoding="utf-8", errors="replace")
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        raise ValueError("give --prompt TEXT, --file PATH, or a text on standard input")
    return sys.stdin.read()


@app.command()
@friendly
def generate(
    prompt: Annotated[str | None, typer.Option(help="the text; default: standard input")] = None,
    file: Annotated[Path | None, typer.Option(help="a file with the text")] = None,
    question: Annotated[str, typer.Option(help="asked about the text, after it")] = "",
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "nacl",
    compression_ratio: Annotated[float, typer.Option(help="share evicted, in [0, 1)")] = 0.8,
    keep_tokens: Annotated[int | None, typer.Option(help="tokens kept, instead of a share")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template")] = False,
    seed: Annotated[int, typer.Option(help="of random draws")] = 0,
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a long text, evict its KV cache, and answer."""
    import torch

    from tenfold.data import load_model
    from tenfold.nacl.eval import make_spec_press
    from tenfold.nacl.speed import measure_generation

    changes: dict[str, Any] = {"seed": seed}
    if keep_tokens is not None:
        changes["keep_tokens"] = keep_tokens
    press = make_spec_press(method, compression_ratio, **({} if method == "full" else changes))
    text = _prompt(prompt, file)
    if question:
        text = f"{text}\n\nQuestion: {question}"
    if not text.strip():
        raise ValueError("the text is empty")
    network, tokenizer = load_model(model, dtype_of(dtype), device_of(device))
    if not raw and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=raw, verbose=False)["input_ids"]
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest and len(ids) + max_new_tokens > longest:
        raise ValueError(
            f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's {longest}"
        )
    speed = measure_generation(
        network, press, torch.tensor([ids], device=device), max_new_tokens, stop=True
    )
    answer = tokenizer.decode(speed.tokens, skip_special_tokens=True)
    if json:
        write_json({
            "text": answer, "method": method, "prompt_tokens": speed.prompt_tokens,
            "kept_tokens": speed.kept_tokens, "new_tokens": len(speed.tokens),
            "prefill_s": speed.prefill_s, "evict_s": speed.evict_s,
            "decode_ms_per_token": speed.decode_ms, "cache_bytes": speed.cache_bytes,
        })  # fmt: skip
        return
    out.print(answer, markup=False, highlight=False, soft_wrap=True)
    if not quiet:
        err.print(
            f"{method}: {speed.prompt_tokens} prompt tokens, {speed.kept_tokens} kept; cache "
            f"{speed.cache_bytes / 1e6:.1f} MB; prefill {speed.prefill_s:.2f} s, of it eviction "
            f"{1e3 * speed.evict_s:.0f} ms; {speed.decode_ms:.1f} ms per token",
            style="dim", highlight=False, soft_wrap=True,
        )  # fmt: skip


@app.command("eval")
@friendly
def evaluate(
    methods: Annotated[str, typer.Option(help=METHOD_HELP)] = (
        "full,nacl,snapkv,tova,h2o,streaming_llm,random"
    ),
    budgets: Annotated[str, typer.Option(help="shares of the cache kept")] = "0.2,0.5",
    tasks: Annotated[str, typer.Option(help="needle, multikey, perplexity")] = (
        "needle,multikey,perplexity"
    ),
    lengths: Annotated[str, typer.Option(help="prompt tokens")] = "1024,2048,4096,7936",
    depths: Annotated[int, typer.Option(min=1, max=100, help="places of the fact")] = 10,
    keys: Annotated[int, typer.Option(min=2, max=16, help="facts of a multikey prompt")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="texts and facts, counted from 0")] = 1,
    continuation: Annotated[int, typer.Option(min=2, help="tokens predicted (perplexity)")] = 256,
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    folder: Annotated[Path, typer.Option("--out", help="folder of the results")] = Path(
        "tenfold-report/nacl"
    ),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare eviction rules: facts in long texts, long-document perplexity; table, JSON, plots.

    A run that was stopped goes on where it was: finished cells are in OUT/cells.jsonl. The table and
    the page cover everything in that file.
    """
    from tenfold.data import load_model
    from tenfold.nacl import eval as study
    from tenfold.nacl.eval_report import COLUMNS, table_rows, write_page

    known = ("needle", "multikey", "perplexity")
    chosen = split(tasks, str, "--tasks")
    if unknown := [t for t in chosen if t not in known]:
        raise ValueError(f"--tasks must be among {', '.join(known)}, got {', '.join(unknown)}")
    specs = study.method_specs(split(methods, str, "--methods"), split(budgets, float, "--budgets"))
    sizes = split(lengths, int, "--lengths")
    if min(sizes) < 1:
        raise ValueError(f"--lengths must be at least 1, got {min(sizes)}")
    network, tokenizer = load_model(model, dtype_of(dtype), device_of(device))
    longest = getattr(network.config, "max_position_embeddings", None)
    room = max(study.MAX_NEW_TOKENS, continuation if "perplexity" in chosen else 0)
    if longest and max(sizes) + room > longest:
        raise ValueError(
            f"--lengths must leave room for {room} tokens below the model's "
            f"{longest}, got {max(sizes)}"
        )
    places = [(i + 0.5) / depths for i in range(depths)]
    rounds = range(seeds)
    parts = {
        "needle": lambda: study.retrieval_cases(tokenizer, sizes, rounds, places),
        "multikey": lambda: study.retrieval_cases(tokenizer, sizes, rounds, places, keys),
        "perplexity": lambda: study.perplexity_cases(tokenizer, sizes, rounds, continuation),
    }
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(len(sizes) * seeds * (1 if t == "perplexity" else depths) for t in chosen)
    with progress(total, quiet or json) as step:
        study.run(
            network, tokenizer, itertools.chain.from_iterable(parts[t]() for t in chosen), specs,
            folder / "cells.jsonl",
            lambda c: step(f"{c.task}, {c.length} tokens, depth {c.depth:.2f}"),
        )  # fmt: skip
    # The page covers all that the folder has of this model, not only what this run asked for.
    setting = study.setup_name(network)
    cells = [c for c in study.read_cells(folder / "cells.jsonl") if c.setup == setting]
    rows = study.summary(cells)
    files = write_page(cells, folder / "index.html", "Cost of KV-cache eviction", setting)
    result = {"setting": setting, "rows": rows}
    study.write_json(result, folder / "summary.json")
    if json:
        write_json(result)
        return
    out.print(table(setting, COLUMNS, table_rows(rows)))
    out.print(f"report: {files[-1]}", highlight=False, soft_wrap=True)
