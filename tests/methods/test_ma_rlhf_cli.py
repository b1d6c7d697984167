# SPDX-License-Identifier: Apache-2.0
"""``tenfold ma-rlhf``: train, rm, eval and report on a tiny checkpoint; what they refuse; pages; names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_calls import fails, succeeds
from ma_rlhf_models import kill_at
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tenfold.cli import ma_rlhf as cli
from tenfold.cli.main import app
from tenfold.ma_rlhf import inputs, pages, report, trainer
from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.critic import Critic
from tenfold.ma_rlhf.record import PPORecord
from tenfold.ma_rlhf.samples import read_samples
from tenfold.rlhf import preferences
from tenfold.rlhf.reward_model import RewardModel
from tenfold.rlhf.reward_training import RewardRecord
from tenfold.rlhf.small import make_policy
from tenfold.testing import processes

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--steps", "2", "--batch-size", "4", "--max-response", "6", "--quiet"]
RM_FEW = ["--steps", "2", "--batch-size", "4", "--sequence-length", "32", "--quiet"]
REWARD = """
def low_bytes(completion_ids, **columns):
    return [sum(i < 128 for i in ids) / len(ids) for ids in completion_ids]

def labelled(queries, prompts, labels):
    return [len(label) / 4 for label in labels]

def every_third(mask, **others):
    return (mask.int().cumsum(1) % 3) == 1

answer = 42
"""


def save_tokenizer(folder, shift=0):
    """A token per byte, as transformers stores it; with ``shift`` the ids are others."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: (i + shift) % len(letters) for i, c in enumerate(letters)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    end = next(c for c, i in vocabulary.items() if i == 3)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end).save_pretrained(
        folder
    )


@pytest.fixture(scope="module", autouse=True)
def few_plots():
    """All the curves are drawn in the report's own tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "CURVES", report.CURVES[:1])
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny policy, prompts, pairs and rewards."""
    folder = tmp_path_factory.mktemp("ma-rlhf")
    save_tokenizer(folder / "base")
    make_policy(0, 1, heads=2, head_dim=8).save_pretrained(folder / "base")
    words = ["say it", "a name", "what now", "go", "the end", "begin"]
    rows = [{"prompt": w, "label": w[:2]} for w in words]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"prompt": w, "chosen": f" good {i}", "rejected": f" bad {w}"}
             for w in words for i in range(4)]  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "my_rewards.py").write_text(REWARD)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    yield place
    sys.modules.pop("my_rewards", None)


@pytest.fixture(scope="module")
def judge(place):
    found = json.loads(succeeds("ma-rlhf", "rm", "--model", place / "base", "--data", place / "pairs.jsonl",
                                "--held-out", "0.25", "--out", place / "judge", *RM_FEW,
                                "--json"))  # fmt: skip
    return place / "judge", found


def train(place, name, *more):
    return succeeds("ma-rlhf", "train", "--model", place / "base", "--prompts", place / "prompts.jsonl",
                    "--out", place / name, *FEW, *more)  # fmt: skip


@pytest.fixture(scope="module")
def own(place):
    """(folder, result) of a run with a function as reward."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        found = train(place, "own", "--reward", "my_rewards:low_bytes", "--n", "3", "--lam", "0.9",
                      "--set", "betas=0.9,0.99", "--set", "value_clip=none", "--json")  # fmt: skip
    sys.modules.pop("my_rewards", None)
    return place / "own", json.loads(found)


class TestTrain:
    def test_a_function_as_reward(self, own):
        folder, found = own
        config = found["config"]
        assert config["n"] == 3 and config["lam"] == 0.9 and config["preset"] == "small"
        assert config["betas"] == [0.9, 0.99] and config["value_clip"] is None
        record = PPORecord.read(folder / "record.json")
        assert record.config == config and record.rewards == ["low_bytes"] and found["steps"] == 2
        assert found["first"] == record.curve[0] and found["last"] == record.curve[1]
        base, made = (
            AutoModelForCausalLM.from_pretrained(folder / n) for n in ("../base", "policy")
        )
        assert any(not torch.equal(p, q) for p, q in zip(base.parameters(), made.parameters()))
        assert Critic.from_pretrained(folder / "critic").head.weight.abs().sum() > 0
        assert AutoTokenizer.from_pretrained(folder / "policy")("a")["input_ids"]
        assert {s["step"] for s in read_samples(folder / "work" / "samples.jsonl")} == {1, 2}
        assert "PPO with macro actions" in Path(found["report"]).read_text()

    def test_several_rewards_and_the_table(self, here):
        out = train(here, "two", "--reward", "my_rewards:low_bytes", "--reward", "my_rewards:labelled",
                    "--reward-weight", "1", "--reward-weight", "0.5", "--n", "inf")  # fmt: skip
        assert "MA-PPO, n = ∞" in out and f"policy: {here / 'two' / 'policy'}" in out
        curve = PPORecord.read(here / "two" / "record.json").curve
        for step in curve:
            parts = [step[f"rewards/{n}/mean"] for n in ("low_bytes", "labelled")]
            assert step["objective/scores"] == pytest.approx(parts[0] + 0.5 * parts[1], abs=1e-5)
            assert step["macro/per_response"] == 1

    def test_lora_is_merged(self, here):
        train(here, "lora", "--reward", "my_rewards:low_bytes", "--lora-rank", "2", "--learning-rate", "0.05",
              "--critic", "shared")  # fmt: skip
        from peft import PeftModel

        base, made = (
            AutoModelForCausalLM.from_pretrained(here / n) for n in ("base", "lora/policy")
        )
        ids = torch.arange(60, 72)[None]
        with torch.no_grad():
            plain, merged = (m(ids).logits for m in (base, made))
            adapted = PeftModel.from_pretrained(base, str(here / "lora" / "adapter"))(ids).logits
        assert not torch.allclose(plain, merged, atol=1e-4)
        torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-4)
        assert not (here / "lora" / "critic").exists()

    def test_a_killed_run_goes_on(self, here, monkeypatch):
        options = ["--reward", "my_rewards:low_bytes", "--checkpoint-every", "1"]
        train(here, "whole", *options)
        made = trainer.MAPPOTrainer.__init__

        def killed(self, *args, **kwargs):
            made(self, *args, **kwargs | {"callback": kill_at(1)})

        monkeypatch.setattr(trainer.MAPPOTrainer, "__init__", killed)
        said = CliRunner().invoke(app, list(map(str, [
            "ma-rlhf", "train", "--model", here / "base", "--prompts", here / "prompts.jsonl", "--out",
            here / "killed", *FEW, *options])))  # fmt: skip
        assert type(said.exception).__name__ == "Killed" and (here / "killed/work/ppo-1").is_dir()
        monkeypatch.undo()
        monkeypatch.chdir(here)
        assert "with other settings" not in train(here, "killed", *options)
        whole, gone_on = (PPORecord.read(here / n / "record.json") for n in ("whole", "killed"))
        assert whole.curve == gone_on.curve and len(gone_on.seconds) == 1
        whole, gone_on = (
            AutoModelForCausalLM.from_pretrained(here / n / "policy") for n in ("whole", "killed")
        )
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), gone_on.parameters()))

    def test_a_reward_model_as_reward_and_critic(self, here, judge):
        train(here, "judged", "--reward", judge[0], "--set", "critic_learning_rate=1e-30")
        critic = Critic.from_pretrained(here / "judged" / "critic")
        head = RewardModel.from_pretrained(judge[0]).head.weight
        torch.testing.assert_close(critic.head.weight, head)
        record = PPORecord.read(here / "judged" / "record.json")
        assert record.rewards == ["RewardModel"] and record.curve[0]["objective/scores"] != 0
        for folder in (here / "judged" / "critic", judge[0]):
            made = cli._critic(str(folder), "cpu")
            torch.testing.assert_close(made.head.weight, head)

    def test_custom_macro_actions(self, here):
        train(here, "custom", "--reward", "my_rewards:low_bytes", "--termination", "custom", "--starts",
              "my_rewards:every_third")  # fmt: skip
        record = PPORecord.read(here / "custom" / "record.json")
        assert record.curve[0]["macro/length_max"] == 3

    def test_programs(self, here):
        row = {"prompt": "print 1", "tests": [{"input": "", "output": "1"}]}
        (here / "tests.jsonl").write_text(json.dumps(row))
        found = json.loads(succeeds(
            "ma-rlhf", "train", "--model", here / "base", "--prompts", here / "tests.jsonl", "--reward",
            "program", "--out", here / "program", *FEW, "--batch-size", "2", "--steps", "1",
            "--json"))  # fmt: skip
        assert -1 <= found["score"] < 0  # a random policy does not print 1


class TestRewardModel:
    def test_rm(self, judge):
        folder, found = judge
        record = RewardRecord.read(folder / "record.json")
        assert found["steps"] == 2 and found["pairs"] == record.pairs == 18
        assert found["before"]["loss"] != found["after"]["loss"]
        assert Path(found["report"]).is_file() and AutoTokenizer.from_pretrained(folder)("a")

    def test_training_goes_on_with_its_head(self, place, judge):
        out = succeeds("ma-rlhf", "rm", "--model", judge[0], "--data", place / "pairs.jsonl", "--held-out",
                       "0", "--out", place / "more", *RM_FEW, "--learning-rate", "1e-30")  # fmt: skip
        assert "token_span" not in out and "bradley_terry" in out
        heads = [RewardModel.from_pretrained(f).head.weight for f in (judge[0], place / "more")]
        torch.testing.assert_close(*heads)

    def test_eval(self, place, judge):
        command = ["ma-rlhf", "eval", "--reward-model", judge[0], "--policy", f"base={place / 'base'}",
                   "--policy", f"again={place / 'base'}", "--prompts", place / "prompts.jsonl", "--count",
                   "5", "--max-new-tokens", "5", "--best-of", "3", "--out", place / "eval"]  # fmt: skip
        found = json.loads(succeeds(*command, "--json"))
        base = found["policies"]["base"]
        assert base["count"] == 5 and base["low"] < base["mean"] < base["high"]
        assert found["policies"]["again"] == base  # the same weights, the same random numbers
        assert found["win_rates"][0]["ties"] == 5 and found["win_rates"][0]["rate"] == 0.5
        curve = found["best_of_n"]["base"]
        assert [p["n"] for p in curve] == [1, 2, 3]
        assert curve[0]["mean"] < curve[1]["mean"] < curve[2]["mean"]
        out = succeeds(*command, "--quiet")
        assert "Win rates" in out and "n = 3" in out
        assert {"index.html", "scores.png", "best-of-n.png"} <= {
            p.name for p in (place / "eval").iterdir()
        }

    def test_report_of_both_kinds(self, judge, own, here):
        out = succeeds(
            "ma-rlhf", "report", own[0], judge[0] / "record.json", "--out", here / "page"
        )
        page = (here / "page" / "index.html").read_text()
        assert "report" in out and "Reward models" in page and "MA-PPO, n = 3" in page


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--termination", "sometimes"], "termination must be one of fixed"),
        (["--n", "0"], "n must be >= 1, got 0"),
        (["--n", "five"], "--n must be a whole number, or inf"),
        (["--lam", "2"], "lam must be in"),
        (["--preset", "huge"], "preset must be one of default"),
        (["--set", "lambda=1"], "--set takes FIELD=VALUE with a field of"),
        (["--set", "vf_coef"], "--set takes FIELD=VALUE"),
        (["--set", "lam=1", "--lam", "1"], "lam is given by an option and by --set, too"),
        (["--set", "gamma=1", "--set", "gamma=0"], "--set gamma is given twice"),
        (["--reward", "beauty"], "a reward is spelling, program, module:function"),
        (["--reward", "my_rewards:none"], "'my_rewards:none' names nothing that can be imported"),
        (["--reward", "my_rewards:answer"], "must be callable, got int"),
        (["--reward", "program"], "needs prompts with a column tests; there are: prompt, label"),
        (["--reward", "base"], "base is no reward model but LlamaForCausalLM"),
        (["--reward-weight", "1", "--reward-weight", "2"], "reward_weights must be 1 finite"),
        (["--critic", "base"], "base is no reward model"),
        (["--termination", "custom"], "callback"),
        (["--device", "tpu"], "--device takes"),
    ],
)  # fmt: skip
def test_bad_options(here, extra, message):
    said = fails("ma-rlhf", "train", "--model", here / "base", "--prompts", here / "prompts.jsonl", "--out",
                 here / "never", *FEW, *(["--reward", "my_rewards:low_bytes"] if "--reward" not in extra else []),
                 *extra)  # fmt: skip
    assert message in said
    assert not (here / "never" / "policy").exists()


def test_bad_input(here, judge, tmp_path):
    options = ["--model", here / "base", "--out", tmp_path / "never", *FEW]
    file = tmp_path / "rows.jsonl"
    for text, message in (('{"question": "a"}', "line 1: needs a text, or an object with prompt"),
                          ('"a"\n{', "line 2 is not JSON"), ("\n", "has no rows")):  # fmt: skip
        file.write_text(text)
        assert message in fails("ma-rlhf", "train", "--prompts", file, *options)
    assert "line 1 needs text in" in fails(
        "ma-rlhf",
        "rm",
        "--data",
        here / "prompts.jsonl",
        "--model",
        here / "base",
        "--out",
        tmp_path,
    )
    assert "--held-out must be" in fails("ma-rlhf", "rm", "--held-out", "1", "--out", tmp_path)
    assert "rm_loss must be one of" in fails("ma-rlhf", "rm", "--rm-loss", "mse", "--out", tmp_path)
    command = ["ma-rlhf", "eval", "--reward-model", judge[0], "--out", tmp_path]
    twice = ["--policy", here / "base", "--policy", here / "base"]
    assert "two policies are called" in fails(*command, *twice)
    assert "--top-p must be in" in fails(*command, "--policy", here / "base", "--top-p", "0")
    assert "has no record.json" in fails("ma-rlhf", "report", tmp_path)
    file.write_text('{"config": {}, "colour": 1}')
    assert "is no record" in fails("ma-rlhf", "report", file)


def test_a_machine_without_a_sandbox_is_one_sentence(here, monkeypatch):
    from tenfold import sandbox

    def refuse(self, *args, **kwargs):
        raise sandbox.SandboxError("no means here to protect: files")

    monkeypatch.setattr(sandbox.Sandbox, "run", refuse)
    (here / "few.jsonl").write_text('{"prompt": "a", "tests": ["assert 1"]}')
    said = fails("ma-rlhf", "train", "--model", here / "base", "--prompts", here / "few.jsonl", "--reward",
                 "program", "--out", here / "never", *FEW)  # fmt: skip
    assert "no means here to protect" in said


class TestInputs:
    def test_prompts(self, tmp_path):
        chat = [{"role": "user", "content": "hi"}]
        (tmp_path / "p.jsonl").write_text(f'"a"\n\n{json.dumps({"prompt": chat})}\n')
        assert inputs.load_prompts(tmp_path / "p.jsonl") == [{"prompt": "a"}, {"prompt": chat}]

    def test_packaged_prompts(self, monkeypatch):
        found = preferences.packaged_preferences()
        monkeypatch.setattr(preferences, "packaged_preferences", lambda: found)
        train, held = inputs.packaged_prompts(), inputs.packaged_prompts(held_out=True)
        assert len(train) > 1000 < 5 * len(held) and len(set(train)) == len(train)
        assert not set(train) & set(held) and set(train) | set(held) == {
            p.prompt for part in found for p in part
        }

    def test_tokenizers_that_differ(self, place, tmp_path, judge):
        save_tokenizer(tmp_path / "other", shift=1)
        own, other = (
            AutoTokenizer.from_pretrained(f) for f in (place / "base", tmp_path / "other")
        )
        assert inputs.same_tokens(own, AutoTokenizer.from_pretrained(judge[0]))
        assert not inputs.same_tokens(own, other)
        assert inputs.named_reward(str(judge[0]), own, ["prompt"]).tokenizer is None
        assert inputs.named_reward(str(judge[0]), other, ["prompt"]).tokenizer is not None

    def test_settings(self):
        fields = ["n", "lengths", "sigma", "gamma", "isolate_last"]
        given = ["n=inf", "lengths=2,3", "sigma=unit", "gamma=.5", "isolate-last=true"]
        found = inputs.named_settings(given, fields)
        assert found == {"n": None, "lengths": (2, 3), "sigma": "unit", "gamma": 0.5,
                         "isolate_last": True}  # fmt: skip
        assert MARLHFConfig(**found).n is None

    def test_paths(self):
        assert inputs.named_paths(["a=x/y", "smollm2"]) == {"a": "x/y", "smollm2": "smollm2"}
        with pytest.raises(ValueError, match="NAME=PATH"):
            inputs.named_paths(["=x"])

    def test_best_of_sizes(self):
        from tenfold.rlhf.best_of import BestOfN

        made = pages._sizes(BestOfN(["a"], [[""] * 6], torch.zeros(1, 6)))
        assert made == [1, 2, 4, 6]


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "ma_rlhf.py", "--steps", "2", "--json", tmp_path / "ma.json"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "ma.json").read_text())
    assert [r["config"]["n"] for r in found["runs"]] == [1, 5]


DOCS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/methods/ma_rlhf.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_documentation_runs(at, tmp_path):
    done = processes.python("-c", DOCS[at], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    if at == 1:
        seg, adv = map(json.loads, re.findall(r"\[\[.*?\]\]", done.stdout))
        assert seg == [[0, 0, 1, 1, 2]] and adv[0] == pytest.approx([0.55, 0.55, 0.7, 0.7, 1.0])
    else:
        assert (tmp_path / "ma-rlhf-run" / "record.json").is_file()
