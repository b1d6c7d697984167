# SPDX-License-Identifier: Apache-2.0
"""``tenfold hft``: fine-tune one half, prefer one half, learn tasks one after the other, look at it."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tenfold.cli.common import dtype_of, friendly, out, rank_device, split, table, write_json

app = typer.Typer(help="HFT: fine-tune one half of a model, and forget less.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="'smollm2', a folder, or a hub id")]
Out = Annotated[Path, typer.Option("--out", help="folder of the result")]
Method = Annotated[str, typer.Option(help="hft, full, lora or lisa")]
Strategy = Annotated[str, typer.Option(help="category, layer, model or element")]
Ratio = Annotated[float, typer.Option(help="share of the layers' matrices that trains")]
Balance = Annotated[str, typer.Option(help="count matrices or params")]
Reselect = Annotated[str, typer.Option(help="new draw per round, epoch, steps:N, or never")]
States = Annotated[str, typer.Option(help="at a new draw: drop, keep or hand_over")]
Soft = Annotated[float | None, typer.Option(help="penalty instead of a freeze")]
StateDtype = Annotated[str, typer.Option(help="param, fp32, bf16 or int8")]
Steps = Annotated[int | None, typer.Option(min=1, help="steps per round; default: by epochs")]
Epochs = Annotated[float | None, typer.Option(help="default: the preset's")]
Rate = Annotated[float | None, typer.Option(help="peak learning rate; default: the preset's")]
Batch = Annotated[int | None, typer.Option(min=1, help="rows per step")]
Micro = Annotated[int | None, typer.Option(min=1, help="rows per forward and rank")]
Length = Annotated[int | None, typer.Option(min=2, help="tokens per row")]
Precision = Annotated[str, typer.Option(help="no, bf16 or fp16")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="of everything random")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON, nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar")]


def _config(preset: str, **settings: Any) -> Any:
    from tenfold.hft.config import HFTConfig

    return HFTConfig.from_preset(preset, **{k: v for k, v in settings.items() if v is not None})


def _lines(file: Path, keys: tuple[str, ...]) -> list[Any]:
    """The objects of a JSON-lines file as tuples."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json_module.loads(line)
            rows.append(tuple(str(given[k]) for k in keys))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file}, line {number}: needs an object with {', '.join(keys)}"
            ) from None
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def _main() -> bool:
    from tenfold.training.loop import is_main_process

    return is_main_process()


def _finish(
    record: Any, model: Any, tokenizer: Any, base: Any, folder: Path, title: str, json: bool
) -> None:
    """Saves model, delta, numbers and page, and prints them."""
    from tenfold.hft.delta import save_delta
    from tenfold.hft.report import write_report

    if not _main():
        return
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    delta = save_delta(model, base, folder / "delta.safetensors")
    record.write(folder / "record.json")
    page = write_report([record], folder / "report" / "index.html", title)
    found = {
        "model": str(folder), "report": str(page), "losses": record.losses, "seconds": record.seconds,
        "plans": record.plans, "trained": record.trained_parameters / max(1, record.parameters),
        "delta_bytes": delta["bytes"], "steps": sum(map(len, record.curves.values())),
    }  # fmt: skip
    if json:
        write_json(found)
        return
    out.print(
        f"{title}: {100 * found['trained']:.1f} % of the parameters trained, {found['steps']} steps"
    )
    if record.losses:
        out.print("loss: " + ", ".join(f"{k} {v:.3f}" for k, v in record.losses.items()))
    out.print(f"model: {folder}   delta: {delta['bytes'] / 1e6:.1f} MB   report: {page}",
              highlight=False, soft_wrap=True)  # fmt: skip


@app.command()
@friendly
def sft(
    folder: Out,
    data: Annotated[Path | None, typer.Option(help="JSON lines with prompt and answer")] = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="text files: plain LM")] = None,
    task: Annotated[str, typer.Option(help="packaged task, where no data are given")] = "docstring",
    preset: Annotated[str, typer.Option(help="sft or small")] = "small",
    method: Method = "hft",
    strategy: Strategy = "category",
    ratio: Ratio = 0.5,
    balance: Balance = "matrices",
    reselect: Reselect = "round",
    states: States = "drop",
    soft_freeze: Soft = None,
    state_dtype: StateDtype = "fp32",
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    batch_size: Batch = None,
    micro_batch_size: Micro = None,
    sequence_length: Length = None,
    mixed_precision: Precision = "no",
    seed: Seed = 0,
    work_dir: Annotated[Path | None, typer.Option(help="checkpoints; default: OUT/work")] = None,
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Supervised fine-tuning; several ranks with torchrun; a stopped run goes on where it was."""
    from tenfold.data import load_model
    from tenfold.hft.delta import snapshot
    from tenfold.hft.supervised import sft as run
    from tenfold.training import tasks
    from tenfold.training.batches import token_rows

    config = _config(preset, method=method, strategy=strategy, ratio=ratio, balance=balance,
                     reselect=reselect, states=states, soft_freeze=soft_freeze, state_dtype=state_dtype,
                     steps=steps, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size,
                     micro_batch_size=micro_batch_size, sequence_length=sequence_length,
                     mixed_precision=mixed_precision, seed=seed)  # fmt: skip
    network, tokenizer = load_model(model, dtype_of(dtype), rank_device(device))
    rows: Any
    held = None
    if text:
        files = [f.read_text(encoding="utf-8", errors="replace") for f in text]
        rows = token_rows(tokenizer, files, config.sequence_length)
        if len(rows) > 8:
            held, rows = rows[-4:], rows[:-4]
    else:
        given = _lines(data, ("prompt", "answer")) if data else tasks.pairs(task)
        end = tokenizer.eos_token_id
        rows = tasks.rows_of_pairs(
            given, tasks.encoder(tokenizer), config.sequence_length, end, end or 0
        )
    base = snapshot(network)
    record = run(network, rows, config, eval_rows=held, work_dir=str(work_dir or folder / "work"),
                 quiet=quiet or json)  # fmt: skip
    _finish(record, network, tokenizer, base, folder, f"SFT of {model}, {method}", json)


@app.command()
@friendly
def dpo(
    folder: Out,
    data: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt, chosen and rejected")
    ] = None,
    task: Annotated[str, typer.Option(help="packaged task, where no data are given")] = "docstring",
    preset: Annotated[str, typer.Option(help="dpo or small")] = "small",
    beta: Annotated[float, typer.Option(help="of the loss")] = 0.1,
    method: Method = "hft",
    strategy: Strategy = "category",
    ratio: Ratio = 0.5,
    balance: Balance = "matrices",
    reselect: Reselect = "round",
    states: States = "drop",
    state_dtype: StateDtype = "fp32",
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    batch_size: Batch = None,
    micro_batch_size: Micro = None,
    sequence_length: Length = None,
    mixed_precision: Precision = "no",
    seed: Seed = 0,
    work_dir: Annotated[Path | None, typer.Option(help="checkpoints; default: OUT/work")] = None,
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Direct preference optimisation; the reference model shares what is frozen."""
    from tenfold.data import load_model
    from tenfold.hft.delta import snapshot
    from tenfold.hft.preference import dpo as run
    from tenfold.training import tasks

    config = _config(preset, method=method, strategy=strategy, ratio=ratio, balance=balance, beta=beta,
                     reselect=reselect, states=states, state_dtype=state_dtype, steps=steps, epochs=epochs,
                     learning_rate=learning_rate, batch_size=batch_size, micro_batch_size=micro_batch_size,
                     sequence_length=sequence_length, mixed_precision=mixed_precision,
                     seed=seed)  # fmt: skip
    network, tokenizer = load_model(model, dtype_of(dtype), rank_device(device))
    given = (
        _lines(data, ("prompt", "chosen", "rejected")) if data else tasks.swapped(tasks.pairs(task))
    )
    end = tokenizer.eos_token_id
    rows = tasks.preference_rows(
        given, tasks.encoder(tokenizer), config.sequence_length, end, end or 0
    )
    base = snapshot(network)
    record = run(
        network, rows, config, work_dir=str(work_dir or folder / "work"), quiet=quiet or json
    )
    last = record.curves["round-0"][-1]
    record.losses.update(loss=last["loss"], accuracy=last["accuracy"], margin=last["margin"])
    _finish(record, network, tokenizer, base, folder, f"DPO of {model}, {method}", json)


@app.command()
@friendly
def continual(
    folder: Out = Path("tenfold-report/hft"),
    tasks: Annotated[
        str, typer.Option(help="of docstring, german, french, spanish, licence, topic")
    ] = "docstring,german,licence,topic",
    methods: Annotated[str, typer.Option(help="of hft, full, lora, lisa")] = "full,hft",
    seeds: Annotated[str, typer.Option(help="whole numbers separated by commas")] = "0",
    preset: Annotated[str, typer.Option(help="trace or small")] = "small",
    strategy: Strategy = "category",
    ratio: Ratio = 0.5,
    balance: Balance = "matrices",
    reselect: Reselect = "round",
    states: States = "drop",
    soft_freeze: Soft = None,
    state_dtype: StateDtype = "fp32",
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    lora_lr: Annotated[float | None, typer.Option(help="of LoRA")] = None,
    batch_size: Batch = None,
    micro_batch_size: Micro = None,
    sequence_length: Length = None,
    train_rows: Annotated[int, typer.Option(min=1, help="training rows per task")] = 256,
    test_rows: Annotated[int, typer.Option(min=1, help="test rows per task")] = 64,
    mixed_precision: Precision = "no",
    model: Model = "smollm2",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tasks one after the other, methods and seeds side by side: what is learnt, what is forgotten.

    Finished runs are kept in OUT as FILE.json; a stopped study goes on where it was.
    """
    from tenfold.data import load_model
    from tenfold.hft.config import METHODS
    from tenfold.hft.record import TuneRecord
    from tenfold.hft.report import COLUMNS, table_rows, write_report
    from tenfold.hft.sequence import continual as run
    from tenfold.training import tasks as packaged
    from tenfold.training.checks import one_of

    names, kinds = split(tasks, str, "--tasks"), split(methods, str, "--methods")
    numbers = split(seeds, int, "--seeds")
    for name in names:
        one_of("--tasks", name, packaged.NAMES)
    for kind in kinds:
        one_of("--methods", kind, METHODS)
    records = []
    for seed in numbers:
        for kind in kinds:
            config = _config(preset, method=kind, strategy=strategy, ratio=ratio, balance=balance,
                             reselect=reselect, states=states, soft_freeze=soft_freeze,
                             state_dtype=state_dtype, steps=steps, epochs=epochs,
                             learning_rate=learning_rate, lora_lr=lora_lr, batch_size=batch_size,
                             micro_batch_size=micro_batch_size, sequence_length=sequence_length,
                             mixed_precision=mixed_precision, seed=seed)  # fmt: skip
            file = folder / f"{kind}-{seed}.json"
            if file.is_file():
                kept = TuneRecord.read(file)
                if kept.config != config.to_json() or kept.tasks != names:
                    raise ValueError(f"{file} is of a run with other settings; give another --out")
                records.append(kept)
                continue
            network, tokenizer = load_model(model, dtype_of(dtype), rank_device(device))
            end = tokenizer.eos_token_id
            made = packaged.make_tasks(names, packaged.encoder(tokenizer), config.sequence_length, end,
                                       end or 0, train=train_rows, test=test_rows, seed=seed)  # fmt: skip
            record = run(network, made, config, work_dir=str(folder / f"work-{kind}-{seed}"),
                         quiet=quiet or json)  # fmt: skip
            if _main():
                record.write(file)
            records.append(record)
    if not _main():
        return
    page = write_report(records, folder / "index.html", f"{model}: {', '.join(names)}")
    if json:
        runs = [{k: v for k, v in r.to_json().items() if k != "curves"} for r in records]
        write_json({"report": str(page), "runs": runs})
        return
    out.print(table(f"{model}: {', '.join(names)}", COLUMNS, table_rows(records)))
    out.print(f"report: {page}", highlight=False, soft_wrap=True)


@app.command()
@friendly
def plan(
    file: Annotated[Path | None, typer.Option("--out", help="where the Plan is written")] = None,
    round: Annotated[int, typer.Option(min=0, help="number of the round")] = 0,
    seed: Seed = 0,
    strategy: Strategy = "category",
    ratio: Ratio = 0.5,
    balance: Balance = "matrices",
    freeze_embeddings: Annotated[bool, typer.Option("--freeze-embeddings")] = False,
    model: Model = "smollm2",
    json: Json = False,
) -> None:
    """Draw a Plan and say what it trains."""
    from tenfold.data import load_model
    from tenfold.hft.selection import select

    network, _ = load_model(model)
    drawn = select(network, round, seed, strategy=strategy, ratio=ratio, balance=balance,
                   freeze_embeddings=freeze_embeddings)  # fmt: skip
    if file is not None:
        drawn.write(file)
    if json:
        write_json(drawn.to_json())
        return
    out.print(
        f"{strategy}-level, round {round}, seed {seed}: {len(drawn.trained)} tensors train, "
        f"{len(drawn.partial)} in part, {len(drawn.frozen)} are frozen; "
        f"{100 * drawn.layer_fraction:.1f} % of the layers' parameters, {100 * drawn.fraction:.1f} % of all"
    )


@app.command()
@friendly
def report(
    files: Annotated[list[Path], typer.Argument(help="records, or folders with record.json")],
    folder: Out = Path("tenfold-report/hft"),
    json: Json = False,
) -> None:
    """A page with scores, forgetting and loss curves of one or more runs."""
    from tenfold.hft.record import TuneRecord
    from tenfold.hft.report import write_report

    records = []
    for given in files:
        path = given / "record.json" if given.is_dir() else given
        if not path.is_file():
            raise ValueError(f"{given} has no record.json (of `tenfold hft sft`)")
        records.append(TuneRecord.read(path))
    page = write_report(records, folder / "index.html")
    if json:
        write_json({"report": str(page)})
        return
    out.print(f"report: {page}", highlight=False, soft_wrap=True)
