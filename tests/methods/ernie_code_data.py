# SPDX-License-Identifier: Apache-2.0
"""What the tests of ERNIE-Code's data side share: a small tokenizer, one with mT5's ids, and real files."""

import functools
import sysconfig
from pathlib import Path

import numpy as np

from tenfold.ernie_code.formatting import format_code
from tenfold.ernie_code.tokenizer import train_tokenizer

FIRST = 250_099  # sentinel of Mt5Ids


@functools.cache
def files(step: int = 1) -> tuple[str, ...]:
    """Every so-manieth module at the top of the standard library."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::step]
    return tuple(path.read_bytes().decode() for path in paths)


@functools.cache
def tokenizer(model: str = "bpe", size: int = 1024):
    """Trained on some of them."""
    return train_tokenizer([format_code(t) for t in files(8)[:12]], size, model=model)


class Mt5Ids:
    """Ids of the released vocabulary without its pieces."""

    pad_token_id, eos_token_id, unk_token_id = 0, 1, 2

    def __len__(self):
        return 250_105

    def get_vocab(self):
        return {f"<extra_id_{i}>": 250_099 - i for i in range(100)}


def t5_tokenizer(pieces: int = 0, sentinels: str = "▁<extra_id_{}>"):
    """T5's class over letters, dummy pieces and mT5's sentinels."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz():=+.,'0123456789"]
    vocabulary += [(f"§{i}", -9.0) for i in range(max(0, pieces - len(vocabulary)))]
    if sentinels:
        vocabulary += [(sentinels.format(i), 0.0) for i in reversed(range(100))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def rows_of(*lengths, seed=0, step=3):
    draw = np.random.default_rng(seed)
    return [
        {"input_ids": draw.integers(3, 900, n), "step": step, "row": i}
        for i, n in enumerate(lengths)
    ]


def trimmed(batch, i):
    """A row of a batch without padding."""
    n = int(batch["attention_mask"][i].sum())
    labels = batch["labels"][i]
    return batch["input_ids"][i, :n].tolist(), labels[labels != -100].tolist()
