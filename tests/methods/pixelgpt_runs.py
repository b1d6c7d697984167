# SPDX-License-Identifier: Apache-2.0
"""Streams, settings and models of quick runs: catalogue lines in two languages, strips of 16 patches."""

import functools

import pixelgpt_models as tiny

from tenfold.pixelgpt.small import packaged_processor
from tenfold.pixelgpt.streams import make_streams
from tenfold.pixelgpt.texts import documents, split_documents
from tenfold.pixelgpt.tokens import train_tokenizer
from tenfold.pixelgpt.train_config import PretrainConfig

SIZE = 320


def config(variant, **changes):
    settings = {"steps": 8, "batch_size": 6, "length": 24, "pair_patches": 24, "pair_tokens": 40, "eval_every": 4,
                "learning_rate": 3e-3, "checkpoint_every": 100, "seed": 0, "warmup": 0.0}  # fmt: skip
    return PretrainConfig.from_preset("small", variant=variant, **(settings | changes))


@functools.cache
def processor():
    return packaged_processor()


@functools.cache
def corpus():
    return split_documents(documents(("de", "el"), 8), 0.25)


@functools.cache
def tokenizer():
    return train_tokenizer([d.text for d in corpus()[0]], SIZE)


@functools.cache
def streams(variant, held=False):
    return make_streams(corpus()[held], config(variant), processor(), tokenizer())


def model(seed=0, **changes):
    return tiny.make_model(tiny.config(vocab_size=SIZE, **changes), seed)
