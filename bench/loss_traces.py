# SPDX-License-Identifier: Apache-2.0
"""Cases of building traces and classing their tokens (``trace_token_class``): part of the family ``loss``.

A batch of Themis' pairs as ids and classes [2B, S]. ``kept``: rows were tokenised and classed once, as in training, and
a step only joins them (with mask, weights and positions, which only ours makes). ``text``: from texts. The peers do
what the published code describes: they write a row as text, tokenise it, tokenise the part before the targets again
to count its tokens, and look for special tokens; row by row, or with all rows and parts in one call of the fast
tokenizer. ``eager`` pads what ours keeps by torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tenfold.themis import collate as batches
from tenfold.themis.synthetic import synthetic_mixture
from tenfold.themis.tokens import byte_tokenizer
from tenfold.themis.traces import (
    ANSWER,
    EOS,
    OBSERVATION,
    RATIONALE,
    TOOL,
    Query,
    Trace,
    TraceFormat,
)

from .case import Case, Inputs, Shape, provider

S = 512
VOCABULARY = 4096
MIXTURE = {"calculator": 12, "calendar": 4, "weather": 8, "multi": 8}


def _text(query: Query, trace: Trace) -> tuple[str, str, str]:
    """The whole row without its end token, what comes before its answer, and what comes before its trace."""
    before = f"### USER:\nQuestion: {query.question}\nAnswer:"
    prompt = f"{before} {query.answer}\n"
    text = f"{prompt}### ASSISTANT:\n"
    for s in trace.steps:
        text += (f"<start_tool> Thought: {s.thought}\nAction: {s.tool}\nAction Input: {s.arguments}\n"
                 f"<start_observation> Observation: {s.observation}\n")  # fmt: skip
    return f"{text}<start_work> Work: {trace.rationale}", before, prompt


@functools.cache
def _form() -> tuple[TraceFormat, Any, tuple[Any, ...]]:
    pairs = synthetic_mixture(MIXTURE, seed=0)
    tokenizer = byte_tokenizer([_text(*row)[0] for p in pairs for row in p.rows()], VOCABULARY)
    return TraceFormat(tokenizer, max_length=S), tokenizer, tuple(pairs)


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    form, tokenizer, pairs = _form()
    pairs = pairs[: s["b"]]
    rows = [p.rows()[side] for side in (0, 1) for p in pairs]
    return Inputs(
        form=form,
        tokenizer=tokenizer,
        pairs=pairs,
        rows=rows,
        kept=batches.encode_pairs(pairs, form),
    )


def _classes(ids: list[int], answer: int, trace: int, form: TraceFormat) -> list[int]:
    special = form.ids
    made = [0] * answer + [ANSWER] * (trace - answer)
    kind = TOOL
    for token in ids[trace:]:
        if token in (special.tool, special.observation, special.work):
            made.append(TOOL)
            kind = {special.tool: TOOL, special.observation: OBSERVATION}.get(token, RATIONALE)
        else:
            made.append(EOS if token == special.eos else kind)
    return made


def _padded(rows: list[tuple[list[int], list[int]]], form: TraceFormat) -> tuple[Tensor, Tensor]:
    ids = [r + [form.ids.pad] * (S - len(r)) for r, _ in rows]
    cls = [c + [0] * (S - len(c)) for _, c in rows]
    return torch.tensor(ids), torch.tensor(cls, dtype=torch.int8)


def row_by_row(i: Inputs) -> tuple[Tensor, Tensor]:
    """A call of the tokenizer for each text."""
    made = []
    for query, trace in i.rows:
        text, before, prompt = _text(query, trace)
        ids, first, second = (
            i.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, before, prompt)
        )
        ids.append(i.form.ids.eos)
        made.append((ids, _classes(ids, len(first), len(second), i.form)))
    return _padded(made, i.form)


def all_at_once(i: Inputs) -> tuple[Tensor, Tensor]:
    """One call for all of them."""
    texts = [t for row in i.rows for t in _text(*row)]
    found = i.tokenizer(texts, add_special_tokens=False)["input_ids"]
    made = []
    for ids, first, second in zip(found[::3], found[1::3], found[2::3]):
        ids.append(i.form.ids.eos)
        made.append((ids, _classes(ids, len(first), len(second), i.form)))
    return _padded(made, i.form)


def defined(i: Inputs) -> tuple[Tensor, Tensor]:
    """Every row on its own, with the classes that come from its pieces."""
    made = [i.form.assemble(*row) for row in i.rows]
    return _padded([(m.ids, m.classes) for m in made], i.form)


def _joined(kept: Any, form: TraceFormat) -> tuple[Tensor, Tensor]:
    """Kept rows padded by torch, one by one."""
    rows = [k.rows[side] for side in (0, 1) for k in kept]
    ids = pad_sequence([torch.from_numpy(r.ids) for r in rows], True, form.ids.pad)
    cls = pad_sequence([torch.from_numpy(r.classes) for r in rows], True)
    room = (0, S - ids.shape[1])
    return F.pad(ids.long(), room, value=form.ids.pad), F.pad(cls, room)


def _collated(pairs: Any, form: TraceFormat) -> tuple[Tensor, Tensor]:
    batch = batches.collate(pairs, form, multiple_of=S)
    return batch["ids"], batch["cls"]


def _case(s: Shape, variant: str) -> Case:
    def ours(i: Inputs) -> tuple[Tensor, Tensor]:
        return _collated(i.kept if variant == "kept" else i.pairs, i.form)

    def eager(i: Inputs) -> tuple[Tensor, Tensor]:
        return _joined(
            i.kept if variant == "kept" else batches.encode_pairs(i.pairs, i.form), i.form
        )

    return Case(
        op="trace_token_class", variant=variant, shape=s, dtype=torch.int64, inputs=_inputs,
        # Ids in and out, classes out.
        bytes=lambda s, size: 2 * s["b"] * S * (2 * size + 1),
        providers=[provider("tenfold", ours), provider("eager", eager), provider("peer:retokenise", row_by_row),
                   provider("peer:retokenise_batch", all_at_once)],
        reference=defined, tolerance=0.0, quick=variant == "kept" and s["b"] == 8,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for variant, sizes in (("kept", (8, 32)), ("text", (32,))):
        for b in sizes:
            yield _case({"b": b, "s": S}, variant)
