# SPDX-License-Identifier: Apache-2.0
"""NACL on real long documents with SmolLM2-135M-Instruct: what was kept, what it cost and saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tenfold.nacl.baselines import FullPress, StreamingLLMPress
from tenfold.nacl.eval import Case, method_specs, retrieval_case, run, summary
from tenfold.nacl.eval_report import COLUMNS, table_rows
from tenfold.nacl.press import NaclPress, Press
from tenfold.nacl.speed import Speed, measure_generation
from tenfold.report import Card, Page, heat_map, png_bytes, shares_strip

LENGTH = 4096
KEPT = 0.2
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
METHODS = ("full", "nacl", "snapkv", "tova", "h2o", "streaming_llm", "random")
PRESSES: dict[str, type[Press]] = {
    "full cache": FullPress, "NACL": NaclPress, "StreamingLLM": StreamingLLMPress,
}  # fmt: skip


@dataclass
class Story:
    """One document, one question, under several rules."""

    case: Case
    speeds: dict[str, Speed]
    answers: dict[str, str]
    kept: dict[int, torch.Tensor]
    pieces: list[str]


@dataclass
class Demo:
    """All that the demo found; ``write`` puts it on a page."""

    stories: list[Story]
    cells: list[Any]
    setting: str = ""
    summary: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        stories = [
            {
                "document": s.case.document,
                "expected": s.case.answer_text,
                "rules": {
                    name: {k: v for k, v in asdict(speed).items() if k != "tokens"}
                    | {"answer": s.answers[name]}
                    for name, speed in s.speeds.items()
                },
            }
            for s in self.stories
        ]
        return {"setting": self.setting, "documents": stories, "retrieval": self.summary}


def tell(model: Any, tokenizer: Any, case: Case) -> Story:
    """Runs one case under ``PRESSES``, generating the answer."""
    ids = torch.tensor([case.prompt], device=model.device)
    speeds, answers, kept = {}, {}, {}
    for name, make in PRESSES.items():
        press = make() if make is FullPress else make(compression_ratio=round(1 - KEPT, 6))
        speeds[name] = measure_generation(model, press, ids, new_tokens=12)
        said = tokenizer.decode(speeds[name].tokens, skip_special_tokens=True)
        answers[name] = said.strip().splitlines()[0] if said.strip() else ""
        if name == "NACL":
            kept = {layer: idx.cpu() for layer, idx in press.kept.items()}
    pieces = [tokenizer.decode([token]) for token in case.prompt]
    return Story(case, speeds, answers, kept, pieces)


def run_demo(model: Any, tokenizer: Any, step: Callable[[str], None] = lambda text: None) -> Demo:
    """Documents first, then a small comparison of methods; ``step`` is told after each piece."""
    measure_generation(model, FullPress(), torch.zeros(1, 256, dtype=torch.int64), 2)  # warm-up
    stories = []
    for seed, depth in ((11, 0.35), (12, 0.8)):
        case = retrieval_case(tokenizer, LENGTH, depth, seed)
        stories.append(tell(model, tokenizer, case))
        step(f"document: {case.document}")
    cases = [retrieval_case(tokenizer, 1536, depth, 1) for depth in DEPTHS]
    specs = method_specs(METHODS, (0.2, 0.5))
    cells = run(model, tokenizer, cases, specs, progress=lambda c: step(f"depth {c.depth:.1f}"))
    setting = (
        f"SmolLM2-135M-Instruct, {str(model.dtype).removeprefix('torch.')}, {model.device.type}, "
        f"{torch.get_num_threads()} threads; NACL keeps {100 * KEPT:g} % of the KV cache."
    )
    return Demo(stories, cells, setting, summary(cells))


STEPS = 2 + len(DEPTHS)
SPEED_COLUMNS = (
    "rule", "tokens", "prefill s", "evict ms", "ms/token", "cache MB", "RSS MB", "answer",
)  # fmt: skip


def speed_rows(story: Story) -> list[list[str]]:
    """The rows of a document's table, for ``SPEED_COLUMNS``."""
    return [
        [name, str(s.kept_tokens), f"{s.prefill_s:.2f}", f"{1e3 * s.evict_s:.0f}",
         f"{s.decode_ms:.1f}", f"{s.cache_bytes / 1e6:.1f}", f"{s.resident_bytes / 1e6:.1f}",
         story.answers[name]]
        for name, s in story.speeds.items()
    ]  # fmt: skip


def _kept_shares(story: Story, bins: int = 128) -> list[list[float]]:
    """Per layer and position bin: the share of (head, token) pairs that were kept."""
    length = len(story.case.prompt)
    rows = []
    for layer in sorted(story.kept):
        idx = story.kept[layer][0].reshape(-1)
        heads = story.kept[layer].shape[1]
        at = torch.bincount((idx[idx >= 0] * bins // length).clamp(max=bins - 1), minlength=bins)
        size = torch.bincount(torch.arange(length) * bins // length, minlength=bins)
        rows.append((at / (size * heads)).tolist())
    return rows


def _token_shares(story: Story) -> list[tuple[str, float]]:
    """Every prompt token and the share of (layer, head) caches that kept it."""
    votes, total = torch.zeros(len(story.case.prompt)), 0
    for idx in story.kept.values():
        for head in idx[0]:
            votes[head[head >= 0]] += 1
            total += 1
    return list(zip(story.pieces, (votes / max(total, 1)).tolist()))


def add_section(demo: Demo, page: Page) -> None:
    """NACL's part of the report page."""
    page.section("NACL: KV-cache eviction")
    page.text(
        "After a long prompt was read, NACL keeps for every layer and KV head the tokens at both ends "
        "and those that the last tokens of the prompt, the question, attended to. Below: what was "
        "kept, what it cost and what it saved."
    )
    page.text(demo.setting, soft=True)
    first = demo.stories[0]
    full, ours = first.speeds["full cache"], first.speeds["NACL"]
    right = sum(s.case.answer_text in s.answers["NACL"] for s in demo.stories)
    page.cards([
        Card(f"{100 * ours.cache_bytes / full.cache_bytes:.0f} %", "of the cache's bytes kept",
             f"{ours.cache_bytes / 1e6:.1f} of {full.cache_bytes / 1e6:.1f} MB"),
        Card(f"{100 * ours.evict_share:.1f} %", "added to the prefill by eviction",
             f"{1e3 * ours.evict_s:.0f} ms for {ours.prompt_tokens} tokens"),
        Card(f"{full.decode_ms / ours.decode_ms:.2f}×", "decoding speed",
             f"{ours.decode_ms:.1f} instead of {full.decode_ms:.1f} ms per token"),
        Card(f"{right} of {len(demo.stories)}", "documents answered right with NACL"),
    ])  # fmt: skip
    for story in demo.stories:
        case = story.case
        page.heading(f"{case.document}: {len(case.prompt)} tokens, one sentence hidden in it")
        page.text(
            f"The question at the end asks for a code that one added sentence gives, at "
            f"{100 * case.depth:.0f} % of the text. The right answer is {case.answer_text}."
        )
        page.table(SPEED_COLUMNS, speed_rows(story), [1])
    page.text(
        "tokens: kept per KV head. evict ms: part of the prefill. ms/token: median decoding step. cache "
        "MB: storage behind all keys and values. RSS MB: growth of the process by holding them.",
        soft=True,
    )
    page.heading("What was kept")
    strip = shares_strip(
        _kept_shares(first), len(first.case.prompt), "Share of tokens kept, all KV heads of a layer",
        "share kept", "layer",
    )  # fmt: skip
    page.image(png_bytes(strip), "Kept tokens by layer and position. The hidden sentence is at "
               f"{100 * first.case.depth:.0f} % of the text, the question at the right end.")  # fmt: skip
    page.text("The prompt's tokens, shaded by the share of (layer, head) caches that kept them:")
    page.tokens(_token_shares(first))
    page.heading("Against other rules")
    page.text(
        f"{len(DEPTHS)} prompts of 1,536 tokens with the fact at different depths; every rule evicts "
        "the same prefill. A demo, not a study: docs/methods/nacl.md has one."
    )
    best = [i for i, r in enumerate(demo.summary) if r["method"] == "nacl"]
    page.table(COLUMNS[1:], [row[1:] for row in table_rows(demo.summary)], best)
    methods = [m for m in METHODS if m != "full"]
    correct = {(c.method, c.depth): float(c.correct) for c in demo.cells if c.budget == KEPT}
    made = heat_map(
        [[correct[m, d] for d in DEPTHS] for m in methods], methods, [f"{d:g}" for d in DEPTHS],
        f"Right answers, {100 * KEPT:g} % of the cache kept", "rule", "depth of the fact (0: start)",
    )  # fmt: skip
    page.image(png_bytes(made), "1.00: the rule's cache gave the right answer.", 560)
