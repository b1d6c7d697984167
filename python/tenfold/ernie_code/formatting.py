# SPDX-License-Identifier: Apache-2.0
"""Code as ERNIE-Code reads it: indentation written as ``<|space|>`` tokens, and back.

A SentencePiece vocabulary squeezes spaces, which is the end of Python. So every run of spaces directly after a newline
becomes as many ``<|space|>``, of which the tokenizer has tokens of four, two and one (spec 3.2).

Two ways of decoding. ``exact`` works on ids: whitespace tokens become what they stand for, and what lies between them
is decoded as it is, so with ``tokenizer.train_tokenizer``'s vocabulary decode(encode(text)) == text for every text.
``published`` is the procedure of the released checkpoint: it works on the decoded string and strips both ends, so a
final newline or the first line's indentation is lost.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from tenfold.training.checks import one_of

SPACE = "<|space|>"
# In the order of their ids in the released vocabulary.
WHITESPACE_TOKENS = ("\n", "\t", SPACE * 4, SPACE * 2, SPACE)
MEANINGS = {"\n": "\n", "\t": "\t", SPACE * 4: " " * 4, SPACE * 2: "  ", SPACE: " "}
MODES = ("exact", "published")

_INDENT = re.compile(r"(?<=\n) +")
_RAW_INDENT = re.compile(r"\n +[^ \n\r]")
_CUT = len(SPACE) // 2


class UnformattedCodeWarning(UserWarning):
    """Code reached the tokenizer with raw indentation."""


def format_code(text: str) -> str:
    r"""Every run of spaces directly after a newline as the same number of ``<|space|>``.

    Other spaces and tabs stay, and so do spaces before the first line: ``"a\n  b  c"`` gives
    ``"a\n<|space|><|space|>b  c"``. Text (not code) is not formatted. Code that has ``<|space|>`` in it already is
    left as it is there; ``encode_code`` keeps such code apart from indentation, too.
    """
    return _INDENT.sub(lambda run: SPACE * len(run[0]), text)


def unformat_code(text: str) -> str:
    """``<|space|>`` as spaces: what ``format_code`` did, undone, for text that had none of its own."""
    return text.replace(SPACE, " ")


def warn_unformatted(text: str, name: str = "code", stacklevel: int = 2) -> bool:
    """Warns (``UnformattedCodeWarning``) if a line of ``text`` starts with a space; says whether it did.

    Args:
        text: what is about to be tokenised as code. name: what the warning calls it.
    """
    found = _RAW_INDENT.search(text) is not None
    if found:
        warnings.warn(
            f"{name} has lines indented with raw spaces, which the tokenizer of a released checkpoint drops; "
            "pass it through tenfold.ernie_code.format_code first",
            UnformattedCodeWarning,
            stacklevel=stacklevel + 1,
        )
    return found


def is_indented_python(text: str) -> bool:
    """Whether a text with lines that start with spaces is Python: it parses."""
    if _RAW_INDENT.search(text) is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in what is parsed
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def whitespace_ids(tokenizer: Any) -> dict[str, int]:
    """Id of each of ``WHITESPACE_TOKENS``.

    Raises ValueError for a vocabulary without one of them: ``extend_tokenizer`` adds them.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in WHITESPACE_TOKENS if t not in vocabulary]
    if missing:
        raise ValueError(
            f"the tokenizer has no whitespace tokens {missing}; add them with "
            "tenfold.ernie_code.tokenizer.extend_tokenizer"
        )
    return {t: vocabulary[t] for t in WHITESPACE_TOKENS}


def _parts(text: str) -> list[str]:
    """``text`` cut inside each ``<|space|>`` that is part of the text itself, so that none of them is a token."""
    pieces = text.split(SPACE)
    for i in range(len(pieces) - 1):
        pieces[i] += SPACE[:_CUT]
        pieces[i + 1] = SPACE[_CUT:] + pieces[i + 1]
    return pieces


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    # Names of special tokens inside a text are text: no `</s>` of a source file ends a row.
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return tokenizer(list(texts), **options)["input_ids"] if texts else []


def encode_texts(tokenizer: Any, texts: Sequence[str], *, code: bool = False) -> list[list[int]]:
    """Token ids of texts, without EOS; with ``code``, formatted by ``format_code`` first.

    Unlike a bare call of the tokenizer, the names of special tokens inside a text (``</s>``, ``<extra_id_0>``,
    ``<|space|>``) are encoded as text.
    """
    cut = [_parts(text) for text in texts]
    flat = [format_code(part) if code else part for parts in cut for part in parts]
    found = iter(_ids(tokenizer, flat))
    return [[i for _ in parts for i in next(found)] for parts in cut]


def encode_code(tokenizer: Any, text: str) -> list[int]:
    """Token ids of code, without EOS; ``decode_code`` gives the code back."""
    return encode_texts(tokenizer, [text], code=True)[0]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text, without EOS; ``decode_text(..., mode="exact")`` gives the text back."""
    return encode_texts(tokenizer, [text])[0]


def _special(tokenizer: Any, names: Iterable[str] = ("pad", "eos", "unk")) -> set[int]:
    found = {getattr(tokenizer, f"{name}_token_id") for name in names}
    return {i for i in found if i is not None}


def _plain(tokenizer: Any, ids: list[int]) -> str:
    if not ids:
        return ""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _exact(tokenizer: Any, ids: Iterable[int], dropped: set[int]) -> str:
    vocabulary = tokenizer.get_vocab()
    meaning = {vocabulary[t]: MEANINGS[t] for t in WHITESPACE_TOKENS if t in vocabulary}
    made: list[str] = []
    run: list[int] = []
    for i in map(int, ids):
        if i in meaning:
            made += [_plain(tokenizer, run), meaning[i]]
            run = []
        elif i >= 0 and i not in dropped:
            run.append(i)
    return "".join([*made, _plain(tokenizer, run)])


def decode_code(tokenizer: Any, ids: Iterable[int], *, mode: str = "exact") -> str:
    """Code of token ids.

    Args:
        ids: of one sequence; pad, EOS and unknown tokens are dropped, and so are labels of -100.
        mode: ``exact`` or ``published``, see the module.

    Raises ValueError for another mode, or for a vocabulary without whitespace tokens.
    """
    one_of("mode", mode, MODES)
    whitespace_ids(tokenizer)
    if mode == "exact":
        return _exact(tokenizer, ids, _special(tokenizer))
    special = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token]
    text = _plain(tokenizer, [i for i in map(int, ids) if i >= 0])
    for token in [*special, *WHITESPACE_TOKENS]:
        if token is not None:
            text = text.replace(token + " ", token)
    for token in special:
        if token is not None:
            text = text.replace(token, "")
    return unformat_code(text).strip()


def decode_text(tokenizer: Any, ids: Iterable[int], *, mode: str = "published") -> str:
    """Text of token ids, special tokens skipped and both ends stripped.

    Args:
        ids: of one sequence. mode: ``exact`` strips nothing; whitespace tokens are what they stand for in both.

    Raises ValueError for another mode.
    """
    one_of("mode", mode, MODES)
    text = _exact(tokenizer, ids, set(tokenizer.all_special_ids))
    return text if mode == "exact" else text.strip()
