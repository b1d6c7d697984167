# SPDX-License-Identifier: Apache-2.0
"""``tenfold ernie-music``: data from scores, training, sounds from prompts, how well they follow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tenfold.cli import ma_rlhf_options as opt
from tenfold.cli.common import friendly, out, progress, rank_device, split, table, write_json

app = typer.Typer(help="ERNIE-Music: waveforms from text by diffusion.", no_args_is_help=True)
FOLDER = Path("tenfold-report/ernie_music")

Rows = Annotated[Path, typer.Option("--data", help="CSV or JSON lines: audio, text (texts, tags)")]
Encoder = Annotated[
    str | None, typer.Option(help="minilm (packaged), bag:WIDTH (no model), a folder, or a hub id")
]
ModelFolder = Annotated[Path, typer.Option("--model", help="folder that train wrote")]
Guidance = Annotated[float, typer.Option("--guidance", help="1: none; needs condition dropout")]
InferenceSteps = Annotated[int, typer.Option("--steps", min=1, help="of the sampler")]
Solver = Annotated[str, typer.Option(help="ddim, or dpm++ (fewer steps)")]


@app.command()
@friendly
def prepare(
    folder: opt.Out = FOLDER / "data",
    clips: Annotated[int, typer.Option(min=1, help="for training")] = 600,
    test_clips: Annotated[int, typer.Option(min=0, help="of other scores")] = 60,
    seconds: Annotated[float, typer.Option(help="of a clip")] = 6.0,
    sample_rate: Annotated[int, typer.Option(min=1000, help="Hz")] = 16_000,
    instruments: Annotated[
        str | None, typer.Option(help="separated by commas; default: all eight")
    ] = None,
    composers: Annotated[str | None, typer.Option(help="bach, mozart, ...")] = None,
    languages: Annotated[str | None, typer.Option(help="of the texts: en, de, fr, es, zh")] = None,
    ensemble: Annotated[float, typer.Option(help="share of clips with all parts")] = 0.3,
    scores: Annotated[int, typer.Option(min=1, help="of each composer, at most")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="of everything random")] = 0,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Render real scores to audio files with texts in several phrasings and languages."""
    from tenfold.ernie_music.recipe import RecipeConfig
    from tenfold.ernie_music.recipe import prepare as make

    given: dict[str, Any] = {
        n: tuple(split(v, str, f"--{n}"))
        for n, v in (
            ("instruments", instruments),
            ("composers", composers),
            ("languages", languages),
        )
        if v is not None
    }
    config = RecipeConfig(
        clips=clips,
        test_clips=test_clips,
        seconds=seconds,
        sample_rate=sample_rate,
        ensemble=ensemble,
        scores=scores,
        seed=seed,
        **given,
    )
    with progress(clips + test_clips, quiet or json) as step:
        files = make(folder, config, step)
    if json:
        write_json(
            {n: str(p) for n, p in files.items()} | {"clips": clips, "test_clips": test_clips}
        )
        return
    out.print(
        f"{clips} + {test_clips} clips: {files['train']}   {files['test']}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
@friendly
def train(
    data: Rows = FOLDER / "data" / "train.jsonl",
    folder: opt.Out = FOLDER / "model",
    test: Annotated[Path | None, typer.Option(help="the same, held out")] = None,
    size: Annotated[str, typer.Option(help="of a new model: tiny, small, dance or paper")] = "tiny",
    model: Annotated[Path | None, typer.Option(help="go on with the model of this folder")] = None,
    seconds: Annotated[float | None, typer.Option(help="of a crop; default: the size's")] = None,
    sample_rate: Annotated[
        int | None, typer.Option(help="Hz; audio of other rates is resampled")
    ] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="of the waveform")] = None,
    encoder: Encoder = None,
    text: Annotated[str | None, typer.Option(help="text, texts (one at random) or tags")] = None,
    preset: Annotated[str, typer.Option(help="small or paper")] = "small",
    steps: opt.Steps = None,
    batch_size: Annotated[int | None, typer.Option(help="crops per step, over all ranks")] = None,
    micro_batch_size: opt.Micro = None,
    learning_rate: opt.Rate = None,
    condition_dropout: Annotated[float | None, typer.Option(help="rows without text")] = None,
    mixed_precision: opt.Precision = None,
    checkpoint_every: opt.Every = None,
    eval_every: Annotated[int | None, typer.Option(help="steps between evaluations")] = None,
    demo_every: Annotated[int | None, typer.Option(help="steps between demo sounds")] = None,
    demo: Annotated[
        list[str] | None, typer.Option("--demo", help="a prompt; may be repeated")
    ] = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="do not go on with a stopped run")
    ] = False,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train on audio with texts; several ranks with torchrun.

    A stopped run goes on where it was, with the same command. Options, and --set, have the names of MusicTrainConfig's
    fields; what is not given is the preset's.
    """
    given = dict(locals())
    import torch

    from tenfold.ernie_music import (
        ErnieMusicConfig,
        ErnieMusicPipeline,
        ErnieMusicUNet1D,
        report,
        text_encoder_of,
    )
    from tenfold.ernie_music.dataset import AudioTexts, read_rows
    from tenfold.ernie_music.train_config import MusicTrainConfig
    from tenfold.ernie_music.training import train as run
    from tenfold.report import Page
    from tenfold.training.loop import is_main_process

    config = opt.settings_of(MusicTrainConfig, preset, given, more)
    rows = read_rows(data)
    held = read_rows(test) if test else None
    where = rank_device(device)
    if model is not None:
        pipe = ErnieMusicPipeline.from_pretrained(
            model, text_encoder=None if encoder is None else text_encoder_of(encoder, where)
        )
        network, states = pipe.unet, pipe.text_encoder
    else:
        states = text_encoder_of(encoder or "minilm", where)
        changes = {
            k: v for k, v in (("sample_rate", sample_rate), ("channels", channels)) if v is not None
        }
        made = ErnieMusicConfig.from_preset(size, text_dim=states.width, **changes)
        if seconds is not None:
            made.sample_size = made.valid_length(round(seconds * made.sample_rate))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = ErnieMusicUNet1D(made)
    network = network.to(where)
    shape = network.config.sample_rate, network.config.channels
    record, _ = run(
        network,
        AudioTexts(rows, *shape),
        states,
        config,
        held_out=AudioTexts(held, *shape) if held else None,
        demo_prompts=demo or (),
        out=folder,
        resume=not restart,
        quiet=quiet or json,
    )
    if not is_main_process():
        return
    page = Page("ERNIE-Music", f"{record.rows} pieces, {len(record.curve)} steps.")
    report.add_training(page, record)
    path = page.write(folder / "report" / "index.html")
    if json:
        write_json(
            {
                "model": str(folder),
                "report": str(path),
                "steps": len(record.curve),
                "loss": record.curve[-1]["loss"],
                "validation": record.validation,
                "demos": record.demos,
                "seconds": record.seconds,
            }
        )
        return
    last = f", held-out {record.validation[-1]['loss']:.4f}" if record.validation else ""
    out.print(
        f"loss {record.curve[-1]['loss']:.4f}{last}   model: {folder}   report: {path}",
        highlight=False,
        soft_wrap=True,
    )


def _pipeline(folder: Path, encoder: str | None, solver: str, device: str) -> Any:
    from tenfold.ernie_music import ErnieMusicPipeline, VDiffusionScheduler, text_encoder_of

    where = rank_device(device)
    states = None if encoder is None else text_encoder_of(encoder, where)
    pipe = ErnieMusicPipeline.from_pretrained(folder, text_encoder=states).to(where)
    pipe.scheduler = VDiffusionScheduler.from_config(pipe.scheduler.config, solver=solver)
    return pipe


@app.command()
@friendly
def generate(
    prompts: Annotated[list[str], typer.Argument(help="texts; '' is without text")],
    model: ModelFolder = FOLDER / "model",
    file: Annotated[
        Path, typer.Option("--out", help="WAV, FLAC, ...; several are numbered")
    ] = FOLDER / "sound.wav",
    negative: Annotated[str | None, typer.Option(help="what guidance leads away from")] = None,
    steps: InferenceSteps = 50,
    guidance: Guidance = 1.0,
    eta: Annotated[float | None, typer.Option(help="0: DDIM, 1: ancestral")] = None,
    solver: Solver = "ddim",
    seconds: Annotated[
        float | None, typer.Option(help="default: what the model was trained on")
    ] = None,
    each: Annotated[int, typer.Option(min=1, help="sounds of each prompt")] = 1,
    init: Annotated[Path | None, typer.Option(help="audio to start from")] = None,
    strength: Annotated[float, typer.Option(help="of the noise on --init, in (0, 1]")] = 0.7,
    keep: Annotated[
        str | None,
        typer.Option(help="FROM-TO seconds of --init that stay as they are (inpainting)"),
    ] = None,
    subtype: Annotated[str, typer.Option(help="int16, int24 or float")] = "int16",
    spectrogram: Annotated[
        bool, typer.Option("--spectrogram", help="a PNG beside the sounds")
    ] = False,
    encoder: Encoder = None,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Make sounds of prompts: files that play."""
    import torch

    from tenfold.ernie_music.audio import read_audio, resample, with_channels

    pipe = _pipeline(model, encoder, solver, device)
    pipe.set_progress_bar_config(disable=quiet or json)
    config = pipe.unet.config
    more: dict[str, Any] = {}
    if init is not None:
        x, rate = read_audio(init)
        known = with_channels(resample(x, rate, config.sample_rate), config.channels)
        if keep is None:
            more = {"init_audio": known, "strength": strength}
        else:
            mask = torch.zeros(known.shape[-1])
            begin, end = _span(keep)
            mask[int(begin * config.sample_rate) : int(end * config.sample_rate)] = 1
            more = {"inpaint_audio": known, "inpaint_mask": mask}
    elif keep is not None:
        raise ValueError("--keep needs --init, the audio of which a part is kept")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts) * each)]
    made = pipe(
        prompts,
        negative,
        steps,
        guidance,
        seconds,
        generators,
        eta=eta,
        num_waveforms_per_prompt=each,
        **more,
        output_type="pt",
    )
    files = made.save(file, subtype)
    pictures: list[Path] = []
    if spectrogram:
        from tenfold.ernie_music.report import spectrogram_picture

        pictures = [file.with_suffix(".png")]
        pictures[0].write_bytes(spectrogram_picture(made.audios, made.prompts, made.sample_rate))
    if json:
        write_json(
            {
                "files": [str(f) for f in files],
                "pictures": [str(p) for p in pictures],
                "sample_rate": made.sample_rate,
                "seconds": made.audios.shape[-1] / made.sample_rate,
            }
        )
        return
    out.print(
        "\n".join(f"{f}: {p}" for f, p in zip(files, made.prompts)), highlight=False, soft_wrap=True
    )


def _span(text: str) -> tuple[float, float]:
    try:
        begin, end = (float(p) for p in text.split("-"))
    except ValueError:
        raise ValueError(f"--keep takes FROM-TO in seconds, got {text!r}") from None
    if not 0 <= begin < end:
        raise ValueError(f"--keep takes FROM-TO with 0 <= FROM < TO, got {text!r}")
    return begin, end


@app.command("eval")
@friendly
def evaluate(
    model: ModelFolder = FOLDER / "model",
    data: Rows = FOLDER / "data" / "train.jsonl",
    test: Annotated[Path, typer.Option(help="the same, held out: its prompts are used")] = FOLDER
    / "data"
    / "test.jsonl",
    folder: opt.Out = FOLDER / "evaluation",
    limit: Annotated[int, typer.Option(min=2, help="prompts, at most")] = 60,
    steps: InferenceSteps = 20,
    guidance: Guidance = 1.0,
    solver: Solver = "dpm++",
    judge_steps: Annotated[int, typer.Option(min=1, help="of training the judges")] = 400,
    metrics: Annotated[str, typer.Option(help="fad, clap, where they are installed")] = "",
    encoder: Encoder = None,
    seed: Annotated[int, typer.Option(min=0, help="of noise and judges")] = 0,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Do sounds have the instrument, register and tempo of their prompts? Judged by what real audio teaches."""
    import json as json_module

    from tenfold.ernie_music import evaluation, report
    from tenfold.ernie_music.dataset import AudioTexts, read_rows
    from tenfold.report import Page
    from tenfold.training.store import write_text

    chosen = split(metrics, str, "--metrics") if metrics else []
    for name in chosen:
        evaluation.metric_of(name)
    pipe = _pipeline(model, encoder, solver, device)
    pipe.set_progress_bar_config(disable=True)
    shape = pipe.unet.config.sample_rate, pipe.unet.config.channels
    real, held = (AudioTexts(read_rows(p), *shape) for p in (data, test))
    rows = held.rows[:limit]
    with progress(2 + -(-len(rows) // 16), quiet or json) as step:
        judges = evaluation.train_judges(
            real,
            held,
            pipe.unet.config.sample_size,
            pipe.text_encoder,
            steps=judge_steps,
            seed=seed,
        )
        step("judges are trained")
        prompts = [row.text for row in rows]
        audio = evaluation.generate(
            pipe, prompts, seed=seed, step=step, num_inference_steps=steps, guidance_scale=guidance
        )
        found = evaluation.evaluate(audio, prompts, [row.about for row in rows], judges, chosen)
        step("judged")
    page = Page("ERNIE-Music", f"Sounds of {model}.")
    report.add_evaluation(page, found)
    report.add_sounds(page, audio[:6], prompts[:6], shape[0], "The first prompts.")
    path = page.write(folder / "index.html")
    write_text(folder / "evaluation.json", json_module.dumps(found.to_json(), indent=1))
    if json:
        write_json({"report": str(path)} | found.to_json())
        return
    out.print(table("Attributes of generated sounds", report.COLUMNS, report.attribute_rows(found)))
    if found.retrieval:
        out.print(
            table(
                "Texts found by their sounds",
                report.RETRIEVAL_COLUMNS,
                report.retrieval_rows(found),
            )
        )
    out.print(f"report: {path}", highlight=False, soft_wrap=True)
