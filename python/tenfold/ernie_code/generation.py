# SPDX-License-Identifier: Apache-2.0
"""Generation for whole batches: prompts, beam search, decoding of text and code; likelihoods of given targets."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.ernie_code.batching import IGNORE, TruncationWarning
from tenfold.ernie_code.formatting import decode_code, decode_text, encode_texts
from tenfold.ernie_code.languages import is_code, prompt
from tenfold.ernie_code.tokenizer import check_rows
from tenfold.training.checks import integers

Row = Mapping[str, Any]  # source, source_language, target_language; target for what compares


def encode_sources(tokenizer: Any, rows: Sequence[Row], max_inputs: int = 1024) -> list[list[int]]:
    r"""``translate {source_language} to {target_language}: \n`` + source + EOS of each row, as token ids.

    A source of a programming language is formatted first; one that is too long loses tokens at its end, with a
    warning. A row may have its own ``prompt`` instead, which goes before its source as it is.

    Raises ValueError for a prompt that does not fit.
    """
    prompts = [
        r["prompt"] if r.get("prompt") is not None else prompt(r["source_language"], r["target_language"])
        for r in rows
    ]  # fmt: skip
    heads = dict(zip(prompts, encode_texts(tokenizer, prompts)))
    made: list[list[int]] = [[] for _ in rows]
    cut = 0
    for code in (False, True):
        own = [i for i, r in enumerate(rows) if is_code(r["source_language"]) == code]
        texts = encode_texts(tokenizer, [rows[i]["source"] for i in own], code=code)
        for i, ids in zip(own, texts):
            room = max_inputs - len(heads[prompts[i]]) - 1
            if room < 1:
                raise ValueError(
                    f"the prompt {prompts[i]!r} does not fit into max_inputs = {max_inputs}"
                )
            cut += len(ids) > room
            made[i] = [*heads[prompts[i]], *ids[:room], tokenizer.eos_token_id]
    if cut:
        warnings.warn(
            f"cut to fit: {cut} of {len(rows)} sources (max_inputs = {max_inputs})",
            TruncationWarning,
            stacklevel=2,
        )
    return made


def encode_targets(tokenizer: Any, rows: Sequence[Row], max_targets: int = 1024) -> list[list[int]]:
    """The target of each row + EOS, as token ids; too long ones are cut, and end in EOS all the same."""
    made: list[list[int]] = [[] for _ in rows]
    for code in (False, True):
        own = [i for i, r in enumerate(rows) if is_code(r["target_language"]) == code]
        texts = encode_texts(tokenizer, [rows[i]["target"] for i in own], code=code)
        for i, ids in zip(own, texts):
            made[i] = [*ids[: max_targets - 1], tokenizer.eos_token_id]
    return made


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(int64 [B, L] padded at the end, mask [B, L])."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(r) for r in rows])
    return ids, (torch.arange(width) < lengths[:, None]).long()


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of rows, those of similar lengths together, longest first (what does not fit fails at once)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[at : at + size] for at in range(0, len(order), size))


def decode(tokenizer: Any, ids: Any, language: str) -> str:
    """Text or code of generated ids, by the language."""
    return decode_code(tokenizer, ids) if is_code(language) else decode_text(tokenizer, ids)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    num_beams: int = 3,
    length_penalty: float = 0.0,
    max_length: int = 1024,
    max_inputs: int = 1024,
    batch_size: int = 16,
    step: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[str]:
    """What the model makes of each row, in their order; results do not depend on ``batch_size``, rounding apart.

    Args:
        rows: dicts with ``source``, ``source_language``, ``target_language`` (names, or codes of catalogues), and
            optionally a ``prompt`` of their own: zero-shot prompting.
        num_beams, length_penalty: of beam search; 3 and 0 (the sum of log-probabilities) are the released ones.
        max_length, max_inputs: tokens. batch_size: rows at a time. step: told after each batch.
        options: of transformers' ``generate``.

    Raises:
        ValueError: a vocabulary of another length, a prompt that does not fit.
    """
    check_rows(tokenizer, model.shared.num_embeddings)
    sizes = {"num_beams": num_beams, "max_length": max_length, "batch_size": batch_size}
    integers(_Named(sizes), {"num_beams": 1, "max_length": 2, "batch_size": 1})
    if not rows:
        return []
    sources = encode_sources(tokenizer, rows, max_inputs)
    made = [""] * len(rows)
    device, was = model.shared.weight.device, model.training
    model.eval()
    for some in _batches([len(s) for s in sources], batch_size):
        ids, mask = padded([sources[i] for i in some], tokenizer.pad_token_id)
        found = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), num_beams=num_beams,
            length_penalty=length_penalty, max_length=max_length, do_sample=options.pop("do_sample", False), **options,
        )  # fmt: skip
        for i, answer in zip(some, found.tolist()):
            made[i] = decode(tokenizer, answer, rows[i]["target_language"])
        step(f"{len(some)} generated")
    model.train(was)
    return made


class _Named:
    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


@torch.no_grad()
def log_likelihoods(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    candidates: Sequence[Sequence[str]],
    *,
    batch_size: int = 8,
    max_inputs: int = 1024,
    max_targets: int = 1024,
) -> Tensor:
    """``log p(candidate | prompt, source)``, summed over its tokens and EOS: float32 [rows, candidates].

    Args:
        rows: as of :func:`generate`. candidates: as many for each row. batch_size: rows at a time; each source is
            encoded once.

    Raises ValueError for other numbers of candidates.
    """
    count = len(candidates[0]) if len(candidates) else 0
    if len(candidates) != len(rows) or not count or any(len(c) != count for c in candidates):
        raise ValueError(
            f"each of {len(rows)} rows needs as many candidates, got {[len(c) for c in candidates[:4]]} ..."
        )
    sources = encode_sources(tokenizer, rows, max_inputs)
    flat = [
        {"target": c, "target_language": r["target_language"]}
        for r, own in zip(rows, candidates)
        for c in own
    ]
    targets = encode_targets(tokenizer, flat, max_targets)
    made = torch.empty(len(rows), count)
    device, was = model.shared.weight.device, model.training
    model.eval()
    for some in _batches([len(s) for s in sources], batch_size):
        ids, mask = (
            x.to(device) for x in padded([sources[i] for i in some], tokenizer.pad_token_id)
        )
        states = model.encoder(input_ids=ids, attention_mask=mask)[0]
        each = list(
            itertools.chain.from_iterable(targets[i * count : (i + 1) * count] for i in some)
        )
        labels = padded(each, IGNORE)[0].to(device)
        hidden = model.decoder(
            input_ids=model._shift_right(labels), encoder_hidden_states=states.repeat_interleave(count, 0),
            encoder_attention_mask=mask.repeat_interleave(count, 0), use_cache=False,
        )[0]  # fmt: skip
        loss, _ = ops.linear_cross_entropy(hidden, model.lm_head.weight, labels, reduction="none")
        made[some] = -loss.sum(-1).view(len(some), count).float().cpu()
    model.train(was)
    return made
