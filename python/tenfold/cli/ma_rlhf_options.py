# SPDX-License-Identifier: Apache-2.0
"""Options of ``tenfold ma-rlhf`` and how they become settings: names are those of the settings' fields."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Option(help="'smollm2', a folder, or a hub id")]
Out = Annotated[Path, typer.Option("--out", help="folder of the result")]
Prompts = Annotated[
    Path | None, typer.Option(help="JSON lines with prompt and columns; default: packaged ones")
]
More = Annotated[
    list[str] | None, typer.Option("--set", help="any other setting, FIELD=VALUE; may be repeated")
]
Work = Annotated[Path | None, typer.Option(help="checkpoints; default: OUT/work")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON, nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar")]

# What is not given is the preset's.
Termination = Annotated[
    str | None,
    typer.Option(help="fixed, random, ppl, parsing, sentence, statement, turn or custom"),
]
N = Annotated[
    str | None, typer.Option("--n", help="tokens per macro action; 1: PPO; inf: the whole response")
]
Sigma = Annotated[str | None, typer.Option(help="equal, unit, position or position_early")]
Ratio = Annotated[str | None, typer.Option(help="token, joint or geo_mean")]
Advantage = Annotated[str | None, typer.Option(help="gae; without a critic rloo or grpo")]
Group = Annotated[int | None, typer.Option(help="responses per prompt")]
Lam = Annotated[float | None, typer.Option(help="lambda of GAE")]
Beta = Annotated[float | None, typer.Option(help="weight of the KL penalty")]
Kl = Annotated[str | None, typer.Option(help="estimator: k1, k2 or k3")]
Controller = Annotated[str | None, typer.Option(help="of beta: fixed or adaptive")]
Target = Annotated[float | None, typer.Option(help="KL per response, of adaptive control")]
ScoreClip = Annotated[float | None, typer.Option(help="scores are clipped to it")]
Whiten = Annotated[str | None, typer.Option(help="of advantages: none, token, macro or group")]
Steps = Annotated[int | None, typer.Option(help="how many")]
Batch = Annotated[int | None, typer.Option(help="responses (pairs) per step, over all ranks")]
Micro = Annotated[int | None, typer.Option(help="of them, per forward and rank")]
Minibatches = Annotated[int | None, typer.Option(help="of a rollout")]
PpoEpochs = Annotated[int | None, typer.Option(help="over a rollout")]
Rate = Annotated[float | None, typer.Option(help="at its peak")]
CriticRate = Annotated[float | None, typer.Option(help="of the critic")]
MaxPrompt = Annotated[int | None, typer.Option(help="tokens; longer ones lose their beginning")]
MaxResponse = Annotated[int | None, typer.Option(help="tokens")]
Temperature = Annotated[float | None, typer.Option(help="of sampling")]
TopK = Annotated[int | None, typer.Option(help="of sampling; 0: all tokens")]
TopP = Annotated[float | None, typer.Option(help="of sampling")]
Penalty = Annotated[
    float | None, typer.Option(help="subtracted from the score of a response without an end")
]
Rank = Annotated[int | None, typer.Option(help="LoRA; without it all weights train")]
Precision = Annotated[str | None, typer.Option(help="no, bf16 or fp16")]
Every = Annotated[int | None, typer.Option(help="steps between checkpoints")]
Seed = Annotated[int | None, typer.Option(help="of everything random")]
RmLoss = Annotated[str | None, typer.Option(help="bradley_terry, token_span or token_span_padded")]
Center = Annotated[float | None, typer.Option(help="weight that keeps scores around 0")]
Epochs = Annotated[float | None, typer.Option(help="over the pairs")]
Length = Annotated[int | None, typer.Option(help="tokens of prompt and answer")]


def settings_of(kind: Any, preset: str, given: dict[str, Any], more: list[str] | None) -> Any:
    """Settings of a class with ``from_preset``: the options that are fields of it, and those of ``--set``.

    Raises ValueError for a field that is given twice, and what the class refuses.
    """
    from tenfold.ma_rlhf.inputs import named_settings

    fields = [f.name for f in dataclasses.fields(kind) if f.name != "preset"]
    found = {k: v for k, v in given.items() if k in fields and v is not None}
    if "n" in found:
        found["n"] = _tokens(found["n"])
    extra = named_settings(more or [], fields)
    twice = [k for k in extra if k in found]
    if twice:
        raise ValueError(f"{', '.join(twice)} is given by an option and by --set, too")
    return kind.from_preset(preset, **(found | extra))


def _tokens(text: str) -> int | None:
    if text.lower() in ("inf", "none"):
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--n must be a whole number, or inf, got {text!r}") from None


def read_prompts(file: Path | None, held_out: bool = False) -> list[Any]:
    """The prompts of a file, or packaged ones."""
    from tenfold.ma_rlhf.inputs import load_prompts, packaged_prompts

    return packaged_prompts(held_out) if file is None else load_prompts(file)
