# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the demos: a page's text, and a tokenizer over bytes that can do what a chat model's can."""

import torch
from transformers import BatchEncoding

from tenfold.report import Page, Speedup
from tenfold.rlhf.small import ByteTokenizer

FAST = Speedup("an_op", "a loop", 12.3456)


class ChatBytes(ByteTokenizer):
    """Bytes, with a template and tensors."""

    def apply_chat_template(self, turn, **kwargs):
        return f"<{turn[0]['content']}>"

    def __call__(self, text, return_tensors=None, **kwargs):
        ids = list(text.encode("ascii", "replace"))
        return BatchEncoding({"input_ids": torch.tensor([ids]) if return_tensors else ids})


def rendered(demo, found):
    """The page with a demo's section alone."""
    page = Page("a page")
    demo.add_demo_section(found, page)
    return page.render()


def check_protocol(demo, found):
    """What the runner asks of every demo; (headline, texts of all tables)."""
    line, tables = demo.headline(found), demo.tables(found)
    assert len(line.ran) <= 75 and len(line.result) <= 75
    assert isinstance(line.speed, Speedup)
    assert isinstance(demo.STEPS, int)
    for made in tables:
        assert made.title and made.rows
        assert all(len(row) == len(made.columns) for row in made.rows)
        assert all(isinstance(cell, str) for row in made.rows for cell in row)
    return line, " ".join(
        cell for made in tables for row in made.rows for cell in (made.title, *row)
    )
