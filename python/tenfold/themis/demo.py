# SPDX-License-Identifier: Apache-2.0
"""Themis on a byte-level model that is trained here: it asks a tool about sums that it cannot do.

Two small Llamas of the same size see the same pairs of answers to products and sums. One learns to write a trace (call,
observation, rationale) and to score it, the other to score question and answer alone. Then the tool fails, and lies.
A demo of one seed: docs/methods/themis.md has a study.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops
from tenfold.report import Card, Headline, Page, Speedup, TextTable, speedup
from tenfold.themis import report
from tenfold.themis.config import ThemisConfig
from tenfold.themis.data import Candidate, Pair
from tenfold.themis.evaluate import Evaluation, PlainJudge, evaluate
from tenfold.themis.loop import ToolLoop
from tenfold.themis.objective import target_weights
from tenfold.themis.scorer import Scorer
from tenfold.themis.small import small_model
from tenfold.themis.steps import collated
from tenfold.themis.tools import Tool, Toolbox
from tenfold.themis.tools.arithmetic import evaluate as reckon
from tenfold.themis.traces import Query, Step, Trace, TraceFormat
from tenfold.themis.training import ThemisRecord, train_themis
from tenfold.training.loop import Progress
from tenfold.training.threads import threads

LAYERS, HEADS, TRAIN, TEST, LENGTH, TELL = 2, 4, 512, 96, 256, 10
SETTINGS: dict[str, Any] = {"steps": 120, "batch_size": 8, "learning_rate": 3e-3, "warmup": 0.1,
                            "max_length": LENGTH, "checkpoint_every": 1000}  # fmt: skip
PLAIN: dict[str, Any] = {
    "alpha": 0.0,
    "beta": 0.0,
    "omega": 0.0,
    "inputs": "plain",
    "require_trace": False,
}
NAMES = ("plain reward model", "Themis", "Themis, the tool fails", "Themis, the tool lies")
STEPS = 2 * SETTINGS["steps"] // TELL + len(NAMES) + 2
COLUMNS = (
    "judge",
    "pairs ranked right, %",
    "95 % interval",
    "calls per trace",
    "calibration error",
)
SPEED_COLUMNS = (
    "requests at once",
    "seconds",
    "per second",
    "median s to an answer",
    "95 % within s",
)
KERNEL_COLUMNS = (
    "op",
    "against",
    "times as fast",
    "largest difference",
)
TRACE_COLUMNS = ("answer", "reward", "what was written")


class Check(Tool):
    """``check``: reckons the question again and says whether the answer is the same."""

    names = ("check",)
    right, wrong = "correct", "wrong"

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """One of two words; the arguments stand for the answer itself. What is no number is wrong."""
        try:
            said = reckon(example["answer"])
        except ValueError:
            return self.wrong
        return (
            self.right if reckon(example["question"].removesuffix(" = ?")) == said else self.wrong
        )


class Fails(Check):
    """Cannot be reached."""

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """Raises."""
        raise ConnectionError("the tool is out of order")


class Lies(Check):
    """Says the opposite."""

    right, wrong = Check.wrong, Check.right


def problems(count: int, seed: int, but: Sequence[Pair] = ()) -> list[Pair]:
    """Pairs of answers to sums, differences and products, no question of ``but`` among them."""
    draw = random.Random(seed)
    taken = {p.question for p in but}
    made: list[Pair] = []
    tool = Check()
    while len(made) < count:
        a, b, sign = draw.randrange(10, 100), draw.randrange(10, 100), draw.choice("+-*")
        question, right = f"{a} {sign} {b} = ?", int(reckon(f"{a} {sign} {b}"))
        if question in taken:
            continue
        taken.add(question)
        sides = []
        for value in (right, right + draw.choice((-100, -10, -2, -1, 1, 2, 10, 100))):
            said = tool.call("check", "", {"question": question, "answer": str(value)})
            trace = Trace(
                (Step("Reckon it again.", "check", "the answer", said),),
                None,
                f"The tool says {said}.",
            )
            sides.append(Candidate(str(value), trace, 1.0 if value == right else -1.0))
        made.append(Pair(f"{seed}-{len(made)}", question, None, sides[0], sides[1], "arithmetic"))
    return made


@dataclass
class Demo:
    """What the demo found: runs and evaluations by name, both traces of one pair, times of a scorer and of a kernel.

    ``apart``: the largest difference between the kernel's gradients and PyTorch's, as a share of the largest one.
    """

    records: dict[str, ThemisRecord] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    traces: list[tuple[str, float, str]] = field(default_factory=list)
    setting: str = ""
    kernel: Speedup | None = None
    apart: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        kept = {
            n: {k: v for k, v in e.items() if k not in ("pairs", "samples")}
            for n, e in self.found.items()
        }
        runs = {n: {"before": r.before, "after": r.after, "seconds": r.seconds, "last": r.curve[-1]}
                for n, r in self.records.items()}  # fmt: skip
        return {"setting": self.setting, "evaluations": kept, "runs": runs, "speed": self.speed}


async def _all_at_once(scorer: Scorer, queries: Sequence[Query]) -> list[Any]:
    return await asyncio.gather(*(scorer.score(q) for q in queries))


def _speed(loop: ToolLoop, pairs: Sequence[Pair]) -> dict[str, float]:
    queries = [Query(p.question, c.answer) for p in pairs for c in (p.chosen, p.rejected)]
    with Scorer(loop, batch_size=loop.batch_size, deadline=60.0) as scorer:
        start = time.perf_counter()
        found = asyncio.run(_all_at_once(scorer, queries))
        seconds = time.perf_counter() - start
        stats = scorer.stats()
    return {"requests": len(found), "seconds": seconds, "median": stats["seconds_median"],
            "within": stats["seconds_95"], "answered": sum(f.finish == "rationale" for f in found)}  # fmt: skip


def weighted_loss(
    loop: ToolLoop, pairs: Sequence[Pair], config: ThemisConfig
) -> tuple[Speedup, float]:
    """(the traces' weighted loss with its gradients on a training batch against PyTorch's, how far these are apart).

    Hidden states are the trained model's. The difference is a share of the largest gradient.
    """
    batch = collated(pairs[: config.batch_size], loop.format, config, "cpu")
    with torch.no_grad():
        x, head, _ = loop.model.operands(loop.model.hidden(batch["ids"], batch["mask"]))
    x, head = (t.detach().clone().requires_grad_() for t in (x.flatten(0, 1), head))
    targets, by = (t.flatten().roll(-1) for t in (batch["ids"], target_weights(batch)))

    def grads(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (x, head))

    def ours() -> tuple[Tensor, ...]:
        return grads(ops.weighted_linear_ce(x, head, targets, by)[0])

    def theirs() -> tuple[Tensor, ...]:
        return grads((F.cross_entropy(F.linear(x, head), targets, reduction="none") * by).sum())

    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(), theirs()))
    return speedup("weighted_linear_ce", "F.linear + F.cross_entropy", ours, theirs), apart


def run_demo(step: Callable[[str], None] = lambda text: None, seed: int = 0) -> Demo:
    """Runs everything, on one thread; ``step`` is told after each piece. ``seed``: of sums, weights and orders."""
    with threads(1):
        return _run(step, seed)


def _run(step: Callable[[str], None], seed: int) -> Demo:
    demo = Demo()
    test = problems(TEST, 2 * seed + 1)
    pairs = problems(TRAIN, 2 * seed, but=test)

    def evaluated(name: str, judge: Any) -> Evaluation:
        made = evaluate(judge, test, name=name)
        demo.found[name] = made.to_json()
        step(f"{name}: {100 * demo.found[name]['accuracy']['all']['value']:.0f} % right")
        return made

    for name in NAMES[:2]:
        model, tokenizer = small_model(seed=seed, layers=LAYERS, heads=HEADS)
        format = TraceFormat(tokenizer, max_length=LENGTH, escape=True)
        config = ThemisConfig.from_preset(
            "small", seed=seed, **(SETTINGS | (PLAIN if name == NAMES[0] else {}))
        )

        def told(p: Progress, name: str = name) -> None:
            if p.step % TELL == 0:
                step(f"{name}: loss {p.metrics['loss']:.2f}")

        demo.records[name] = train_themis(model, pairs, format, config, callback=told)
        if name == NAMES[0]:
            evaluated(name, PlainJudge(model, format, 64))
    for name, tool in zip(NAMES[1:], (Check(), Fails(), Lies())):
        with Toolbox([tool]) as box:
            loop = ToolLoop(model, format, box, max_new_tokens=96, batch_size=64)
            made = evaluated(name, loop)
            if name == NAMES[1]:
                first = made.pairs[0]
                sides = ((test[0].chosen, first.chosen), (test[0].rejected, first.rejected))
                demo.traces = [
                    (c.answer, j.reward, j.text.split("### ASSISTANT:\n")[-1]) for c, j in sides
                ]
                demo.speed = _speed(loop, test)
                step("all requests at once")
                demo.kernel, demo.apart = weighted_loss(loop, pairs, config)
                step(str(demo.kernel))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    demo.setting = (
        f"A Llama over bytes with {size:.1f}M parameters, random at first; {SETTINGS['steps']} steps of "
        f"{SETTINGS['batch_size']} pairs; {TEST} pairs of other questions to test on; float32, "
        "one thread, one seed."
    )
    return demo


def table_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    rows = []
    for name, e in demo.found.items():
        a, c = e["accuracy"]["all"], e["calibration"]
        rows.append([name, f"{100 * a['value']:.1f}", f"{100 * a['low']:.1f} to {100 * a['high']:.1f}",
                     f"{e['calls_per_trace']:.2f}", "–" if c is None else f"{c['ece']:.3f}"])  # fmt: skip
    return rows


def speed_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SPEED_COLUMNS``."""
    s = demo.speed
    return [[f"{s['requests']}", f"{s['seconds']:.2f}", f"{s['requests'] / s['seconds']:.0f}",
             f"{s['median']:.2f}", f"{s['within']:.2f}"]]  # fmt: skip


def trace_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``TRACE_COLUMNS``."""
    return [
        [answer, f"{reward:.2f}", " ".join(text.split())] for answer, reward, text in demo.traces
    ]


def kernel_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``KERNEL_COLUMNS``."""
    assert demo.kernel is not None
    return [[demo.kernel.op, demo.kernel.against, f"{demo.kernel.ratio:.2f}", f"{demo.apart:.1e}"]]


def headline(found: Demo) -> Headline:
    """Its line of the table of all methods."""
    assert found.kernel is not None
    plain, tool, _, lies = (
        f"{100 * found.found[n]['accuracy']['all']['value']:.0f} %" for n in NAMES
    )
    record = found.records[NAMES[1]]
    return Headline(
        f"{record.parameters / 1e6:.1f}M byte Llama, {record.pairs} pairs of answers to sums",
        f"{tool} ranked right with the tool; {plain} without, {lies} if it lies",
        found.kernel,
    )


def tables(found: Demo) -> list[TextTable]:
    """What the terminal shows."""
    return [
        TextTable("Is an answer to a sum right?", COLUMNS, table_rows(found)),
        TextTable("What it writes about two answers", TRACE_COLUMNS, trace_rows(found), prose=True),
        TextTable("Scores, all at once", SPEED_COLUMNS, speed_rows(found)),
        TextTable("Its loss on a training batch", KERNEL_COLUMNS, kernel_rows(found)),
    ]


def add_demo_section(demo: Demo, page: Page) -> None:
    """Themis's part of the report page."""
    page.section("Themis: a reward model that asks a tool")
    page.text(
        "An ordinary reward model has to know whether 47 * 86 is 4042. Themis writes a call, reads what the tool says, "
        "writes down what follows, and scores that. One network does both, trained on the ranking and on the text."
    )
    page.text(demo.setting, soft=True)
    values = [e["accuracy"]["all"]["value"] for e in demo.found.values()]
    page.cards([Card(f"{100 * v:.0f} %", f"right: {n}") for n, v in zip(demo.found, values)])
    page.table(COLUMNS, table_rows(demo))
    page.text(
        "Where the tool fails, the trace says so, and the reward has nothing to go by; where it lies, the preference "
        "turns round: the reward depends on the observation, not on how the question looks.", soft=True,
    )  # fmt: skip
    page.heading("What it writes")
    page.text(f"About the two answers to one question, which is not among those trained on: {demo.traces[0][0]} and "
              f"{demo.traces[1][0]}.", soft=True)  # fmt: skip
    for answer, reward, text in demo.traces:
        page.text(f"{answer}: reward {reward:.2f}", soft=True)
        page.preformatted(text)
    page.heading("Many requests at once")
    page.table(SPEED_COLUMNS, speed_rows(demo))
    page.text(
        "Through the scorer: places in the batch are given to the next request as they come free.",
        soft=True,
    )
    page.heading("The traces' loss on these kernels, and in plain PyTorch")
    page.text("With its gradients, on a training batch and the trained model's states.", soft=True)
    page.table(KERNEL_COLUMNS, kernel_rows(demo))
    report.add_training(page, demo.records, "Training", inside=True)
    judged = {n: demo.found[n] for n in NAMES[:2]}
    report.add_evaluations(page, judged, "Evaluation", samples=0, inside=True)
