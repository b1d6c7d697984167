# SPDX-License-Identifier: Apache-2.0
"""How much an eviction rule costs: retrieval of facts from long texts, and perplexity after them.

Every prompt runs once; each rule evicts that one prefill (``Press.evict_prefilled``). This is exact:
attention sees the whole prompt before anything is evicted, so a rule cannot change the prefill. As
in ``generate``, the prompt's own forward gives the first new token and the evicted cache the others.
The answer is scored twice: its mean log-probability, fed in one forward, and
whether greedy generation says it. Where every answer token is the most likely one, greedy
generation is known to produce it and is not run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.integrations import transformers as hf
from tenfold.nacl.baselines import METHODS, make_press
from tenfold.nacl.cache import cache_bytes
from tenfold.nacl.config import NaclConfig
from tenfold.nacl.eval_cases import (
    DEPTHS,
    Case,
    perplexity_cases,
    retrieval_case,
    retrieval_cases,
)
from tenfold.nacl.press import NaclPress, Prefill, Press, continuing

__all__ = [
    "DEPTHS",
    "Case",
    "Cell",
    "Spec",
    "greedy",
    "measure",
    "method_specs",
    "nacl_spec",
    "perplexity_cases",
    "read_cells",
    "retrieval_case",
    "retrieval_cases",
    "run",
    "summary",
]

MAX_NEW_TOKENS = 12
PRESETS = ("paper_20", "repo")


@dataclass(frozen=True)
class Spec:
    """One rule at one budget: its label in results, the share kept, and a press for a seed."""

    method: str
    budget: float
    make: Callable[[int], Press]


@dataclass
class Cell:
    """One case under one rule; ``log_prob`` is the mean over the answer's tokens, natural log."""

    task: str
    method: str
    budget: float
    length: int
    depth: float
    seed: int
    correct: bool
    log_prob: float
    said: str
    evict_ms: float
    kept_tokens: int
    cache_bytes: int
    document: str
    setup: str = ""

    def key(self) -> tuple[Any, ...]:
        """What identifies the cell in a result file."""
        return (self.setup, self.task, self.method, self.budget, self.length, self.depth, self.seed)


def _forward(model: Any, ids: Tensor, cache: Any, start: int) -> Tensor:
    """Logits [S, V] float32 of new tokens whose first has position ``start``."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    out = hf.forward(model, ids, cache, position_ids=positions)
    return out.logits[0].float()


@torch.no_grad()
def greedy(
    model: Any, press: Press, prefill: Prefill, length: int, max_new_tokens: int
) -> list[int]:
    """Greedy generation of up to ``max_new_tokens`` from the press's eviction of a prefill."""
    stop = model.generation_config.eos_token_id
    stops = set(stop) if isinstance(stop, list) else {stop}
    cache = press.evict_prefilled(model, prefill)
    said = [int(prefill.logits[0].argmax())]
    with continuing(press, model):
        while len(said) < max_new_tokens and said[-1] not in stops:
            ids = torch.tensor([said[-1:]], device=prefill.logits.device)
            logits = _forward(model, ids, cache, length + len(said) - 1)
            said.append(int(logits[-1].argmax()))
    return said


@dataclass
class Measured:
    """What one rule does to one case."""

    correct: bool
    log_prob: float
    said: str
    kept_tokens: int
    cache_bytes: int
    evict_ms: float


@torch.no_grad()
def measure(model: Any, tokenizer: Any, prefill: Prefill, case: Case, press: Press) -> Measured:
    """Scores a case's answer on the press's eviction of its prefill (all prompt tokens)."""
    length = len(case.prompt)
    cache = press.evict_prefilled(model, prefill)
    held = cache_bytes(cache)
    evict_ms = press.stats.evict_seconds * 1e3
    kept = next(iter(press.kept.values())).shape[-1] if press.kept else length
    answer = torch.tensor(case.answer, device=prefill.logits.device)
    logits = prefill.logits[:1].float()
    if len(case.answer) > 1:
        with continuing(press, model):
            logits = torch.cat([logits, _forward(model, answer[None, :-1], cache, length)])
    log_prob = float(logits.log_softmax(-1).gather(-1, answer[:, None]).mean())
    if not case.answer_text:
        return Measured(False, log_prob, "", kept, held, evict_ms)
    if bool((logits.argmax(-1) == answer).all()):
        return Measured(True, log_prob, case.answer_text, kept, held, evict_ms)
    said = tokenizer.decode(greedy(model, press, prefill, length, MAX_NEW_TOKENS))
    return Measured(case.answer_text in said, log_prob, said, kept, held, evict_ms)


def make_spec_press(name: str, ratio: float, **changes: Any) -> Press:
    """A press by a name of ``METHODS``, or ``nacl@<preset>``; ``ratio`` is the share evicted.

    Raises ValueError for an unknown name or a setting out of range.
    """
    base, _, preset = name.partition("@")
    if base not in METHODS or (preset and (base != "nacl" or preset not in PRESETS)):
        known = [*METHODS, *(f"nacl@{preset}" for preset in PRESETS)]
        raise ValueError(f"unknown eviction method {name!r}; known: {', '.join(known)}")
    if preset:
        changes["preset"] = preset
    return make_press(base, compression_ratio=ratio, **changes)


def _make(name: str, budget: float, changes: dict[str, Any]) -> Callable[[int], Press]:
    ratio = round(1 - budget, 6)
    make_spec_press(name, ratio, **changes)  # raises here, not in the middle of a run
    return lambda seed: make_spec_press(name, ratio, seed=seed, **changes)


def method_specs(methods: Iterable[str], budgets: Iterable[float], **changes: Any) -> list[Spec]:
    """A spec for every method and budget (share of tokens kept); "full" once, with budget 1.

    Args:
        methods: names of ``tenfold.nacl.METHODS``, or ``nacl@<preset>``.
        budgets: shares in (0, 1].
        changes: further settings for every press, e.g. ``min_length``.

    Raises:
        ValueError: an unknown method, or a budget out of range.
    """
    budgets = list(budgets)
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"a budget is a share of tokens kept, in (0, 1]; got {budget}")
    specs = []
    for name in methods:
        shares = [1.0] if name == "full" else budgets
        specs += [Spec(name, b, _make(name, b, {} if name == "full" else changes)) for b in shares]
    return specs


def nacl_spec(label: str, budget: float, base: NaclConfig | None = None, **changes: Any) -> Spec:
    """NACL with some settings changed, under a name of its own."""
    config = base or NaclConfig()
    ratio = round(1 - budget, 6)
    config.with_changes(compression_ratio=ratio, **changes)  # raises here, not in the middle
    return Spec(
        label,
        budget,
        lambda seed: NaclPress(
            config=config.with_changes(compression_ratio=ratio, seed=seed, **changes)
        ),
    )


def read_cells(path: Path | None) -> list[Cell]:
    """Cells of an earlier run; lines that a killed run left incomplete are dropped."""
    if path is None or not path.is_file():
        return []
    cells = []
    for line in path.read_text().splitlines():
        try:
            cells.append(Cell(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return cells


def write_json(value: Any, path: Path) -> None:
    """Writes a result file in one step."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def setup_name(model: Any) -> str:
    """Model and dtype, so that a result file never mixes two."""
    name = Path(str(model.config._name_or_path or type(model).__name__)).name
    return f"{name} {str(model.dtype).removeprefix('torch.')}"


def _drop_unfinished_line(path: Path | None) -> None:
    """What a killed run was writing would swallow the next cell."""
    if path is None or not path.is_file():
        return
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def run(
    model: Any,
    tokenizer: Any,
    cases: Iterable[Case],
    specs: list[Spec],
    out: Path | None = None,
    progress: Callable[[Case], None] | None = None,
) -> list[Cell]:
    """All cases under all specs; appends finished cells to ``out`` (JSONL) and skips those it has.

    ``progress`` is called after every case. Returns only the cells asked for, old and new.
    """
    setup = setup_name(model)
    _drop_unfinished_line(out)
    known = {cell.key(): cell for cell in read_cells(out)}
    cells = []
    for case in cases:
        prefill = None
        for spec in specs:
            key = (setup, case.task, spec.method, spec.budget, case.length, case.depth, case.seed)
            if key in known:
                cells.append(known[key])
                continue
            if prefill is None:
                prefill = Prefill.run(model, torch.tensor([case.prompt], device=model.device))
            got = measure(model, tokenizer, prefill, case, spec.make(case.seed))
            cells.append(
                Cell(case.task, spec.method, spec.budget, case.length, case.depth, case.seed,
                     got.correct, got.log_prob, got.said, got.evict_ms, got.kept_tokens,
                     got.cache_bytes, case.document, setup)
            )  # fmt: skip
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(asdict(cells[-1])) + "\n")
        if progress:
            progress(case)
    return cells


def _spread(values: list[float]) -> float:
    """Sample standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def summary(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Means per (task, length, method, budget), best first; spreads are between seeds.

    ``accuracy`` is None for perplexity, which has ``perplexity`` = exp(-log_prob) instead.
    """
    groups: dict[tuple[str, int, float, str], list[Cell]] = {}
    for c in cells:
        groups.setdefault((c.task, c.length, c.budget, c.method), []).append(c)
    rows: list[dict[str, Any]] = []
    for (task, length, budget, method), mine in groups.items():
        n = len(mine)
        by_seed: dict[int, list[Cell]] = {}
        for c in mine:
            by_seed.setdefault(c.seed, []).append(c)
        log_prob = sum(c.log_prob for c in mine) / n
        scored = task != "perplexity"
        per_seed = [sum(c.correct for c in s) / len(s) for s in by_seed.values()]
        rows.append({
            "task": task, "length": length, "method": method, "budget": budget,
            "cases": n, "seeds": len(by_seed),
            "accuracy": sum(c.correct for c in mine) / n if scored else None,
            "accuracy_spread": _spread(per_seed) if scored else None,
            "log_prob": log_prob,
            "perplexity": None if scored else math.exp(-log_prob),
            "evict_ms": sum(c.evict_ms for c in mine) / n,
            "cache_mb": sum(c.cache_bytes for c in mine) / n / 1e6,
        })  # fmt: skip
    rows.sort(
        key=lambda r: (r["task"], r["length"], -r["budget"], -(r["accuracy"] or 0), -r["log_prob"])
    )
    return rows
