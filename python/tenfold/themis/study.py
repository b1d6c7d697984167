# SPDX-License-Identifier: Apache-2.0
"""What traces are worth: Themis, with and without parts of its loss, and a plain reward model on the same pairs.

Also as the reward of PPO, on sums whose right answers a program knows. For ``examples/themis.py``.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.trainer import MAPPOTrainer
from tenfold.rlhf.best_of import sample_answers
from tenfold.rlhf.small import EOS, ByteTokenizer, make_policy
from tenfold.themis import demo
from tenfold.themis.config import ThemisConfig
from tenfold.themis.data import Pair
from tenfold.themis.evaluate import PlainJudge, evaluate
from tenfold.themis.loop import ToolLoop
from tenfold.themis.rewards import ThemisReward
from tenfold.themis.scorer import Scorer
from tenfold.themis.small import small_model
from tenfold.themis.tools import Toolbox
from tenfold.themis.traces import TraceFormat
from tenfold.themis.training import train_themis
from tenfold.training import tiny
from tenfold.training.loop import Progress
from tenfold.training.store import write_text

# What differs from the study's settings. "none" is a plain reward model that reads the same question and answer,
# truncated as fairly: context is cut, question and answer never.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": demo.PLAIN,
    "themis": {},
    "beta0": {"beta": 0.0},
    "omega0": {"omega": 0.0},
}
TITLES = {"plain": "plain reward model", "themis": "Themis", "beta0": "w/o observation loss",
          "omega0": "w/o rationale loss"}  # fmt: skip
PROMPT, ANSWER = "{question} ", 5  # of the policy: its prompt, and bytes of an answer


def run_variant(
    variant: str, ready: Callable[[], tuple[Any, Any]], train: Sequence[Pair], tests: Mapping[str, Sequence[Pair]],
    settings: Mapping[str, Any], out: str | Path, *, tools: Callable[[], list[Any]], validation: Sequence[Pair] = (),
    loop: Mapping[str, Any] | None = None, step: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Trains one variant and evaluates it; what is finished in the folder ``out`` is not done again.

    Args:
        variant: of ``VARIANTS``. ready: makes (reward model, tokenizer), untrained, the same every time.
        train, validation: pairs. tests: pairs by the name of the set. settings: of ``ThemisConfig``, with ``preset``.
        tools: makes those that judges may call. loop: of ``ToolLoop``. step: told on the way.

    Returns:
        ``evaluations`` by test set (``Evaluation.to_json()``), ``record`` (of training, without its curve's middle).
    """
    folder = Path(out)
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    model, tokenizer = ready()
    options = dict(settings) | VARIANTS[variant]
    config = ThemisConfig.from_preset(options.pop("preset", "small"), **options)
    format = TraceFormat(tokenizer, max_length=config.max_length, escape=True)

    def told(p: Progress) -> None:
        step(f"{TITLES[variant]}, step {p.step} of {p.steps}: loss {p.metrics['loss']:.3f}")

    record = train_themis(model, train, format, config, validation=validation, out=folder, tokenizer=tokenizer,
                          callback=told)  # fmt: skip
    if config.mixed_precision == "bf16":
        model.to(torch.bfloat16)  # judges as it was trained; decoding reads half the bytes
    found: dict[str, Any] = {}
    with Toolbox(tools()) as box:
        judge: Any = (
            PlainJudge(model, format)
            if variant == "plain"
            else ToolLoop(model, format, box, **(loop or {}))
        )
        for name, pairs in tests.items():
            found[name] = evaluate(
                judge, pairs, name=TITLES[variant], swap=name == next(iter(tests))
            ).to_json()
            step(
                f"{TITLES[variant]}, {name}: {100 * found[name]['accuracy']['all']['value']:.1f} % right"
            )
    every = max(1, len(record.curve) // 100)
    kept = {"before": record.before, "after": record.after, "best": record.best, "seconds": record.seconds,
            "config": record.config, "curve": record.curve[::every], "validation": record.validation}  # fmt: skip
    made = {"variant": variant, "evaluations": found, "record": kept}
    write_text(done, json.dumps(made) + "\n")
    return made


def sums(count: int, seed: int, noise: float = 0.0) -> list[tuple[str, str]]:
    """(question, answer) of sums of a two-digit and a one-digit number; a share ``noise`` of the answers is wrong."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        a, b = draw.randrange(10, 100), draw.randrange(1, 10)
        off = draw.choice((-10, -2, -1, 1, 2, 10)) if draw.random() < noise else 0
        made.append((f"{a} + {b} = ?", str(a + b + off)))
    return made


def noisy_policy(
    seed: int, steps: int, noise: float = 0.5, step: Callable[[str], None] = lambda text: None
) -> Any:
    """A byte-level Llama that has learnt to answer sums from answers of which a share is wrong."""
    pool = [
        f"{PROMPT.format(question=q)}{a}{chr(EOS)}".encode() for q, a in sums(20_000, seed, noise)
    ]
    length = 4 * max(map(len, pool))

    def rows(stage: str, at: int, size: int) -> torch.Tensor:
        draw = random.Random(f"{seed} {at}")
        made = [b"".join(draw.choices(pool, k=8))[:length] for _ in range(size)]
        return torch.tensor([list(row) for row in made])

    def told(at: int, loss: float) -> None:
        if at % 100 == 0:
            step(f"a policy learns sums, half of them wrong, step {at}: loss {loss:.3f}")

    return tiny.train(
        make_policy(seed, layers=2, heads=4), rows, steps, batch_size=32, callback=told
    )


def share_right(policy: Any, questions: Sequence[str], seed: int = 0) -> float:
    """Of the policy's sampled answers to sums, those that are right."""
    prompts = [PROMPT.format(question=q) for q in questions]
    answers = sample_answers(policy, ByteTokenizer(), prompts, temperature=1.0, max_prompt=64, max_new_tokens=ANSWER,
                             batch_size=64, seed=seed)  # fmt: skip
    check = demo.Check()
    said = [
        check.call("check", "", {"question": q, "answer": a[0]}) for q, a in zip(questions, answers)
    ]
    return said.count(check.right) / len(said)


def arithmetic_judges(
    seed: int, steps: int, step: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The demo's two reward models, trained: (model, format) by variant."""
    made: dict[str, Any] = {}
    pairs = demo.problems(demo.TRAIN, seed)
    for variant in ("plain", "themis"):
        model, tokenizer = small_model(seed=seed, layers=demo.LAYERS, heads=demo.HEADS)
        format = TraceFormat(tokenizer, max_length=demo.LENGTH, escape=True)
        options = demo.SETTINGS | VARIANTS[variant] | {"steps": steps, "seed": seed}
        train_themis(model, pairs, format, ThemisConfig.from_preset("small", **options))
        step(f"reward of PPO: {TITLES[variant]} is trained")
        made[variant] = model, format
    return made


def ppo(
    variant: str, policy: Any, judge: tuple[Any, Any], settings: Mapping[str, Any], seed: int,
    step: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """PPO of a copy of the policy with a reward model of :func:`arithmetic_judges`, by the scorer.

    Returns:
        Shares of right answers before and after (300 sums, sampled), and the curve: score, KL, and what the judge did.
    """
    model, format = judge
    asked = [q for q, _ in sums(300, seed + 1)]
    prompts = [PROMPT.format(question=q) for q, _ in sums(2000, seed + 2)]
    trained = copy.deepcopy(policy)
    before, curve = share_right(policy, asked, seed), []
    with Toolbox([demo.Check()]) as box:
        made: Any = PlainJudge(model, format, 64)
        if variant != "plain":
            made = ToolLoop(model, format, box, max_new_tokens=96, batch_size=64)
        with Scorer(made, batch_size=64, deadline=120.0) as scorer:
            reward = ThemisReward(scorer, question=str.strip)
            config = MARLHFConfig.from_preset("small", **({"max_prompt": 64, "max_response": ANSWER, "min_response": 1,
                                                          "seed": seed} | dict(settings)))  # fmt: skip

            def told(p: Progress) -> None:
                m = p.metrics
                curve.append(
                    {"score": m["objective/scores"], "kl": m["objective/kl"]} | reward.metrics()
                )
                step(
                    f"PPO with {TITLES[variant]}, step {p.step}: score {m['objective/scores']:.2f}"
                )

            trainer = MAPPOTrainer(trained, reward=reward, prompts=prompts, tokenizer=ByteTokenizer(), config=config,
                                   callback=told, samples=0)  # fmt: skip
            trainer.train()
    after = share_right(trainer.policy, asked, seed)
    step(
        f"PPO with {TITLES[variant]}: {100 * before:.1f} % right before, {100 * after:.1f} % after"
    )
    return {"variant": variant, "before": before, "after": after, "curve": curve}
