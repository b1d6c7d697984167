# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer made here, for models that are trained here: byte pairs, with a begin and an end token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: Iterable[str], size: int = 1024) -> Any:
    """A fast byte-level BPE tokenizer with ``size`` ids; any text of any script can be written in it.

    ``<pad>`` is 0, ``<s>`` 1, ``</s>`` 2. It puts ``<s>`` before every text (Llama 2's habit), also before the second
    of a pair, and nothing after.

    Raises ValueError for fewer ids than bytes and special tokens (259).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [PAD, BOS, EOS]
    if size < len(letters) + len(specials):
        raise ValueError(
            f"a byte-level tokenizer needs at least {len(letters) + len(specials)} ids, got {size}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=letters, special_tokens=specials
    )
    backend.train_from_iterator(list(texts), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="right",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode_rows(
    tokenizer: Any, texts: list[str], others: list[str] | None, length: int, *, end: bool = False
) -> list[list[int]]:
    """Token ids of texts or pairs of texts, at most ``length`` each: begin tokens as the tokenizer puts them.

    Args:
        end: put the end token after each; a text that was cut has none.
    """
    options = {"verbose": False, "add_special_tokens": True}
    found = tokenizer(texts, others, **options)["input_ids"] if texts else []
    stop = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    return [(list(row) + stop)[:length] for row in found]
