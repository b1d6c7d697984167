# SPDX-License-Identifier: Apache-2.0
"""Does English as a pivot carry over to pairs of languages that were never seen together?

Two models of one size, from the same weights, at equal steps: one learns from text of each language alone (SCLM), the
other also from pairs with English (PTLM): each language with English, and English with Python. Then both are asked for
held-out messages in pairs that neither saw: German to French, Finnish to Python.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.ernie_code.config import model_config
from tenfold.ernie_code.corpora import (
    DEFAULT_LANGUAGES,
    code_pairs,
    english_text,
    message_pairs,
    site_pairs,
    split_messages,
    text_of,
)
from tenfold.ernie_code.evaluation import Evaluation, evaluate, ranking
from tenfold.ernie_code.formatting import format_code
from tenfold.ernie_code.generation import encode_sources, encode_targets
from tenfold.ernie_code.languages import name_of
from tenfold.ernie_code.mixture import grouped_weights
from tenfold.ernie_code.model import build_model, load_model
from tenfold.ernie_code.packing import PackedRows, pack_texts
from tenfold.ernie_code.pairs import Pair, PairRows
from tenfold.ernie_code.tokenizer import load_tokenizer, train_tokenizer
from tenfold.ernie_code.train_config import CodeTrainConfig
from tenfold.ernie_code.training import RECORD, CodeRecord, task_of, train
from tenfold.training.loop import Progress

Step = Callable[[str], None]
VARIANTS = {"SCLM": False, "SCLM + PTLM": True}
# Kinds of rows, and whether training had such pairs. Messages are held out in all languages, but those of ``pivot``
# and ``pivot-code``: each of their two languages was paired with English for them, but never with the other one.
KINDS = {
    "pivot": "X to Y (never seen), known messages",
    "pivot-code": "X to Python (never seen), known messages",
    "to-english": "X to English (seen pairs)",
    "from-english": "English to X (seen pairs)",
    "zero-shot": "X to Y (never seen)",
    "code": "X to Python (never seen)",
}


@dataclass(frozen=True)
class StudyConfig:
    """What is learnt from and asked.

    Attributes:
        languages: codes of catalogues. share: of the messages that are held out, in all languages.
        vocab_size: of the tokenizer. max_chars, code_chars: of a message, and of Python code, in pairs.
        text_tokens: of a packed row. pair_share: of the draws that are pairs, with PTLM.
        neighbours: each language is asked to be translated to those so many places further in the list, and back.
        candidates: of a ranking. ranked, generated: rows of each kind that are ranked, and for which translations are
            made. model: fields of the configuration. packages: of Python code; None: the standard library. seed.
    """

    languages: tuple[str, ...] = DEFAULT_LANGUAGES
    share: float = 0.1
    vocab_size: int = 6144
    max_chars: int = 100
    code_chars: int = 200
    text_tokens: int = 48
    pair_share: float = 0.8
    neighbours: tuple[int, ...] = (1, 4)
    candidates: int = 16
    ranked: int = 800
    generated: int = 100
    model: Mapping[str, Any] = field(
        default_factory=lambda: {"d_model": 256, "d_ff": 640, "num_layers": 2, "num_heads": 4, "d_kv": 64}
    )  # fmt: skip
    packages: tuple[str, ...] | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return dataclasses.asdict(self) | {"languages": list(self.languages),
                                           "neighbours": list(self.neighbours)}  # fmt: skip


@dataclass
class Material:
    """Corpora of a study.

    Attributes:
        text: packed rows by language. pairs: by pair of languages. held: rows by kind of ``KINDS``. held_text.
    """

    tokenizer: Any
    text: dict[str, PackedRows]
    pairs: dict[str, PairRows]
    held: dict[str, list[dict[str, Any]]]
    held_text: dict[str, PackedRows]


def _short(pairs: Sequence[Pair], config: StudyConfig) -> list[Pair]:
    most = {True: config.code_chars, False: config.max_chars}
    return [
        p
        for p in pairs
        if len(p.source) <= most[p.source_language == "Python"]
        and len(p.target) <= most[p.target_language == "Python"]
    ]


def _rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(p) for p in pairs]


def _held(
    config: StudyConfig, held: Sequence[Any], messages: Sequence[Any]
) -> dict[str, list[dict[str, Any]]]:
    codes = config.languages
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}

    def add(kind: str, pairs: Sequence[Pair]) -> None:
        pairs = _short(pairs, config)
        # A ranking needs that many different targets.
        if len({p.target for p in pairs}) >= config.candidates:
            found[kind] += _rows(pairs)

    for i, code in enumerate(codes):
        add("to-english", message_pairs(held, code, "en"))
        add("from-english", message_pairs(held, "en", code))
        for n in config.neighbours:
            other = codes[(i + n) % len(codes)]
            add("zero-shot", message_pairs(held, code, other))
            add("zero-shot", message_pairs(held, other, code))
            add("pivot", message_pairs(messages, code, other))
        add("pivot-code", site_pairs(messages, code))
        add("code", site_pairs(held, code))
    return found


def material(config: StudyConfig, tokenizer: Any = None, seed: int = 0) -> Material:
    """Text, pairs and held-out rows; the tokenizer is trained on the training text alone.

    Raises MissingData without the wheel ``django``.
    """
    train_messages, held = split_messages(config.languages, config.share)
    functions, held_functions = code_pairs(packages=config.packages, max_chars=config.code_chars)
    pages, held_pages = english_text(limit=24)
    text: dict[str, list[str]] = {
        "English": ["\n".join(m.source for m in train_messages), *pages],
        "Python": [p.target for p in functions],
    }
    held_text = {"English": held_pages, "Python": [p.target for p in held_functions]}
    pairs: dict[str, list[Pair]] = {}
    for code in config.languages:
        text[name_of(code)] = text_of(train_messages, code)
        held_text[name_of(code)] = text_of(held, code)
        pairs[f"{name_of(code)}-English"] = _short(
            message_pairs(train_messages, code, "en"), config
        )
    pairs["English-Python"] = _short(functions, config)
    pairs["English-Python messages"] = _short(site_pairs(train_messages, "en"), config)
    if tokenizer is None:
        tokenizer = train_tokenizer(
            (format_code(t) if name == "Python" else t for name, ts in text.items() for t in ts),
            config.vocab_size,
        )

    def packed(of: Mapping[str, list[str]]) -> dict[str, PackedRows]:
        return {name: pack_texts(tokenizer, ts, config.text_tokens, code=name == "Python")
                for name, ts in of.items() if ts}  # fmt: skip

    return Material(tokenizer, packed(text), {n: PairRows(p) for n, p in pairs.items()},
                    _held(config, held, train_messages), packed(held_text))  # fmt: skip


def corpora_of(
    data: Material, with_pairs: bool, config: StudyConfig
) -> tuple[dict[str, Any], dict[str, float]]:
    """(corpora, their weights) of a variant."""
    corpora: dict[str, Any] = dict(data.text)
    if with_pairs:
        corpora |= data.pairs
    sizes = {n: len(rows) for n, rows in corpora.items()}
    shares = {"sclm": 1 - config.pair_share if with_pairs else 1.0, "ptlm": config.pair_share}
    return corpora, grouped_weights(sizes, {n: task_of(r) for n, r in corpora.items()}, shares)


@dataclass
class Variant:
    """One model of the study: its training, rankings by kind and pair of languages, generations by kind; itself."""

    record: CodeRecord
    rankings: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    generated: dict[str, Evaluation] = field(default_factory=dict)
    model: Any = None


@dataclass
class Study:
    """All of it; ``to_json`` is what is committed."""

    config: StudyConfig
    settings: CodeTrainConfig
    sizes: dict[str, int]
    variants: dict[str, Variant] = field(default_factory=dict)

    def to_json(self, curve_every: int = 20, samples: int = 12) -> dict[str, Any]:
        """Settings, curves (means of some steps), rankings, scores and some samples."""
        return {
            "config": self.config.to_json(), "training": self.settings.to_json(), "sizes": self.sizes,
            "variants": {
                name: {
                    "parameters": v.record.parameters, "seconds": round(v.record.seconds),
                    "curve": smoothed(v.record.curve, curve_every), "validation": v.record.validation,
                    "rankings": v.rankings,
                    "generated": {
                        kind: {"scores": e.scores, "rows": len(e.rows), "samples": e.rows[:samples]}
                        for kind, e in v.generated.items()
                    },
                }
                for name, v in self.variants.items()
            },
        }  # fmt: skip


def smoothed(curve: Sequence[Mapping[str, float]], every: int) -> list[dict[str, float]]:
    """Means of ``every`` steps, with the last of them as ``step``."""
    made = []
    for at in range(0, len(curve), every):
        part = curve[at : at + every]
        point = {"step": float(at + len(part))}
        for name in ("loss", "sclm", "ptlm"):
            values = [m[name] for m in part if name in m]
            if values:
                point[name] = sum(values) / len(values)
        made.append(point)
    return made


def _some(rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    return random.Random(seed).sample(list(rows), min(count, len(rows)))


def judge(made: Variant, model: Any, data: Material, config: StudyConfig, step: Step) -> None:
    """Ranks and generates for all kinds of held-out rows."""
    for kind, rows in data.held.items():
        if not rows:
            continue
        ranked = _some(rows, config.ranked, config.seed)
        made.rankings[kind] = ranking(model, data.tokenizer, ranked, candidates=config.candidates,
                                      seed=config.seed, pool=rows)  # fmt: skip
        step(f"{KINDS[kind]}: right in {100 * made.rankings[kind]['all']['top1']:.1f} %")
        some = _some(rows, config.generated, config.seed)
        task = "text-to-code" if kind.endswith("code") else "translate"
        made.generated[kind] = evaluate(
            model, data.tokenizer, some, task, max_length=96, batch_size=20
        )
        step(f"{KINDS[kind]}: {made.generated[kind].scores}")


def run(
    config: StudyConfig,
    settings: CodeTrainConfig,
    *,
    out: Path | None = None,
    variants: Sequence[str] = tuple(VARIANTS),
    step: Step = lambda text: None,
    tell: int = 50,
    data: Material | None = None,
    done: Callable[[Study], None] = lambda study: None,
) -> Study:
    """Trains and judges the variants; one that has been trained into ``out`` already is only judged.

    ``done`` is told after each of them; ``step`` often.
    """
    files = [None if out is None else out / name.lower().replace(" ", "") for name in variants]
    trained = next((f for f in files if f is not None and (f / RECORD).is_file()), None)
    if data is None:
        data = material(config, load_tokenizer(str(trained)) if trained else None)
    sizes = {n: len(r) for n, r in (data.text | data.pairs).items()}  # type: ignore[operator]
    study = Study(config, settings, sizes)
    step(f"{sum(sizes.values())} rows of {len(sizes)} corpora, {len(data.tokenizer)} ids")

    def told(p: Progress) -> None:
        if p.step % tell == 0:
            step(f"{p.stage}, step {p.step}: loss {p.metrics['loss']:.3f}")

    for name, file in zip(variants, files):
        if file is not None and (file / RECORD).is_file():
            model, record = load_model(file), CodeRecord.read(file / RECORD)
        else:
            model = build_model(
                model_config("small", vocab_size=len(data.tokenizer), **config.model), seed=config.seed,
                head_std=config.model["d_model"] ** -0.5,
            )  # fmt: skip
            corpora, weights = corpora_of(data, VARIANTS[name], config)
            seen: dict[str, Any] = {
                **data.held_text,
                "X to English": _some(data.held["to-english"], 128, config.seed),
            }
            record = train(model, data.tokenizer, corpora, settings, weights=weights, held_out=seen,
                           out=file, callback=told)  # fmt: skip
        step(f"{name} is trained: {record.curve[-1]['loss']:.3f}")
        study.variants[name] = Variant(record, model=model)
        judge(study.variants[name], model, data, config, step)
        done(study)
    return study


def longest(data: Material, max_inputs: int = 1024) -> tuple[int, int]:
    """(tokens of the longest input, of the longest target) of a study's pairs: what settings must allow."""
    rows = [r for rows in data.pairs.values() for r in rows]
    turned = [
        r | {"source": r["target"], "target": r["source"], "source_language": r["target_language"],
             "target_language": r["source_language"]}
        for r in rows
    ]  # fmt: skip
    both = rows + turned
    return (max(map(len, encode_sources(data.tokenizer, both, max_inputs))),
            max(map(len, encode_targets(data.tokenizer, both, max_inputs))))  # fmt: skip
