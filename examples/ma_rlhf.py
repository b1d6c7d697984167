# SPDX-License-Identifier: Apache-2.0
"""Trains SmolLM2-135M-Instruct (LoRA) by PPO and by MA-PPO on the same prompts: score, KL, samples.

python examples/ma_rlhf.py [--steps 10] [--methods ppo,ma-ppo] [--reward spelling] [--json FILE]

A few minutes on two cores. --reward takes what `tenfold ma-rlhf train --reward` does, as the folder of a reward
model: `tenfold ma-rlhf rm --out judge --steps 60`, then --reward judge.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from tenfold import ma_rlhf, ops
from tenfold.data import smollm2
from tenfold.ma_rlhf.inputs import named_reward, packaged_prompts
from tenfold.ma_rlhf.report import run_name, write_report

METHODS = {
    "ppo": {"n": 1},
    "ppo-lambda-1": {"n": 1, "lam": 1.0},
    "ma-ppo": {"n": 5},
    "bandit": {"n": None},
}


def own_loop(model, tokenizer, prompt: str, score, rows: int = 4, width: int = 16) -> None:
    """One step without any trainer: sample, cut, assign credit, and the loss with its gradient."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]] * rows)
    end = model.generation_config.eos_token_id
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=width,
        pad_token_id=end,
    )
    answers = made[:, ids.shape[1] :]
    ended = (answers == end).int()
    mask = ended.cumsum(1) - ended == 0  # up to the first end, with it

    def logp() -> torch.Tensor:
        logits = model(made[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
        return ops.selective_logprob(logits, answers, 1.0)[0]

    with torch.no_grad():
        old = ref = logp()  # at the first step the policy is the reference
    points = torch.tensor(
        score([prompt] * rows, tokenizer.batch_decode(answers, skip_special_tokens=True))
    )
    seg, nseg = ops.macro_segment_fixed(mask, 5)
    value = torch.zeros_like(old)  # a critic's values stand here
    adv, *_ = ops.ma_ppo_prepare(old, ref, value, points, seg, nseg, beta=0.05, lam=0.95)
    loss, _ = ops.ma_ppo_policy_loss(logp(), old, adv, seg)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    print(f"own loop: {nseg.tolist()} macro actions, scores {[round(x, 2) for x in points.tolist()]}, "
          f"loss {float(loss.detach()):.3f}, gradient norm {float(norm):.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", default="ppo,ma-ppo", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--reward", default="spelling")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep-layers", type=int, help="the model's first layers alone, for a quick try"
    )
    parser.add_argument("--out", type=Path, help="where the report is written")
    parser.add_argument("--json", type=Path, help="where the result is written")
    chosen = parser.parse_args()
    methods = chosen.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods takes {', '.join(METHODS)}; got {', '.join(sorted(unknown))}")

    model, tokenizer = smollm2(layers=chosen.keep_layers)
    prompts = packaged_prompts()
    reward = named_reward(chosen.reward, tokenizer, ["prompt"])
    if chosen.reward == "spelling":
        torch.manual_seed(chosen.seed)
        own_loop(model, tokenizer, prompts[0], reward)
    records = []
    for name in methods:
        model, _ = smollm2(layers=chosen.keep_layers)
        config = ma_rlhf.MARLHFConfig.from_preset(
            "small", **METHODS[name], steps=chosen.steps, batch_size=8, max_response=24, beta=0.01,
            learning_rate=chosen.learning_rate, critic_learning_rate=1e-4, lora_rank=16, ppo_epochs=1,
            schedule="constant", seed=chosen.seed, checkpoint_every=None,
        )  # fmt: skip
        trainer = ma_rlhf.MAPPOTrainer(
            model, reward=reward, prompts=prompts, tokenizer=tokenizer, config=config, quiet=False,
            samples=2, sample_every=max(1, chosen.steps - 1),
        )  # fmt: skip
        record = trainer.train()
        seconds = record.time_shares()
        print(f"{name}: score {record.curve[0]['objective/scores']:.3f} -> "
              f"{record.last('objective/scores', 3):.3f}, KL {record.last('objective/kl', 3):.2f} nats per "
              f"response, {sum(seconds.values()):.1f} s per step")  # fmt: skip
        sample = record.samples[-1]
        print(
            "  "
            + sample["prompt"]
            + "".join(f"|{s}" for s in sample["segments"]).replace("\n", "\\n")
        )
        records.append(record)
    if chosen.out:
        print("report:", write_report(records, chosen.out / "index.html", "SmolLM2-135M-Instruct"))
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "model": "smollm2-135m-instruct", "reward": Path(chosen.reward).name,
            "runs": [r.to_json() | {"name": run_name(r)} for r in records], "torch": torch.__version__,
            "machine": platform.machine(), "threads": torch.get_num_threads(),
        }  # fmt: skip
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
