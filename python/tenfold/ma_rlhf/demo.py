"""PPO and MA-PPO on a byte-level model that is trained here first: what macro actions change, in two minutes.

A Llama over bytes (2 layers, width 256) learns Python's documentation, then to continue pages that it has not
seen so that more of what it writes is words (``tasks.Spelling``). One seed and a few dozen steps: a demo, not
a study; docs/methods/ma_rlhf.md has one.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference
from tenfold.ma_rlhf import report
from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.record import PPORecord
from tenfold.ma_rlhf.small import ByteTokenizer, make_policy
from tenfold.ma_rlhf.tasks import Spelling, text_prompts, vocabulary
from tenfold.ma_rlhf.trainer import MAPPOTrainer
from tenfold.report import Card, Page, png_bytes
from tenfold.training import tiny
from tenfold.training.loop import Progress

PARENT_STEPS, TELL, PROMPT, RESPONSE = 180, 10, 64, 48
MACRO = (1, 5)
SETTINGS: dict[str, Any] = {
    "steps": 32, "batch_size": 32, "minibatches": 2, "ppo_epochs": 1, "learning_rate": 2e-4,
    "critic_learning_rate": 5e-4, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "beta": 0.01,
    "temperature": 1.0, "top_k": 0, "max_prompt": PROMPT, "max_response": RESPONSE,
    "checkpoint_every": None, "seed": 0,
}  # fmt: skip
STEPS = PARENT_STEPS // TELL + len(MACRO) * SETTINGS["steps"] + 1
LAST = 5  # steps that a final score is the mean of
COLUMNS = (
    "run",
    "score before",
    "after",
    "steps to PPO's",
    "KL",
    "macro actions",
    "seconds per step",
)
SPEED_COLUMNS = ("rollout", "Python loop", "ma_ppo_prepare", "speed-up", "largest difference")
SAMPLE_COLUMNS = ("response (| between macro actions)", "run", "score")
CURVES = (
    ("objective/scores", "share of well-spelt new words"),
    ("objective/kl", "KL to the reference (nats per response)"),
    ("critic/explained_variance", "explained variance of the returns"),
    ("macro/adv_norm", "advantage (root mean square)"),
)


@dataclass
class Demo:
    """What the demo found: a record per run, the loss of the parent, and times of preparing a rollout."""

    records: list[PPORecord]
    parent_loss: float
    speed: list[dict[str, Any]]
    setting: str = ""

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {
            "setting": self.setting, "parent_loss": self.parent_loss, "speed": self.speed,
            "runs": [{"n": r.config["n"], "score": r.series("objective/scores"),
                      "kl": r.series("objective/kl"), "seconds_per_step": r.time_shares(),
                      "final": final(r), "steps_to_ppo": steps_to(r, final(self.records[0]))}
                     for r in self.records],
        }  # fmt: skip


def final(record: PPORecord) -> float:
    """Mean score of the last steps."""
    return record.last("objective/scores", LAST)


def steps_to(record: PPORecord, level: float) -> int | None:
    """First step at which the mean score over the last steps reaches a level."""
    means = report.smoothed(record.series("objective/scores"), LAST)
    return next((i for i, x in enumerate(means, 1) if i >= LAST and x >= level), None)


def _parent(stream: Tensor, step: Callable[[str], None]) -> tuple[Any, float]:
    losses: list[float] = []

    def told(at: int, loss: float) -> None:
        losses.append(loss)
        if at % TELL == 0:
            step(f"a policy that knows text: loss {loss:.2f}")

    def rows(stage: str, at: int, size: int) -> Tensor:
        return tiny.text_rows(stream, size, torch.Generator().manual_seed(at), PROMPT + RESPONSE)

    model = tiny.train(make_policy(0, layers=2), rows, PARENT_STEPS, batch_size=16, callback=told)
    return model, statistics.fmean(losses[-TELL:])


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


def measure(trainer: MAPPOTrainer) -> list[dict[str, Any]]:
    """The op against its definition, on the policy's next rollout and on one of the published size."""
    config = trainer.config
    exp = trainer.prepare(trainer.roller(trainer.module, config.steps), config.steps, config.beta)
    own = (exp.logp_old, exp.logp_ref, exp.value_old, exp.score, exp.seg, exp.nseg)
    rows, width = exp.seg.shape
    made = torch.Generator().manual_seed(0)
    old, ref, value = (torch.randn(256, 512, generator=made) for _ in range(3))
    seg, nseg = ops.macro_segment_fixed(torch.ones(256, 512, dtype=torch.bool), config.n)
    large = (old, ref, value, torch.randn(256, generator=made), seg, nseg)
    return [_times(f"the next one of this run, {rows} x {width}", own, config.beta, 7),
            _times("the published size, 256 x 512", large, config.beta, 3)]  # fmt: skip


def run_demo(step: Callable[[str], None] = lambda text: None) -> Demo:
    """Runs everything; ``step`` is told after each piece."""
    stream, held = tiny.split(tiny.byte_stream())
    parent, loss = _parent(stream, step)
    prompts = text_prompts(held, 4000, PROMPT, seed=0)
    reward = Spelling(vocabulary(bytes(stream.tolist()).decode()))
    records: list[PPORecord] = []
    for n in MACRO:
        config = MARLHFConfig(n=n, **SETTINGS)
        name = "PPO" if n == 1 else f"MA-PPO, n = {n}"

        def told(p: Progress, name: str = name) -> None:
            step(f"{name}: score {p.metrics['objective/scores']:.2f}")

        trainer = MAPPOTrainer(
            copy.deepcopy(parent), reward=reward, prompts=prompts, tokenizer=ByteTokenizer(), config=config,
            callback=told, samples=3, sample_every=config.steps,
        )  # fmt: skip
        records.append(trainer.train())
    speed = measure(trainer)
    step("the kernel against a loop")
    setting = (f"A Llama over bytes with {sum(p.numel() for p in parent.parameters()) / 1e6:.1f}M parameters, "
               f"{PARENT_STEPS} steps on Python's documentation (loss {loss:.2f} nats per byte), then "
               f"{SETTINGS['steps']} rollouts of {SETTINGS['batch_size']} responses of up to {RESPONSE} bytes; "
               f"float32, {torch.get_num_threads()} threads, one seed.")  # fmt: skip
    return Demo(records, loss, speed, setting)


def table_rows(demo: Demo) -> list[list[str]]:
    """The rows of the table, for ``COLUMNS``: ``after`` is the mean of the last five steps."""
    level, rows = final(demo.records[0]), []
    for r in demo.records:
        reached = steps_to(r, level)
        rows.append([
            report.run_name(r), f"{r.curve[0]['objective/scores']:.3f}", f"{final(r):.3f}",
            str(reached or "–"), f"{r.last('objective/kl', LAST):.2f}",
            f"{r.last('macro/per_response', LAST):.1f}", f"{sum(r.time_shares().values()):.2f}",
        ])  # fmt: skip
    return rows


def _seconds(value: float) -> str:
    return (
        f"{value:.2f} s"
        if value >= 1
        else f"{1e3 * value:.3g} ms"
        if value >= 1e-3
        else f"{1e6 * value:.0f} µs"
    )


def speed_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SPEED_COLUMNS``."""
    return [[s["rollout"], _seconds(s["loop"]), _seconds(s["op"]), f"{s['loop'] / s['op']:,.0f}×",
             f"{s['gap']:.1e}"] for s in demo.speed]  # fmt: skip


def sample_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SAMPLE_COLUMNS``: one prompt before, and one after training in every run."""
    rows = []
    for i, record in enumerate(demo.records):
        first, last = record.samples[0], record.samples[-1]
        named = [("before", first), (report.run_name(record), last)]
        for name, s in named if i == 0 else named[1:]:
            line = "|" if len(s["segments"]) * 2 < sum(map(len, s["segments"])) else ""
            text = line.join(s["segments"]).replace("\n", "⏎")
            rows.append([text, name, f"{s['score']:.2f}"])
    return rows


def add_demo_section(demo: Demo, page: Page) -> None:
    """MA-RLHF's part of the report page."""
    ppo, macro = demo.records[0], demo.records[-1]
    reached, fast = steps_to(macro, final(ppo)), demo.speed[-1]
    page.section("MA-RLHF: PPO with macro actions")
    page.text(
        "PPO learns from one number per response. Token by token, credit for it fades with every step back; "
        "over macro actions of five tokens it has a fifth of the steps to go. Both runs begin with the same "
        "policy and see the same prompts and random numbers."
    )
    page.text(demo.setting, soft=True)
    before = f"{macro.curve[0]['objective/scores']:.2f} before"
    page.cards([
        Card(f"{final(macro):.2f}", f"score, {report.run_name(macro)}", before),
        Card(f"{final(ppo):.2f}", f"score, {report.run_name(ppo)}", "same policy, same prompts"),
        Card("–" if reached is None else str(reached), "steps to PPO's last score", f"of {len(macro.curve)}"),
        Card(f"{fast['loop'] / fast['op']:,.0f}×", "faster credit assignment", "than the loop in Python"),
    ])  # fmt: skip
    page.table(COLUMNS, table_rows(demo), [len(demo.records) - 1])
    for metric, label in CURVES:
        page.image(
            png_bytes(report.curve_plot(demo.records, metric, label)),
            f"{label}, by step.".capitalize(),
        )
    page.heading("Macro actions")
    page.image(png_bytes(report.lengths_plot(demo.records)),
               "How long macro actions are: the last one of a response is what is left over.")  # fmt: skip
    page.text(
        "Prompts of the first and the last step; macro actions of the responses are shaded in turn."
    )
    report.add_samples(page, macro, count=3)
    page.heading("Credit assignment, timed")
    shares = macro.time_shares()
    page.text(
        "ops.ma_ppo_prepare turns a rollout into advantages and returns in one call: KL reward, pooled values, "
        "GAE over macro actions, and back to tokens. Beside it its definition in PyTorch (tenfold.reference), "
        f"which loops over macro actions. All of that is {100 * shares['advantages'] / sum(shares.values()):.1f} % of "
        "a step of this run."
    )
    page.table(SPEED_COLUMNS, speed_rows(demo))
    page.image(png_bytes(report.time_plot(demo.records)), "A step's time by its parts.")
