# SPDX-License-Identifier: Apache-2.0
"""NACL on real long documents with SmolLM2-135M-Instruct: what was kept, what it cost and saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops
from tenfold.data.models import given_or_smollm2
from tenfold.nacl.baselines import FullPress, StreamingLLMPress
from tenfold.nacl.config import BudgetPlan, NaclConfig
from tenfold.nacl.eval import Case, method_specs, retrieval_case, run, summary
from tenfold.nacl.eval_report import COLUMNS, table_rows
from tenfold.nacl.press import NaclPress, Prefill, Press
from tenfold.nacl.speed import Speed, measure_generation, measure_prefilled
from tenfold.report import (
    Card,
    Headline,
    Page,
    Speedup,
    TextTable,
    heat_map,
    png_bytes,
    shares_strip,
    speedup,
)
from tenfold.training.threads import threads_text

LENGTHS, SHORT = (4096, 1536), 1024
KEPT, NEW_TOKENS = 0.2, 8
DEPTHS = (0.1, 0.37, 0.63, 0.9)
METHODS = ("full", "nacl", "snapkv", "tova", "h2o", "streaming_llm")
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

    def right(self, rule: str) -> bool:
        """Is the code in the rule's answer?"""
        return self.case.answer_text in self.answers[rule]


@dataclass
class Eviction:
    """One layer's eviction by ``ops.nacl_evict`` and in plain PyTorch, on a document's keys and queries.

    ``same``: share of the kept tokens that both keep (a pooled score has equals, and the order of those is free);
    ``gap``: largest difference of the scores that were kept, in order.
    """

    speed: Speedup
    tokens: int
    kept: int
    same: float
    gap: float


@dataclass
class Demo:
    """All that the demo found; ``add_demo_section`` puts it on a page."""

    stories: list[Story]
    cells: list[Any]
    eviction: Eviction
    model: str = ""
    setting: str = ""
    summary: list[dict[str, Any]] = field(default_factory=list)

    def right(self, rule: str) -> int:
        """How many documents' questions were answered right under a rule of ``PRESSES``."""
        return sum(story.right(rule) for story in self.stories)

    def share(self) -> float:
        """NACL's cache in bytes, as a share of the full one (first document)."""
        speeds = self.stories[0].speeds
        return speeds["NACL"].cache_bytes / speeds["full cache"].cache_bytes

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
        return {"setting": self.setting, "documents": stories, "retrieval": self.summary,
                "eviction": asdict(self.eviction)}  # fmt: skip


def tell(model: Any, tokenizer: Any, case: Case, seed: int = 0) -> tuple[Story, Prefill]:
    """Runs one case once and evicts it under each of ``PRESSES``, generating the answer."""
    ids = torch.tensor([case.prompt], device=model.device)
    start = time.perf_counter()
    prefill = Prefill.run(model, ids, proxies=NaclConfig().max_proxy)
    seconds = time.perf_counter() - start
    speeds, answers, kept = {}, {}, {}
    for name, make in PRESSES.items():
        change: dict[str, Any] = (
            {} if make is FullPress else {"compression_ratio": round(1 - KEPT, 6)}
        )
        press = make(**change, seed=seed)
        speeds[name] = measure_prefilled(model, press, prefill, seconds, NEW_TOKENS)
        said = tokenizer.decode(speeds[name].tokens, skip_special_tokens=True)
        answers[name] = said.strip().splitlines()[0] if said.strip() else ""
        if name == "NACL":
            kept = {layer: idx.cpu() for layer, idx in press.kept.items()}
    pieces = [tokenizer.decode([token]) for token in case.prompt]
    return Story(case, speeds, answers, kept, pieces), prefill


def plain_evict(q: Tensor, k: Tensor, v: Tensor, plan: BudgetPlan, pool: int) -> tuple[Tensor, ...]:
    """What NACL does to a layer, as one writes it in PyTorch: (k', v', idx [B, Hkv, C], scores [B, Hkv, L])."""
    (b, hq, w, d), (_, hkv, length, _) = q.shape, k.shape
    grouped = q.reshape(b, hkv, -1, d) * d**-0.5
    logits = torch.matmul(grouped, k.transpose(-1, -2)).view(b, hkv, hq // hkv, w, length)
    hidden = torch.ones(w, w, dtype=torch.bool, device=q.device).triu_(1)
    logits[..., length - w :].masked_fill_(hidden, float("-inf"))
    scores = logits.softmax(-1).sum((2, 3)) / (hq // hkv)
    first, last = plan.n_sink, length - plan.n_recent
    pooled = F.max_pool1d(scores[..., first:last], pool, 1, pool // 2)
    best = pooled.topk(plan.n_topk, sorted=False).indices + first
    at = torch.arange(length, device=q.device).expand(b, hkv, -1)
    idx = torch.cat([at[..., :first], best, at[..., last:]], -1).sort(-1).values
    where = idx[..., None].expand(-1, -1, -1, d)
    return k.gather(2, where), v.gather(2, where), idx, scores


def eviction(prefill: Prefill) -> Eviction:
    """Times a layer's eviction at NACL's settings for a prefill's middle layer, and compares what was kept."""
    config = NaclConfig(compression_ratio=round(1 - KEPT, 6))
    layer = len(prefill.queries) // 2
    keys, values = prefill.cache.layers[layer].keys, prefill.cache.layers[layer].values
    length = keys.shape[2]
    plan = config.budget(length)
    if plan is None:
        raise ValueError(f"NACL leaves a prompt of {length} tokens alone: nothing to compare")
    q = prefill.queries[layer][:, :, -plan.num_proxies :].contiguous()
    counts: dict[str, Any] = dict(zip(("n_sink", "n_recent", "n_topk", "n_random"), plan.counts))

    def ours() -> tuple[Tensor, ...]:
        return ops.nacl_evict(q, keys, values, **counts, pool_kernel=config.pool_kernel)

    def plain() -> tuple[Tensor, ...]:
        return plain_evict(q, keys, values, plan, config.pool_kernel)

    idx, (_, _, other, scores) = ours()[2], plain()
    first, last = plan.n_sink, length - plan.n_recent
    pool = config.pool_kernel
    scores[..., first:last] = F.max_pool1d(scores[..., first:last], pool, 1, pool // 2)
    mine, theirs = (scores.gather(-1, i).sort(-1).values for i in (idx, other))
    kept = torch.zeros_like(scores).scatter_(-1, idx, 1.0)
    speed = speedup("nacl_evict", "plain PyTorch", ours, plain, rounds=15)
    return Eviction(
        speed, length, plan.keep, float(kept.gather(-1, other).mean()),
        float((mine - theirs).abs().max()),
    )  # fmt: skip


def run_demo(
    step: Callable[[str], None] = lambda text: None,
    seed: int = 0,
    model: tuple[Any, Any] | None = None,
) -> Demo:
    """Documents first, then a small comparison of methods.

    Args:
        step: told after each piece.
        seed: which documents and codes, and what rules that draw at random draw.
        model: (model, tokenizer); default SmolLM2-135M-Instruct.

    Raises:
        TypeError: ``model`` is not a pair. MissingData: no model here.
    """
    name, network, tokenizer = given_or_smollm2(model)
    device = network.device
    measure_generation(
        network, FullPress(), torch.zeros(1, 256, dtype=torch.int64, device=device), 2
    )
    stories: list[Story] = []
    timed: Eviction | None = None
    for length, at, depth in zip(LENGTHS, (11, 12), (0.35, 0.8)):
        case = retrieval_case(tokenizer, length, depth, at + 100 * seed)
        story, prefill = tell(network, tokenizer, case, seed)
        timed = timed or eviction(prefill)
        del prefill
        stories.append(story)
        step(f"document: {case.document}")
    assert timed is not None
    cases = [retrieval_case(tokenizer, SHORT, depth, 1 + 100 * seed) for depth in DEPTHS]
    specs = method_specs(METHODS, (KEPT,))
    cells = run(network, tokenizer, cases, specs, progress=lambda c: step(f"depth {c.depth:.1f}"))
    setting = (
        f"{name}, {str(network.dtype).removeprefix('torch.')}, {device.type}, "
        f"{threads_text()}; NACL keeps {100 * KEPT:g} % of the KV cache."
    )
    return Demo(stories, cells, timed, name, setting, summary(cells))


STEPS = len(LENGTHS) + len(DEPTHS)
SPEED_COLUMNS = (
    "rule", "tokens", "prefill s", "evict ms", "ms/token", "cache MB", "RSS MB", "answer",
)  # fmt: skip
EVICTION_COLUMNS = (
    "a layer's eviction", "op", "against", "speed-up", "same tokens kept", "largest difference",
)  # fmt: skip


def speed_rows(story: Story) -> list[list[str]]:
    """The rows of a document's table, for ``SPEED_COLUMNS``."""
    return [
        [name, str(s.kept_tokens), f"{s.prefill_s:.2f}", f"{1e3 * s.evict_s:.0f}",
         f"{s.decode_ms:.1f}", f"{s.cache_bytes / 1e6:.1f}", f"{s.resident_bytes / 1e6:.1f}",
         story.answers[name]]
        for name, s in story.speeds.items()
    ]  # fmt: skip


def eviction_rows(found: Eviction) -> list[list[str]]:
    """Rows for ``EVICTION_COLUMNS``."""
    what = f"keeping {found.kept} of {found.tokens:,} tokens"
    return [[what, *found.speed.cells, f"{100 * found.same:.2f} %", f"{found.gap:.1e}"]]


def headline(found: Demo) -> Headline:
    """NACL's line in the demo's table."""
    total = len(found.stories)
    lengths = " and ".join(f"{len(s.case.prompt):,}" for s in found.stories)
    return Headline(
        f"{found.model}, documents of {lengths} tokens",
        f"{found.right('NACL')} of {total} answered right with {100 * found.share():.0f} % of the cache "
        f"(StreamingLLM: {found.right('StreamingLLM')})",
        found.eviction.speed,
    )


def tables(found: Demo) -> list[TextTable]:
    """What the demo shows on a terminal."""
    made = [
        TextTable(
            f"{s.case.document}: the right answer is {s.case.answer_text}",
            SPEED_COLUMNS,
            speed_rows(s),
        )
        for s in found.stories
    ]
    rows = [row[2:] for row in table_rows(found.summary)]
    length, depths = found.cells[0].length, len({c.depth for c in found.cells})
    title = f"One fact in {length:,} tokens, {depths} depths"
    return [
        *made,
        TextTable(title, COLUMNS[2:], rows),
        TextTable("A layer's eviction", EVICTION_COLUMNS, eviction_rows(found.eviction)),
    ]


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


def add_demo_section(demo: Demo, page: Page) -> None:
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
    speed = demo.eviction.speed
    page.cards([
        Card(f"{100 * demo.share():.0f} %", "of the cache's bytes kept",
             f"{ours.cache_bytes / 1e6:.1f} of {full.cache_bytes / 1e6:.1f} MB"),
        Card(f"{100 * ours.evict_share:.1f} %", "added to the prefill by eviction",
             f"{1e3 * ours.evict_s:.0f} ms for {ours.prompt_tokens} tokens"),
        Card(f"{full.decode_ms / ours.decode_ms:.2f}×", "decoding speed",
             f"{ours.decode_ms:.1f} instead of {full.decode_ms:.1f} ms per token"),
        Card(f"{demo.right('NACL')} of {len(demo.stories)}", "documents answered right with NACL",
             f"full cache: {demo.right('full cache')}"),
        Card(speed.times, "faster eviction of a layer", f"than {speed.against}"),
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
        "A document's prompt runs once and every rule evicts that. tokens: kept per KV head. evict ms: part of "
        "the prefill. ms/token: median decoding step. cache MB: storage behind all keys and values. RSS MB: growth "
        "of the process by holding them.",
        soft=True,
    )
    page.table(EVICTION_COLUMNS, eviction_rows(demo.eviction))
    page.text(
        "One layer of the first document, evicted by ops.nacl_evict and by PyTorch alone. Pooled scores have equals, "
        "among which either may keep another; the difference is that of the scores kept.",
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
    depths = sorted({c.depth for c in demo.cells})
    page.text(
        f"{len(depths)} prompts of {demo.cells[0].length:,} tokens with the fact at different depths; every rule "
        "evicts the same prefill. A demo, not a study: docs/methods/nacl.md has one."
    )
    best = [i for i, r in enumerate(demo.summary) if r["method"] == "nacl"]
    page.table(COLUMNS[1:], [row[1:] for row in table_rows(demo.summary)], best)
    correct = {(c.method, c.depth): float(c.correct) for c in demo.cells if c.budget == KEPT}
    methods = list(dict.fromkeys(method for method, _ in correct))
    made = heat_map(
        [[correct[m, d] for d in depths] for m in methods], methods, [f"{d:g}" for d in depths],
        f"Right answers, {100 * KEPT:g} % of the cache kept", "rule", "depth of the fact (0: start)",
    )  # fmt: skip
    page.image(png_bytes(made), "1.00: the rule's cache gave the right answer.", 560)
