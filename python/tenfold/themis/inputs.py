# SPDX-License-Identifier: Apache-2.0
"""What the command line names: models, tools and data of Themis."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.themis.benchmarks import read_rows
from tenfold.themis.data import Pair, Pairs, read_tara
from tenfold.themis.evaluate import PlainJudge
from tenfold.themis.traces import Query, TraceFormat, prepare_tokenizer
from tenfold.training.checks import one_of

TOOLS = ("default", "synthetic", "none")
SMALL = "bytes"
RECORD = "themis.json"


def reward_model(
    name: str, dtype: Any = None, device: str = "cpu", *, seed: int = 0, pooling: str | None = None
) -> tuple[Any, Any]:  # fmt: skip
    """(reward model to be trained, its tokenizer with the special tokens of traces).

    Args:
        name: ``"bytes"`` (a small Llama over bytes, random), ``"smollm2"``, or the folder or hub id of a causal LM
            or reward model; a causal LM gets a new value head. seed: of what is new.
    """
    from transformers import AutoTokenizer

    from tenfold.data.models import DEFAULT_MODEL, load_model
    from tenfold.themis.model import ThemisRewardModel
    from tenfold.themis.small import small_model

    if name == SMALL:
        model, tokenizer = small_model(seed=seed, pooling=pooling or "last")
        return model.to(device=device, dtype=dtype), tokenizer
    if name.lower().startswith(DEFAULT_MODEL) or not os.path.isdir(name):
        network, tokenizer = load_model(
            name, **({} if dtype is None else {"dtype": dtype}), device=device
        )
        prepare_tokenizer(tokenizer, network)
        return ThemisRewardModel.from_model(
            network, seed=seed, pooling=pooling or "last"
        ).eval(), tokenizer
    options = {} if dtype is None else {"dtype": dtype}
    model = ThemisRewardModel.from_pretrained(name, seed=seed, pooling=pooling, **options)
    tokenizer = AutoTokenizer.from_pretrained(name)
    prepare_tokenizer(tokenizer, model)
    return model.to(device), tokenizer


@dataclass
class LoadedJudge:
    """A judge that was loaded; a context manager that ends its tools.

    ``judge``: a :class:`~tenfold.themis.loop.ToolLoop`, or for models that were trained without traces a
    :class:`~tenfold.themis.evaluate.PlainJudge`. ``toolbox``: None for those.
    """

    judge: Any
    model: Any
    format: TraceFormat
    toolbox: Any = None

    def __enter__(self) -> LoadedJudge:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.toolbox is not None:
            self.toolbox.close()


def named_tools(
    name: str = "default", data: str | Path | None = None, web: bool = False
) -> list[Any]:
    """Tools by name: ``"default"`` (with ``data``, see ``default_tools``), ``"synthetic"`` (those that synthetic
    data were made with), or ``"none"``; ``web``: and a web search."""
    from tenfold.themis.synthetic import synthetic_tools
    from tenfold.themis.tools import GoogleSerper, default_tools

    one_of("tools", name, TOOLS)
    if data is not None and name != "default":
        raise ValueError(f"tool data are for the default tools, not for {name!r}")
    if name == "default":
        return default_tools(data, web=web)
    return (synthetic_tools() if name == "synthetic" else []) + ([GoogleSerper()] if web else [])


def recorded(folder: str) -> dict[str, Any]:
    """The settings in the record beside a model; {} where there is none. ValueError for another file of that name."""
    file = Path(folder) / RECORD
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())["config"]
        return {k: config[k] for k in ("inputs", "max_length")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is no record of `tenfold themis train`") from None


def load_judge(
    name: str, dtype: Any = None, device: str = "cpu", *, tools: str = "default",
    tool_data: str | Path | None = None, web: bool = False, cache: str | Path | None = None,
    cache_mode: str = "both", max_length: int | None = None, batch_size: int = 16, plain: bool | None = None,
    **loop: Any,
) -> LoadedJudge:  # fmt: skip
    """A trained reward model as a judge.

    Args:
        name: folder or hub id. plain: whether it reads question and answer alone; default: what its record says.
        tools, tool_data, web: of :func:`named_tools`. cache, cache_mode: of ``ToolCache``.
        max_length: tokens of question, answer and context; default: what its record says, else 512.
        batch_size, loop: of ``ToolLoop``.

    Raises:
        ValueError: no reward model with the special tokens of traces, or without a value head.
    """
    from transformers import AutoConfig, AutoTokenizer

    from tenfold.data.models import MissingData
    from tenfold.themis.loop import ToolLoop
    from tenfold.themis.model import ThemisRewardModel
    from tenfold.themis.tools import Toolbox, ToolCache

    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise MissingData(f"no model folder at {name!r}; `tenfold themis train` makes one")
    if getattr(AutoConfig.from_pretrained(name), "themis", None) is None:
        raise ValueError(
            f"{name} has no value head; `tenfold themis train` makes a reward model of it"
        )
    settings: dict[str, Any] = {"inputs": "trace", "max_length": 512} | recorded(name)
    options = {} if dtype is None else {"dtype": dtype}
    tokenizer = AutoTokenizer.from_pretrained(name)
    try:
        format = TraceFormat(
            tokenizer, max_length=max_length or settings["max_length"], escape=True
        )
    except KeyError as error:
        raise ValueError(f"{name} is no model of `tenfold themis train`: {error.args[0]}") from None
    model = ThemisRewardModel.from_pretrained(name, **options).to(device)
    if settings["inputs"] == "plain" if plain is None else plain:
        return LoadedJudge(PlainJudge(model, format, batch_size), model, format)
    kept = ToolCache(cache, cache_mode) if cache is not None else None
    box = Toolbox(named_tools(tools, tool_data, web), cache=kept)
    try:
        return LoadedJudge(
            ToolLoop(model, format, box, batch_size=batch_size, **loop), model, format, box
        )
    except BaseException:
        box.close()
        raise


def themis_reward(name: str, device: str = "cpu") -> Any:
    """Themis as a reward by name: the address of a server (``http://...``), or the folder of a reward model.

    What it opens stays open as long as the process. None: the name is of something else. The token of a server:
    ``TENFOLD_THEMIS_TOKEN``.
    """
    from tenfold.themis.client import RemoteScorer
    from tenfold.themis.rewards import ThemisReward
    from tenfold.themis.scorer import Scorer

    if name.startswith(("http://", "https://")):
        return ThemisReward(RemoteScorer(name, os.environ.get("TENFOLD_THEMIS_TOKEN") or None))
    file = Path(name) / "config.json"
    if not file.is_file() or "themis" not in json.loads(file.read_text()):
        return None
    return ThemisReward(Scorer(load_judge(name, device=device).judge, deadline=None))


def read_pairs(
    files: Sequence[str | Path], *, on_bad: str = "raise", max_steps: int = 3, allow_ties: bool = False,
    need_traces: bool = True,
) -> Pairs:  # fmt: skip
    """Pairs of several files, see ``read_tara``; what was skipped is added up. ValueError where there are none."""
    found = Pairs()
    for file in files:
        part = read_tara(
            file, on_bad=on_bad, max_steps=max_steps, allow_ties=allow_ties, need_traces=need_traces
        )
        found.extend(part)
        found.skipped.update(part.skipped)
    if not found:
        raise ValueError(f"{', '.join(map(str, files))}: no pairs")
    return found


def split_off(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs: every n-th is held out, so that all tools are in both parts.

    Raises ValueError for a share outside of [0, 0.9].
    """
    if not 0 <= share <= 0.9:
        raise ValueError(f"--held-out must be in [0, 0.9], got {share}")
    parts: tuple[list[Pair], list[Pair]] = [], []
    for i, pair in enumerate(pairs):
        parts[int((i + 1) * share) > int(i * share)].append(pair)
    return parts


def read_queries(path: str | Path) -> tuple[list[Query], list[dict[str, Any]]]:
    """(queries, what tools may read) of JSON lines with question, answer, perhaps context, and other fields.

    Raises ValueError for a row without text in one of them, with its number.
    """
    queries, examples = [], []
    for where, row in read_rows(path):
        context = row.get("context")
        wrong = [k for k in ("question", "answer") if not isinstance(row.get(k), str)]
        if wrong or not isinstance(context, str | None):
            raise ValueError(
                f"{where} needs text in {', '.join(wrong or ['context'])}; it has {sorted(map(str, row))}"
            )
        queries.append(Query(row["question"], row["answer"], context))
        examples.append(
            {k: v for k, v in row.items() if k not in ("question", "answer", "context")}
        )
    return queries, examples
