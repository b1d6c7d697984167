# SPDX-License-Identifier: Apache-2.0
"""Drafts from packaged texts: translations, documentation, and text that needs no tool."""

from __future__ import annotations

import functools
import random
import re

from tenfold.data import Document, long_documents
from tenfold.themis.synthetic import Draft, Judged, Recorder, Useless
from tenfold.themis.traces import NO_TOOL

LANGUAGES = {"de": "German", "es": "Spanish", "fr": "French"}  # those of the tool's own table
_SEVERAL = 4  # texts in a context


@functools.cache
def _translated(language: str) -> tuple[tuple[str, str], ...]:
    """(English, translation) pairs that are one line of words, without markup and placeholders."""
    from tenfold.data.translations import translations

    plain = re.compile(r"[^\n%{}<>|\\]{12,110}")
    return tuple(
        (english, text)
        for english, text in translations(language)
        if plain.fullmatch(english) and plain.fullmatch(text) and " " in english
    )


def translator(draw: random.Random) -> Draft:
    """What a text means in English, or which of several English texts it is."""
    code = draw.choice(tuple(LANGUAGES))
    texts = draw.sample(_translated(code), _SEVERAL)
    (good, foreign), (bad, _) = texts[:2]
    context = None
    question = f'What does this {LANGUAGES[code]} text mean in English: "{foreign}"'
    if draw.random() < 0.5:
        draw.shuffle(texts)
        context = "\n".join(f"({i}) {english}" for i, (english, _) in enumerate(texts, 1))
        question = f'Which of the messages is this one in {LANGUAGES[code]}: "{foreign}"'

    def judge(call: Recorder, answer: str, right: bool) -> Judged:
        found = call("I need to translate the text into English.", "translate", foreign)
        if found != good:
            raise Useless("the table has another translation")
        verdict = (
            "says the same, so it is correct"
            if right
            else "says something else, so it is not correct"
        )
        return Judged(f'The text means "{found}" The answer {verdict}.')

    return Draft(question, good, bad, judge, context, asks=f"{code} {foreign}")


@functools.cache
def _documents() -> list[Document]:
    return long_documents(("docs",), min_chars=200)


@functools.cache
def _documented() -> tuple[tuple[str, str, str], ...]:
    """(module, function, first sentence of its documentation) of the standard library."""
    found: dict[str, tuple[str, str, str]] = {}
    for document in _documents():
        module = document.title.rpartition(" ")[2]
        for part in document.text.split("\n\n\n"):
            head, _, text = part.partition("\n\n")
            name = re.match(r"([\w.]+)\(", head)
            said = re.match(r"[A-Z][^.\n]*(?:\n[^.\n]+)*\.(?=\s|$)", text.strip())
            if name is None or said is None or "._" in name[1]:
                continue
            sentence = " ".join(said[0].split())
            if 20 <= len(sentence) <= 140 and "<" not in sentence:
                found[name[1]] = (module, name[1], sentence)
    return tuple(found.values())


@functools.cache
def search_passages() -> tuple[tuple[str, str], ...]:
    """(title, text) of what ``wiki_search`` searches for these traces: a function and what it does."""
    return tuple((name, said) for _, name, said in _documented())


@functools.cache
def _by_module() -> tuple[tuple[tuple[str, str], ...], ...]:
    modules: dict[str, list[tuple[str, str]]] = {}
    for module, name, said in _documented():
        modules.setdefault(module, []).append((name, said))
    return tuple(tuple(m) for m in modules.values() if len(m) > 3)


def search(draw: random.Random) -> Draft:
    """What a function of the standard library does; the wrong answer is what a neighbour of it does."""
    (name, good), (_, bad) = draw.sample(draw.choice(_by_module()), 2)
    if good == bad:
        raise Useless("the neighbour does the same")

    def judge(call: Recorder, answer: str, right: bool) -> Judged:
        found = call(f"I need to look {name} up in the documentation.", "wiki_search", name)
        if not found.startswith(f"{name} | ") or good not in found or bad in found:
            raise Useless("another passage was found")
        verdict = (
            "says the same, so it is correct"
            if right
            else "says something else, so it is not correct"
        )
        return Judged(f'The documentation says: "{good}" The answer {verdict}.')

    return Draft(f"What does {name} of Python's standard library do?", good, bad, judge)


@functools.cache
def _preferences() -> tuple[list[tuple[str, str, str, str]], ...]:
    """(training, test) lists of (prompt, good, bad, what is wrong), of documents that the parts do not share."""
    from tenfold.rlhf.preferences import packaged_preferences

    long = [d for d in _documents() if len(d.text) >= 2000]
    parts = packaged_preferences(held_out=0.25, seed=0, documents=long)
    return tuple([(p.prompt, p.chosen, p.rejected, p.kind) for p in part] for part in parts)


_FAULTS = {
    "other": "is about something else",
    "shuffled": "has its words out of order",
    "repeated": "says the same again and again",
}


def none(draw: random.Random, split: str) -> Draft:
    """How a paragraph of documentation goes on; no tool is of use, and the trace says so."""
    prompt, good, bad, kind = draw.choice(_preferences()[split == "test"])

    def judge(call: Recorder, answer: str, right: bool) -> Judged:
        if right:
            return Judged(
                "The text goes on in order and stays with its topic, so the answer is good.",
                NO_TOOL,
            )
        return Judged(f"The text {_FAULTS[kind]}, so the answer is not good.", NO_TOOL)

    return Draft(f"How does this text go on: {prompt}", good.strip(), bad.strip(), judge)
