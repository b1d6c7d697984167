# SPDX-License-Identifier: Apache-2.0
"""What a round of writing means: at the level of ids, so that no text can pass for a special token."""

import time

import pytest
import themis_models as tiny

from tenfold.themis.interpreter import Move, next_move

FORMAT = tiny.format()
SPECIAL = {"<T>": FORMAT.ids.tool, "<O>": FORMAT.ids.observation, "<W>": FORMAT.ids.work}


def ids(*parts):
    made = []
    for part in parts:
        made += [SPECIAL[part]] if part in SPECIAL else tiny.encode(part)
    return made


CALL = tiny.call("calculator", "1+1", "add")


@pytest.mark.parametrize(
    "parts, kind",
    [
        ([CALL], "call"),
        (["<T>", CALL], "call"),
        ([" Thought: no\nFinished.\n"], "work"),
        ([" Thought: no\nFinished"], "work"),
        ([" Thought: no\nFinished.\n", "<W>", " Work: fine"], "rationale"),
        (["<W>", " Work: fine"], "rationale"),
        ([" Thought: hm\nWork: fine"], "rationale"),
        ([" Thought: hm"], "stop"),
        ([" Thought: hm\nAction: calculator\n"], "stop"),  # no input
        ([], "stop"),
        # What a rationale speaks of is not called.
        (["<W>", " Work: it said\nAction: calculator\nAction Input: 1+1\n"], "rationale"),
        # Words for special tokens are words.
        ([" Thought: <start_work> Work: fine"], "stop"),
    ],
)
def test_kinds(parts, kind):
    made = ids(*parts)
    move = next_move(FORMAT, made, {"calculator"})
    assert move.kind == kind
    assert move.keep == len(made)


def test_a_call():
    assert next_move(FORMAT, ids(CALL), {"calculator"}) == Move(
        "call", len(ids(CALL)), "calculator", "1+1", "add"
    )
    assert not next_move(FORMAT, ids(CALL), {"calendar"}).known
    assert next_move(FORMAT, ids(CALL)).known


@pytest.mark.parametrize("then", ["<O>", "<W>"])
def test_what_follows_an_action_goes(then):
    """An observation of the model's own, or a rationale before the tool has answered."""
    move = next_move(FORMAT, ids(CALL, then, " whatever\n", "<W>", " Work: fine"))
    assert (move.kind, move.keep, move.arguments) == ("call", len(ids(CALL)), "1+1")


def test_the_last_action_counts():
    move = next_move(FORMAT, ids(" Thought: a\n", "<T>", tiny.call("calendar", "x"), "<T>", CALL))
    assert (move.tool, move.arguments) == ("calculator", "1+1")


def test_escaped_lines_and_unicode():
    made = FORMAT.assemble(
        tiny.query(), tiny.Trace((tiny.Step("t", "run", "a\nAction Input: é\n\\Work: b", "x"),))
    )
    start = made.ids.index(SPECIAL["<T>"]) + 1
    stop = made.ids.index(SPECIAL["<O>"])
    move = next_move(FORMAT, made.ids[start:stop])
    assert move.arguments == "a\nAction Input: é\n\\Work: b"


@pytest.mark.parametrize("end", ["", "x", "\nFinished", "\nAction Input:"])
@pytest.mark.parametrize(
    "text",
    [
        "Action:" + 6_000 * " ", "Action:" + 6_000 * "\n", "Action:" + 3_000 * " \n", 6_000 * " \t",
        500 * "Action:\n" + 3000 * "\n", 500 * "Action: a\nAction Input: b\n", 500 * "Thought:\n",
        " Thought: t" + 250 * "\nAction: a\nAction Input: b",
    ],
    ids=["spaces", "lines", "both", "tabs", "actions", "calls", "thoughts", "row"],
)  # fmt: skip
def test_no_text_takes_long(text, end):
    """While a pattern tries every way to read a text, no other thread runs: not even the clock of deadlines."""
    written = tiny.encode(text + end)
    begin = time.process_time()
    next_move(FORMAT, written)
    FORMAT.read([FORMAT.ids.tool, *written])
    assert time.process_time() - begin < 2


def test_actions_as_models_write_them():
    text = (
        "Thought: a\nAction: one\nAction Input: 1\n  Thought: b\nso\n Action:  two \n\n Action Input: 2,\n3\n"
        "Observation: made up\nAction: three\n"
    )
    made = next_move(FORMAT, tiny.encode(text))
    assert (made.kind, made.tool, made.arguments, made.thought) == ("call", "two", "2,\n3", "b\nso")
