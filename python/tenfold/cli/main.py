# SPDX-License-Identifier: Apache-2.0
"""``tenfold``: one command, a group per method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenfold.cli.common import friendly
from tenfold.cli.dha import app as dha
from tenfold.cli.ernie_code import app as ernie_code
from tenfold.cli.ernie_music import app as ernie_music
from tenfold.cli.gptfluence import app as gptfluence
from tenfold.cli.hft import app as hft
from tenfold.cli.ma_rlhf import app as ma_rlhf
from tenfold.cli.nacl import app as nacl
from tenfold.cli.pixelgpt import app as pixelgpt
from tenfold.cli.themis import app as themis
from tenfold.cli.upit import app as upit

app = typer.Typer(
    help="Fused CPU and CUDA ops for LLM methods, and the methods end to end.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(nacl, name="nacl")
app.add_typer(dha, name="dha")
app.add_typer(hft, name="hft")
app.add_typer(ma_rlhf, name="ma-rlhf")
app.add_typer(upit, name="upit")
app.add_typer(themis, name="themis")
app.add_typer(pixelgpt, name="pixelgpt")
app.add_typer(gptfluence, name="gptfluence")
app.add_typer(ernie_music, name="ernie-music")
app.add_typer(ernie_code, name="ernie-code")

Json = Annotated[bool, typer.Option("--json", help="print the result as JSON, nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar")]


def _version(wanted: bool) -> None:
    if wanted:
        import tenfold

        typer.echo(f"tenfold {tenfold.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Parses what stands before the command."""


@app.command()
@friendly
def doctor(json: Json = False) -> None:
    """Say what works here and why not; test every CPU path against the reference, the GPU against the CPU."""
    from tenfold.cli.doctor import run

    raise typer.Exit(run(json))


@app.command()
@friendly
def demo(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            help="methods; default: all (nacl, dha, hft, ma-rlhf, upit, themis, pixelgpt, gptfluence, ernie-music, "
            "ernie-code)"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("tenfold-report"),
    seed: Annotated[int, typer.Option(help="of all that is random")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="methods at a time, each in a process with its share of the cores; default: one for "
            "each core, at most 4"
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run methods end to end on real input: a table, and a report page with plots.

    A method that fails is shown as failed, the others still run, and the status is 1.
    """
    from tenfold.cli.demo import run

    raise typer.Exit(run(methods or [], out, seed, jobs, json, quiet))


@app.command()
@friendly
def bench(
    families: Annotated[
        list[str] | None,
        typer.Argument(help="families of ops, such as attention or loss; default: all"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few samples, no torch.compile")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    select: Annotated[str, typer.Option(help="only cases whose name contains this")] = "",
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("tenfold-report/bench"),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time ops against eager PyTorch, torch.compile and peers; JSON and an HTML page with plots."""
    from tenfold import _bench

    raise typer.Exit(
        _bench.run(
            families, quick=quick, device=device, select=select, out=out, json=json, quiet=quiet
        )
    )


if __name__ == "__main__":
    app()
