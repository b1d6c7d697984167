# SPDX-License-Identifier: Apache-2.0
"""Macro actions of program text: statements of Python, by the standard library's ``ast``."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence

from tenfold.ma_rlhf.parsing import Mismatch, first_of_each, owners


def statements(pieces: Sequence[str]) -> list[int]:
    """The tokens that begin a statement, nested ones included (a :data:`tenfold.ma_rlhf.parsing.Cut`).

    Where the text has fences of three backticks, only what is between them is program. A program that
    breaks off is cut as far as it can be parsed, and what is left is its last macro action.

    Raises:
        Mismatch: not even one statement can be parsed.
    """
    text = "".join(pieces).replace("\r", " ")
    return first_of_each(owners(pieces, statement_starts(text)))


def statement_starts(text: str) -> list[int]:
    """Characters at which statements begin, ascending; a decorated one at its first decorator."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    begin = [0]
    for line in lines:
        begin.append(begin[-1] + len(line))
    program = _fenced(lines)
    tree, used = _parsed(program)
    made = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            at, column = node.lineno, node.col_offset
            first = min(getattr(node, "decorator_list", ()), key=lambda d: d.lineno, default=None)
            if first is not None:
                at = first.lineno
                column = max(lines[at - 1].encode()[: first.col_offset].rfind(b"@"), 0)
            made.add(begin[at - 1] + len(lines[at - 1].encode()[:column].decode()))
    rest = "".join(program[used:])
    if rest.strip():
        made.add(begin[used] + len(rest) - len(rest.lstrip()))
    return sorted(made)


def _fenced(lines: Sequence[str]) -> list[str]:
    """The lines, blank outside of fences if there are any."""
    if not any(line.lstrip().startswith("```") for line in lines):
        return list(lines)
    made, inside = [], False
    for line in lines:
        fence = line.lstrip().startswith("```")
        blank = " " * (len(line) - line.count("\n")) + "\n" * line.count("\n")
        made.append(line if inside and not fence else blank)
        inside ^= fence
    return made


def _parsed(lines: Sequence[str]) -> tuple[ast.Module, int]:
    """The program of the most lines from the first that can be parsed, and how many they are."""
    count = len(lines)
    while count > 0:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # what the program's strings escape is its own affair
                tree = ast.parse("".join(lines[:count]))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            # nothing after the line of an error mends it
            count = min(count, getattr(error, "lineno", None) or count) - 1
            continue
        if tree.body:
            return tree, count
        break
    raise Mismatch("the response has no statement of Python that can be parsed")
