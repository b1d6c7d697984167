# SPDX-License-Identifier: Apache-2.0
"""Vocabularies of the layout that ERNIE-Code's models need: pieces, 100 descending sentinels, five whitespace tokens.

Ids of the released vocabulary: pad 0, EOS 1, unknown 2, pieces, ``<extra_id_99>`` at 250000 up to ``<extra_id_0>`` at
250099, then newline, tab, and four, two and one ``<|space|>`` (250100 to 250104). ``train_tokenizer`` makes small ones
of the same layout; ``extend_tokenizer`` adds to others what they lack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tenfold.ernie_code.formatting import WHITESPACE_TOKENS, whitespace_ids
from tenfold.training.checks import one_of

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
NUM_SENTINELS = 100
FIRST_SENTINEL = 250_099  # <extra_id_0> of mT5's and ERNIE-Code's vocabulary
ERNIE_CODE_ROWS, MT5_ROWS = 250_105, 250_112
MODELS = ("bpe", "unigram")

_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 4096,
    *,
    model: str = "bpe",
    num_sentinels: int = NUM_SENTINELS,
) -> Any:
    """A small byte-level tokenizer that writes any text of any script, and gives back exactly that text.

    Args:
        texts: to learn pieces from. Code goes through ``format_code`` first, as before tokenising.
        vocab_size: ids in all, sentinels and whitespace tokens included; a small corpus gives fewer.
        model: ``bpe`` or ``unigram`` (what SentencePiece calls them), both over bytes.
        num_sentinels: ``<extra_id_0>`` has the highest id of them.

    Returns:
        A transformers tokenizer (save_pretrained, from_pretrained) that ends a row with EOS and starts it with nothing.

    Raises:
        ValueError: fewer ids than bytes, specials, sentinels and whitespace tokens; another model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    one_of("model", model, MODELS)
    letters, specials = sorted(pre_tokenizers.ByteLevel.alphabet()), [PAD, EOS, UNK]
    added = num_sentinels + len(WHITESPACE_TOKENS)
    least = len(letters) + len(specials) + added
    if num_sentinels < 1 or vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least} (bytes, special tokens, {num_sentinels} sentinels, whitespace "
            f"tokens) and num_sentinels at least 1, got vocab_size {vocab_size} and num_sentinels {num_sentinels}"
        )
    backend = Tokenizer(models.BPE() if model == "bpe" else models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {
        "vocab_size": vocab_size - added, "show_progress": False, "initial_alphabet": letters,
        "special_tokens": specials,
    }  # fmt: skip
    if model == "unigram":
        trainer: Any = trainers.UnigramTrainer(unk_token=UNK, **options)
    else:
        trainer = trainers.BpeTrainer(**options)
    # Whitespace tokens are never inside a piece: the tokenizer takes them out of a text before anything else.
    backend.train_from_iterator((p for t in texts for p in _SPLIT.split(t) if p), trainer)
    backend.add_tokens(_new_tokens([], num_sentinels))
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A $B {EOS}", special_tokens=[(EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNK, padding_side="right",
        clean_up_tokenization_spaces=False, extra_special_tokens=[f"<extra_id_{i}>" for i in range(num_sentinels)],
    )  # fmt: skip


_SPLIT = re.compile("|".join(map(re.escape, sorted(WHITESPACE_TOKENS, key=len, reverse=True))))


def _new_tokens(vocabulary: Iterable[str], num_sentinels: int) -> list[Any]:
    """What the vocabulary lacks, in the order of their ids: sentinels from the last to the first, whitespace."""
    from tokenizers import AddedToken

    there = set(vocabulary)
    names = [f"<extra_id_{i}>" for i in reversed(range(num_sentinels))]
    missing = [n for n in names if n not in there and f"▁{n}" not in there]
    # Whitespace tokens are not special, so that a text's newlines and tabs are tokens even where special tokens in a
    # text are taken as text, and skip_special_tokens leaves them.
    return [AddedToken(n, special=True, normalized=False) for n in missing] + [
        AddedToken(t, special=False, normalized=False) for t in WHITESPACE_TOKENS if t not in there
    ]


def extend_tokenizer(tokenizer: Any, num_sentinels: int = NUM_SENTINELS) -> list[str]:
    """Adds the sentinels and whitespace tokens that a tokenizer lacks; returns them in the order of their new ids.

    On mT5's tokenizer this gives ERNIE-Code's ids. The model's tables must be resized to ``len(tokenizer)`` after it.

    Raises ValueError where some sentinels are there and others are not, or where they do not descend: new ids are
    higher than all others, so ``<extra_id_0>`` could not be the highest of them.
    """
    there = [t for t in tokenizer.get_vocab() if _SENTINEL.fullmatch(t)]
    if there:
        _, count = sentinels(tokenizer)
        if count < num_sentinels:
            raise ValueError(
                f"the tokenizer has {count} sentinels of {num_sentinels}; more cannot be added below their ids. "
                f"Use num_sentinels={count}"
            )
        num_sentinels = count
    new = _new_tokens(tokenizer.get_vocab(), num_sentinels)
    special, plain = [t for t in new if t.special], [t for t in new if not t.special]
    if special:
        tokenizer.add_tokens(special, special_tokens=True)
    if plain:
        tokenizer.add_tokens(plain)
    return [t.content for t in new]


def sentinels(tokenizer: Any) -> tuple[int, int]:
    """(id of ``<extra_id_0>``, number of sentinels): sentinel j has the id first - j.

    Raises ValueError for a vocabulary without sentinels, or whose sentinels do not descend without gaps.
    """
    ids: dict[int, int] = {}
    for token, i in tokenizer.get_vocab().items():
        found = _SENTINEL.fullmatch(token)
        if found and ids.setdefault(int(found[1]), i) != i:
            raise ValueError(
                f"the vocabulary has <extra_id_{found[1]}> twice, as {ids[int(found[1])]} and {i}: give first_sentinel "
                "and num_sentinels"
            )
    if 0 not in ids:
        raise ValueError(
            "the tokenizer has no sentinels (<extra_id_0>, ...); add them with "
            "tenfold.ernie_code.tokenizer.extend_tokenizer, or give first_sentinel and num_sentinels"
        )
    first = ids[0]
    for number in range(len(ids)):
        if ids.get(number) != first - number:
            raise ValueError(
                f"sentinels must have descending ids without gaps: <extra_id_0> is {first}, so <extra_id_{number}> "
                f"should be {first - number}, got {ids.get(number)}"
            )
    return first, len(ids)


def check_rows(tokenizer: Any, rows: int, *, allow_more: bool = False) -> None:
    """ValueError unless a model's embedding has as many rows as the tokenizer has ids.

    Args:
        rows: of the embedding table. allow_more: accept a table that is longer (padded to a multiple, say).
    """
    length = len(tokenizer)
    if rows == length or (allow_more and rows > length):
        return
    known = {MT5_ROWS: " (mT5's table)", ERNIE_CODE_ROWS: " (ERNIE-Code's table)"}.get(rows, "")
    raise ValueError(
        f"the model has {rows} embedding rows{known} and the tokenizer has {length} ids: resize both tables with "
        f"model.resize_token_embeddings({length}), or use the tokenizer that the model was saved with"
    )


@dataclass(frozen=True)
class Layout:
    """What the ids of a vocabulary are.

    Attributes:
        length: ids in all. first_sentinel, num_sentinels. pad, eos, unk: ids or None. whitespace: id by token.
        problems: in words, where it differs from what the method expects; empty if nowhere.
    """

    length: int
    first_sentinel: int
    num_sentinels: int
    pad: int | None
    eos: int | None
    unk: int | None
    whitespace: dict[str, int]
    problems: tuple[str, ...]


def layout(tokenizer: Any) -> Layout:
    """The ids of a tokenizer, checked.

    Raises ValueError for a vocabulary without sentinels or whitespace tokens.
    """
    first, count = sentinels(tokenizer)
    spaces = whitespace_ids(tokenizer)
    pad, eos, unk = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    problems = [
        f"{name} is {got}, not {want}"
        for name, got, want in (("pad", pad, 0), ("EOS", eos, 1), ("unknown", unk, 2))
        if got != want
    ]
    if len(tokenizer) == ERNIE_CODE_ROWS:
        if first != FIRST_SENTINEL:
            problems.append(f"<extra_id_0> is {first}, not {FIRST_SENTINEL}")
        wanted = list(range(FIRST_SENTINEL + 1, ERNIE_CODE_ROWS))
        if list(spaces.values()) != wanted:
            problems.append(f"whitespace tokens are {list(spaces.values())}, not {wanted}")
    return Layout(len(tokenizer), first, count, pad, eos, unk, spaces, tuple(problems))


def load_tokenizer(name_or_path: str, *, extend: bool = True, **options: Any) -> Any:
    """A tokenizer by path or hub name (ERNIE-Code's, mT5's, T5's, or one of ``train_tokenizer``), ready for use.

    Args:
        extend: add sentinels and whitespace tokens that are not there (mT5's vocabulary lacks the latter).
        options: of ``AutoTokenizer.from_pretrained``; ``local_files_only=True`` for files on this machine only.

    Raises ValueError, with what is wrong, for ids that the method cannot work with: see ``layout``.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    if extend:
        extend_tokenizer(tokenizer)
    found = layout(tokenizer)
    if found.problems:
        raise ValueError(f"the tokenizer {name_or_path!r}: {'; '.join(found.problems)}")
    return tokenizer
