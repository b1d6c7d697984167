# SPDX-License-Identifier: Apache-2.0
"""``tenfold ernie-code``: vocabularies, pre-training, fine-tuning, generation, evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from tenfold.cli import ma_rlhf_options as opt
from tenfold.cli.common import friendly, out, progress, rank_device, split, table, write_json

app = typer.Typer(help="ERNIE-Code: human and programming languages.", no_args_is_help=True)
FOLDER = Path("tenfold-report/ernie_code")

ModelFolder = Annotated[
    Path,
    typer.Option("--model", help="folder that training wrote, or a checkpoint of mT5's layout"),
]
Tokenizer = Annotated[Path | None, typer.Option(help="folder; default: the model's")]
From = Annotated[str, typer.Option("--from", help="language of sources (English, de, Python, ...)")]
To = Annotated[str, typer.Option("--to", help="language of targets")]
Layout = Annotated[str, typer.Option(help="pairs (source, target), codesearchnet or conala")]
Turned = Annotated[
    bool, typer.Option("--turned", help="read pairs the other way round: summaries of code")
]
Languages = Annotated[str | None, typer.Option(help="codes of catalogues; default: 24 of them")]
Texts = Annotated[
    list[str] | None, typer.Option("--text", help="LANGUAGE=FILE, text or code; may be repeated")
]
Restart = Annotated[bool, typer.Option("--restart", help="do not go on with a stopped run")]
Beams = Annotated[int, typer.Option("--beams", min=1, help="of beam search")]
Penalty = Annotated[float, typer.Option("--length-penalty", help="0: the sum of log-probabilities")]
MaxLength = Annotated[int, typer.Option(min=2, help="tokens of an output")]
BatchSize = Annotated[int, typer.Option(min=1, help="rows at a time")]


def _texts(given: list[str]) -> dict[str, list[str]]:
    """Documents by language, of ``--text``."""
    found: dict[str, list[str]] = {}
    for item in given:
        name, sign, file = item.partition("=")
        if not sign or not name:
            raise ValueError(f"--text takes LANGUAGE=FILE, got {item!r}")
        found.setdefault(name, []).append(Path(file).read_text(encoding="utf-8"))
    return found


def _corpora(languages: str | None, texts: list[str] | None, pairs: Path | None, source: str, target: str,
             limit: int | None) -> Any:  # fmt: skip
    """The user's files where there are some, else what is packaged."""
    from tenfold.ernie_code.corpora import DEFAULT_LANGUAGES, Corpora, packaged, split_messages
    from tenfold.ernie_code.pairs import read_pairs

    if texts is None and pairs is None:
        codes = split(languages, str, "--languages") if languages else DEFAULT_LANGUAGES
        split_messages(codes)  # says what is wrong before anything else is read
        return packaged(codes, code=("python",), limit=limit)
    made = Corpora(text=_texts(texts or []))
    for pair in read_pairs(pairs, source, target) if pairs else ():
        made.pairs.setdefault(pair.name, []).append(pair)
    return made


def _model(folder: Path, tokenizer: Path | None, device: str) -> tuple[Any, Any]:
    from tenfold.ernie_code import load_model, load_tokenizer

    loaded = load_model(folder).to(rank_device(device))
    return loaded, load_tokenizer(str(tokenizer or folder))


def _rows(
    file: Path, source: str, target: str, layout: str, turned: bool, limit: int | None
) -> list[dict[str, Any]]:
    from tenfold.ernie_code.pairs import read_pairs

    found = list(read_pairs(file, source, target, layout=layout))[:limit]
    return [dataclasses.asdict(p.turned() if turned else p) for p in found]


@app.command()
@friendly
def tokenizer(
    folder: opt.Out = FOLDER / "tokenizer",
    vocab_size: Annotated[int, typer.Option(min=1, help="ids in all")] = 8192,
    languages: Languages = None,
    text: Texts = None,
    algorithm: Annotated[str, typer.Option(help="bpe or unigram, over bytes")] = "bpe",
    limit: Annotated[
        int | None, typer.Option(min=1, help="documents of each language, at most")
    ] = None,
    json: opt.Json = False,
) -> None:
    """Train a vocabulary with sentinels and whitespace tokens, on files or on what is packaged."""
    from tenfold.ernie_code import format_code, train_tokenizer
    from tenfold.ernie_code.languages import is_code
    from tenfold.ernie_code.tokenizer import layout

    found = _corpora(languages, text, None, "", "", limit).text
    made = train_tokenizer(
        (format_code(t) if is_code(name) else t for name, texts in found.items() for t in texts),
        vocab_size, model=algorithm,
    )  # fmt: skip
    made.save_pretrained(str(folder))
    about = layout(made)
    if json:
        write_json({"tokenizer": str(folder), "ids": about.length, "first_sentinel": about.first_sentinel,
                    "sentinels": about.num_sentinels, "languages": sorted(found)})  # fmt: skip
        return
    out.print(
        f"{about.length} ids, {len(found)} languages: {folder}", highlight=False, soft_wrap=True
    )


def _finish(record: Any, folder: Path, title: str, json: bool) -> None:
    from tenfold.ernie_code import report
    from tenfold.report import Page
    from tenfold.training.loop import is_main_process

    if not is_main_process():
        return
    page = Page("ERNIE-Code", title)
    report.add_training(page, record)
    path = page.write(folder / "report" / "index.html")
    last = record.curve[-1]
    if json:
        write_json({"model": str(folder), "report": str(path), "steps": len(record.curve), "last": last,
                    "validation": record.validation, "rows": record.rows, "seconds": record.seconds})  # fmt: skip
        return
    held = f", held-out {record.validation[-1]['loss']:.3f}" if record.validation else ""
    out.print(
        f"loss {last['loss']:.3f}{held}   model: {folder}   report: {path}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
@friendly
def pretrain(
    folder: opt.Out = FOLDER / "model",
    size: Annotated[str, typer.Option(help="tiny, small, mt5-small, mt5-base, ernie-code-560m")] = "tiny",
    model: Annotated[Path | None, typer.Option(help="go on with the model of this folder")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="folder; default: the model's, or a new one")] = None,
    vocab_size: Annotated[int, typer.Option(min=1, help="of a new tokenizer")] = 4096,
    languages: Languages = None,
    text: Texts = None,
    pairs: Annotated[Path | None, typer.Option(help="JSON lines: source, target")] = None,
    source: From = "English",
    target: To = "Python",
    limit: Annotated[int | None, typer.Option(min=1, help="documents and pairs of each corpus, at most")] = None,
    pair_share: Annotated[float | None, typer.Option(help="share of draws that are pairs; default: by size")] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="span corruption without pairs")] = False,
    preset: Annotated[str, typer.Option(help="small, l512 or l1024")] = "small",
    steps: opt.Steps = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per step, over all ranks")] = None,
    rows_per_draw: Annotated[int | None, typer.Option(help="rows of one corpus at a time")] = None,
    micro_batch_size: opt.Micro = None,
    optimizer: Annotated[str | None, typer.Option(help="adafactor or adamw")] = None,
    learning_rate: opt.Rate = None,
    mixed_precision: opt.Precision = None,
    checkpoint_every: opt.Every = None,
    eval_every: Annotated[int | None, typer.Option(help="steps between evaluations")] = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    restart: Restart = False,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:  # fmt: skip
    """Pre-train on text (span corruption) and pairs (translation by way of English); several ranks with torchrun.

    A stopped run goes on where it was, with the same command. Options, and --set, have the names of CodeTrainConfig's
    fields; what is not given is the preset's.
    """
    given = dict(locals())
    from tenfold.ernie_code import (
        CodeTrainConfig,
        PairRows,
        build_model,
        format_code,
        load_model,
        load_tokenizer,
        model_config,
        pack_texts,
        raw_length,
        train,
        train_tokenizer,
    )
    from tenfold.ernie_code.languages import is_code
    from tenfold.ernie_code.mixture import grouped_weights
    from tenfold.ernie_code.training import task_of

    config = opt.settings_of(CodeTrainConfig, preset, given, more)
    where = rank_device(device)
    found = _corpora(languages, text, pairs, source, target, limit)
    if tokenizer or model:
        words = load_tokenizer(str(tokenizer or model))
    else:
        words = train_tokenizer(
            (format_code(t) if is_code(n) else t for n, ts in found.text.items() for t in ts),
            vocab_size,
        )
    if model:
        net = load_model(model)
    else:
        net = build_model(model_config(size, vocab_size=len(words)), seed=config.seed)
    length = raw_length(config.max_inputs, config.density, config.mean_span)[0]

    def corpora(texts: Any, of_pairs: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            n: pack_texts(words, t, length, code=is_code(n)) for n, t in texts.items() if t
        }
        if not text_only:
            made |= {n: PairRows(p) for n, p in of_pairs.items() if p}
        return {n: rows for n, rows in made.items() if len(rows)}

    data = corpora(found.text, found.pairs)
    weights = None
    if pair_share is not None:
        tasks = {n: task_of(rows) for n, rows in data.items()}
        sizes = {n: len(rows) for n, rows in data.items()}
        weights = grouped_weights(sizes, tasks, {"sclm": 1 - pair_share, "ptlm": pair_share})
    held = corpora(found.held_text, {n: p for n, p in found.held_pairs.items() if n in found.pairs})
    record = train(net.to(where), words, data, config, weights=weights, held_out=held or None, out=folder,
                   resume=not restart, quiet=quiet or json)  # fmt: skip
    _finish(record, folder, f"Pre-training, {len(record.curve)} steps.", json)


@app.command()
@friendly
def finetune(
    data: Annotated[Path, typer.Option(help="JSON, JSON lines, CSV or TSV with pairs")],
    model: ModelFolder = FOLDER / "model",
    folder: opt.Out = FOLDER / "finetuned",
    source: From = "English",
    target: To = "Python",
    layout: Layout = "pairs",
    turned: Turned = False,
    test: Annotated[Path | None, typer.Option(help="the same, held out")] = None,
    tokenizer: Tokenizer = None,
    preset: Annotated[
        str, typer.Option(help="finetune-small, summarise, refine-small, refine-medium or concode")
    ] = "finetune-small",
    epochs: opt.Epochs = None,
    steps: opt.Steps = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per step, over all ranks")] = None,
    rows_per_draw: Annotated[int | None, typer.Option(help="it must divide the batch")] = None,
    micro_batch_size: opt.Micro = None,
    learning_rate: opt.Rate = None,
    patience: Annotated[int | None, typer.Option(help="evaluations without improvement")] = None,
    mixed_precision: opt.Precision = None,
    checkpoint_every: opt.Every = None,
    eval_every: Annotated[int | None, typer.Option(help="steps between evaluations")] = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    restart: Restart = False,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:  # fmt: skip
    """Fine-tune on pairs: summaries, code, repairs, translations."""
    given = dict(locals())
    from tenfold.ernie_code import CodeTrainConfig, train

    config = opt.settings_of(CodeTrainConfig, preset, given, more)
    net, words = _model(model, tokenizer, device)
    rows = _rows(data, source, target, layout, turned, None)
    held = _rows(test, source, target, layout, turned, None) if test else []
    record = train(net, words, {data.stem: rows}, config, held_out={"test": held} if held else None, out=folder,
                   resume=not restart, quiet=quiet or json)  # fmt: skip
    _finish(record, folder, f"Fine-tuning on {data.name}, {len(record.curve)} steps.", json)


@app.command()
@friendly
def generate(
    sources: Annotated[list[str], typer.Argument(help="texts or code; @FILE reads a file")],
    model: ModelFolder = FOLDER / "model",
    tokenizer: Tokenizer = None,
    source: From = "English",
    target: To = "Python",
    prompt: Annotated[str | None, typer.Option(help="instead of 'translate FROM to TO: '")] = None,
    beams: Beams = 3,
    length_penalty: Penalty = 0.0,
    max_length: MaxLength = 256,
    batch_size: BatchSize = 16,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Translate texts and code, or follow a prompt."""
    from tenfold.ernie_code.generation import generate as run

    net, words = _model(model, tokenizer, device)
    texts = [Path(s[1:]).read_text(encoding="utf-8") if s.startswith("@") else s for s in sources]
    rows: list[dict[str, Any]] = [
        {"source": t, "source_language": source, "target_language": target, "prompt": prompt}
        for t in texts
    ]
    with progress(-(-len(rows) // batch_size), quiet or json) as step:
        made = run(net, words, rows, num_beams=beams, length_penalty=length_penalty, max_length=max_length,
                   batch_size=batch_size, step=step)  # fmt: skip
    if json:
        write_json([{"source": t, "output": m} for t, m in zip(texts, made)])
        return
    for text in made:
        out.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command("eval")
@friendly
def evaluate(
    data: Annotated[Path, typer.Option(help="JSON, JSON lines, CSV or TSV with pairs")],
    model: ModelFolder = FOLDER / "model",
    task: Annotated[
        str, typer.Option(help="summarise, text-to-code, repair or translate")
    ] = "translate",
    folder: opt.Out = FOLDER / "evaluation",
    source: From = "English",
    target: To = "Python",
    layout: Layout = "pairs",
    turned: Turned = False,
    tokenizer: Tokenizer = None,
    limit: Annotated[int | None, typer.Option(min=1, help="rows, at most")] = None,
    candidates: Annotated[int, typer.Option(min=0, help="also rank the target among so many")] = 0,
    beams: Beams = 3,
    length_penalty: Penalty = 0.0,
    max_length: MaxLength = 256,
    batch_size: BatchSize = 16,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Score outputs for held-out pairs, by pair of languages; a page with samples."""
    import json as json_module

    from tenfold.ernie_code import evaluation, report
    from tenfold.ernie_code.metrics import TASKS
    from tenfold.report import Page
    from tenfold.training.checks import one_of
    from tenfold.training.store import write_text

    one_of("task", task, tuple(TASKS))
    net, words = _model(model, tokenizer, device)
    rows = _rows(data, source, target, layout, turned, limit)
    with progress(-(-len(rows) // batch_size), quiet or json) as step:
        found = evaluation.evaluate(net, words, rows, task, num_beams=beams, length_penalty=length_penalty,
                                    max_length=max_length, batch_size=batch_size, step=step)  # fmt: skip
    ranked = evaluation.ranking(net, words, rows, candidates=candidates) if candidates else {}
    page = Page("ERNIE-Code", f"{len(rows)} rows of {data.name} with {model}.")
    report.add_evaluation(page, found)
    path = page.write(folder / "index.html")
    result = {"task": task, "scores": found.scores, "by_pair": found.by_pair, "ranking": ranked}
    write_text(
        folder / "evaluation.json", json_module.dumps(result | {"rows": found.rows}, indent=1)
    )
    if json:
        write_json({"report": str(path)} | result)
        return
    out.print(
        table(f"{task}: {len(rows)} rows", report.score_columns(found), report.score_rows(found))
    )
    for pair, own in ranked.items():
        out.print(f"{pair}: right of {candidates} in {100 * own['top1']:.1f} %", highlight=False)
    out.print(f"report: {path}", highlight=False, soft_wrap=True)
