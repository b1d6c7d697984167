# SPDX-License-Identifier: Apache-2.0
"""The Unicode Bidirectional Algorithm (UAX #9) for one paragraph.

``embedding_levels`` gives each character its level after rule L1; even levels run left to right, odd ones right
to left. ``visual_order`` is rule L2. Shaping and mirroring (L3, L4) are HarfBuzz's.
"""

from __future__ import annotations

from collections.abc import Sequence

from tenfold.pixelgpt.bidi_classes import CLOSING, OPENING, SAME, bidi_class

MAX_DEPTH = 125
MAX_BRACKETS = 63
_EMBEDDINGS = {"LRE": (0, None), "RLE": (1, None), "LRO": (0, "L"), "RLO": (1, "R")}
_ISOLATES = ("LRI", "RLI", "FSI")
_REMOVED = ("LRE", "RLE", "LRO", "RLO", "PDF", "BN")
_NEUTRAL = ("B", "S", "WS", "ON", "LRI", "RLI", "FSI", "PDI")


def _isolates(classes: Sequence[str]) -> dict[int, int]:
    """BD9: where the isolate of each initiator ends, for those that end."""
    ends, open_ = {}, []
    for i, kind in enumerate(classes):
        if kind in _ISOLATES:
            open_.append(i)
        elif kind == "PDI" and open_:
            ends[open_.pop()] = i
    return ends


def _first_strong(classes: Sequence[str], start: int, end: int, ends: dict[int, int]) -> int | None:
    """P2, P3: 0 or 1 by the first strong character outside isolates; None without one."""
    i = start
    while i < end:
        kind = classes[i]
        if kind in ("L", "R", "AL"):
            return int(kind != "L")
        i = ends.get(i, end) + 1 if kind in _ISOLATES else i + 1
    return None


def paragraph_level(text: str, default: int = 0) -> int:
    """0 (left to right) or 1, by the first strong character outside isolates (P2, P3); ``default`` without one."""
    depth = 0
    for char in text:
        kind = bidi_class(char)
        if kind in _ISOLATES:
            depth += 1
        elif kind == "PDI":
            depth = max(depth - 1, 0)
        elif not depth and kind in ("L", "R", "AL"):
            return int(kind != "L")
    return default


def _explicit(classes: list[str], base: int, ends: dict[int, int]) -> tuple[list[int], list[str]]:
    """X1 to X8: levels, and classes after overrides."""
    levels, out = [base] * len(classes), list(classes)
    stack: list[tuple[int, str | None, bool]] = [(base, None, False)]
    lost_isolates = lost_embeddings = isolates = 0
    for i, kind in enumerate(classes):
        level, override, _ = stack[-1]
        levels[i] = level
        if kind in _EMBEDDINGS:
            right, forced = _EMBEDDINGS[kind]
            new = (level + 1) | 1 if right else (level + 2) & ~1
            if new <= MAX_DEPTH and not lost_isolates and not lost_embeddings:
                stack.append((new, forced, False))
            elif not lost_isolates:
                lost_embeddings += 1
        elif kind in _ISOLATES:
            if override:
                out[i] = override
            right = kind == "RLI" or (
                kind == "FSI"
                and _first_strong(classes, i + 1, ends.get(i, len(classes)), ends) == 1
            )
            new = (level + 1) | 1 if right else (level + 2) & ~1
            if new <= MAX_DEPTH and not lost_isolates and not lost_embeddings:
                isolates += 1
                stack.append((new, None, True))
            else:
                lost_isolates += 1
        elif kind == "PDI":
            if lost_isolates:
                lost_isolates -= 1
            elif isolates:
                lost_embeddings = 0
                while not stack[-1][2]:
                    stack.pop()
                stack.pop()
                isolates -= 1
            levels[i], override, _ = stack[-1]
            if override:
                out[i] = override
        elif kind == "PDF":
            if lost_isolates:
                pass
            elif lost_embeddings:
                lost_embeddings -= 1
            elif not stack[-1][2] and len(stack) > 1:
                stack.pop()
        elif kind == "B":
            levels[i] = base
        elif kind != "BN" and override:
            out[i] = override
    return levels, out


def _sequences(kept: list[int], levels: list[int], ends: dict[int, int]) -> list[list[int]]:
    """BD13: isolating run sequences."""
    runs: list[list[int]] = []
    for i in kept:
        if runs and levels[runs[-1][-1]] == levels[i]:
            runs[-1].append(i)
        else:
            runs.append([i])
    starts = {run[0]: run for run in runs}
    closing = set(ends.values())
    made = []
    for run in runs:
        if run[0] in closing:
            continue
        whole = list(run)
        while (end := ends.get(whole[-1])) is not None and end in starts:
            whole += starts[end]
        made.append(whole)
    return made


def _weak(kinds: list[str], sos: str) -> None:
    """W1 to W7, in place."""
    strong, before = sos, sos
    for i, kind in enumerate(kinds):
        if kind == "NSM":
            kind = "ON" if before in (*_ISOLATES, "PDI") else before
        before = kind  # as W1 leaves it
        if kind in ("L", "R", "AL"):
            strong = kind
        elif kind == "EN" and strong == "AL":
            kind = "AN"
        kinds[i] = kind
    kinds[:] = ["R" if kind == "AL" else kind for kind in kinds]
    for i in range(1, len(kinds) - 1):
        around = kinds[i - 1]
        if around == kinds[i + 1] and (
            (kinds[i] == "ES" and around == "EN") or (kinds[i] == "CS" and around in ("EN", "AN"))
        ):
            kinds[i] = around
    i = 0
    while i < len(kinds):
        if kinds[i] != "ET":
            i += 1
            continue
        end = i
        while end < len(kinds) and kinds[end] == "ET":
            end += 1
        if (i and kinds[i - 1] == "EN") or (end < len(kinds) and kinds[end] == "EN"):
            kinds[i:end] = ["EN"] * (end - i)
        i = end
    strong = sos
    for i, kind in enumerate(kinds):
        if kind in ("ES", "ET", "CS"):
            kinds[i] = "ON"
        elif kind in ("L", "R"):
            strong = kind
        elif kind == "EN" and strong == "L":
            kinds[i] = "L"


def _direction(kind: str) -> str | None:
    """L or R for what counts as strong in N0 to N2."""
    return {"L": "L", "R": "R", "EN": "R", "AN": "R"}.get(kind)


def _bracket_pairs(chars: Sequence[str], kinds: list[str]) -> list[tuple[int, int]]:
    """BD16, in order of the opening brackets."""
    stack: list[tuple[str, int]] = []
    pairs = []
    for i, char in enumerate(chars):
        if kinds[i] != "ON":
            continue
        if char in CLOSING:
            if len(stack) == MAX_BRACKETS:
                return []
            closing = CLOSING[char]
            stack.append((SAME.get(closing, closing), i))
        elif char in OPENING:
            char = SAME.get(char, char)
            for at in range(len(stack) - 1, -1, -1):
                if stack[at][0] == char:
                    pairs.append((stack[at][1], i))
                    del stack[at:]
                    break
    return sorted(pairs)


def _brackets(
    chars: Sequence[str], kinds: list[str], marks: Sequence[bool], sos: str, own: str
) -> None:
    """N0, in place. ``marks``: which characters were NSM before W1."""
    for first, last in _bracket_pairs(chars, kinds):
        inside = {_direction(k) for k in kinds[first + 1 : last]} - {None}
        if own in inside:
            chosen = own
        elif inside:
            before = next(filter(None, map(_direction, reversed(kinds[:first]))), sos)
            chosen = before
        else:
            continue
        for at in (first, last):
            kinds[at] = chosen
            while at + 1 < len(kinds) and marks[at + 1]:
                at += 1
                kinds[at] = chosen


def _neutral(kinds: list[str], sos: str, eos: str, own: str) -> None:
    """N1 and N2, in place."""
    i = 0
    while i < len(kinds):
        if kinds[i] not in _NEUTRAL:
            i += 1
            continue
        end = i
        while end < len(kinds) and kinds[end] in _NEUTRAL:
            end += 1
        before = _direction(kinds[i - 1]) if i else sos
        after = _direction(kinds[end]) if end < len(kinds) else eos
        kinds[i:end] = [before if before == after and before else own] * (end - i)
        i = end


def embedding_levels(text: str, base: int) -> list[int]:
    """The level of each character of a paragraph; ``base`` (0 or 1) is the paragraph's own."""
    classes = [bidi_class(c) for c in text]
    ends = _isolates(classes)
    levels, types = _explicit(classes, base, ends)
    kept = [i for i, kind in enumerate(classes) if kind not in _REMOVED]
    place = {i: at for at, i in enumerate(kept)}
    explicit = list(levels)
    for run in _sequences(kept, levels, ends):
        level = explicit[run[0]]
        first, last = place[run[0]], place[run[-1]]
        before = explicit[kept[first - 1]] if first else base
        open_ended = classes[run[-1]] in _ISOLATES
        after = base if open_ended or last + 1 == len(kept) else explicit[kept[last + 1]]
        sos, eos = ("R" if max(level, x) & 1 else "L" for x in (before, after))
        own = "R" if level & 1 else "L"
        kinds = [types[i] for i in run]
        marks = [classes[i] == "NSM" for i in run]
        _weak(kinds, sos)
        _brackets([text[i] for i in run], kinds, marks, sos, own)
        _neutral(kinds, sos, eos, own)
        for i, kind in zip(run, kinds):
            if level & 1:
                levels[i] = level + (kind in ("L", "EN", "AN"))
            else:
                levels[i] = level + {"R": 1, "AN": 2, "EN": 2}.get(kind, 0)
    for i, kind in enumerate(classes):  # what X9 removes goes with what stands before it
        if kind in _REMOVED:
            levels[i] = levels[i - 1] if i else base
    _reset(classes, levels, base)
    return levels


def _reset(classes: Sequence[str], levels: list[int], base: int) -> None:
    """L1, in place: separators and white space before them and at the end have the base level."""
    trailing = True
    for i in range(len(classes) - 1, -1, -1):
        kind = classes[i]
        if kind in ("B", "S"):
            levels[i], trailing = base, True
        elif kind in ("WS", *_ISOLATES, "PDI", *_REMOVED):
            if trailing:
                levels[i] = base
        else:
            trailing = False


def visual_order(levels: Sequence[int]) -> list[int]:
    """L2: positions of items, one level each, from left to right."""
    order = list(range(len(levels)))
    odd = [level for level in levels if level & 1]
    if not odd:
        return order
    for at_least in range(max(levels), min(odd) - 1, -1):
        i = 0
        while i < len(order):
            if levels[order[i]] < at_least:
                i += 1
                continue
            end = i
            while end < len(order) and levels[order[end]] >= at_least:
                end += 1
            order[i:end] = reversed(order[i:end])
            i = end
    return order
