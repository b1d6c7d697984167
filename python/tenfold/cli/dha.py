# SPDX-License-Identifier: Apache-2.0
"""``tenfold dha``: convert a checkpoint, train it further, generate with it, look at what was done."""

from __future__ import annotations

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
    rank_device,
    table,
    write_json,
)

app = typer.Typer(
    help="DHA: fewer key and value heads, by fusing those that can share.", no_args_is_help=True
)

Model = Annotated[str, typer.Option(help="'smollm2', a folder, or a hub id")]
Text = Annotated[
    list[Path] | None,
    typer.Option("--text", help="training text files; default: documents on this machine"),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON, nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar")]
Steps = Annotated[int | None, typer.Option(min=0, help="default: the preset's")]


def _texts(files: list[Path] | None) -> list[str]:
    from tenfold.data import long_documents

    if files:
        return [f.read_text(encoding="utf-8", errors="replace") for f in files]
    return [d.text for d in long_documents(("docs", "reference"))]


def _rows(tokenizer: Any, files: list[Path] | None, length: int, held: int = 16) -> tuple[Any, Any]:
    """Training rows, and at most ``held`` rows (a tenth, at least one) to evaluate on."""
    from tenfold.training.batches import token_rows

    rows = token_rows(tokenizer, _texts(files), length)
    count = min(held, max(1, len(rows) // 10))
    if len(rows) < 2:
        raise ValueError(
            f"--text gives {len(rows)} row of {length} tokens; two are needed at least"
        )
    return rows[:-count], rows[-count:]


def _changes(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _main_process() -> bool:
    from tenfold.training.loop import is_main_process

    return is_main_process()


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@app.command()
@friendly
def convert(
    folder: Annotated[Path, typer.Option("--out", help="folder of the converted model")],
    budget: Annotated[float, typer.Option(help="key + value heads kept, of MHA's")] = 0.25,
    preset: Annotated[str, typer.Option(help="paper or small")] = "small",
    method: Annotated[str, typer.Option(help="dha, dha_mean, gqa_mean or cka_mean")] = "dha",
    gqa: Annotated[str, typer.Option(help="from GQA: expand or group the heads")] = "expand",
    allocation: Annotated[str, typer.Option(help="dp, greedy, uniform, loss_weighted")] = "dp",
    init: Annotated[str, typer.Option(help="identity or aligned")] = "identity",
    nested: Annotated[bool, typer.Option("--nested", help="value groups unite key groups")] = False,
    progressive: Annotated[bool, typer.Option("--progressive", help="halve repeatedly")] = False,
    tp_size: Annotated[int, typer.Option(min=1, help="group inside each rank's heads")] = 1,
    distill: Annotated[float, typer.Option(help="share of the parent's KL in recovery")] = 0.0,
    search_steps: Steps = None,
    fusion_steps: Steps = None,
    recovery_steps: Steps = None,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="tokens per row")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="rows per step")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="rows per forward and rank; default: all")
    ] = None,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16")] = "no",
    learning_rate: Annotated[float | None, typer.Option(help="of the weights")] = None,
    omega_lr: Annotated[float | None, typer.Option(help="of the fusion operators")] = None,
    force: Annotated[bool, typer.Option("--force", help="collapse in any case")] = False,
    work_dir: Annotated[
        Path | None, typer.Option(help="checkpoints; default: OUT/work; goes on where it was")
    ] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    text: Text = None,
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a Llama, Mistral or Qwen2 checkpoint (MHA or GQA); several ranks with torchrun."""
    from tenfold.data import load_model
    from tenfold.dha.config import DhaConfig
    from tenfold.dha.conversion import convert as run

    settings = DhaConfig.from_preset(preset, budget=budget, method=method, gqa=gqa, init=init,
                                     allocation=allocation, nested=nested, progressive=progressive,
                                     tp_size=tp_size, distill=distill, seed=seed, force=force,
                                     mixed_precision=mixed_precision)  # fmt: skip
    settings = settings.with_changes(**_changes(
        search_steps=search_steps, fusion_steps=fusion_steps, recovery_steps=recovery_steps,
        sequence_length=sequence_length, batch_size=batch_size, recovery_batch_size=batch_size,
        micro_batch_size=micro_batch_size, learning_rate=learning_rate, omega_lr=omega_lr,
    ))  # fmt: skip
    parent, tokenizer = load_model(model, dtype_of(dtype), rank_device(device))
    rows, held = _rows(tokenizer, text, settings.sequence_length)
    made = run(parent, data=rows, config=settings, work_dir=work_dir or folder / "work",
               eval_rows=held, quiet=quiet or json)  # fmt: skip
    if _main_process():
        _save(made, tokenizer, folder)
        _tell(made.conversion, folder, model, dtype, json)


def _tell(record: Any, folder: Path, model: str, dtype: str, json: bool) -> None:
    """Writes a conversion's numbers beside its model, and prints them."""
    from tenfold.dha.report import COLUMNS, stage_rows, write_report

    record.write(folder / "conversion.json")
    page = write_report([record], folder / "report" / "index.html", f"{model}, {dtype}")
    if json:
        write_json(_summary(record) | {"model": str(folder), "report": str(page)})
        return
    out.print(
        table(f"{model}: {100 * record.ratio:.1f} % of MHA's heads", COLUMNS, stage_rows(record))
    )
    out.print("loss: " + ", ".join(f"{k} {v:.3f}" for k, v in record.losses.items()))
    out.print(f"model: {folder}   report: {page}", highlight=False, soft_wrap=True)


def _summary(record: Any) -> dict[str, Any]:
    return {
        "ratio": record.ratio, "key_heads": record.key_heads, "value_heads": record.value_heads,
        "kv_bytes_per_token_16bit": record.kv_bytes_per_token(), "losses": record.losses,
        "seconds": record.seconds, "mse_by_layer": record.mse_by_layer,
    }  # fmt: skip


@app.command()
@friendly
def recover(
    model: Annotated[str, typer.Argument(help="folder of a converted model")],
    folder: Annotated[Path, typer.Option("--out", help="folder of the trained model")],
    teacher: Annotated[str | None, typer.Option(help="the parent, to distil from")] = None,
    distill: Annotated[float, typer.Option(help="share of the teacher's KL")] = 0.5,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    sequence_length: Annotated[int, typer.Option(min=2, help="tokens per row")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per step")] = 8,
    learning_rate: Annotated[float, typer.Option(help="peak")] = 3e-4,
    seed: int = 0,
    text: Text = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a converted model further; a stopped run goes on where it was."""
    from tenfold.data import load_model
    from tenfold.dha.config import DhaConfig
    from tenfold.dha.recovery import recover as run
    from tenfold.training.batches import lm_loss

    settings = DhaConfig.from_preset(
        "small", recovery_steps=steps, sequence_length=sequence_length, seed=seed,
        recovery_batch_size=batch_size, learning_rate=learning_rate,
        distill=distill if teacher else 0.0,
    )  # fmt: skip
    place = rank_device(device)
    network, tokenizer = load_model(model, dtype_of(dtype), place)
    parent = load_model(teacher, dtype_of(dtype), place)[0] if teacher else None
    rows, held = _rows(tokenizer, text, sequence_length)
    before = lm_loss(network, held)
    curve = run(network, rows, settings, teacher=parent, work_dir=str(folder / "work"),
                quiet=quiet or json)  # fmt: skip
    if not _main_process():
        return
    after = lm_loss(network, held)
    _save(network, tokenizer, folder)
    if json:
        write_json(
            {"model": str(folder), "steps": len(curve), "loss": {"before": before, "after": after}}
        )
        return
    out.print(f"loss {before:.3f} -> {after:.3f} after {len(curve)} steps; model: {folder}",
              highlight=False, soft_wrap=True)  # fmt: skip


@app.command()
@friendly
def generate(
    model: Annotated[str, typer.Argument(help="folder of a converted model, or any causal LM")],
    prompt: Annotated[str | None, typer.Option(help="the text; default: standard input")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt greedily; says how large the cache was."""
    from tenfold.data import load_model
    from tenfold.dha.demo import measure_generation

    if prompt is None:
        if sys.stdin.isatty():
            raise ValueError("give --prompt TEXT, or a text on standard input")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise ValueError("the text is empty")
    network, tokenizer = load_model(model, dtype_of(dtype), device_of(device))
    if not raw and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    found = measure_generation(network, tokenizer, prompt, max_new_tokens, special=raw)
    if json:
        write_json(found)
        return
    out.print(found["text"], markup=False, highlight=False, soft_wrap=True)
    if not quiet:
        err.print(
            f"{found['prompt_tokens']} prompt tokens, {found['new_tokens']} new; cache "
            f"{found['cache_bytes'] / 1e6:.2f} MB ({found['bytes_per_token']} bytes per token); "
            f"{found['ms_per_token']:.1f} ms per token",
            style="dim", highlight=False, soft_wrap=True,
        )  # fmt: skip


@app.command()
@friendly
def report(
    folders: Annotated[list[Path], typer.Argument(help="folders of converted models, or records")],
    folder: Annotated[Path, typer.Option("--out", help="folder of the page")] = Path(
        "tenfold-report/dha"
    ),
    json: Json = False,
) -> None:
    """A page with head budgets, similarities, distances and loss curves of one or more conversions."""
    from tenfold.dha.record import ConversionRecord
    from tenfold.dha.report import write_report

    records = []
    for given in folders:
        path = given / "conversion.json" if given.is_dir() else given
        if given.is_dir() and not path.is_file():
            path = given / "record.json"
        if not path.is_file():
            raise ValueError(f"{given} has no conversion.json (of `tenfold dha convert`)")
        records.append(ConversionRecord.read(path))
    page = write_report(records, folder / "index.html")
    if json:
        write_json({"report": str(page), "conversions": [_summary(r) for r in records]})
        return
    out.print(f"report: {page}", highlight=False, soft_wrap=True)
