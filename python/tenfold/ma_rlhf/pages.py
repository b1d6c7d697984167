# SPDX-License-Identifier: Apache-2.0
"""Pages of what the commands of MA-RLHF found: runs, reward models and evaluations, together or alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.ma_rlhf import report, reward_report
from tenfold.ma_rlhf.record import RECORD_FILE, PPORecord
from tenfold.report import PALETTE, Card, Page, figure, png_bytes
from tenfold.rlhf.best_of import BestOfN
from tenfold.rlhf.evaluate import PolicyScore, WinRate
from tenfold.rlhf.reward_training import RewardRecord

Record = PPORecord | RewardRecord
SCORE_COLUMNS = ("policy", "score", "95 % interval", "prompts")
WIN_COLUMNS = ("policy", "against", "win rate", "95 % interval", "wins", "ties", "losses")


@dataclass(frozen=True)
class Evaluation:
    """Policies under one reward model: ``scores`` by policy, ``rates`` by pair, ``samples`` of best-of-n."""

    scores: Mapping[str, PolicyScore]
    rates: Mapping[tuple[str, str], WinRate] = field(default_factory=dict)
    samples: Mapping[str, BestOfN] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {
            "policies": {
                n: {"mean": s.mean.value, "low": s.mean.low, "high": s.mean.high, "count": s.mean.count}
                for n, s in self.scores.items()
            },
            "win_rates": [
                {"policy": a, "against": b, "rate": r.rate.value, "low": r.rate.low,
                 "high": r.rate.high, "wins": r.wins, "ties": r.ties, "losses": r.losses}
                for (a, b), r in self.rates.items()
            ],
            "best_of_n": {
                n: [{"n": k, "mean": m, "error": None if math.isnan(e) else e}
                    for k, (m, e) in s.curve(_sizes(s)).items()]
                for n, s in self.samples.items()
            },
        }  # fmt: skip


def _sizes(samples: BestOfN) -> list[int]:
    """Powers of two up to the number of samples, and that number."""
    most = samples.scores.shape[1]
    return sorted({*(1 << i for i in range(most.bit_length()) if 1 << i <= most), most})


def score_rows(found: Evaluation) -> list[list[str]]:
    """Rows for ``SCORE_COLUMNS``."""
    return [[n, f"{s.mean.value:.3f}", f"{s.mean.low:.3f} to {s.mean.high:.3f}", str(s.mean.count)]
            for n, s in found.scores.items()]  # fmt: skip


def win_rows(found: Evaluation) -> list[list[str]]:
    """Rows for ``WIN_COLUMNS``."""
    return [[a, b, f"{100 * r.rate.value:.1f} %", f"{100 * r.rate.low:.1f} to {100 * r.rate.high:.1f} %",
             str(r.wins), str(r.ties), str(r.losses)] for (a, b), r in found.rates.items()]  # fmt: skip


def best_of_table(found: Evaluation) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): the mean score of the best of n, by policy."""
    sizes = _sizes(next(iter(found.samples.values())))
    rows = [[n, *(f"{mean:.3f}" for mean, _ in s.curve(sizes).values())]
            for n, s in found.samples.items()]  # fmt: skip
    return ["policy", *(f"n = {k}" for k in sizes)], rows


def score_plot(found: Evaluation) -> Any:
    """Mean scores with their intervals."""
    made, axes = figure(7.2, 0.9 + 0.42 * len(found.scores))
    for i, score in enumerate(found.scores.values()):
        mean = score.mean
        if math.isfinite(mean.low):
            axes.plot([mean.low, mean.high], [i, i], lw=2, color=PALETTE[i % len(PALETTE)])
        axes.plot(mean.value, i, "o", color=PALETTE[i % len(PALETTE)])
    axes.set_yticks(range(len(found.scores)), list(found.scores))
    axes.set_ylim(len(found.scores) - 0.5, -0.5)
    axes.set_xlabel("reward-model score")
    axes.grid(axis="x", alpha=0.3)
    return made


def _add_evaluation(found: Evaluation, page: Page, title: str) -> list[tuple[str, bytes]]:
    drawn: list[tuple[str, bytes]] = []

    def plot(made: Any, name: str, caption: str) -> None:
        drawn.append((name, png_bytes(made)))
        page.image(drawn[-1][1], caption)

    page.section(title)
    page.cards([Card(f"{s.mean.value:.3f}", n) for n, s in found.scores.items()])
    page.table(SCORE_COLUMNS, score_rows(found))
    plot(score_plot(found), "scores", "Mean scores with 95 % intervals over prompts.")
    if found.rates:
        page.heading("Win rates")
        page.text("How often a policy's answer scores higher on the same prompt; ties count half.")
        page.table(WIN_COLUMNS, win_rows(found))
    if found.samples:
        page.heading("Best of n")
        sizes = _sizes(next(iter(found.samples.values())))
        plot(reward_report.best_of_n_plot(found.samples, sizes), "best-of-n",
             "Score of the best of n answers; bars are standard errors.")  # fmt: skip
    page.heading("Answers")
    first = next(iter(found.scores.values()))
    for i, prompt in enumerate(first.prompts[:3]):
        page.tokens([(prompt, 0.0)])
        for name, score in found.scores.items():
            page.text(f"{name}, score {float(score.scores[i]):.3f}", soft=True)
            page.tokens([(score.answers[i] or "(nothing)", 0.1)])
    return drawn


def read_record(path: str | Path) -> Record:
    """The record of a run or of a reward model, from its file or the folder with ``record.json``.

    Raises ValueError if there is none.
    """
    file = Path(path) / RECORD_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{path} has no {RECORD_FILE} (of `tenfold ma-rlhf train` or `rm`)")
    try:
        config = json.loads(file.read_text())["config"]
        return (RewardRecord if "rm_loss" in config else PPORecord).read(file)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is no record of `tenfold ma-rlhf train` or `rm`") from None


def write_page(
    path: str | Path, subtitle: str = "", records: Sequence[Record] = (),
    evaluation: Evaluation | None = None,
) -> Path:  # fmt: skip
    """A page for runs, reward models and an evaluation; the plots stand beside it as PNG files."""
    path = Path(path)
    page = Page("PPO with macro actions", subtitle)
    drawn: list[tuple[str, bytes]] = []
    runs = [r for r in records if isinstance(r, PPORecord)]
    rewards = [r for r in records if isinstance(r, RewardRecord)]
    if runs:
        drawn += report.add_section(runs, page, "MA-RLHF")
    if rewards:
        drawn += reward_report.add_section(rewards, page, "Reward models")
    if evaluation is not None:
        drawn += _add_evaluation(evaluation, page, "Evaluation")
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, png in drawn:
        (path.parent / f"{name}.png").write_bytes(png)
    return page.write(path)
