# SPDX-License-Identifier: Apache-2.0
"""``tenfold gptfluence``: record fine-tunings, fit a simulator to them, and ask it what examples do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenfold.cli import gptfluence_results as results
from tenfold.cli import ma_rlhf_options as opt
from tenfold.cli.common import dtype_of, friendly, out, progress, rank_device, split, write_json

app = typer.Typer(
    help="GPTfluence: simulated training runs, and what each training example does.",
    no_args_is_help=True,
)
FOLDER = Path("tenfold-report/gptfluence")

Data = Annotated[
    Path, typer.Argument(help="folder of `record`, or of runs in the published layout")
]
Sim = Annotated[Path, typer.Argument(help="folder of `fit`")]
Metric = Annotated[str | None, typer.Option(help="loss, bleu, rougeL, ...; default: loss")]
Published = Annotated[
    bool, typer.Option("--published", help="the runs are in the published layout")
]
TrainTexts = Annotated[
    Path | None, typer.Option(help="JSON lines of the examples; default: DATA/train.jsonl")
]
TestTexts = Annotated[
    Path | None, typer.Option(help="JSON lines of the tests; default: DATA/tests.jsonl")
]
Missing = Annotated[bool, typer.Option("--mask", help="leave out measurements that are missing")]
Validation = Annotated[
    int, typer.Option(min=0, help="runs for early stopping, before the last ones")
]
Test = Annotated[int, typer.Option(min=0, help="runs that are kept for testing: the last ones")]
Encoder = Annotated[
    str, typer.Option(help="minilm (packaged), bag (no model), a folder, or a hub id")
]
Pooling = Annotated[str | None, typer.Option(help="of the encoder: cls, mean or last")]


@app.command()
@friendly
def record(
    folder: opt.Out,
    data: Annotated[
        Path,
        typer.Option(help="JSON lines with prompt and answer (or input and context); id, group"),
    ],
    tests: Annotated[Path, typer.Option(help="the same, of what is measured")],
    model: opt.Model = "smollm2",
    preset: Annotated[str, typer.Option(help="small, or reference (the publication's)")] = "small",
    runs: Annotated[int | None, typer.Option(min=1, help="how many fine-tunings")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="of each, drawn from all")] = None,
    epochs: Annotated[float | None, typer.Option(help="over these examples")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="examples per step")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="steps between measurements")] = None,
    subset: Annotated[
        int | None, typer.Option(min=1, help="tests per measurement; default: all")
    ] = None,
    concentration: Annotated[
        float | None,
        typer.Option(help="runs differ in their shares of groups: Dirichlet; default: they do not"),
    ] = None,
    learning_rate: opt.Rate = None,
    length: Annotated[int | None, typer.Option(min=2, help="tokens of a row")] = None,
    generate: Annotated[
        int | None, typer.Option(min=0, help="tokens to generate for BLEU and ROUGE-L")
    ] = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fine-tune a model many times and record what every step does to the tests.

    A stopped recording goes on where it was, with the same command; more --runs add to it. Options, and --set, have
    the names of
    RecordConfig's fields.
    """
    given = dict(locals())
    from tenfold.data import load_model
    from tenfold.gptfluence import inputs
    from tenfold.gptfluence.config import RecordConfig
    from tenfold.gptfluence.recording import record_runs, rows_of_samples
    from tenfold.gptfluence.reference_format import read_samples
    from tenfold.training.loop import is_main_process

    config = opt.settings_of(RecordConfig, preset, given, more)
    samples, asked = read_samples(data), read_samples(tests)
    network, tokenizer = load_model(model, dtype_of(dtype), rank_device(device))
    rows, test_rows = (
        rows_of_samples(list(s.values()), tokenizer, config.length) for s in (samples, asked)
    )
    with progress(config.runs, quiet or json) as step:
        made = record_runs(
            network, rows, test_rows, folder / inputs.RUNS, config, ids=list(samples), test_ids=list(asked),
            groups=[s.get("group", "") for s in samples.values()], tokenizer=tokenizer,
            test_samples=list(asked.values()), step=step,
        )  # fmt: skip
    if not is_main_process():
        return
    for name, these in ((inputs.TRAIN, samples), (inputs.TESTS, asked)):
        inputs.write_samples(these, folder / name)
    if json:
        write_json(
            {"folder": str(folder), "runs": [str(m) for m in made], "config": config.to_json()}
        )
        return
    out.print(f"{len(made)} runs: {folder}", highlight=False, soft_wrap=True)


@app.command()
@friendly
def fit(
    data: Data,
    folder: opt.Out = FOLDER / "simulator",
    metric: Metric = None,
    preset: Annotated[
        str, typer.Option(help="default, reference or reference-instruction")
    ] = "default",
    encoder: Encoder = "minilm",
    pooling: Pooling = None,
    order: Annotated[int | None, typer.Option(min=1, help="n of the recurrence")] = None,
    towers: Annotated[str | None, typer.Option(help="separate or shared")] = None,
    mode: Annotated[str | None, typer.Option(help="teacher_forced or free_running")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="over all steps of all runs")] = None,
    learning_rate: opt.Rate = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    validation: Validation = 2,
    test: Test = 5,
    published: Published = False,
    train_texts: TrainTexts = None,
    test_texts: TestTexts = None,
    mask: Missing = False,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fit a simulator to recorded runs, the last --test of which it never sees.

    Options, and --set, have the names of SimulatorConfig's fields.
    """
    given = dict(locals())
    from tenfold.gptfluence.config import SimulatorConfig
    from tenfold.gptfluence.encoders import encoder_of
    from tenfold.gptfluence.simulator import Simulator

    config = opt.settings_of(SimulatorConfig, preset, given, more)
    found = results.recorded(given)
    train, held, kept = found.runs.split(validation, test)
    of_train, of_tests = found.features(encoder_of(encoder, pooling, rank_device(device)))
    simulator = Simulator(of_train, of_tests, config)
    made = simulator.fit(train, held if len(held) else None, quiet=quiet or json)
    simulator.save(folder)
    results.fitted(simulator, made, kept, folder, json)


@app.command()
@friendly
def predict(
    simulator: Sim,
    run: Annotated[
        Path | None, typer.Option(help="folder of a recorded run: its curriculum and first values")
    ] = None,
    curriculum: Annotated[
        Path | None, typer.Option(help="JSON lines with samples_id, batch after batch")
    ] = None,
    first: Annotated[
        Path | None, typer.Option(help="JSON object: test -> value before the first batch")
    ] = None,
    without: Annotated[str, typer.Option(help="examples to leave out, separated by commas")] = "",
    file: Annotated[
        Path | None, typer.Option("--out", help="JSON lines: a trajectory per test")
    ] = None,
    json: opt.Json = False,
) -> None:
    """Simulate a training run from its curriculum."""
    results.predicted(
        simulator,
        run,
        curriculum,
        first,
        split(without, str, "--without") if without else [],
        file,
        json,
    )


@app.command()
@friendly
def attribute(
    simulator: Sim,
    kind: Annotated[str, typer.Option(help="delta, alpha, beta or counterfactual")] = "delta",
    test: Annotated[str, typer.Option(help="ids of tests, separated by commas; default: all")] = "",
    level: Annotated[
        float | None, typer.Option(help="of delta: value of the metric; default: the fit's mean")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="of counterfactual: folder of a recorded run")
    ] = None,
    itself: Annotated[
        bool, typer.Option("--self", help="what examples do to themselves (alpha or beta)")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="examples that are shown from either end")] = 5,
    file: Annotated[Path | None, typer.Option("--out", help="JSON lines: all scores")] = None,
    json: opt.Json = False,
) -> None:
    """What training examples do to tests; positive: they raise the metric (of a loss: they harm)."""
    from tenfold.gptfluence.simulator import Simulator

    loaded = Simulator.load(simulator)
    results.attributed(
        loaded,
        dict(kind=kind, test=test, level=level, run=run, itself=itself, top=top, file=file),
        json,
    )


@app.command()
@friendly
def evaluate(
    data: Data,
    simulators: Annotated[
        list[str] | None,
        typer.Option("--simulator", help="NAME=FOLDER, or a folder; may be repeated"),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="baselines that are fitted here: constant, mean, ridge, table, similarity"
        ),
    ] = "constant,mean,ridge,similarity",
    folder: opt.Out = FOLDER / "evaluation",
    metric: Metric = None,
    validation: Validation = 2,
    test: Test = 5,
    encoder: Annotated[str, typer.Option(help="of similarity, without a simulator")] = "minilm",
    published: Published = False,
    train_texts: TrainTexts = None,
    test_texts: TestTexts = None,
    mask: Missing = False,
    json: opt.Json = False,
) -> None:
    """Errors of simulated runs that were not fitted, of simulators and baselines; a page with plots."""
    results.evaluated(dict(locals()), json)


@app.command()
@friendly
def plot(
    data: Data,
    simulators: Annotated[
        list[str], typer.Option("--simulator", help="NAME=FOLDER, or a folder; may be repeated")
    ],
    folder: opt.Out = FOLDER / "plots",
    runs: Annotated[int, typer.Option(min=1, help="how many of the last runs")] = 5,
    metric: Metric = None,
    published: Published = False,
    train_texts: TrainTexts = None,
    test_texts: TestTexts = None,
    mask: Missing = False,
    json: opt.Json = False,
) -> None:
    """A page of simulated against recorded curves."""
    results.plotted(dict(locals()), json)
