"""Generated tables of the methods' studies, each from its committed result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tables import RESULTS, markdown


def _load(root: Path, folder: str, name: str) -> dict[str, Any] | None:
    path = root / RESULTS / folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def quality_block(root: Path) -> str:
    """Tables of the quality study of NACL, from its summary."""
    found = _load(root, "nacl", "summary")
    if found is None:
        return "No study has been committed."
    columns = ("task", "length", "budget", "method", "cases", "correct", "log p", "perplexity",
               "evict ms", "cache MB")  # fmt: skip

    rows = [
        [r["task"], str(r["length"]), f"{100 * r['budget']:g} %", r["method"], str(r["cases"]),
         _number(r["accuracy"]), _number(r["log_prob"], 3), _number(r["perplexity"]),
         _number(r["evict_ms"], 0), _number(r["cache_mb"], 1)]
        for r in found["rows"]
    ]  # fmt: skip
    return f"{found['setting']}.\n\n{markdown(columns, rows)}"


def ablation_block(root: Path) -> str:
    """One line per variant of NACL, from ``examples/nacl_ablation.py``."""
    found = _load(root, "nacl_ablation", "summary")
    if found is None:
        return "No ablation has been committed."
    cells = {(r["task"], r["method"], r["budget"]): r for r in found["rows"]}
    tasks = list(dict.fromkeys(r["task"] for r in found["rows"]))
    columns = ["variant", *(f"{t} {100 * b:g} %" for t in tasks for b in (0.2, 0.5))]
    rows = []
    for method in dict.fromkeys(r["method"] for r in found["rows"]):
        row = [method]
        for task, budget in ((t, b) for t in tasks for b in (0.2, 0.5)):
            cell = cells.get((task, method, budget)) or cells.get((task, method, 1.0))
            key = "perplexity" if task == "perplexity" else "accuracy"
            row.append("–" if cell is None or cell[key] is None else f"{cell[key]:.2f}")
        rows.append(row)
    length = found["rows"][0]["length"]
    return f"{found['setting']}, prompts of {length} tokens.\n\n{markdown(columns, rows)}"


def dha_study_block(root: Path) -> str:
    """Losses right after conversion and after recovery, from ``examples/dha_study.py``."""
    found = _load(root, "dha", "study")
    if found is None:
        return "No study has been committed."
    columns = ("budget", "variant", "seed", "recovery steps", "text loss after conversion",
               "after recovery", "recall loss after conversion", "after recovery")  # fmt: skip
    rows = [
        [f"{100 * c['budget']:g} %", c["variant"], str(c["seed"]), str(c["recovery_steps"]),
         *(_number(c[when][what]) for what in ("text_loss", "recall_loss")
           for when in ("before", "after"))]
        for c in found["cells"]
    ]  # fmt: skip
    steps = ", ".join(f"{name} {n}" for name, n in found["setting"]["steps"].items())
    parents = "; ".join(
        f"seed {p['seed']}: text loss {p['text_loss']:.2f}, recall loss {p['recall_loss']:.2f}"
        for p in found["parents"]
    )
    return (
        f"Steps: {steps}; parent: {found['setting']['parent_steps']}. "
        f"The parent ({parents}).\n\n{markdown(columns, rows)}"
    )


def dha_smollm2_block(root: Path) -> str:
    """What SmolLM2 and its conversion say, from ``examples/dha.py``."""
    found = _load(root, "dha", "smollm2")
    if found is None:
        return "No conversion has been committed."
    losses = ", ".join(f"{name} {value:.3f}" for name, value in found["losses"].items())
    columns = ("model", "question", "answer", "bytes per token")
    rows = [
        [a["model"], a["question"], " ".join(a["text"].split()), str(a["bytes_per_token"])]
        for a in found["answers"]
    ]
    chosen = found["settings"]
    return (
        f"{100 * found['ratio']:.1f} % of MHA's heads (the parent: 33.3 %); search "
        f"{chosen['search_steps']}, fusion {chosen['fusion_steps']} and recovery "
        f"{chosen['recovery_steps']} steps, {sum(found['seconds'].values()) / 60:.0f} minutes on "
        f"{found['threads']} threads; loss on held-out text: {losses}.\n\n"
        f"{markdown(columns, rows)}"
    )


def dha_speed_block(root: Path) -> str:
    """Decoding end to end, from ``python -m tenfold.dha.speed``."""
    found = _load(root, "dha", "speed")
    if found is None:
        return "No measurement has been committed."
    columns = ("dtype", "context", "heads kept", "cache MB", "ms per token", "speed-up")
    rows = [
        [r["dtype"], str(r["context"]), f"{100 * r['budget']:g} %",
         f"{r['cache_bytes'] / 1e6:.1f}", f"{r['ms_per_token']:.2f}", f"{r['speedup']:.2f}×"]
        for r in found["rows"]
    ]  # fmt: skip
    model = ", ".join(f"{k} {v}" for k, v in found["setting"]["model"].items())
    return f"Model: {model}; {found['setting']['threads']} threads.\n\n{markdown(columns, rows)}"


BLOCKS = {
    "quality": quality_block, "ablation": ablation_block, "dha-study": dha_study_block,
    "dha-smollm2": dha_smollm2_block, "dha-speed": dha_speed_block,
}  # fmt: skip
