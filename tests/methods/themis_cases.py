# SPDX-License-Identifier: Apache-2.0
"""Queries, traces and tokenizers that the tests of Themis' data share."""

import functools
import random

from tenfold.data.models import prepare_smollm2
from tenfold.themis.data import Candidate, Pair
from tenfold.themis.tokens import SPECIALS, byte_tokenizer
from tenfold.themis.traces import NO_TOOL, Query, Step, Trace, prepare_tokenizer

# What a field may hold to be taken for something else.
FRAGMENTS = (
    "### USER:", "### ASSISTANT:", "Context:", "Question:", "Answer:", "Thought:", "Action:", "Action Input:",
    "Observation:", "Work:", "Finished.", "Finished", "\\", "\\\\", "\n", "\n", "\n", "\r\n", "\t", " ", "  ", "", "a",
    "Zürich", "東京", "\U0001f600", "e\u0301", "\u200b", "\u2028", "\x00", "#### 12", "<<1+1=2>>2", *SPECIALS, "</s>",
)  # fmt: skip


def texts(seed, count, longest=6):
    draw = random.Random(seed)
    return ["".join(draw.choices(FRAGMENTS, k=draw.randrange(longest + 1))) for _ in range(count)]


def traces(seed):
    """One of every shape: 0 to 3 calls, with and without closing thought, rationale and last observation."""
    for calls in range(4):
        for shape in range(8):
            if calls == 0 and shape & 4:
                continue
            t = iter(texts(f"{seed} {calls} {shape}", 40))
            steps = [Step(next(t), next(t), next(t), next(t)) for _ in range(calls)]
            if shape & 4:  # breaks off after the last call
                steps[-1] = Step(*(next(t) for _ in range(3)))
                yield Trace(tuple(steps))
            else:
                yield Trace(
                    tuple(steps), next(t) if shape & 1 else None, next(t) if shape & 2 else None
                )


@functools.cache
def smollm2_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2())
    prepare_tokenizer(tokenizer)
    return tokenizer


@functools.cache
def merged_tokenizer():
    return byte_tokenizer(
        ["Question: What is it?\nAnswer: It is what it is.\nAction: calculator"] * 9, 300
    )


def bare_tokenizer():
    """Bytes, ``</s>`` and ``<pad>``, but no tokens of traces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {k: v for k, v in byte_tokenizer().get_vocab().items() if v < 256}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@functools.cache
def loose_tokenizer():
    """The tokens of traces were added as ordinary added tokens, which ``split_special_tokens`` lets through."""
    made = bare_tokenizer()
    made.add_tokens(list(SPECIALS), special_tokens=False)
    return made


TOKENIZERS = {"bytes": byte_tokenizer, "merged": merged_tokenizer, "smollm2": smollm2_tokenizer,
              "loose": loose_tokenizer}  # fmt: skip

QUERY = Query("What is 2 + 2?", "It is 4.")
STEP = Step("I check it.", "calculator", "<<2+2=4>>4", "Both are right.")
TRACE = Trace((STEP,), None, "The tool agrees.")


def pair(
    name="p",
    question="What is 2 + 2?",
    good="It is 4.",
    bad="It is 5.",
    context=None,
    trace=TRACE,
    other=None,
):
    return Pair(
        name,
        question,
        context,
        Candidate(good, trace, 1.0),
        Candidate(bad, other or trace, -1.0),
        "calculator",
    )


def some_pairs(count=5):
    """Pairs of several shapes and lengths."""
    made = []
    for i in range(count):
        steps = tuple(
            Step(f"look {j}", "t", "x" * (3 * j + i), "y" * (5 * i + j)) for j in range(i % 4)
        )
        trace = Trace(steps, NO_TOOL if i % 2 or not steps else None, f"because {'z' * i}")
        made.append(
            pair(f"p{i}", f"q{'?' * i}", f"good {i}", f"bad {i}!", "ctx" * i or None, trace)
        )
    return made
