# SPDX-License-Identifier: Apache-2.0
"""Sample tables: prompts with the responses cut into macro actions, as JSON lines.

A line: ``{"step", "row", "prompt", "segments", "advantages", "score", "kl", "truncated", "dropped"}``. ``kl`` is in
nats per response. ``dropped`` is "" or why the row did not train: ``"short"`` or ``"not finite"``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from tenfold.ma_rlhf.experience import Experience
from tenfold.ma_rlhf.parsing import token_pieces
from tenfold.ma_rlhf.rollout import Rollout
from tenfold.training.store import write_text

Sample = dict[str, Any]
MOST_DROPPED = 8  # rows of a step that are kept to be looked at


def segment_texts(tokenizer: Any, ids: list[int], seg: list[int]) -> list[str]:
    """The text of every macro action of one row: ids and their segments, both of valid tokens only.

    A character of several tokens belongs to the last of them.
    """
    made = [""] * (max(seg, default=-1) + 1)
    for piece, at in zip(token_pieces(tokenizer, ids), seg):
        made[at] += piece
    return made


def take_samples(
    rollout: Rollout, exp: Experience, tokenizer: Any, step: int, count: int
) -> list[Sample]:
    """The first ``count`` rows of a rollout, and up to 8 of those that were dropped."""
    dropped = exp.dropped.nonzero()[:, 0].tolist()
    rows = sorted(set(range(min(count, len(exp)))) | set(dropped[:MOST_DROPPED]))
    return [_sample(rollout, exp, tokenizer, step, row) for row in rows]


def _sample(rollout: Rollout, exp: Experience, tokenizer: Any, step: int, row: int) -> Sample:
    on = rollout.response_mask[row].cpu()
    ids = rollout.response[row].cpu()[on].tolist()
    seg = exp.seg[row].cpu()[on].clamp_min(0).tolist()  # a dropped row has no macro actions
    kl = torch.where(on, (rollout.logp_old[row] - rollout.logp_ref[row]).cpu(), 0.0).sum()
    gone, score = bool(exp.dropped[row]), float(rollout.score[row])
    short = len(ids) > 0 and math.isfinite(score) and math.isfinite(float(kl))
    return {
        "step": step, "row": row, "prompt": rollout.batch.texts[row],
        "segments": segment_texts(tokenizer, ids, seg),
        "advantages": [round(x, 6) for x in exp.adv_m[row, : int(exp.nseg[row])].tolist()],
        "score": score if math.isfinite(score) else None,
        "kl": float(kl) if math.isfinite(float(kl)) else None,
        "truncated": bool(rollout.truncated[row]),
        "dropped": "" if not gone else "short" if short else "not finite",
    }  # fmt: skip


class SampleFile:
    """The samples of a run, in memory and, with a path, as JSON lines; only the main process writes."""

    def __init__(self, path: Path | None, main: bool = True) -> None:
        self.path, self.main = path, main
        self.samples: list[Sample] = []

    def resume(self, step: int) -> None:
        """Keeps what belongs to the first ``step`` steps: what came later will come again."""
        if self.path is None:
            return
        lines = self.path.read_text().splitlines() if self.path.exists() and step else []
        self.samples = []
        for line in lines:
            try:
                sample = json.loads(line)
            except json.JSONDecodeError:  # the end of a file whose writer was killed
                break
            if sample["step"] <= step:
                self.samples.append(sample)
        if self.main:
            write_text(self.path, "".join(json.dumps(s) + "\n" for s in self.samples))

    def add(self, samples: list[Sample]) -> None:
        """Appends."""
        self.samples += samples
        if self.path is not None and self.main and samples:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(s) + "\n" for s in samples))


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
