# SPDX-License-Identifier: Apache-2.0
"""What commands share: consoles, progress, option parsing, errors as one sentence."""

from __future__ import annotations

import contextlib
import functools
import json as json_module
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# A pipe has no width; a table must not be cut for one.
out = Console(width=None if sys.stdout.isatty() else 150)
err = Console(stderr=True)


def _expected(error: RuntimeError) -> bool:
    """Is it a training that cannot go on, or a machine that cannot confine programs?"""
    from tenfold.sandbox import SandboxError
    from tenfold.training.errors import TrainingError

    return isinstance(error, TrainingError | SandboxError)


def friendly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Ends a command with one sentence and status 2 where the user can do something about it."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from tenfold._load import LoadError
        from tenfold.data.models import MissingData

        try:
            return command(*args, **kwargs)
        except (MissingData, LoadError, ImportError, ValueError, TypeError) as error:
            err.print(f"[red]tenfold:[/red] {error}", highlight=False, soft_wrap=True)
        except RuntimeError as error:
            if not _expected(error):
                raise
            err.print(f"[red]tenfold:[/red] {error}", highlight=False, soft_wrap=True)
        except OSError as error:
            # transformers reports an unknown model as one, over several lines.
            first = (str(error) or type(error).__name__).splitlines()[0]
            err.print(f"[red]tenfold:[/red] {first}", highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            err.print("tenfold: interrupted")
            raise typer.Exit(130) from None
        raise typer.Exit(2)

    return run


def split(text: str, kind: Callable[[str], Any], name: str) -> list[Any]:
    """Values of a comma-separated option; ValueError names the option."""
    try:
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        what = {int: "whole numbers", float: "numbers"}.get(kind, "values")  # type: ignore[call-overload]
        raise ValueError(f"{name} takes {what} separated by commas, got {text!r}") from None
    if not values:
        raise ValueError(f"{name} needs at least one value, got {text!r}")
    return values


@contextlib.contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function it gives is called after each step with what comes next."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=err, disable=quiet, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False
) -> Table:
    """A table for the terminal: first column left, the others right; ``text``: the last one is prose, which wraps."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        prose = text and i == len(columns) - 1
        made.add_column(name, justify="left" if prose or i == 0 else "right", no_wrap=not prose)
    for row in rows:
        made.add_row(*map(str, row))
    return made


def write_json(value: Any) -> None:
    """The machine-readable result, alone on stdout."""
    json_module.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


def device_of(name: str) -> str:
    """``name`` if it is a device that can be used here; ValueError says why it is not."""
    import torch

    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device takes cpu, cuda, cuda:1, ..., got {name!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device takes cpu, cuda, cuda:1, ..., got {name!r}")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        what = f"only {count} GPUs" if count else "no GPU"
        raise ValueError(f"--device {name}: torch finds {what} here; `tenfold doctor` says why")
    return name


def rank_device(name: str) -> str:
    """``--device``, checked; with torchrun, the GPU of this rank."""
    found, rank = device_of(name), os.environ.get("LOCAL_RANK")
    return device_of(f"cuda:{rank}") if rank and found.startswith("cuda") else found


def dtype_of(name: str) -> Any:
    """A torch dtype by its usual names; ValueError lists them."""
    import torch

    known = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16,
             "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16}  # fmt: skip
    if name not in known:
        raise ValueError(f"--dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name]
