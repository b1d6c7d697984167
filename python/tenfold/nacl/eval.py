"""How much an eviction rule costs: retrieval of facts in long texts, and perplexity after them.

Every prompt runs once; each rule evicts that one prefill (``Press.evict_prefilled``), which is exact,
since attention sees the whole prompt before anything is evicted. The prompt's last token and the
answer are then fed to the evicted cache in one forward. An answer counts as retrieved if every
token of it is the most likely one: greedy decoding would produce exactly it.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tenfold.data import long_documents
from tenfold.nacl.baselines import make_press
from tenfold.nacl.press import Prefill, Press

NAMES = (
    "Amelia", "Boris", "Carmen", "Dmitri", "Elena", "Farid", "Greta", "Hiro", "Ingrid", "Jonas",
    "Kavya", "Leon", "Marta", "Nadia", "Omar", "Paula",
)  # fmt: skip
DEPTHS = tuple((i + 0.5) / 10 for i in range(10))


@dataclass(frozen=True)
class Case:
    """One prompt: its tokens, the tokens whose probability is measured, and what it is."""

    task: str
    length: int
    depth: float
    seed: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    document: str


@dataclass
class Cell:
    """One case under one rule."""

    task: str
    method: str
    budget: float
    length: int
    depth: float
    seed: int
    correct: bool
    log_prob: float  # mean natural log-probability per answer token
    evict_ms: float
    kept_tokens: int

    def key(self) -> tuple[Any, ...]:
        """What identifies the cell in a result file."""
        return (self.task, self.method, self.budget, self.length, self.depth, self.seed)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.cache
def _texts() -> tuple[tuple[str, str], ...]:
    """(name, text) of real texts on every machine with Python, long enough for 8k tokens."""
    documents = long_documents(("docs", "reference"), min_chars=2000)
    by_kind: dict[str, list[str]] = {}
    for document in documents:
        by_kind.setdefault(document.kind, []).append(document.text)
    return tuple((kind, "\n\n".join(texts)) for kind, texts in by_kind.items())


def _haystack(tokenizer: Any, length: int, rng: random.Random) -> tuple[list[int], str]:
    """``length`` tokens of real text from a random place, and where they came from."""
    name, text = rng.choice(_texts())
    start = rng.randrange(max(len(text) - 10 * length, 1))
    ids = _tokens(tokenizer, text[start : start + 10 * length])
    if len(ids) < length:
        raise ValueError(f"the packaged texts are too short for {length} tokens")
    return ids[:length], f"{name} at {start}"


def _fact(name: str, number: str) -> str:
    return f"\nThe secret code of {name} is {number}.\n"


def retrieval_cases(
    tokenizer: Any,
    lengths: Iterable[int],
    seeds: Iterable[int],
    depths: Iterable[float] = DEPTHS,
    num_keys: int = 1,
) -> Iterator[Case]:
    """Facts hidden in real text at given depths, one of them asked for at the end.

    With ``num_keys`` > 1 (multi-key retrieval) the others are spread over the text.
    """
    for length in lengths:
        for seed in seeds:
            for depth in depths:
                rng = random.Random(f"{length}/{seed}/{depth}/{num_keys}")
                names = rng.sample(NAMES, num_keys)
                numbers = [str(rng.randrange(10000, 100000)) for _ in names]
                question = (
                    f"\n\nQuestion: What is the secret code of {names[0]}?\n"
                    f"Answer: The secret code of {names[0]} is"
                )
                tail = _tokens(tokenizer, question)
                facts = [_tokens(tokenizer, _fact(a, b)) for a, b in zip(names, numbers)]
                room = length - len(tail) - sum(len(f) for f in facts)
                ids, document = _haystack(tokenizer, room, rng)
                spots = [depth, *(rng.random() for _ in names[1:])]
                pieces, at = [], 0
                for spot, fact in sorted(zip(spots, facts)):
                    stop = int(spot * room)
                    pieces += ids[at:stop] + fact
                    at = stop
                prompt = pieces + ids[at:room] + tail
                answer = tuple(_tokens(tokenizer, " " + numbers[0]))
                task = "needle" if num_keys == 1 else f"multikey{num_keys}"
                yield Case(task, length, depth, seed, tuple(prompt), answer, document)


def perplexity_cases(
    tokenizer: Any, lengths: Iterable[int], seeds: Iterable[int], continuation: int = 256
) -> Iterator[Case]:
    """The continuation of a real text, predicted from the evicted cache of what precedes it."""
    for length in lengths:
        for seed in seeds:
            rng = random.Random(f"ppl/{length}/{seed}")
            ids, name = _haystack(tokenizer, length + continuation, rng)
            yield Case("perplexity", length, 1.0, seed, tuple(ids[:length]),
                       tuple(ids[length : length + continuation]), name)  # fmt: skip


@torch.no_grad()
def measure(model: Any, prefill: Prefill, case: Case, press: Press) -> tuple[bool, float]:
    """(retrieved exactly, mean log-probability) of a case's answer on the press's evicted cache."""
    cache = press.evict_prefilled(model, prefill)
    tokens = torch.tensor([[case.prompt[-1], *case.answer[:-1]]])
    start = len(case.prompt) - 1
    positions = torch.arange(start, start + tokens.shape[1])[None]
    with _continuing(press, model):
        logits = model(tokens, cache=cache, position_ids=positions).logits[0].float()
    answer = torch.tensor(case.answer)
    log_prob = logits.log_softmax(-1).gather(-1, answer[:, None]).mean()
    return bool((logits.argmax(-1) == answer).all()), float(log_prob)


def _continuing(press: Press, model: Any):
    """The press's context without forgetting the statistics of the eviction just made."""
    stats, kept = press.stats, press.kept
    context = press(model)

    class Keep:
        def __enter__(self) -> None:
            context.__enter__()
            press.stats, press.kept = stats, kept

        def __exit__(self, *args: Any) -> None:
            context.__exit__(*args)

    return Keep()


Spec = tuple[str, float, Callable[[int], Press]]  # label, budget kept, press for a seed


def method_specs(methods: Iterable[str], budgets: Iterable[float]) -> list[Spec]:
    """One spec for every method and budget (share of tokens kept); "full" once."""

    def one(name: str, budget: float) -> Spec:
        def make(seed: int) -> Press:
            return make_press(name, compression_ratio=round(1 - budget, 6), seed=seed)

        return name, budget, make

    specs = []
    for name in methods:
        specs += [one(name, 1.0)] if name == "full" else [one(name, b) for b in budgets]
    return specs


def read_cells(path: Path | None) -> list[Cell]:
    """Cells of an earlier run; an incomplete last line (a killed run) is dropped."""
    if path is None or not path.is_file():
        return []
    cells = []
    for line in path.read_text().splitlines():
        try:
            cells.append(Cell(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return cells


def run(
    model: Any,
    cases: Iterable[Case],
    specs: list[Spec],
    out: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Cell]:
    """All cases under all specs; appends each cell to ``out`` (JSONL) and skips those it holds."""
    cells = read_cells(out)
    done = {c.key() for c in cells}
    for case in cases:
        todo = [
            s for s in specs
            if (case.task, s[0], s[1], case.length, case.depth, case.seed) not in done
        ]  # fmt: skip
        if not todo:
            continue
        if progress:
            progress(f"{case.task} length {case.length} depth {case.depth:.2f} seed {case.seed}")
        prefill = Prefill.run(model, torch.tensor([case.prompt[:-1]]))
        for name, budget, make in todo:
            press = make(case.seed)
            correct, log_prob = measure(model, prefill, case, press)
            kept = next(iter(press.kept.values())).shape[-1] if press.kept else len(case.prompt) - 1
            cells.append(
                Cell(case.task, name, budget, case.length, case.depth, case.seed, correct, log_prob,
                     press.stats.evict_seconds * 1e3, kept)
            )  # fmt: skip
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(asdict(cells[-1])) + "\n")
    return cells


def summary(cells: list[Cell]) -> list[dict[str, Any]]:
    """Mean accuracy, log-probability and eviction time per (task, method, budget)."""
    groups: dict[tuple[str, str, float], list[Cell]] = {}
    for c in cells:
        groups.setdefault((c.task, c.method, c.budget), []).append(c)
    rows = []
    for (task, method, budget), mine in groups.items():
        n = len(mine)
        mean = sum(c.log_prob for c in mine) / n
        rows.append({
            "task": task, "method": method, "budget": budget, "cases": n,
            "accuracy": sum(c.correct for c in mine) / n, "log_prob": mean,
            "evict_ms": sum(c.evict_ms for c in mine) / n,
        })  # fmt: skip
    return rows
