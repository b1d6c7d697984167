# SPDX-License-Identifier: Apache-2.0
"""Macro actions against tokens: PPO, PPO with a larger lambda, and MA-PPO on a language model trained here.

python examples/ma_rlhf_study.py [--rewards spelling model] [--seeds 0 1 2] [--out bench/results/ma_rlhf]

A byte-level Llama (4 layers, width 256, 2.8M parameters) learns standard-library text, and then to continue
text that it has not seen so that a program (spelling) or a reward model trained here scores it higher. The
question of the method's reviewers is whether a larger lambda does the same as macro actions. Finished runs
are kept in the cache: a stopped study goes on, and processes may share the work.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
from pathlib import Path

import torch

from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.record import PPORecord
from tenfold.ma_rlhf.report import curve_plot, run_name
from tenfold.ma_rlhf.tasks import Spelling, text_prompts, vocabulary
from tenfold.ma_rlhf.trainer import MAPPOTrainer
from tenfold.report import png_bytes
from tenfold.rlhf.preferences import encode_preferences, packaged_preferences
from tenfold.rlhf.reward_config import RewardConfig
from tenfold.rlhf.reward_model import RewardModel
from tenfold.rlhf.reward_training import train_reward_model
from tenfold.rlhf.small import ByteTokenizer, make_policy
from tenfold.training import tiny

PROMPT, RESPONSE = 32, 48
METHODS = {
    "ppo": {"n": 1},
    "ppo-lambda-1": {"n": 1, "lam": 1.0},
    "ma-ppo-5": {"n": 5},
    "ma-ppo-10": {"n": 10},
    "bandit": {"n": None},
}
MAIN = ("ppo", "ppo-lambda-1", "ma-ppo-5")
REWARDS = ("spelling", "model")
KEPT = ("objective/scores", "objective/kl", "objective/entropy", "critic/explained_variance",
        "macro/adv_norm", "policy/clipfrac_avg", "policy/approxkl_avg", "loss/value_avg")  # fmt: skip


def settings(name: str, seed: int, steps: int) -> MARLHFConfig:
    """The settings of a run: methods differ in what METHODS says and in nothing else."""
    return MARLHFConfig(
        **METHODS[name], seed=seed, steps=steps, batch_size=32, minibatches=2, ppo_epochs=1,
        learning_rate=2e-4, critic_learning_rate=5e-4, schedule="constant", warmup=0.0, weight_decay=0.0,
        beta=0.01, temperature=1.0, top_k=0, max_prompt=PROMPT, max_response=RESPONSE, checkpoint_every=None,
    )  # fmt: skip


def parent_of(steps: int, stream, folder: Path):
    """The policy that all runs begin with, from the cache if it is there."""
    path = folder / f"parent-{steps}.pt"
    model = make_policy(0)
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model.eval()

    def data(stage: str, step: int, size: int):
        return tiny.text_rows(stream, size, torch.Generator().manual_seed(step), 192)

    def told(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"parent: step {step} of {steps}, loss {loss:.3f}", flush=True)

    tiny.train(model, data, steps, batch_size=16, callback=told)
    torch.save(model.state_dict(), path)
    return model


def reward_model_of(parent, folder: Path, steps: int):
    """(reward model, its accuracy on held-out pairs): real continuations against looping ones.

    Answers are cut where responses are, so that they end anywhere, as most responses do. Of the packaged kinds
    of pairs it is the one that so small a model of bytes learns: shuffled words stayed at chance.
    """
    path, numbers = folder / f"reward-{steps}", folder / f"reward-{steps}.json"
    if numbers.exists():
        return RewardModel.from_pretrained(path), json.loads(numbers.read_text())
    tokenizer = ByteTokenizer()
    train, held = packaged_preferences(prompt_words=5, answer_words=16, corruptions=("repeated",))
    rows = {
        name: encode_preferences(tokenizer, pairs, PROMPT + RESPONSE)
        for name, pairs in (("train", train), ("held", held[:400]))
    }
    model = RewardModel.from_model(parent)
    config = RewardConfig(steps=steps, batch_size=16, learning_rate=5e-4, center=0.01, weight_decay=0.01,
                          sequence_length=PROMPT + RESPONSE)  # fmt: skip
    record = train_reward_model(model, rows["train"], config, held_out=rows["held"])
    model.save_pretrained(path)
    found = {"before": record.before, "after": record.after, "pairs": record.pairs}
    numbers.write_text(json.dumps(found) + "\n")
    print(f"reward model: {record.before} -> {record.after}", flush=True)
    return model, found


def steps_to(curve: list[float], level: float, window: int = 5) -> int | None:
    """First step whose mean over the last ``window`` reaches a level."""
    for i in range(window, len(curve) + 1):
        if math.fsum(curve[i - window : i]) / window >= level:
            return i
    return None


def summary(runs: list[dict]) -> list[dict]:
    """Per reward and method, and by seed in them: scores and KL of the last ten steps, the mean score of all
    steps, and the steps to the final score of that seed's PPO (None: not reached, or no such run)."""

    def last(run: dict, name: str) -> float:
        return math.fsum(m[name] for m in run["curve"][-10:]) / len(run["curve"][-10:])

    at = {(r["reward"], r["method"], r["seed"]): r for r in runs}
    made = []
    for reward, method in dict.fromkeys((r, m) for r, m, _ in at):
        seeds = sorted(s for r, m, s in at if (r, m) == (reward, method))
        mine = [at[reward, method, s] for s in seeds]
        curves = [[m["objective/scores"] for m in r["curve"]] for r in mine]
        base = [at.get((reward, "ppo", s)) for s in seeds]
        made.append({
            "reward": reward, "method": method, "name": mine[0]["name"], "seeds": seeds,
            "final": [last(r, "objective/scores") for r in mine],
            "mean": [math.fsum(c) / len(c) for c in curves],
            "kl": [last(r, "objective/kl") for r in mine],
            "steps_to_ppo": [
                None if b is None else steps_to(c, last(b, "objective/scores"))
                for c, b in zip(curves, base)
            ],
        })  # fmt: skip
    return made


def run(name: str, reward, seed: int, steps: int, parent, prompts) -> PPORecord:
    """One run on a copy of the parent."""
    trainer = MAPPOTrainer(
        copy.deepcopy(parent), reward=reward, prompts=prompts, tokenizer=ByteTokenizer(),
        config=settings(name, seed, steps), samples=2, sample_every=50,
    )  # fmt: skip
    return trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(MAIN))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--parent-steps", type=int, default=400)
    parser.add_argument("--reward-steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("bench/results/ma_rlhf"))
    parser.add_argument("--cache", type=Path, default=Path("tenfold-report/ma-rlhf-study"))
    chosen = parser.parse_args()
    for folder in (chosen.out, chosen.cache):
        folder.mkdir(parents=True, exist_ok=True)
    stream, held = tiny.split(tiny.byte_stream())
    parent = parent_of(chosen.parent_steps, stream, chosen.cache)
    prompts = text_prompts(held, 4000, PROMPT, seed=0)
    spelling = Spelling(vocabulary(bytes(stream.tolist()).decode()))
    for seed in chosen.seeds:
        for kind in chosen.rewards:
            reward = spelling
            if kind == "model":
                reward, _ = reward_model_of(parent, chosen.cache, chosen.reward_steps)
            for name in chosen.methods:
                path = chosen.cache / f"{kind}-{name}-{chosen.steps}-{seed}.json"
                try:
                    path.touch(exist_ok=False)  # other processes leave it alone
                except FileExistsError:
                    continue
                try:
                    record = run(name, reward, seed, chosen.steps, parent, prompts)
                except BaseException:
                    path.unlink()
                    raise
                record.write(path)
                print(f"{kind}, seed {seed}, {name}: score {record.curve[0]['objective/scores']:.3f} -> "
                      f"{record.last('objective/scores'):.3f}, KL {record.last('objective/kl'):.1f}",
                      flush=True)  # fmt: skip
    gather(chosen)


def setting(chosen: argparse.Namespace) -> dict:
    """What all runs share."""
    shared = settings("ppo", 0, chosen.steps).to_json()
    names = ("steps", "batch_size", "minibatches", "learning_rate", "critic_learning_rate", "beta", "lam",
             "max_prompt", "max_response")  # fmt: skip
    reward = chosen.cache / f"reward-{chosen.reward_steps}.json"
    return {
        "parent_steps": chosen.parent_steps, "torch": torch.__version__, "machine": platform.machine(),
        "reward_model": json.loads(reward.read_text()) if reward.exists() else None,
        "ppo": {n: shared[n] for n in names},
    }  # fmt: skip


def gather(chosen: argparse.Namespace) -> None:
    """Writes the result file and the plots of all finished runs."""
    runs, records = [], {}
    for kind in REWARDS:
        for name in METHODS:
            for path in sorted(chosen.cache.glob(f"{kind}-{name}-{chosen.steps}-*.json")):
                if not path.stat().st_size:
                    continue
                record = PPORecord.read(path)
                records.setdefault(kind, []).append(record)
                curve = [{k: round(m[k], 5) for k in KEPT if k in m} for m in record.curve]
                runs.append({
                    "reward": kind, "method": name, "name": run_name(record), "seed": record.config["seed"],
                    "curve": curve, "seconds_per_step": record.time_shares(), "samples": record.samples[-2:],
                })  # fmt: skip
    result = {"setting": setting(chosen), "summary": summary(runs), "runs": runs}
    (chosen.out / "study.json").write_text(json.dumps(result) + "\n")
    labels = {"spelling": "share of well-spelt new words", "model": "score of the reward model"}
    for kind, found in records.items():
        for metric, label, name in (
            ("objective/scores", labels[kind], kind),
            ("objective/kl", "KL to the parent (nats per response)", f"{kind}-kl"),
        ):
            plot = curve_plot(found, metric, label, window=5)
            (chosen.out / f"{name}.png").write_bytes(png_bytes(plot))
    for row in result["summary"]:
        final = ", ".join(f"{x:.3f}" for x in row["final"])
        print(
            f"{row['reward']}, {row['method']}: final {final}; steps to PPO's {row['steps_to_ppo']}"
        )


if __name__ == "__main__":
    main()
