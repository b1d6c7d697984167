# SPDX-License-Identifier: Apache-2.0
"""Generated tables of the methods' studies, each from its committed result file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tables import RESULTS, markdown

Found = dict[str, Any]
BLOCKS: dict[str, Callable[[Path], str]] = {}


def generated(
    name: str, folder: str, file: str, what: str
) -> Callable[[Callable[[Found], str]], Any]:
    """Registers the maker of the block ``name``: Markdown from the result ``folder/file.json``."""

    def register(make: Callable[[Found], str]) -> Callable[[Found], str]:
        def block(root: Path) -> str:
            path = root / RESULTS / folder / f"{file}.json"
            if not path.is_file():
                return f"No {what} has been committed."
            return make(json.loads(path.read_text(encoding="utf-8")))

        BLOCKS[name] = block
        return make

    return register


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


@generated("quality", "nacl", "summary", "study")
def quality_block(found: Found) -> str:
    """Tables of the quality study of NACL, from its summary."""
    columns = ("task", "length", "budget", "method", "cases", "correct", "log p", "perplexity",
               "evict ms", "cache MB")  # fmt: skip

    rows = [
        [r["task"], str(r["length"]), f"{100 * r['budget']:g} %", r["method"], str(r["cases"]),
         _number(r["accuracy"]), _number(r["log_prob"], 3), _number(r["perplexity"]),
         _number(r["evict_ms"], 0), _number(r["cache_mb"], 1)]
        for r in found["rows"]
    ]  # fmt: skip
    return f"{found['setting']}.\n\n{markdown(columns, rows)}"


@generated("ablation", "nacl_ablation", "summary", "ablation")
def ablation_block(found: Found) -> str:
    """One line per variant of NACL, from ``examples/nacl_ablation.py``."""
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


@generated("dha-study", "dha", "study", "study")
def dha_study_block(found: Found) -> str:
    """Losses right after conversion and after recovery, from ``examples/dha_study.py``."""
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


@generated("dha-smollm2", "dha", "smollm2", "conversion")
def dha_smollm2_block(found: Found) -> str:
    """What SmolLM2 and its conversion say, from ``examples/dha.py``."""
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


@generated("dha-speed", "dha", "speed", "measurement")
def dha_speed_block(found: Found) -> str:
    """Decoding end to end, from ``python -m tenfold.dha.speed``."""
    columns = ("dtype", "context", "heads kept", "cache MB", "ms per token", "speed-up")
    rows = [
        [r["dtype"], str(r["context"]), f"{100 * r['budget']:g} %",
         f"{r['cache_bytes'] / 1e6:.1f}", f"{r['ms_per_token']:.2f}", f"{r['speedup']:.2f}×"]
        for r in found["rows"]
    ]  # fmt: skip
    model = ", ".join(f"{k} {v}" for k, v in found["setting"]["model"].items())
    return f"Model: {model}; {found['setting']['threads']} threads.\n\n{markdown(columns, rows)}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@generated("hft-study", "hft", "study", "study")
def hft_study_block(found: Found) -> str:
    """Forgetting by method over seeds, from ``examples/hft_study.py``."""

    def values(variant: str, of: Callable[[Found], float]) -> dict[int, float]:
        return {c["config"]["seed"]: of(c) for c in found["cells"] if c["variant"] == variant}

    def learnt(c: Found) -> float:
        """Mean over the tasks, each right after its round."""
        scores = c["scores"]["log_prob"]
        return _mean([row[i] for i, row in enumerate(scores)])

    measures: list[tuple[str, Callable[[Found], float]]] = [
        ("learnt", learnt),
        ("OP", lambda c: c["summary"]["log_prob"]["op"]),
        ("BWT", lambda c: c["summary"]["log_prob"]["bwt"]),
        ("OP, accuracy %", lambda c: 100 * c["summary"]["accuracy"]["op"]),
        ("BWT, accuracy %", lambda c: 100 * c["summary"]["accuracy"]["bwt"]),
        ("text forgotten", lambda c: c["text_loss"]["after"] - c["text_loss"]["before"]),
    ]
    full = {name: values("full", of) for name, of in measures}
    rows = []
    for variant in dict.fromkeys(c["variant"] for c in found["cells"]):
        shares = values(variant, lambda c: c["trained_parameters"] / c["parameters"])
        row = [variant, f"{100 * shares[min(shares)]:.0f} %", str(len(shares))]
        for name, of in measures:
            mine, sign = values(variant, of), -1 if name == "text forgotten" else 1
            both = mine.keys() & full[name].keys()
            better = sum(sign * mine[s] > sign * full[name][s] for s in both)
            digits = 1 if "%" in name else 3
            cell = f"{_mean(list(mine.values())):.{digits}f}"
            row.append(cell if variant == "full" else f"{cell} ({better}/{len(both)})")
        rows.append(row)
    columns = ("method", "trained", "seeds", *(name for name, _ in measures))
    setting = found["setting"]
    return (
        f"Tasks in order: {', '.join(setting['tasks'])}; {setting['steps']} steps each, after "
        f"{setting['parent_steps']} steps on ordinary text. Means over the seeds; in brackets on how many "
        "seeds a method is ahead of full fine-tuning. What was learnt (each task right after its round), OP and BWT "
        "of log-probability (nats per answer token), then OP and BWT of greedy token accuracy."
        f"\n\n{markdown(columns, rows)}"
    )


@generated("hft-seeds", "hft", "study", "study")
def hft_seeds_block(found: Found) -> str:
    """BWT and forgotten text of every seed, from ``examples/hft_study.py``."""
    seeds = sorted({c["config"]["seed"] for c in found["cells"]})
    rows = []
    for variant in dict.fromkeys(c["variant"] for c in found["cells"]):
        cells = {c["config"]["seed"]: c for c in found["cells"] if c["variant"] == variant}
        row = [variant]
        for s in seeds:
            cell = cells.get(s)
            row.append("–" if cell is None else (
                f"{cell['summary']['log_prob']['bwt']:+.3f} / "
                f"{cell['text_loss']['after'] - cell['text_loss']['before']:.3f}"))  # fmt: skip
        rows.append(row)
    columns = ("BWT / text forgotten", *(f"seed {s}" for s in seeds))
    return markdown(columns, rows)


@generated("hft-smollm2", "hft", "smollm2", "run")
def hft_smollm2_block(found: Found) -> str:
    """SmolLM2 on two tasks, from ``examples/hft.py``."""
    rows = []
    for r in found["runs"]:
        by = r["summary"]
        text = r["text_loss"]
        rows.append([
            r["config"]["method"], f"{100 * r['trained_parameters'] / r['parameters']:.1f} %",
            str(r["config"]["seed"]), f"{by['log_prob']['op']:.3f}", f"{by['log_prob']['bwt']:+.3f}",
            f"{100 * by['accuracy']['op']:.1f}", f"{100 * by['accuracy']['bwt']:+.1f}",
            f"{text['before']:.3f}", f"{text['after']:.3f}", f"{sum(r['seconds'].values()):.0f}",
        ])  # fmt: skip
    columns = ("method", "trained", "seed", "OP", "BWT", "OP, accuracy %", "BWT, accuracy %",
               "text loss before", "after", "seconds")  # fmt: skip
    first = found["runs"][0]
    return (
        f"Tasks in order: {', '.join(first['tasks'])}; {first['config']['steps']} steps each of "
        f"{first['config']['batch_size']} rows, {found['threads']} threads.\n\n{markdown(columns, rows)}"
    )


@generated("hft-speed", "hft", "speed", "measurement")
def hft_speed_block(found: Found) -> str:
    """Where a training step's time goes, from ``python -m tenfold.hft.speed``."""
    parts = ("forward", "backward", "optimizer", "step")
    columns = ("method", "dtype", "rows x tokens", *(f"{p} ms" for p in parts), "speed",
               "gradients MB", "states MB", "activations MB")  # fmt: skip
    rows = [
        [r["method"], r["dtype"], f"{r['rows']} x {r['length']}", *(f"{1e3 * r[p]:.0f}" for p in parts),
         f"{r['speedup']:.2f}×",
         *(f"{r[k] / 1e6:.0f}" for k in ("gradient_bytes", "state_bytes", "activation_bytes"))]
        for r in found["rows"]
    ]  # fmt: skip
    setting = found["setting"]
    return f"{setting['model']}, {setting['threads']} threads.\n\n{markdown(columns, rows)}"


@generated("ma-rlhf-study", "ma_rlhf", "study", "study")
def ma_rlhf_study_block(found: Found) -> str:
    """Scores, steps to PPO's final score and KL by method and seed, from ``examples/ma_rlhf_study.py``."""
    by = {(r["reward"], r["method"]): r for r in found["summary"]}
    rows = []
    for (reward, method), row in by.items():
        base = by.get((reward, "ppo"), {"seeds": [], "final": []})
        theirs = dict(zip(base["seeds"], base["final"]))
        pairs = [(x, theirs[s]) for s, x in zip(row["seeds"], row["final"]) if s in theirs]
        ahead = f"{sum(x > y for x, y in pairs)}/{len(pairs)}"
        rows.append([
            reward, row["name"], ", ".join(f"{x:.3f}" for x in row["final"]),
            f"{_mean(row['final']):.3f}", "–" if method == "ppo" else ahead,
            ", ".join("–" if x is None else str(x) for x in row["steps_to_ppo"]),
            f"{_mean(row['mean']):.3f}", ", ".join(f"{x:.1f}" for x in row["kl"]),
        ])  # fmt: skip
    columns = ("reward", "method", "final score of each seed", "mean", "ahead of PPO",
               "steps to PPO's final score", "mean score of all steps", "KL")  # fmt: skip
    setting = found["setting"]
    ppo, judge = setting["ppo"], setting["reward_model"]
    told = "" if judge is None else (
        f" The reward model is right on {100 * judge['after']['accuracy']:.0f} % of held-out pairs."
    )  # fmt: skip
    return (
        f"{ppo['steps']} steps of {ppo['batch_size']} responses of {ppo['max_response']} bytes to prompts of "
        f"{ppo['max_prompt']}; {ppo['minibatches']} minibatches, 1 epoch, learning rates "
        f"{ppo['learning_rate']:g} and (critic) {ppo['critic_learning_rate']:g}, beta {ppo['beta']:g}, lambda "
        f"{ppo['lam']:g} unless said; the parent had {setting['parent_steps']} steps on text.{told} Final: the "
        "last ten steps; steps: until a mean over five reaches what PPO of the same seed ended with."
        f"\n\n{markdown(columns, rows)}"
    )


@generated("ma-rlhf-smollm2", "ma_rlhf", "smollm2", "run")
def ma_rlhf_smollm2_block(found: Found) -> str:
    """SmolLM2 with LoRA on one reward, from ``examples/ma_rlhf.py``."""

    def mean(run: Found, name: str, late: bool) -> float:
        half = len(run["curve"]) // 2
        return _mean([m[name] for m in (run["curve"][half:] if late else run["curve"][:half])])

    rows = [
        [r["name"], str(r["config"]["seed"]), str(len(r["curve"])),
         f"{mean(r, 'objective/scores', False):.3f}", f"{mean(r, 'objective/scores', True):.3f}",
         f"{mean(r, 'objective/kl', True):.2f}", f"{mean(r, 'macro/length_mean', True):.1f}",
         f"{sum(map(sum, (s.values() for s in r['seconds']))) / len(r['seconds']):.1f}"]
        for r in found["runs"]
    ]  # fmt: skip
    columns = ("method", "seed", "steps", "score, first half", "score, second half", "KL",
               "tokens per macro action", "seconds per step")  # fmt: skip
    config = found["runs"][0]["config"]
    return (
        f"{config['batch_size']} responses of up to {config['max_response']} tokens per step, LoRA of rank "
        f"{config['lora_rank']}, learning rate {config['learning_rate']:g}, reward: {found['reward']}; "
        f"{found['threads']} threads.\n\n{markdown(columns, rows)}"
    )


def _upit_block(found: Found) -> str:
    """Loss by family and method of every run, from ``examples/upit.py``."""
    runs = found["runs"]
    families = runs[0]["families"]
    titles = list(dict.fromkeys(t for r in runs for t in r["losses"]))
    rows = []
    for experts in sorted({r["experts"] for r in runs}):
        some = [r for r in runs if r["experts"] == experts]
        for title in titles:
            of = [r["losses"][title] for r in some if title in r["losses"]]
            if of:
                rows.append([
                    str(experts), title, *(_number(_mean([x[f] for x in of]), 3) for f in families),
                    _number(_mean([x["mean"] for x in of]), 3), ", ".join(f"{x['mean']:.3f}" for x in of),
                ])  # fmt: skip
    setting = runs[0]["setting"]
    rest = (
        f"{setting['layers']} of its 30 layers, healed for {setting['heal']} steps, "
        if setting["layers"]
        else ""
    )
    columns = ("experts", "model", *families, "mean", "mean of each seed")
    return (
        f"{setting['model']}, {rest}{setting['train']} training rows per family of up to {setting['length']} tokens, "
        f"{setting['test']} held out, batch {setting['batch']}, 2 epochs of S1 and {setting['post_epochs']:g} after; "
        f"seeds {', '.join(str(s) for s in sorted({r['seed'] for r in runs}))}, {found['about']['threads']} threads. "
        f"Loss in nats per answer token.\n\n{markdown(columns, rows)}"
    )  # fmt: skip


@generated("upit-bytes", "upit", "bytes", "study")
def upit_bytes_block(found: Found) -> str:
    """The byte-level model's runs."""
    return _upit_block(found)


@generated("upit-smollm2", "upit", "smollm2", "study")
def upit_smollm2_block(found: Found) -> str:
    """SmolLM2's runs."""
    return _upit_block(found)


@generated("pixelgpt-study", "pixelgpt", "study", "study")
def pixelgpt_study_block(found: Found) -> str:
    """Losses of the variants, and accuracies by script, from ``examples/pixelgpt.py``."""
    setting = found["setting"]
    runs = found["pretraining"]
    losses = []
    for variant in dict.fromkeys(r["variant"] for r in runs):
        some = [r for r in runs if r["variant"] == variant]
        for key in some[0]["validation"][-1]:
            if key == "step":
                continue
            stream, kind = key.split("/")
            base = some[0]["baselines"] if key == "pixel/npp" else {}
            losses.append([
                some[0]["title"], f"{'next patch' if kind == 'npp' else 'next token'}, {stream}",
                _number(_mean([r["validation"][0][key] for r in some]), 3),
                ", ".join(_number(r["validation"][-1][key], 3) for r in some),
                *(_number(base.get(b), 3) for b in ("zero", "copy", "mean")),
                f"{_mean([r['seconds'] for r in some]):.0f}",
            ])  # fmt: skip
    first = markdown(("model", "loss", "before", "after, each seed", "predict zero", "copy the last patch",
                      "mean patch", "seconds"), losses)  # fmt: skip
    names = list(dict.fromkeys((t["variant"], t["modality"]) for t in found["tasks"]))
    tasks = list(dict.fromkeys(t["task"] for t in found["tasks"]))
    groups = {task: list(setting["groups"][task]) for task in tasks}
    rows = []
    for variant, modality in names:
        title = next((r["title"] for r in runs if r["variant"] == variant), "no pre-training")
        row = [title, modality]
        for task in tasks:
            for group in groups[task]:
                values = [100 * t["scores"][group]["accuracy"] for t in found["tasks"]
                          if (t["variant"], t["modality"], t["task"]) == (variant, modality, task)]  # fmt: skip
                row.append(f"{_mean(values):.1f} ({', '.join(f'{v:.0f}' for v in values)})")
        rows.append(row)
    second = markdown(("model", "reads", *(f"{t}, {g}" for t in tasks for g in groups[t])), rows)
    languages = "; ".join(
        f"{task}: " + ", ".join(f"{g} {' '.join(codes)}" for g, codes in setting["groups"][task].items())
        for task in tasks
    )  # fmt: skip
    return (
        f"{runs[0]['parameters'] / 1e6:.1f}M parameters ({setting['layers']} layers of {setting['width']}), "
        f"{setting['steps']} steps per stream of {setting['batch']} rows of {setting['length']} patches or tokens, "
        f"learning rate {setting['learning_rate']:g}, {setting['documents']['train']} documents; seeds "
        f"{', '.join(map(str, setting['seeds']))}, {found['about']['threads']} threads. Held-out losses: mean squared "
        f"error per normalised pixel, nats per token.\n\n{first}\n\n"
        f"Accuracy in per cent, mean and each seed, after {setting['tune_steps']} steps (pixels and pairs: "
        f"{setting['pixel_tune_steps']} at {setting['pixel_tune_rate']:g}) on {setting['train']} lines "
        f"per language of up to {setting['tune_length']} patches or tokens. {languages}.\n\n{second}"
    )


@generated("pixelgpt-render", "pixelgpt", "render", "measurement")
def pixelgpt_render_block(found: Found) -> str:
    """Strips per second, from ``python -m tenfold.pixelgpt.speed``."""
    columns = ("renderer", "characters", "threads", "strips per second", "slowest", "fastest",
               "to the faster reference")  # fmt: skip
    rows = [
        [r["provider"], str(r["characters"]), str(r["threads"]), f"{r['per_second']:.0f}",
         *(f"{x:.0f}" for x in r["spread"]), f"{r['ratio']:.1f}×"]
        for r in found["rows"]
    ]  # fmt: skip
    setting = found["setting"]
    cold = ", ".join(f"{v:.0f} of {k} characters" for k, v in setting["cold"].items())
    used = ", ".join(f"{k} {v}" for k, v in setting["versions"].items())
    return (
        f"Batches of {setting['count']} texts, {setting['rounds']} rounds in turns, {setting['cores']} cores with a "
        f"load of {setting['load']:.1f}; {used}. Median strips per second, and the slowest and fastest round. With "
        f"empty caches, on one thread: {cold}.\n\n{markdown(columns, rows)}"
    )


def _percent(values: list[float]) -> str:
    return f"{100 * _mean(values):.1f}"


@generated("themis-study", "themis", "smollm2", "study")
def themis_study_block(found: Found) -> str:
    """Accuracy by kind of tool, variant and test set, from ``examples/themis.py``."""
    runs, setting = found["runs"], found["setting"]
    variants = list(dict.fromkeys(r["variant"] for r in runs))
    rows = []
    for test in runs[0]["evaluations"]:
        kinds = [k for k in runs[0]["evaluations"][test]["accuracy"] if k != "all"]
        for kind in [*kinds, "all"]:
            of = {
                v: [
                    r["evaluations"][test]["accuracy"][kind]["value"]
                    for r in runs
                    if r["variant"] == v
                ]
                for v in variants
            }
            rows.append([test, kind, *(_percent(of[v]) for v in variants)])
        errors = [[r["evaluations"][test]["calibration"]["ece"] for r in runs if r["variant"] == v
                   and r["evaluations"][test]["calibration"]] for v in variants]  # fmt: skip
        rows.append([test, "calibration error", *(_number(_mean(e), 3) if e else "–" for e in errors)])  # fmt: skip
    titles = {r["variant"]: next(iter(r["evaluations"].values()))["name"] for r in runs}
    config = runs[0]["record"]["config"]
    seconds = ", ".join(
        f"{titles[v]} {_mean([r['record']['seconds'] for r in runs if r['variant'] == v]) / 60:.0f}"
        for v in variants
    )
    if setting["model"] == "bpe":
        trained = f"A Llama of {setting['layers']} layers over {setting['vocabulary']} byte pairs, random at first"
    else:
        first = setting.get("keep_layers")
        layers = (
            f"the first {first} layers of SmolLM2-135M-Instruct"
            if first
            else "SmolLM2-135M-Instruct"
        )
        trained = f"{layers[0].upper()}{layers[1:]}, {'with LoRA' if config['lora_rank'] else 'trained whole'}"
    often = "once" if config["epochs"] == 1 else f"{config['epochs']:g} times"
    return (
        f"{trained}; "
        f"{setting['train']} pairs of each of {', '.join(setting['kinds'])}, {often}, in batches of "
        f"{config['batch_size']}; {setting['test']} other questions per kind to test on; seeds "
        f"{', '.join(map(str, setting['seeds']))}; minutes of training: {seconds}. Per cent of pairs ranked right; "
        f"seen tools are tested on new questions, unseen kinds were in no training set.\n\n"
        f"{markdown(('test set', 'kind', *(titles[v] for v in variants)), rows)}"
    )


@generated("themis-ppo", "themis", "smollm2", "run")
def themis_ppo_block(found: Found) -> str:
    """PPO with both reward models, from ``examples/themis.py``."""
    titles = {r["variant"]: next(iter(r["evaluations"].values()))["name"] for r in found["runs"]}
    rows = [
        [titles.get(r["variant"], r["variant"]), str(r["seed"]), str(len(r["curve"])),
         f"{100 * r['before']:.1f}", f"{100 * r['after']:.1f}",
         f"{r['curve'][0]['score']:.2f}", f"{r['curve'][-1]['score']:.2f}", f"{r['curve'][-1]['kl']:.2f}"]
        for r in found["ppo"]
    ]  # fmt: skip
    columns = ("reward", "seed", "steps", "% of answers right before", "after", "score of the first step",
               "of the last", "KL")  # fmt: skip
    return markdown(columns, rows) if rows else "No run has been committed."


_GPTFLUENCE = {
    "default": "GPTfluence",
    "reference": "GPTfluence as published",
    "ridge": "Simfluence, ridge",
    "table": "Simfluence, N(0, 1) start",
    "similarity": "similarity of texts",
    "mean": "mean training run",
    "constant": "first value",
    "tracin": "TracIn-CP",
    "tracin, head": "TracIn-CP, head alone",
    "grad-dot": "Grad-Dot",
    "grad-cosine": "Grad-cosine",
}
_SCALES = {
    "": "",
    "raw": ", raw",
    "fitted": ", scale from training runs",
    "oracle": ", scale in hindsight",
}


def _kinds(found: Found) -> list[tuple[str, Found]]:
    return [("", found)] if "mse" in found else list(found.items())


@generated("gptfluence-study", "gptfluence", "study", "study")
def gptfluence_block(found: Found) -> str:
    """Held-out runs: a line per method and scale, a pair of columns per seed."""
    seeds = found["seeds"]
    columns = [
        "method",
        *(f"{what}, seed {s['seed']}" for s in seeds for what in ("MSE", "Spearman")),
    ]
    rows = []
    for name, one in seeds[0]["methods"].items():
        for kind, _ in _kinds(one):
            cells = [s["methods"][name][kind] if kind else s["methods"][name] for s in seeds]
            rows.append(
                [
                    _GPTFLUENCE[name] + _SCALES[kind],
                    *(
                        _number(c[k], 4 if k == "mse" else 3)
                        for c in cells
                        for k in ("mse", "spearman")
                    ),
                ]
            )
    s = found["setting"]
    head = (
        f"{s['runs'] - s['test_runs'] - 2} runs of {seeds[0]['steps']} steps to learn from, "
        f"{s['test_runs']} to predict; "
        f"{4 * s['tests_per_task']} tests; features by {s['encoders'][0]}; "
        f"{100 * s['noise']:g} % of the examples have another's answer."
    )
    return f"{head}\n\n{markdown(columns, rows)}"


@generated("gptfluence-more", "gptfluence", "study", "study")
def gptfluence_more_block(found: Found) -> str:
    """The study's other questions, a line each."""
    seeds = found["seeds"]
    lines: dict[str, list[str]] = {}

    def add(name: str, cell: str) -> None:
        lines.setdefault(name, []).append(cell)

    for s in seeds:
        for name, one in s["encoders"].items():
            add(f"GPTfluence, features by {name}: MSE", _number(one["default"]["mse"], 4))
        for name, one in s["intervals"].items():
            every, rule = name.split(", ")
            add(f"measured every {every} steps, {rule}: MSE", _number(one["mse"], 4))
        for name in ("default", "mean", "constant"):
            add(
                f"unseen examples, {_GPTFLUENCE[name]}: MSE",
                _number(s["unseen"]["examples"][name]["mse"], 4),
            )
        for name in ("default", "constant"):
            add(
                f"unseen tests, {_GPTFLUENCE[name]}: MSE",
                _number(s["unseen"]["tests"][name]["mse"], 4),
            )
        a = s["counterfactual"]["agreement"]
        add("without examples, simulated against retrained: correlation / rank correlation / equal signs",
            f"{a['pearson']:.2f} / {a['spearman']:.2f} / {100 * a['signs']:.0f} %")  # fmt: skip
        for name, one in s["mislabelled"].items():
            add(f"mislabelled found by {name}: area (0.5: at random)", _number(one["area"]))
    columns = ["question", *(f"seed {s['seed']}" for s in seeds)]
    return markdown(columns, [[name, *cells] for name, cells in lines.items()])


@generated("ernie-music-study", "ernie_music", "study", "study")
def ernie_music_block(found: Found) -> str:
    """What sounds of held-out prompts have of what was asked for, by guidance."""
    evaluations = found["evaluations"]
    best = evaluations[f"{found['best_guidance']:g}"]
    names = list(best["accuracy"])

    def percent(value: float) -> str:
        return f"{100 * value:.0f} %"

    def line(name: str, values: Found, first: float, frechet: float | None) -> list[str]:
        return [name, *(percent(values[n]) for n in names), percent(first), _number(frechet, 0)]

    columns = ["sounds", *names, "own text found first", "Fréchet distance to real features"]
    rows = [
        line(f"guidance {g}", e["accuracy"], e["retrieval"]["top1"], e["frechet"])
        for g, e in evaluations.items()
    ]
    rows.append(
        line(
            "the same, against other prompts", best["shuffled"], best["retrieval"]["chance1"], None
        )
    )
    rows.append(
        line(
            "real, held-out", best["ceiling"], best["real_retrieval"]["top1"], best["frechet_real"]
        )
    )
    languages = "; ".join(
        f"{lang} {', '.join(percent(one[n]) for n in names)}"
        for lang, one in found["by_language"].items()
    )
    times = ", ".join(
        f"{part} {r['ratio']:.2f} times as fast as in plain PyTorch"
        for part, r in found["speed"].items()
    )
    return (
        f"{found['setting']} {best['count']} held-out prompts.\n\n{markdown(columns, rows)}\n\n"
        f"By the language of the prompt ({', '.join(names)}): {languages}. The whole net on these "
        f"kernels: {times} (batches of {found['training']['batch_size']}, float32)."
    )


@generated("ernie-code-study", "ernie_code", "study", "study")
def ernie_code_block(found: Found) -> str:
    """How often the right target is found among others, and scores of beam search, by kind of pair."""
    kinds = {
        "pivot": "X to Y (never seen together), messages seen with English",
        "pivot-code": "X to Python (never seen together), messages seen with English",
        "to-english": "X to English, held-out messages", "from-english": "English to X, held-out messages",
        "zero-shot": "X to Y (never seen together), held-out messages",
        "code": "X to Python (never seen together), held-out messages",
    }  # fmt: skip
    columns = (
        "asked for",
        "trained on",
        "right of 16",
        "mean of 1 / rank",
        "rows",
        "BLEU",
        "chrF",
        "exact %",
    )
    rows = []
    for kind, title in kinds.items():
        for name, variant in found["variants"].items():
            if kind not in variant["rankings"]:
                continue
            own, scores = variant["rankings"][kind]["all"], variant["generated"][kind]["scores"]
            rows.append([
                title, name, f"{100 * own['top1']:.1f} %", _number(own["mrr"], 3), f"{own['rows']:.0f}",
                _number(scores.get("bleu", scores.get("mconala_bleu")), 1), _number(scores.get("chrf"), 1),
                _number(scores["exact_match"], 1),
            ])  # fmt: skip
    config, training = found["config"], found["training"]
    pairs = {n: c for n, c in found["sizes"].items() if "-" in n}
    losses = "; ".join(
        f"{name}: {v['curve'][-1]['loss']:.2f} nats per token after {v['seconds'] / 60:.0f} minutes"
        for name, v in found["variants"].items()
    )
    some = next(iter(found["variants"].values()))
    return (
        f"{some['parameters'] / 1e6:.1f}M parameters, {config['vocab_size']} ids, {len(config['languages'])} languages "
        f"({', '.join(config['languages'])}) with English and Python; {sum(pairs.values())} pairs, each with English; "
        f"{training['steps']} steps of {training['batch_size']} rows, one thread, one seed. Chance: "
        f"{100 / config['candidates']:.2f} %. {losses}.\n\n{markdown(columns, rows)}"
    )


@generated("ernie-code-speed-bf16", "ernie_code", "speed-bf16", "measurement")
@generated("ernie-code-speed", "ernie_code", "speed", "measurement")
def ernie_code_speed_block(found: Found) -> str:
    """A training step, from ``python -m tenfold.ernie_code.speed``."""
    columns = ("", "transformers", "tenfold", "ratio")
    s, b, c = found["seconds"], found["bytes"], found["setting"]
    rows = [
        ["seconds", _number(s["stock"]), _number(s["tenfold"]), _number(s["ratio"])],
        [
            "memory taken, MB",
            _number(b["stock"] / 1e6, 0),
            _number(b["tenfold"] / 1e6, 0),
            _number(b["ratio"]),
        ],
    ]
    how = "bfloat16 autocast" if c["autocast"] else "float32"
    head = "as mT5 begins with it" if c["fresh_head"] else "with logits of size 1"
    return (
        f"{c['preset']}, {c['batch']} rows of {c['inputs']} and {c['targets']} tokens, {how}, "
        f"{c['threads']} threads; a head {head}.\n\n"
        f"{markdown(columns, rows)}"
    )
