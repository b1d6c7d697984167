# SPDX-License-Identifier: Apache-2.0
"""PPO and MA-PPO on a byte-level model that is trained here first: what macro actions change, in two minutes.

A Llama over bytes (2 layers) learns Python's documentation, then to continue pages that it has not seen so that
more of what it writes is words (``tasks.Spelling``). One seed and a few dozen steps: a demo, not a study;
docs/methods/ma_rlhf.md has one.
"""

from __future__ import annotations

import copy
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference
from tenfold.ma_rlhf import report
from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.experience import Experience
from tenfold.ma_rlhf.metrics import macro_lengths
from tenfold.ma_rlhf.record import PPORecord
from tenfold.ma_rlhf.samples import segment_texts
from tenfold.ma_rlhf.segmenters import make_segmenter
from tenfold.ma_rlhf.tasks import Spelling, text_prompts, vocabulary
from tenfold.ma_rlhf.trainer import MAPPOTrainer
from tenfold.report import PALETTE, Card, Headline, Page, Speedup, TextTable, figure, png_bytes
from tenfold.rlhf.best_of import sample_answers
from tenfold.rlhf.evaluate import Estimate, mean_estimate
from tenfold.rlhf.small import ByteTokenizer, make_policy
from tenfold.training import tiny
from tenfold.training.loop import Progress
from tenfold.training.parents import trained
from tenfold.training.threads import threads_text

PARENT_STEPS, TELL, LAYERS, HEADS, PROMPT, RESPONSE, ASKED = 150, 10, 2, 4, 64, 48, 128
MACRO, PUBLISHED = (1, 5), (256, 512)
SETTINGS: dict[str, Any] = {
    "steps": 26, "batch_size": 32, "minibatches": 2, "ppo_epochs": 1, "learning_rate": 5e-4,
    "critic_learning_rate": 1e-3, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "beta": 0.01,
    "temperature": 1.0, "top_k": 0, "max_prompt": PROMPT, "max_response": RESPONSE,
    "checkpoint_every": None,
}  # fmt: skip
STEPS = PARENT_STEPS // TELL + len(MACRO) * (SETTINGS["steps"] + 1) + 2
LAST = 5  # steps that a final score is the mean of
CUTS: dict[str, dict[str, Any]] = {
    "every 5 tokens": {"termination": "fixed", "n": 5},
    "random lengths": {"termination": "random"},
    "perplexity": {"termination": "ppl"},
}
COLUMNS = ("policy", "score", "95 % interval", "in training", "steps to PPO's", "KL", "macro actions",
           "s per step")  # fmt: skip
SPEED_COLUMNS = ("rollout", "Python loop", "ma_ppo_prepare", "speed-up", "largest difference")
ANSWER_COLUMNS = ("answer to one prompt", "policy", "score")
CUT_COLUMNS = ("response, | between macro actions", "cut", "macro actions")
CURVES = (
    ("objective/kl", "KL to the reference (nats per response)"),
    ("critic/explained_variance", "explained variance of the returns"),
    ("macro/adv_norm", "advantage (root mean square)"),
)


@dataclass
class Demo:
    """What the demo found.

    Attributes:
        records: one per run. scores: of the policy before, and after each run, on the same prompts.
        asked, answers: one of these prompts, and (answer, score) of all policies to it.
        lengths: of all macro actions of a rollout, by the way to cut. prompt, cuts: one response, cut so.
        speed: times of preparing a rollout.
    """

    records: list[PPORecord]
    scores: list[Estimate]
    asked: str
    answers: list[tuple[str, float]]
    lengths: dict[str, Tensor]
    prompt: str
    cuts: dict[str, list[str]]
    speed: list[dict[str, Any]]
    model: str = ""
    setting: str = ""

    @property
    def names(self) -> list[str]:
        """Of the policies."""
        return ["before", *map(report.run_name, self.records)]

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        scores = [{"policy": n, "mean": s.value, "low": s.low, "high": s.high, "count": s.count}
                  for n, s in zip(self.names, self.scores)]  # fmt: skip
        runs = [{"n": r.config["n"], "score": r.series("objective/scores"), "kl": r.series("objective/kl"),
                 "seconds_per_step": r.time_shares(), "final": final(r),
                 "steps_to_ppo": steps_to(r, final(self.records[0]))} for r in self.records]  # fmt: skip
        means = {n: float(x.double().mean()) for n, x in self.lengths.items()}
        return {"setting": self.setting, "scores": scores, "runs": runs, "speed": self.speed,
                "macro_length_means": means}  # fmt: skip


def final(record: PPORecord) -> float:
    """Mean training score of the last steps."""
    return record.last("objective/scores", LAST)


def steps_to(record: PPORecord, level: float) -> int | None:
    """First step at which the mean training score of the last steps reaches a level."""
    means = report.smoothed(record.series("objective/scores"), LAST)
    return next((i for i, x in enumerate(means, 1) if i >= LAST and x >= level), None)


def _parent(stream: Tensor, step: Callable[[str], None]) -> tuple[Any, float]:
    """(a model that has read the stream, its last loss): trained once, then from the cache."""

    def rows(stage: str, at: int, size: int) -> Tensor:
        return tiny.text_rows(stream, size, torch.Generator().manual_seed(at), PROMPT + RESPONSE)

    def train(model: Any) -> dict[str, float]:
        losses: list[float] = []

        def told(at: int, loss: float) -> None:
            losses.append(loss)
            if at % TELL == 0:
                step(f"learning text: loss {loss:.2f}")

        tiny.train(model, rows, PARENT_STEPS, callback=told)
        return {"loss": statistics.fmean(losses[-TELL:])}

    settings = {
        "steps": PARENT_STEPS, "layers": LAYERS, "heads": HEADS, "length": PROMPT + RESPONSE,
        "text": hashlib.sha256(bytes(stream.tolist())).hexdigest(),
    }  # fmt: skip
    model, said = trained("ma-rlhf", settings, make_policy(0, layers=LAYERS, heads=HEADS), train)
    return model, said["loss"]


def judged(
    policy: Any, reward: Spelling, prompts: list[str], seed: int
) -> tuple[Estimate, tuple[str, float]]:
    """(mean score, first answer with its score) of a policy; all policies have the same random numbers."""
    answers = sample_answers(policy, ByteTokenizer(), prompts, temperature=1.0, max_prompt=PROMPT,
                             max_new_tokens=RESPONSE, batch_size=64, seed=seed)  # fmt: skip
    texts = [a[0] for a in answers]
    scores = reward(prompts, texts)
    return mean_estimate(scores), (texts[0], scores[0])


def cut(exp: Experience, config: MARLHFConfig) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """(lengths of macro actions, texts of those of the first row) of a rollout, by the way to cut."""
    lengths, texts = {}, {}
    tokenizer, keys = ByteTokenizer(), torch.arange(len(exp))
    assert exp.ids is not None
    on = exp.mask[0]
    for name, changes in CUTS.items():
        segmenter = make_segmenter(config.with_changes(**changes), tokenizer)
        seg, nseg = segmenter(exp.mask, ids=exp.ids, logp_ref=exp.logp_ref, keys=keys)
        lengths[name] = macro_lengths(replace(exp, seg=seg, nseg=nseg))
        texts[name] = segment_texts(tokenizer, exp.ids[0][on].tolist(), seg[0][on].tolist())
    return lengths, texts


def _times(name: str, given: tuple[Tensor, ...], beta: float, repeats: int) -> dict[str, Any]:
    """Median seconds of the definition (a Python loop over macro actions) and of the op, in turns."""
    forms: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        "loop": reference.ma_ppo_prepare,
        "op": ops.ma_ppo_prepare,
    }
    found: dict[str, list[float]] = {n: [] for n in forms}
    made: dict[str, Any] = {}
    for _ in range(repeats):
        for n, f in forms.items():
            start = time.perf_counter()
            made[n] = f(*given, beta)
            found[n].append(time.perf_counter() - start)
    gap = max(float((a - b).abs().max()) for a, b in zip(made["loop"], made["op"]))
    return {"rollout": name, "gap": gap} | {n: statistics.median(x) for n, x in found.items()}


def measure(exp: Experience, config: MARLHFConfig) -> list[dict[str, Any]]:
    """The op against its definition, on a rollout and on one of the published size."""
    own = (exp.logp_old, exp.logp_ref, exp.value_old, exp.score, exp.seg, exp.nseg)
    made = torch.Generator().manual_seed(0)
    old, ref, value = (torch.randn(*PUBLISHED, generator=made) for _ in range(3))
    seg, nseg = ops.macro_segment_fixed(torch.ones(PUBLISHED, dtype=torch.bool), config.n)
    large = (old, ref, value, torch.randn(PUBLISHED[0], generator=made), seg, nseg)
    size = " x ".join(map(str, exp.seg.shape))
    return [_times(f"the next one of this run, {size}", own, config.beta, 7),
            _times(f"the published size, {PUBLISHED[0]} x {PUBLISHED[1]}", large, config.beta, 1)]  # fmt: skip


def run_demo(step: Callable[[str], None] = lambda text: None, seed: int = 0) -> Demo:
    """Runs everything.

    Args:
        step: told after each piece; of the parent only where it is not in the cache.
        seed: of prompts and their order, of sampling and of the critic; the parent is the same for all.
    """
    stream, held = tiny.split(tiny.byte_stream())
    parent, loss = _parent(stream, step)
    prompts, asked = (
        text_prompts(held, n, PROMPT, at) for n, at in ((4000, 2 * seed), (ASKED, 2 * seed + 1))
    )
    reward = Spelling(vocabulary(bytes(stream.tolist()).decode()))
    luck = 1234 + seed
    found = [judged(parent, reward, asked, luck)]
    step("the score before")
    records: list[PPORecord] = []
    for n in MACRO:
        config = MARLHFConfig(n=n, seed=seed, **SETTINGS)
        name = "PPO" if n == 1 else f"MA-PPO, n = {n}"

        def told(p: Progress, name: str = name) -> None:
            step(f"{name}: score {p.metrics['objective/scores']:.2f}")

        trainer = MAPPOTrainer(
            copy.deepcopy(parent), reward=reward, prompts=prompts, tokenizer=ByteTokenizer(), config=config,
            callback=told, samples=0,
        )  # fmt: skip
        records.append(trainer.train())
        found.append(judged(trainer.policy, reward, asked, luck))
        step(f"{name}: score after")
    rollout = trainer.roller(trainer.module, config.steps)
    exp = trainer.prepare(rollout, config.steps, config.beta)
    lengths, cuts = cut(exp, config)
    speed = measure(exp, config)
    step("the kernel against a loop")
    name = f"byte-level Llama ({sum(p.numel() for p in parent.parameters()) / 1e6:.1f}M parameters)"
    setting = (f"A {name}, "
               f"{PARENT_STEPS} steps on Python's documentation (loss {loss:.2f} nats per byte), then "
               f"{SETTINGS['steps']} rollouts of {SETTINGS['batch_size']} responses of up to {RESPONSE} bytes; "
               f"float32, {threads_text()}, one seed.")  # fmt: skip
    scores, answers = map(list, zip(*found))
    return Demo(
        records,
        scores,
        asked[0],
        answers,
        lengths,
        rollout.batch.texts[0],
        cuts,
        speed,
        name,
        setting,
    )


def table_rows(demo: Demo) -> list[list[str]]:
    """The rows of the table, for ``COLUMNS``; the scores in training are means of the last five steps."""
    first, level = demo.records[0].curve[0]["objective/scores"], final(demo.records[0])
    rest = [[f"{first:.3f}", "", "", "", ""]]
    for r in demo.records:
        rest.append([
            f"{final(r):.3f}", str(steps_to(r, level) or "–"), f"{r.last('objective/kl', LAST):.2f}",
            f"{r.last('macro/per_response', LAST):.1f}", f"{sum(r.time_shares().values()):.2f}",
        ])  # fmt: skip
    return [[name, f"{s.value:.3f}", f"{s.low:.3f} to {s.high:.3f}", *more]
            for name, s, more in zip(demo.names, demo.scores, rest)]  # fmt: skip


def _seconds(value: float) -> str:
    small = f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.0f} µs"
    return f"{value:.2f} s" if value >= 1 else small


def speed_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SPEED_COLUMNS``."""
    return [[s["rollout"], _seconds(s["loop"]), _seconds(s["op"]), f"{s['loop'] / s['op']:,.0f}×",
             f"{s['gap']:.1e}"] for s in demo.speed]  # fmt: skip


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else "·" for c in text.replace("\n", "¶"))


def answer_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``ANSWER_COLUMNS``."""
    return [
        [_line(text), name, f"{score:.2f}"] for name, (text, score) in zip(demo.names, demo.answers)
    ]


def cut_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``CUT_COLUMNS``."""
    return [[_line("|".join(parts)), name, str(len(parts))] for name, parts in demo.cuts.items()]


def speedup_of(found: Demo) -> Speedup:
    """Credit assignment of a rollout of this run: the op against a Python loop over macro actions."""
    own = found.speed[0]
    return Speedup("ma_ppo_prepare", "a Python loop", own["loop"] / own["op"])


def headline(found: Demo) -> Headline:
    """MA-RLHF's line in the demo's table."""
    before, ppo, macro = (found.scores[i].value for i in (0, 1, -1))
    config, runs = found.records[-1].config, len(found.records)
    return Headline(
        f"{found.model}, {runs} × {len(found.records[-1].curve)} rollouts of {config['batch_size']}",
        f"spelling score {before:.2f} before, {macro:.2f} after MA-PPO, {ppo:.2f} after PPO",
        speedup_of(found),
    )


def tables(found: Demo) -> list[TextTable]:
    """What the demo shows on a terminal."""
    return [
        TextTable("A byte-level model that learns to spell", COLUMNS, table_rows(found)),
        TextTable("What it writes", ANSWER_COLUMNS, answer_rows(found)),
        TextTable("Ways to cut", CUT_COLUMNS, cut_rows(found)),
        TextTable("Credit assignment of a rollout", SPEED_COLUMNS, speed_rows(found)),
    ]


def score_plot(records: Sequence[PPORecord]) -> Any:
    """Scores over steps: thin as they are, thick their running means."""
    made, axes = figure(7.2, 3.2)
    for record, color in zip(records, PALETTE):
        scores = record.series("objective/scores")
        at = range(1, len(scores) + 1)
        axes.plot(at, scores, lw=0.8, alpha=0.35, color=color)
        axes.plot(
            at, report.smoothed(scores, LAST), lw=2, color=color, label=report.run_name(record)
        )
    axes.set_xlabel("step")
    axes.set_ylabel("share of well-spelt new words", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return made


def lengths_plot(lengths: dict[str, Tensor], most: int = 15) -> Any:
    """Shares of macro actions by length, a group of bars per way to cut."""
    made, axes = figure(7.2, 3.0)
    width = 0.8 / len(lengths)
    for i, (name, found) in enumerate(lengths.items()):
        counts = torch.bincount(found.clamp(max=most), minlength=most + 1)[1:].double()
        at = [k + 1 + (i - (len(lengths) - 1) / 2) * width for k in range(most)]
        axes.bar(at, (100 * counts / counts.sum()).tolist(), width, color=PALETTE[i], label=name)
    axes.set_xticks(range(1, most + 1), [*map(str, range(1, most)), f"{most}+"])
    axes.set_xlabel("tokens per macro action")
    axes.set_ylabel("% of macro actions")
    axes.legend(frameon=False, fontsize=8)
    return made


def add_demo_section(demo: Demo, page: Page) -> None:
    """MA-RLHF's part of the report page."""
    ppo, macro = demo.records[0], demo.records[-1]
    reached, speed = steps_to(macro, final(ppo)), speedup_of(demo)
    page.section("MA-RLHF: PPO with macro actions")
    page.text(
        "PPO learns from one number per response, and token by token its credit fades with every step back. "
        "Over macro actions of five tokens it has a fifth of the steps to go. Both runs begin with the same "
        "policy and see the same prompts and random numbers."
    )
    page.text(demo.setting, soft=True)
    before = f"{demo.scores[0].value:.2f} before"
    page.cards([
        Card(f"{demo.scores[-1].value:.2f}", f"score, {report.run_name(macro)}", before),
        Card(f"{demo.scores[1].value:.2f}", f"score, {report.run_name(ppo)}", before),
        Card("–" if reached is None else str(reached), "steps to PPO's last score in training",
             f"of {len(macro.curve)}"),
        Card(f"{speed.ratio:,.0f}×", "faster credit assignment", f"than {speed.against}"),
    ])  # fmt: skip
    page.table(COLUMNS, table_rows(demo))
    page.text(
        f"The score is the share of characters in known words that are new in the response, here over "
        f"{demo.scores[0].count} prompts that were not trained on. One seed and so few steps show that it "
        "learns, not which way is better: the documentation has a study.",
        soft=True,
    )
    page.image(png_bytes(score_plot(demo.records)), "Score by step, and its mean over five steps.")
    for metric, label in CURVES:
        plot = report.curve_plot(demo.records, metric, label)
        page.image(png_bytes(plot), f"{label[0].upper()}{label[1:]}, by step.")
    page.heading("What it writes")
    for name, (text, score) in zip(demo.names, demo.answers):
        page.text(f"{name}, score {score:.2f}", soft=True)
        page.tokens([(demo.asked, 0.0), (text, 0.1)])
    page.heading("Macro actions")
    page.text(
        "One response of the trained policy, cut in different ways, its macro actions shaded in turn."
    )
    for name, parts in demo.cuts.items():
        page.text(f"{name}: {len(parts)} macro actions", soft=True)
        shaded = [(t, 0.4 if i % 2 else 0.1) for i, t in enumerate(parts)]
        page.tokens([(demo.prompt, 0.0), *shaded])
    page.image(png_bytes(lengths_plot(demo.lengths)),
               "How long the macro actions of a whole rollout are, by the way to cut.")  # fmt: skip
    page.heading("Credit assignment, timed")
    shares = macro.time_shares()
    part = 100 * shares["advantages"] / sum(shares.values())
    page.text(
        "ops.ma_ppo_prepare turns a rollout into advantages and returns in one call: KL rewards, pooled "
        "values, GAE over macro actions, and back to tokens. Beside it its definition in PyTorch "
        "(tenfold.reference), which loops over macro actions. Cutting, checks and all, this is "
        f"{part:.1f} % of a step of this run."
    )
    page.table(SPEED_COLUMNS, speed_rows(demo))
    page.image(png_bytes(report.time_plot(demo.records)), "A step's time by its parts.")
