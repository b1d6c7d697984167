# SPDX-License-Identifier: Apache-2.0
"""The verbs of ``tenfold pixelgpt`` about models: ``pretrain``, ``finetune``, ``reconstruct``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tenfold.cli import ma_rlhf_options as opt
from tenfold.cli.common import friendly, out, rank_device, split, table, write_json

FOLDER = Path("tenfold-report/pixelgpt")
Languages = Annotated[str, typer.Option(help="of packaged text, separated by commas")]
Length = Annotated[int | None, typer.Option(help="patches of a strip, tokens of a row")]
EvalEvery = Annotated[int | None, typer.Option(help="steps between evaluations")]
Restart = Annotated[bool, typer.Option("--restart", help="do not go on with a stopped run")]
ModelFolder = Annotated[Path, typer.Option("--model", help="folder that pretrain wrote")]


@friendly
def pretrain(
    folder: opt.Out = FOLDER / "model",
    variant: Annotated[
        str, typer.Option(help="textgpt, pixelgpt, monogpt or dualgpt")
    ] = "pixelgpt",
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="UTF-8 files; default: packaged text")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="name on the hub, NAME or NAME:CONFIGURATION, instead of files"),
    ] = None,
    column: Annotated[str, typer.Option(help="of --dataset, with the texts")] = "text",
    limit: Annotated[int, typer.Option(min=2, help="texts of --dataset, at most")] = 1000,
    languages: Languages = "en,de,fr,es,ru,el",
    per_language: Annotated[int, typer.Option(min=2, help="packaged documents, at most")] = 120,
    size: Annotated[str, typer.Option(help="of a new model: tiny, small or base")] = "tiny",
    model: Annotated[Path | None, typer.Option(help="go on with the model of this folder")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="folder or hub id; default: byte pairs of the text")
    ] = None,
    vocabulary: Annotated[int, typer.Option(min=259, help="ids of a tokenizer made here")] = 1024,
    norm_pix: Annotated[
        bool, typer.Option("--norm-pix/--no-norm-pix", help="normalise targets; not for generation")
    ] = True,
    preset: Annotated[str, typer.Option(help="small or paper")] = "small",
    steps: opt.Steps = None,
    length: Length = None,
    batch_size: opt.Batch = None,
    micro_batch_size: opt.Micro = None,
    learning_rate: opt.Rate = None,
    eval_every: EvalEvery = None,
    mixed_precision: opt.Precision = None,
    checkpoint_every: opt.Every = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    restart: Restart = False,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Pre-train on rendered text, on tokens, or on both; several ranks with torchrun.

    A stopped run goes on where it was, with the same command. Options, and --set, have the names of
    PretrainConfig's fields; what is not given is the preset's.
    """
    given = dict(locals())
    from tenfold.pixelgpt import report, small
    from tenfold.pixelgpt.loading import load
    from tenfold.pixelgpt.pretraining import pretrain as run
    from tenfold.pixelgpt.texts import documents
    from tenfold.pixelgpt.train_config import PretrainConfig
    from tenfold.training.loop import is_main_process

    config = opt.settings_of(PretrainConfig, preset, given, more)
    network = processor = tokens = None
    if model is not None:
        network, processor, tokens = load(model, device=rank_device(device))
    if tokenizer is not None:
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(tokenizer)
    if text and dataset:
        raise ValueError("give --text or --dataset, not both")
    if text:
        found = small.file_documents(text)
    elif dataset:
        found = small.hub_documents(dataset, column=column, limit=limit)
    else:
        found = documents(split(languages, str, "--languages"), per_language)
    if processor is None and not (text or dataset):
        processor = small.packaged_processor()
    corpus = small.corpus_of(found, vocabulary=vocabulary, processor=processor, tokenizer=tokens)
    if network is None:
        network = small.model_for(
            corpus, size, seed=config.seed, norm_pix_loss=norm_pix
        ).to(rank_device(device))  # fmt: skip
    if config.streams != ("pixel",) and network.config.vocab_size < len(corpus.tokenizer):
        raise ValueError(
            f"the tokenizer has {len(corpus.tokenizer)} ids, the model {network.config.vocab_size}"
        )
    streams, held = corpus.streams(config)
    record = run(network, streams, config, held_out=held, out=folder, resume=not restart,
                 quiet=quiet or json)  # fmt: skip
    if not is_main_process():
        return
    name = report.title_of(record)
    pictures = small.pictures(network, held)
    page = report.write_report({name: record}, folder / "report" / "index.html", name, pictures)
    for png in pictures.values():
        (page.parent / "reconstructions.png").write_bytes(png)
    if json:
        write_json({"model": str(folder), "report": str(page), "before": record.validation[0],
                    "after": record.validation[-1], "baselines": record.baselines, "rows": record.rows,
                    "steps": len(record.curve), "seconds": record.seconds})  # fmt: skip
        return
    out.print(table(f"{name}, held-out losses", report.PRETRAIN_COLUMNS,
                    report.pretrain_rows({name: record})))  # fmt: skip
    out.print(f"model: {folder}   report: {page}", highlight=False, soft_wrap=True)


def _task(
    name: str, languages: list[str], data: str | None, validation: str | None, tests: list[str]
) -> tuple[Any, list[Any], list[Any], dict[str, list[Any]]]:
    """(task, training, validation and test examples) of packaged text, files or the hub."""
    from tenfold.pixelgpt import texts
    from tenfold.pixelgpt.tasks import TASKS, printed, read_examples

    if name in ("language", "domain"):
        made = texts.language_task if name == "language" else texts.domain_task
        spec, train, test = made(languages)
        half = [e for i, e in enumerate(test) if i % 2]
        rest = [e for i, e in enumerate(test) if not i % 2]
        return spec, train, half, {"test": rest}
    if name not in TASKS:
        raise ValueError(
            f"--task must be language, domain or one of {', '.join(TASKS)}, got {name!r}"
        )
    spec = TASKS[name]
    source = data or "hub"

    def read(where: str, part: str) -> list[Any]:
        found = read_examples(where, spec, split=part, languages=languages)
        return printed(found) if spec.pretokenized else found

    held = (
        read(validation or source, "validation")
        if validation or Path(source).is_dir() or source == "hub"
        else []
    )
    return spec, read(source, "train"), held, {Path(t).stem: read(t, "test") for t in tests}


@friendly
def finetune(
    model: ModelFolder,
    folder: opt.Out = FOLDER / "classifier",
    task: Annotated[
        str, typer.Option(help="language or domain (packaged), or one of GLUE's, or xnli")
    ] = "language",
    data: Annotated[
        str | None,
        typer.Option(help="of GLUE and XNLI: a file, a folder, or a hub name; default: the hub"),
    ] = None,
    validation: Annotated[str | None, typer.Option(help="the same; default: of --data")] = None,
    test: Annotated[list[str] | None, typer.Option(help="files that are scored at the end")] = None,
    modality: Annotated[str | None, typer.Option(help="pixel, text or pair")] = None,
    languages: Annotated[
        str | None, typer.Option(help="of packaged tasks and XNLI, separated by commas")
    ] = None,
    published: Annotated[
        str | None, typer.Option(help="settings that were published for the task and this variant")
    ] = None,
    preset: Annotated[str, typer.Option(help="small or paper")] = "small",
    steps: opt.Steps = None,
    length: Length = None,
    batch_size: opt.Batch = None,
    micro_batch_size: opt.Micro = None,
    learning_rate: opt.Rate = None,
    eval_every: EvalEvery = None,
    mixed_precision: opt.Precision = None,
    checkpoint_every: opt.Every = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    restart: Restart = False,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fine-tune a classifier on pixels, text or pairs, and score it; several ranks with torchrun."""
    given = dict(locals())
    from tenfold.pixelgpt import report
    from tenfold.pixelgpt.finetuning import finetune as run
    from tenfold.pixelgpt.loading import load
    from tenfold.pixelgpt.recipes import recipe
    from tenfold.pixelgpt.train_config import FineTuneConfig
    from tenfold.training.loop import is_main_process

    if published:
        fields = recipe(task, published, modality or "pixel")
        given |= {k: v for k, v in fields.items() if given.get(k) is None}
    config = opt.settings_of(FineTuneConfig, preset, given, more)
    chosen = split(languages, str, "--languages") if languages else (
        ["de", "fr", "es", "ru", "el"] if task in ("language", "domain") else [])  # fmt: skip
    spec, train, held, tests = _task(task, chosen, data, validation, test or [])
    network, processor, tokenizer = load(
        model, device=rank_device(device), num_labels=spec.num_labels, seed=config.seed
    )
    record = run(network, spec, train, held, config, processor=processor, tokenizer=tokenizer, tests=tests,
                 out=folder, resume=not restart, quiet=quiet or json)  # fmt: skip
    if not is_main_process():
        return
    name = f"{task}, {config.modality}"
    page = report.write_report({name: record}, folder / "report" / "index.html", name)
    if json:
        write_json({"model": str(folder), "report": str(page), "best": record.best, "scores": record.scores,
                    "steps": len(record.curve), "seconds": record.seconds})  # fmt: skip
        return
    out.print(
        table(
            f"{task}: {len(train)} examples", report.TUNE_COLUMNS, report.tune_rows({name: record})
        )
    )
    out.print(f"model: {folder}   report: {page}", highlight=False, soft_wrap=True)


@friendly
def reconstruct(
    model: ModelFolder,
    text: Annotated[list[str] | None, typer.Argument(help="texts; default: packaged ones")] = None,
    file: Annotated[Path | None, typer.Option(help="UTF-8 file, a text per line")] = None,
    folder: opt.Out = FOLDER / "reconstructions",
    length: Annotated[int, typer.Option(min=2, help="patches of a strip")] = 48,
    write: Annotated[
        int,
        typer.Option("--write", min=0, help="patches that the model goes on with after each text"),
    ] = 0,
    denorm: Annotated[
        str | None,
        typer.Option(help="where brightness and contrast come from: target, context, minmax, none"),
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="pixels are so many times as large")] = 2,
    device: opt.Device = "cpu",
    json: opt.Json = False,
) -> None:
    """Draw what a model expects at every patch of a text, and how it goes on: PNG files."""
    import torch

    from tenfold.pixelgpt import report
    from tenfold.pixelgpt.collate import strips_of, with_settings
    from tenfold.pixelgpt.generate import generate_patches
    from tenfold.pixelgpt.generate import reconstruct as expected_of
    from tenfold.pixelgpt.images import without_eos
    from tenfold.pixelgpt.loading import load
    from tenfold.pixelgpt.texts import documents

    network, processor, _ = load(model, device=rank_device(device))
    if processor is None:
        raise ValueError(f"{model} has no renderer: it was not trained on pixels")
    if file is not None:
        text = [t for line in file.read_text(encoding="utf-8").splitlines() if (t := line.strip())]
    texts = text or [d.lines[0] for d in documents(("de", "ru", "el"), 2)]
    batch = strips_of(with_settings(processor, max_patches=length), texts)
    batch = {k: v.to(network.device) for k, v in batch.items()}
    with torch.no_grad():
        npp = float(network(**batch, use_cache=False).pixel_loss)
    expected = expected_of(network, **batch, denorm=denorm)
    folder.mkdir(parents=True, exist_ok=True)
    png = folder / "reconstructions.png"
    png.write_bytes(
        report.pairs_png(
            batch["pixel_values"], expected, rows=len(texts), patches=length, scale=scale
        )
    )
    made: dict[str, Any] = {"picture": str(png), "npp": npp, "texts": len(texts)}
    if write:
        mask = without_eos(batch["patch_mask"])
        how = denorm if denorm != "target" else None
        more = generate_patches(network, batch["pixel_values"], mask, steps=write, denorm=how)
        rows = []
        for strip, valid, new in zip(batch["pixel_values"], mask, more):
            rows.append(_joined(strip, int(valid.sum()), new))
        written = folder / "written.png"
        written.write_bytes(report.strip_png(rows, scale=scale))
        made["written"] = str(written)
    if json:
        write_json(made)
        return
    out.print(f"next patch loss of {len(texts)} texts: {made['npp']:.3f}")
    for name in ("picture", "written"):
        if name in made:
            out.print(f"{name}: {made[name]}", highlight=False, soft_wrap=True)


def _joined(strip: Any, patches: int, new: Any) -> Any:
    """A strip up to the end of its text, a red patch, and the patches that were written."""
    import torch

    size = strip.shape[1]
    line = strip.new_zeros(strip.shape[0], size, size)
    line[0] = 220  # red, in colour
    return torch.cat([strip[..., : patches * size], line, new], -1)


def add_to(app: typer.Typer) -> None:
    """Adds the verbs to the method's group."""
    for command in (pretrain, finetune, reconstruct):
        app.command()(command)
