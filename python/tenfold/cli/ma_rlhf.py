# SPDX-License-Identifier: Apache-2.0
"""``tenfold ma-rlhf``: PPO with macro actions, reward models, and how policies score under them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tenfold.cli import ma_rlhf_options as opt
from tenfold.cli.common import dtype_of, friendly, out, rank_device, table, write_json

app = typer.Typer(help="MA-RLHF: PPO whose credit goes to macro actions.", no_args_is_help=True)


def _critic(name: str, device: str) -> Any:
    """What ``--critic`` names, as the trainer takes it."""
    from tenfold.data.models import quiet_transformers
    from tenfold.ma_rlhf.critic import HEAD_FILE, Critic
    from tenfold.ma_rlhf.inputs import load_reward_model

    if name in ("copy", "shared"):
        return None if name == "copy" else name
    if (Path(name) / HEAD_FILE).is_file():
        with quiet_transformers():
            return Critic.from_pretrained(name).to(device)
    return Critic.from_reward_model(load_reward_model(name, device)[0])


def _save(trainer: Any, folder: Path) -> None:
    """Policy (adapters merged), adapter, critic and tokenizer below a folder."""
    from tenfold.data.models import quiet_transformers
    from tenfold.ma_rlhf.critic import Critic

    policy = trainer.policy
    with quiet_transformers():
        if hasattr(policy, "merge_and_unload"):
            policy.save_pretrained(folder / "adapter")
            policy = policy.merge_and_unload()
        policy.save_pretrained(folder / "policy")
        trainer.tokenizer.save_pretrained(folder / "policy")
        if isinstance(trainer.critic, Critic):
            trainer.critic.save_pretrained(folder / "critic")


@app.command()
@friendly
def train(
    folder: opt.Out,
    prompts: opt.Prompts = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="spelling, program, module:function, or a reward model; may be repeated"),
    ] = None,
    reward_weight: Annotated[
        list[float] | None, typer.Option(help="one per reward; default: 1")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="small, default, reference, or a published run as summarize-2b")
    ] = "small",
    termination: opt.Termination = None,
    n: opt.N = None,
    starts: Annotated[
        str | None, typer.Option(help="module:function, for --termination custom")
    ] = None,
    sigma: opt.Sigma = None,
    ratio: opt.Ratio = None,
    advantage: opt.Advantage = None,
    group_size: opt.Group = None,
    lam: opt.Lam = None,
    beta: opt.Beta = None,
    kl: opt.Kl = None,
    kl_controller: opt.Controller = None,
    kl_target: opt.Target = None,
    score_clip: opt.ScoreClip = None,
    whiten_adv: opt.Whiten = None,
    steps: opt.Steps = None,
    batch_size: opt.Batch = None,
    micro_batch_size: opt.Micro = None,
    minibatches: opt.Minibatches = None,
    ppo_epochs: opt.PpoEpochs = None,
    learning_rate: opt.Rate = None,
    critic_learning_rate: opt.CriticRate = None,
    max_prompt: opt.MaxPrompt = None,
    max_response: opt.MaxResponse = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    missing_eos_penalty: opt.Penalty = None,
    lora_rank: opt.Rank = None,
    mixed_precision: opt.Precision = None,
    checkpoint_every: opt.Every = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    critic: Annotated[
        str, typer.Option(help="copy (of the reward model or policy), shared, or a folder")
    ] = "copy",
    work_dir: opt.Work = None,
    model: opt.Model = "smollm2",
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train a policy by PPO with macro actions; several ranks with torchrun.

    A stopped run goes on where it was, with the same command. Options, and --set, have the names of
    MARLHFConfig's fields; what is not given is the preset's.
    """
    given = dict(locals())
    from tenfold.data import load_model
    from tenfold.ma_rlhf.config import MARLHFConfig
    from tenfold.ma_rlhf.inputs import named_object, named_reward
    from tenfold.ma_rlhf.trainer import MAPPOTrainer
    from tenfold.training.loop import is_main_process

    config = opt.settings_of(MARLHFConfig, preset, given, more)
    where = rank_device(device)
    rows = opt.read_prompts(prompts)
    columns = list(rows[0]) if isinstance(rows[0], dict) else ["prompt"]
    network, tokenizer = load_model(model, dtype_of(dtype), where)
    rewards = [named_reward(r, tokenizer, columns, where) for r in reward or ["spelling"]]
    trainer = MAPPOTrainer(
        network, _critic(critic, where), reward=rewards, prompts=rows, tokenizer=tokenizer,
        config=config, reward_weights=reward_weight or None, folder=work_dir or folder / "work",
        quiet=quiet or json, callback_starts=None if starts is None else named_object(starts),
    )  # fmt: skip
    record = trainer.train()
    if is_main_process():
        _save(trainer, folder)
        title = f"{model}, reward {' and '.join(record.rewards)}"
        _finish_run(record, folder, title, json)


def _finish_run(record: Any, folder: Path, title: str, json: bool) -> None:
    from tenfold.ma_rlhf.pages import write_page
    from tenfold.ma_rlhf.report import COLUMNS, table_rows

    record.write(folder / "record.json")
    page = write_page(folder / "report" / "index.html", title, [record])
    if json:
        write_json({
            "policy": str(folder / "policy"), "report": str(page), "steps": len(record.curve),
            "score": record.last("objective/scores"), "kl": record.last("objective/kl"),
            "first": record.curve[0], "last": record.curve[-1], "config": record.config,
            "seconds_per_step": record.time_shares(), "parameters": record.parameters,
            "trained_parameters": record.trained_parameters,
        })  # fmt: skip
        return
    out.print(table(title, COLUMNS, table_rows([record])))
    out.print(f"policy: {folder / 'policy'}   report: {page}", highlight=False, soft_wrap=True)


def _reward_model(name: str, dtype: Any, device: str, seed: int) -> tuple[Any, Any]:
    """(reward model to be trained, tokenizer): of a reward model, or a causal LM with a new head."""
    from tenfold.data import load_model
    from tenfold.rlhf.reward_model import RewardModel

    network, tokenizer = load_model(name, dtype, device)
    kinds = network.config.architectures or []
    if any("SequenceClassification" in kind for kind in kinds):
        return RewardModel.from_pretrained(name, dtype=dtype).to(device), tokenizer
    return RewardModel.from_model(network, seed=seed), tokenizer


@app.command()
@friendly
def rm(
    folder: opt.Out,
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines with prompt, chosen and rejected; default: packaged pairs"),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="share of --data that is not trained on, from 0 to 0.9")
    ] = 0.1,
    preset: Annotated[
        str, typer.Option(help="small, default, or a published run as summarize-2b")
    ] = "small",
    rm_loss: opt.RmLoss = None,
    center: opt.Center = None,
    steps: opt.Steps = None,
    epochs: opt.Epochs = None,
    batch_size: opt.Batch = None,
    micro_batch_size: opt.Micro = None,
    sequence_length: opt.Length = None,
    learning_rate: opt.Rate = None,
    mixed_precision: opt.Precision = None,
    checkpoint_every: opt.Every = None,
    seed: opt.Seed = None,
    more: opt.More = None,
    work_dir: opt.Work = None,
    model: opt.Model = "smollm2",
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train a reward model on pairs of answers, for `train --reward OUT` and `eval`.

    A stopped run goes on where it was. Options, and --set, have the names of RewardConfig's fields.
    """
    given = dict(locals())
    from tenfold.rlhf.preferences import (
        encode_preferences,
        load_preferences,
        packaged_preferences,
    )
    from tenfold.rlhf.reward_config import RewardConfig
    from tenfold.rlhf.reward_training import train_reward_model
    from tenfold.training.loop import is_main_process

    if not 0 <= held_out <= 0.9:
        raise ValueError(f"--held-out must be in [0, 0.9], got {held_out}")
    config = opt.settings_of(RewardConfig, preset, given, more)
    if data is None:
        pairs, held = packaged_preferences()
    else:
        found = load_preferences(data)
        kept = round(held_out * len(found))
        pairs, held = found[kept:], found[:kept]
    network, tokenizer = _reward_model(model, dtype_of(dtype), rank_device(device), config.seed)
    rows = encode_preferences(tokenizer, pairs, config.sequence_length)
    test = encode_preferences(tokenizer, held[:512], config.sequence_length) if held else None
    record = train_reward_model(network, rows, config, held_out=test,
                                work_dir=work_dir or folder / "work", quiet=quiet or json)  # fmt: skip
    if is_main_process():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _finish_reward(record, folder, f"reward model of {model}", json)


def _finish_reward(record: Any, folder: Path, title: str, json: bool) -> None:
    from tenfold.ma_rlhf.pages import write_page
    from tenfold.ma_rlhf.reward_report import COLUMNS, table_rows

    record.write(folder / "record.json")
    page = write_page(folder / "report" / "index.html", title, [record])
    if json:
        write_json({
            "model": str(folder), "report": str(page), "steps": len(record.curve), "pairs": record.pairs,
            "before": record.before, "after": record.after, "last": record.curve[-1],
            "config": record.config, "seconds": record.seconds,
        })  # fmt: skip
        return
    out.print(table(title, COLUMNS, table_rows([record])))
    out.print(f"reward model: {folder}   report: {page}", highlight=False, soft_wrap=True)


@app.command("eval")
@friendly
def evaluate(
    reward_model: Annotated[str, typer.Option(help="folder or hub id of the reward model")],
    policy: Annotated[
        list[str], typer.Option(help="NAME=PATH, or a path, hub id or 'smollm2'; may be repeated")
    ],
    folder: opt.Out = Path("tenfold-report/ma-rlhf-eval"),
    prompts: opt.Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="prompts; published: 2000")] = 64,
    shuffle: Annotated[bool, typer.Option(help="prompts in a random order, or as they are")] = True,
    max_prompt: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = 512,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="tokens of an answer; published: 512")
    ] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="of sampling; 0: greedy")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="of sampling; 0: all tokens")] = 0,
    top_p: Annotated[float, typer.Option(help="of sampling")] = 1.0,
    length: Annotated[int, typer.Option(min=2, help="tokens that are scored")] = 1024,
    best_of: Annotated[
        int, typer.Option(min=0, help="answers per prompt for the curve of the best of n; 0: none")
    ] = 0,
    tie: Annotated[float, typer.Option(min=0, help="scores so close are a tie")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="answers at a time")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="of sampling")] = 1234,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Score policies under a reward model: means with intervals, win rates, the best of n."""
    from tenfold.cli.common import progress
    from tenfold.data import load_model
    from tenfold.ma_rlhf import pages
    from tenfold.ma_rlhf.inputs import load_reward_model, named_paths
    from tenfold.ma_rlhf.prompts import Prompts
    from tenfold.rlhf.best_of import best_of_n
    from tenfold.rlhf.evaluate import Protocol, score_policy, win_rate

    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be in (0, 1], got {top_p}")
    paths = named_paths(policy)
    protocol = Protocol(count=count, shuffle=shuffle, max_prompt=max_prompt, seed=seed, length=length,
                        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p)  # fmt: skip
    rows, where = opt.read_prompts(prompts, held_out=True), rank_device(device)
    judge, reads = load_reward_model(reward_model, where)
    scores, samples = {}, {}
    with progress(len(paths) * (2 if best_of else 1), quiet or json) as step:
        for name, path in paths.items():
            network, tokenizer = load_model(path, dtype_of(dtype), where)
            given = Prompts(rows, tokenizer, max_prompt, seed)
            texts = [given.encoded(i)[0] for i in range(len(given.rows))]
            scores[name] = score_policy(network, tokenizer, judge, texts, protocol,
                                        reward_tokenizer=reads, batch_size=batch_size)  # fmt: skip
            step(name)
            if best_of:
                samples[name] = best_of_n(
                    network, tokenizer, judge, scores[name].prompts, best_of, reward_tokenizer=reads,
                    length=length, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                    max_prompt=max_prompt, max_new_tokens=max_new_tokens, batch_size=batch_size,
                )  # fmt: skip
                step(f"{name}, best of {best_of}")
    names = list(scores)
    rates = {(a, b): win_rate(scores[a].scores, scores[b].scores, tie=tie)
             for i, a in enumerate(names) for b in names[i + 1 :]}  # fmt: skip
    found = pages.Evaluation(scores, rates, samples)
    page = pages.write_page(folder / "index.html", f"reward model {reward_model}", evaluation=found)
    if json:
        write_json({"report": str(page), "reward_model": reward_model} | found.to_json())
        return
    out.print(table(f"Scores under {reward_model}", pages.SCORE_COLUMNS, pages.score_rows(found)))
    if rates:
        out.print(table("Win rates", pages.WIN_COLUMNS, pages.win_rows(found)))
    if samples:
        out.print(table("Best of n", *pages.best_of_table(found)))
    out.print(f"report: {page}", highlight=False, soft_wrap=True)


@app.command()
@friendly
def report(
    files: Annotated[list[Path], typer.Argument(help="records, or folders with record.json")],
    folder: opt.Out = Path("tenfold-report/ma-rlhf"),
    json: opt.Json = False,
) -> None:
    """A page with learning curves, macro actions and samples of runs, and reward models beside them."""
    from tenfold.ma_rlhf.pages import read_record, write_page

    page = write_page(folder / "index.html", "", [read_record(f) for f in files])
    if json:
        write_json({"report": str(page)})
        return
    out.print(f"report: {page}", highlight=False, soft_wrap=True)
