# SPDX-License-Identifier: Apache-2.0
"""Options that verbs of ``tenfold themis`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Tools = Annotated[str, typer.Option(help="default, synthetic (those of synthetic data) or none")]
ToolData = Annotated[
    Path | None,
    typer.Option(
        help="folder with what translator, weather and search answer from (default tools)"
    ),
]
Web = Annotated[bool, typer.Option("--web", help="a web search, too: needs a network and a key")]
Cache = Annotated[Path | None, typer.Option(help="file with results of tools")]
CacheMode = Annotated[
    str, typer.Option(help="of --cache: record, replay (never calls a tool) or both")
]
Iterations = Annotated[int, typer.Option(min=1, help="rounds of writing and calling")]
NewTokens = Annotated[int, typer.Option(min=1, help="tokens of one round")]
Temperature = Annotated[float, typer.Option(min=0, help="of writing; 0: greedy")]
PromptLength = Annotated[
    int | None,
    typer.Option(min=8, help="tokens of question, answer and context; default: as it was trained"),
]
Batch = Annotated[int, typer.Option(min=1, help="answers at a time")]
Plain = Annotated[
    bool | None, typer.Option("--plain/--traces", help="reads answers alone; default: its record's")
]

RowLength = Annotated[
    int | None, typer.Option(help="tokens of a row; default: the preset's, 1024 for bytes")
]
OnBad = Annotated[str | None, typer.Option(help="pairs that do not fit: raise (default), or skip")]
Dropout = Annotated[float | None, typer.Option(help="share of observations replaced by a failure")]


def judge_of(name: str, given: dict[str, Any], device: str) -> Any:
    """The judge that a verb's options name."""
    from tenfold.cli.common import dtype_of
    from tenfold.themis.inputs import load_judge

    names = ("tools", "tool_data", "web", "cache", "cache_mode", "max_length", "batch_size", "plain",
             "max_iterations", "max_new_tokens", "temperature")  # fmt: skip
    return load_judge(name, dtype_of(given["dtype"]), device, **{n: given[n] for n in names})
