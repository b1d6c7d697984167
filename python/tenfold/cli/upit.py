# SPDX-License-Identifier: Apache-2.0
"""``tenfold upit``: a dense model's instruction tuning becomes a mixture of experts; in one go, or stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tenfold.cli.common import err, friendly, out, rank_device, split, table, write_json

app = typer.Typer(
    help="UpIT: checkpoints of one instruction tuning become a mixture of experts.",
    no_args_is_help=True,
)

RecipeFile = Annotated[
    Path, typer.Argument(help="YAML, see docs/methods/upit.md; or mergekit-moe's")
]
Out = Annotated[Path, typer.Option("--out", help="the run's folder; a stopped run goes on there")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON, nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar")]
FOLDER = Path("tenfold-report/upit")


def _pipeline(recipe: Path, folder: Path, device: str, json: bool, quiet: bool) -> Any:
    from tenfold.upit.pipeline import Pipeline

    if not recipe.is_file():
        raise ValueError(f"no recipe at {str(recipe)!r}")

    def tell(stage: str, text: str) -> None:
        if not (json or quiet):
            err.print(f"{stage}: {text}", highlight=False, soft_wrap=True)

    return Pipeline(recipe, folder, device=rank_device(device), quiet=quiet or json, tell=tell)


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """Without what fills pages."""
    return {stage: {k: v for k, v in values.items() if k not in ("curve", "gram", "buckets", "load", "affinity")}
            for stage, values in found.items()}  # fmt: skip


def _print(found: dict[str, Any], stage: str) -> None:
    from tenfold.upit import summary

    if stage == "report":
        made = found["report"]
        names = made["families"]
        out.print(table("Loss per answer token", summary.loss_columns(names),
                        summary.loss_rows(made["losses"], names)))  # fmt: skip
        out.print(f"report: {made['page']}", highlight=False, soft_wrap=True)
    elif stage == "expand" and found["expand"]["children"]:
        out.print(
            table(
                "Merged experts",
                summary.CHILD_COLUMNS,
                summary.child_rows(found["expand"]["children"]),
            )
        )
    elif stage == "seeds":
        rows = [[str(i), str(len(b)), f"{nll:.3f}"]
                for i, (b, nll) in enumerate(zip(found["seeds"]["buckets"], found["seeds"]["mean_nll"]))]  # fmt: skip
        out.print(table("Seed samples", ("expert", "samples", "mean loss of all"), rows))
    for path in (found[stage].get("model"), *(found[stage].get("experts") or [])):
        if path:
            out.print(path, highlight=False, soft_wrap=True)


def _run(
    recipe: Path, folder: Path, until: str | None, device: str, json: bool, quiet: bool
) -> None:
    made = _pipeline(recipe, folder, device, json, quiet)
    last = until or made.stages[-1]
    found = made.run(last)
    if not made.main:
        return
    if json:
        write_json({"out": str(folder), "stages": _short(found)})
        return
    _print(found, last)
    if last == "report":
        model = (found.get("post-train") or found["assemble"])["model"]
        out.print(f"model: {model}", highlight=False, soft_wrap=True)


VERBS = {
    "run": "Run all stages of a recipe; several processes with torchrun; a stopped run goes on where it was.",
    "collect": "S1: tune the dense model and keep checkpoints, one per quarter of an epoch.",
    "expand": "S2 (and what comes before): merge the least similar experts until there are enough.",
    "seeds": "S3 (and what comes before): deal a sample of the data to the experts by their loss.",
    "route": "S4 (and what comes before): a routing vector for every expert and layer.",
    "assemble": "S5 (and what comes before): the mixture, as a stock Mixtral folder.",
    "post-train": "S6 (and what comes before): train the mixture on the same data.",
    "report": "Losses by family, load and affinity of the experts, on a page (and what comes before).",
}


def _add(verb: str, text: str) -> None:
    def command(recipe: RecipeFile, folder: Out = FOLDER, device: Device = "cpu", json: Json = False,
                quiet: Quiet = False) -> None:  # fmt: skip
        _run(recipe, folder, None if verb == "run" else verb, device, json, quiet)

    app.command(name=verb, help=text)(friendly(command))


for _verb, _text in VERBS.items():
    _add(_verb, _text)


@app.command(name="eval")
@friendly
def evaluate(
    models: Annotated[list[Path], typer.Argument(help="folders of dense models or mixtures")],
    tasks: Annotated[
        str, typer.Option(help="packaged families, separated by commas")
    ] = "docstring,german,licence,topic",
    data: Annotated[
        list[Path] | None, typer.Option(help="JSON lines with prompt and answer")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="test rows per family")] = 64,
    sequence_length: Annotated[int, typer.Option(min=2, help="tokens per row")] = 128,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Loss per family of one or more models."""
    from transformers import AutoTokenizer

    from tenfold.data.models import quiet_transformers
    from tenfold.training import tasks as packaged
    from tenfold.upit import summary
    from tenfold.upit.families import family_losses, read_pairs
    from tenfold.upit.loading import load

    absent = [str(m) for m in models if not m.is_dir()]
    if absent:
        raise ValueError(f"no model folder at {absent[0]!r}")
    pairs = {f.stem: read_pairs(f) for f in data or []} or {
        n: packaged.pairs(n) for n in split(tasks, str, "--tasks")
    }
    losses = {}
    for folder in models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with quiet_transformers():
            model = load(folder).float().to(rank_device(device)).eval()
        end = tokenizer.eos_token_id
        tests = {n: packaged.rows_of_pairs(p[:rows], packaged.encoder(tokenizer), sequence_length, end, end or 0)
                 for n, p in pairs.items()}  # fmt: skip
        losses[str(folder)] = family_losses(model, tests)
    if json:
        write_json({"losses": losses})
        return
    out.print(
        table(
            "Loss per answer token",
            summary.loss_columns(list(pairs)),
            summary.loss_rows(losses, list(pairs)),
        )
    )


@app.command()
@friendly
def export(
    model: Annotated[Path, typer.Argument(help="folder of a mixture")],
    folder: Annotated[Path, typer.Option("--out", help="folder of the result")],
    layout: Annotated[
        str, typer.Option(help="classic (w1, w2, w3 per expert) or stacked (transformers 5)")
    ] = "classic",
    json: Json = False,
) -> None:
    """Write a mixture with the other names of its tensors."""
    from tenfold.upit.layout import convert_layout

    made = convert_layout(model, folder, layout)
    if json:
        write_json({"model": str(made), "layout": layout})
        return
    out.print(f"model: {made}", highlight=False, soft_wrap=True)
