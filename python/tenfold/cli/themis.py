# SPDX-License-Identifier: Apache-2.0
"""``tenfold themis``: reward models that call tools: data, training, scores, evaluation, an HTTP endpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tenfold.cli import ma_rlhf_options as opt
from tenfold.cli import themis_options as own
from tenfold.cli import themis_results as results
from tenfold.cli.common import (
    dtype_of,
    err,
    friendly,
    out,
    progress,
    rank_device,
    split,
    table,
    write_json,
)

app = typer.Typer(
    help="Themis: reward models that call tools and say why, before they score.",
    no_args_is_help=True,
)
FOLDER = Path("tenfold-report/themis")
Models = Annotated[list[str], typer.Argument(help="NAME=PATH, or folders or hub ids")]
Pooling = Annotated[
    str | None, typer.Option(help="reward of the last token, or the mean: last, mean")
]


@app.command("build-data")
@friendly
def build_data(
    folder: opt.Out = FOLDER / "data",
    kinds: Annotated[
        str, typer.Option(help="of synthetic pairs, separated by commas")
    ] = "calculator,calendar,weather,multi,code,translator,search,none",
    count: Annotated[int, typer.Option(min=0, help="pairs per kind to train on")] = 200,
    test: Annotated[
        int, typer.Option(min=0, help="pairs per kind to test on; no question is in both")
    ] = 50,
    source: Annotated[
        list[Path] | None,
        typer.Option("--from", help="files in TARA's layout instead; may be repeated"),
    ] = None,
    held_out: Annotated[float, typer.Option(help="share of --from that is for testing")] = 0.1,
    max_steps: Annotated[int, typer.Option(min=0, help="calls in a trace, at most")] = 3,
    skip: Annotated[
        bool, typer.Option("--skip", help="leave bad examples out and count them")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="of everything drawn")] = 0,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Make pairs with true traces, or check files of them: OUT/train.jsonl and OUT/test.jsonl."""
    from collections import Counter

    from tenfold.themis.data import write_tara
    from tenfold.themis.inputs import read_pairs, split_off
    from tenfold.themis.synthetic import KINDS, synthetic_pairs
    from tenfold.training.checks import one_of

    skipped: dict[str, int] = {}
    if source:
        found = read_pairs(source, on_bad="skip" if skip else "raise", max_steps=max_steps)
        train, held = split_off(found, held_out)
        skipped = dict(found.skipped)
    else:
        names = split(kinds, str, "--kinds")
        for name in names:
            one_of("--kinds", name, KINDS)
        train, held = [], []
        with progress(len(names), quiet or json) as step:
            for name in names:
                train += synthetic_pairs(name, count, seed)
                held += synthetic_pairs(name, test, seed, split="test")
                step(name)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for part, pairs in (("train", train), ("test", held)):
        write_tara(pairs, folder / f"{part}.jsonl")
        counts[part] = dict(Counter(p.source for p in pairs))
    if json:
        write_json({"folder": str(folder), "counts": counts, "skipped": skipped})
        return
    rows = [[s, str(counts["train"].get(s, 0)), str(counts["test"].get(s, 0))]
            for s in dict.fromkeys([*counts["train"], *counts["test"]])]  # fmt: skip
    out.print(table("Pairs", ("tool", "train", "test"), rows))
    if skipped:
        out.print("left out: " + ", ".join(f"{n} ({k})" for k, n in skipped.items()))
    out.print(f"data: {folder}", highlight=False, soft_wrap=True)


@app.command()
@friendly
def train(
    folder: opt.Out,
    data: Annotated[list[Path], typer.Option(help="pairs in TARA's layout; may be repeated")],
    validation: Annotated[Path | None, typer.Option(help="pairs that are not trained on")] = None,
    held_out: Annotated[float, typer.Option(help="without --validation: share of --data")] = 0.1,
    model: Annotated[
        str, typer.Option(help="bytes (a small random Llama), smollm2, a folder, or a hub id")
    ] = "bytes",
    preset: Annotated[str, typer.Option(help="small, default, reference, paper or lora")] = "small",
    plain: Annotated[
        bool, typer.Option("--plain", help="an ordinary reward model: no traces, no tools")
    ] = False,
    alpha: Annotated[float | None, typer.Option(help="weight of the trace's loss")] = None,
    beta: Annotated[float | None, typer.Option(help="weight of observations in it")] = None,
    omega: Annotated[float | None, typer.Option(help="weight of the rationale in it")] = None,
    rm_coef: Annotated[float | None, typer.Option(help="weight of the ranking loss")] = None,
    lm_reduce: Annotated[str | None, typer.Option(help="token_mean or component_sum")] = None,
    obs_dropout: own.Dropout = None,
    pooling: Pooling = None,
    epochs: opt.Epochs = None,
    steps: opt.Steps = None,
    batch_size: opt.Batch = None,
    micro_batch_size: opt.Micro = None,
    max_length: own.RowLength = None,
    on_bad: own.OnBad = None,
    learning_rate: opt.Rate = None,
    lora_rank: opt.Rank = None,
    mixed_precision: opt.Precision = None,
    checkpoint_every: opt.Every = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="do not go on with a stopped run")
    ] = False,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train a reward model on pairs with traces; several ranks with torchrun.

    A stopped run goes on where it was, with the same command. Options, and --set, have the names of
    ThemisConfig's fields; what is not given is the preset's.
    """
    given = dict(locals())
    from tenfold.themis.config import ThemisConfig
    from tenfold.themis.inputs import SMALL, read_pairs, reward_model, split_off
    from tenfold.themis.traces import TraceFormat
    from tenfold.themis.training import train_themis
    from tenfold.training.loop import is_main_process

    if plain:
        given |= {
            "alpha": 0.0,
            "beta": 0.0,
            "omega": 0.0,
            "inputs": "plain",
            "require_trace": False,
        }
    if model == SMALL and not any(m.startswith("max") for m in more or []):
        given["max_length"] = max_length or 1024
    config = opt.settings_of(ThemisConfig, preset, given, more)
    pairs: Any = read_pairs(data, need_traces=not plain)
    held: Any = read_pairs([validation], need_traces=not plain) if validation else []
    if not validation:
        pairs, held = split_off(pairs, held_out)
    network, tokenizer = reward_model(
        model, dtype_of(dtype), rank_device(device), seed=config.seed, pooling=config.pooling
    )
    format = TraceFormat(tokenizer, max_length=config.max_length, escape=True)
    record = train_themis(network, pairs, format, config, validation=held, out=folder, tokenizer=tokenizer,
                          resume=not restart, quiet=quiet or json)  # fmt: skip
    if is_main_process():
        results.trained(record, folder, f"{'plain ' if plain else ''}reward model of {model}", json)


@app.command()
@friendly
def score(
    model: Annotated[str, typer.Argument(help="folder or hub id")],
    data: Annotated[Path | None, typer.Option(help="JSON lines with question and answer")] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="of one answer")] = None,
    answer: Annotated[
        list[str] | None, typer.Option("--answer", "-a", help="to it; may be repeated")
    ] = None,
    context: Annotated[str | None, typer.Option(help="of the question")] = None,
    trace: Annotated[bool, typer.Option(help="print what was written")] = True,
    tools: own.Tools = "default",
    tool_data: own.ToolData = None,
    web: own.Web = False,
    cache: own.Cache = None,
    cache_mode: own.CacheMode = "both",
    max_iterations: own.Iterations = 3,
    max_new_tokens: own.NewTokens = 1024,
    temperature: own.Temperature = 0.0,
    max_length: own.PromptLength = None,
    batch_size: own.Batch = 16,
    plain: own.Plain = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    json: opt.Json = False,
) -> None:
    """Judge answers: rewards, and the traces that say why."""
    given = dict(locals())
    from tenfold.themis.evaluate import judge_all
    from tenfold.themis.inputs import read_queries
    from tenfold.themis.traces import Query

    if (data is None) == (question is None or not answer):
        raise ValueError("give --data, or --question and --answer")
    if data is not None:
        queries, examples = read_queries(data)
    else:
        queries = [Query(question or "", a, context) for a in answer or []]
        examples = [{} for _ in queries]
    with own.judge_of(model, given, rank_device(device)) as loaded:
        found = judge_all(loaded.judge, queries, examples, batch_size=batch_size)
    results.judged(queries, found, json, trace)


@app.command("eval")
@friendly
def evaluate(
    models: Models,
    data: Annotated[Path, typer.Option(help="pairs in TARA's layout, or what --form says")],
    form: Annotated[str, typer.Option(help="tara, rewardbench or choices")] = "tara",
    folder: opt.Out = FOLDER / "eval",
    limit: Annotated[
        int | None, typer.Option(min=1, help="rows, evenly spaced; default: all")
    ] = None,
    swap: Annotated[
        bool, typer.Option("--swap", help="judge again in reverse order: does it come to the same?")
    ] = False,
    ties: Annotated[str, typer.Option(help="rewardbench: wrong, or share")] = "wrong",
    tools: own.Tools = "default",
    tool_data: own.ToolData = None,
    web: own.Web = False,
    cache: own.Cache = None,
    cache_mode: own.CacheMode = "both",
    max_iterations: own.Iterations = 3,
    max_new_tokens: own.NewTokens = 1024,
    temperature: own.Temperature = 0.0,
    max_length: own.PromptLength = None,
    batch_size: own.Batch = 16,
    plain: own.Plain = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Accuracy by tool, calls, calibration of one or more reward models; RewardBench's form; multiple choice."""
    given = dict(locals())
    from tenfold.ma_rlhf.inputs import named_paths
    from tenfold.training.checks import one_of

    one_of("--form", form, ("tara", "rewardbench", "choices"))
    results.evaluated(named_paths(models, "model"), given, rank_device(device))


@app.command()
@friendly
def serve(
    model: Annotated[str, typer.Argument(help="folder or hub id")],
    host: Annotated[str, typer.Option(help="others than this machine need a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8760,
    token_file: Annotated[
        Path | None, typer.Option(help="file with the token; or the variable TENFOLD_THEMIS_TOKEN")
    ] = None,
    deadline: Annotated[float, typer.Option(help="seconds in which a request is answered")] = 60.0,
    queue: Annotated[int, typer.Option(min=1, help="answers that may wait")] = 1024,
    body: Annotated[int, typer.Option(min=1, help="bytes of a request")] = 1 << 20,
    most: Annotated[int, typer.Option("--batch-limit", min=1, help="answers in a request")] = 256,
    clip: Annotated[float, typer.Option(help="scores are rewards clipped to it")] = 5.0,
    running: Annotated[
        bool, typer.Option("--running", help="scores are divided by a running deviation first")
    ] = False,
    missing: Annotated[
        float | None,
        typer.Option(help="reward in OpenRLHF's form where there is none; default: an error"),
    ] = None,
    log: Annotated[Path | None, typer.Option(help="file for all answers with their traces")] = None,
    tools: own.Tools = "default",
    tool_data: own.ToolData = None,
    web: own.Web = False,
    cache: own.Cache = None,
    cache_mode: own.CacheMode = "both",
    max_iterations: own.Iterations = 3,
    max_new_tokens: own.NewTokens = 1024,
    temperature: own.Temperature = 0.0,
    max_length: own.PromptLength = None,
    batch_size: own.Batch = 16,
    plain: own.Plain = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    quiet: opt.Quiet = False,
) -> None:
    """Answer scoring requests over HTTP until interrupted: POST /score, GET /health, GET /stats."""
    given = dict(locals())
    from tenfold.themis.normalize import Normalizer
    from tenfold.themis.record import JudgementLog
    from tenfold.themis.scorer import Scorer
    from tenfold.themis.serve import Limits, checked_access
    from tenfold.themis.serve import serve as run

    token = token_file.read_text().strip() if token_file else os.environ.get("TENFOLD_THEMIS_TOKEN")
    limits = Limits(body=body, batch=most)
    checked_access(host, token or None, missing)
    normalizer = Normalizer(clip, running)
    device = rank_device(device)

    def ready(server: Any) -> None:
        if not quiet:
            err.print(f"listening on {server.url}", highlight=False)

    kept = JudgementLog(log) if log else None
    try:
        with own.judge_of(model, given, device) as loaded, Scorer(
            loaded.judge, batch_size=batch_size, deadline=deadline, queue=queue, normalizer=normalizer, log=kept
        ) as scorer:  # fmt: skip
            run(scorer, host, port, token or None, limits, missing, ready)
            scorer.close(drain=False, timeout=10.0)
    finally:
        if kept is not None:
            kept.close()


@app.command()
@friendly
def report(
    files: Annotated[
        list[Path], typer.Argument(help="folders of runs or evaluations, or their JSON files")
    ],
    folder: opt.Out = FOLDER / "report",
    json: opt.Json = False,
) -> None:
    """A page of training runs and evaluations."""
    from tenfold.themis.report import write_page

    records, found = results.read_results(files)
    page = write_page(folder / "index.html", "", found, records)
    if json:
        write_json({"report": str(page)})
        return
    out.print(f"report: {page}", highlight=False, soft_wrap=True)
