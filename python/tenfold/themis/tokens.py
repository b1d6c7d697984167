# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of traces: an encoder whose text never becomes a special token, and a byte-level tokenizer made here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

SPECIALS = ("<start_tool>", "<start_observation>", "<start_work>")


class PieceEncoder:
    """Encodes and decodes pieces of text with a transformers tokenizer, as if it had no added tokens.

    A fast tokenizer is copied, and the copy's added tokens are removed: transformers' own ``split_special_tokens``
    leaves out only those that were added as special ones, and switches the caller's tokenizer over, which two threads
    must not do at a time. A slow one is asked with that switch. Whatever the tokenizer does, what it gives is
    searched for the ids that text must not give.

    Args:
        tokenizer: of transformers. forbidden: ids that no text may give.

    Attributes:
        exact: does a sample of odd text come back as it was?
    """

    def __init__(self, tokenizer: Any, forbidden: Iterable[int]) -> None:
        self.forbidden = frozenset(forbidden)
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._copy = None if self._backend is None else _without_added(self._backend)
        sample = (
            ' Odd:\ttext \n\n with 3  spaces, "ünïcode" \u4f60\U0001f600\u200b e\u0301\r\n <x> '
        )
        self.exact = self.decode(self.encode([sample])[0]) == sample

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens.

        Raises:
            ValueError: a text that is not Unicode (half of a surrogate pair); a tokenizer that makes a special id
                of text in spite of all.
        """
        if not texts:
            return []
        for text in texts:
            if not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"text must be Unicode; it has the lone surrogate U+{ord(text[error.start]):04X} "
                        f"at character {error.start}"
                    ) from None
        if self._copy is not None:
            rows = self._copy.encode_batch_fast(list(texts), add_special_tokens=False)
            found = [row.ids for row in rows]
        else:
            found = [list(self._slow(text)) for text in texts]
        for text, ids in zip(texts, found):
            if not self.forbidden.isdisjoint(ids):
                made = sorted(self.forbidden.intersection(ids))
                raise ValueError(
                    f"the tokenizer makes the special ids {made} of ordinary text ({text[:80]!r}); "
                    "such a tokenizer cannot keep text apart from special tokens"
                )
        return found

    def _slow(self, text: str) -> Any:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self._tokenizer(text, **options)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included, nothing tidied up."""
        if self._backend is not None:
            return self._backend.decode(list(ids), skip_special_tokens=False)
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _without_added(backend: Any) -> Any:
    """A copy of a fast tokenizer that finds no added tokens in text, and neither pads nor cuts."""
    settings = json.loads(backend.to_str())
    settings["added_tokens"] = []
    settings["padding"] = settings["truncation"] = settings["post_processor"] = None
    return type(backend).from_str(json.dumps(settings))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of a tokenizer's special tokens, but for that of unknown text, which text may give."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    return found - {tokenizer.unk_token_id}


def begin_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: its begin token, or nothing."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None:
        return []
    return [begin] if list(tokenizer("")["input_ids"][:1]) == [begin] else []


def byte_tokenizer(texts: Iterable[str] = (), size: int = 0) -> Any:
    """A fast tokenizer of bytes that needs no files.

    Ids 0 to 255 are bytes, 256 is ``<pad>``, 257 ``</s>``, and then come ``SPECIALS``.

    Args:
        texts, size: train byte-pair merges on texts until there are ``size`` ids; the special ones are the last.

    Returns:
        A transformers tokenizer; ``save_pretrained`` and ``from_pretrained`` work.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    letters = _byte_letters()
    merged = size > len(letters) + len(SPECIALS) + 2
    model = models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=merged)
    backend.decoder = decoders.ByteLevel()
    if merged:
        trainer = trainers.BpeTrainer(
            vocab_size=size - len(SPECIALS) - 2, show_progress=False,
            initial_alphabet=letters, special_tokens=[],
        )  # fmt: skip
        backend.train_from_iterator(list(texts), trainer)
    backend.add_special_tokens(["<pad>", "</s>", *SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", padding_side="right",
        extra_special_tokens=list(SPECIALS), clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _byte_letters() -> list[str]:
    """The characters that stand for the bytes 0 to 255 in byte-level vocabularies, in the bytes' order.

    Bytes that are printable in Latin-1 stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]
