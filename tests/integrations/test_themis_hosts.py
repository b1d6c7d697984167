# SPDX-License-Identifier: Apache-2.0
"""Themis as the reward inside verl's reward loop, OpenRLHF's executor and TRL's GRPO: their code, a real server."""

import asyncio
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from test_trl import tiny, tokenizer, trl  # noqa: F401, its fixtures
from themis_judges import CALL, Crashes, Gives, Lengths

from tenfold.integrations import themis as adapter
from tenfold.themis.rewards import ThemisReward
from tenfold.themis.scorer import Scorer
from tenfold.themis.serve import Server


@pytest.fixture
def served(monkeypatch):
    """Serves a judge where the environment says."""
    ends = []

    def make(judge, **settings):
        server = Server(Scorer(judge, max_wait=0.0), **settings).start()
        ends.append(server)
        monkeypatch.setenv("TENFOLD_THEMIS_URL", server.url)
        return server

    yield make
    for server in ends:
        server.stop()
        server.scorer.close(timeout=5)


class Letters:
    """Tokens as letters."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(96 + int(i)) for i in ids)


@pytest.mark.host_verl
class TestVerl:
    @pytest.fixture(autouse=True)
    def verl(self):
        if importlib.util.find_spec("verl") is None:
            pytest.skip("needs verl (make test-hosts)")

    def function(self, name):
        """As verl loads it from its configuration."""
        from omegaconf import OmegaConf
        from verl.trainer.ppo.reward import get_custom_reward_fn

        path = {"path": f"pkg://{adapter.__name__}", "name": name}
        return get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": path}}))

    def data(self, lengths):
        import numpy as np
        from verl import DataProto

        mask = torch.arange(8)[None] < torch.tensor(lengths)[:, None]
        tensors = {"responses": torch.ones(len(lengths), 8, dtype=torch.int64),
                   "attention_mask": torch.cat([torch.ones(len(lengths), 3), mask], 1).long()}  # fmt: skip
        extra = [{"question": f"q{i}", "index": i} for i in range(len(lengths))]
        others = {"data_source": ["set"] * len(lengths), "extra_info": extra,
                  "reward_model": [{"ground_truth": "t"}] * len(lengths)}  # fmt: skip
        return DataProto.from_dict(
            tensors, {k: np.array(v, dtype=object) for k, v in others.items()}
        )

    def run(self, judge_data, manager="naive"):
        from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

        async def go():
            made = get_reward_manager_cls(manager)({}, Letters(), self.function("compute_score"))
            return await asyncio.gather(
                *(made.run_single(judge_data[i : i + 1]) for i in range(len(judge_data)))
            )

        return asyncio.run(go())

    def test_reward_loop(self, served):
        judge = Lengths()
        served(judge)
        found = self.run(self.data([3, 1, 8]))
        assert [f["reward_score"] for f in found] == [3, 1, 5]
        assert all(f["reward_extra_info"]["themis_finish"] == "rationale" for f in found)
        assert sorted(a for b in judge.batches for a in b) == ["a", "aaa", "aaaaaaaa"]
        assert {e["index"] for e in judge.examples} == {0, 1, 2} and judge.examples[0][
            "ground_truth"
        ] == "t"

    def test_missing(self, served, monkeypatch):
        served(Gives({"aaa": 1.0}))
        with pytest.raises(RuntimeError, match="a response got no reward"):
            self.run(self.data([2]))
        monkeypatch.setenv("TENFOLD_THEMIS_MISSING", "-2")
        assert [f["reward_score"] for f in self.run(self.data([2, 3]))] == [-2, 1]


@pytest.mark.host_openrlhf
class TestOpenRlhf:
    @pytest.fixture
    def executor(self):
        if importlib.util.find_spec("openrlhf") is None:
            pytest.skip("needs openrlhf (make test-hosts)")
        from openrlhf.utils.agent import SingleTurnAgentExecutor

        return SingleTurnAgentExecutor

    def execute(self, executor, prompt="ask: ", said="hello"):
        """One response of a stub engine, rewarded by OpenRLHF's own code."""
        ids = {c: i for i, c in enumerate(sorted(set(prompt + said)))}
        back = {i: c for c, i in ids.items()}

        class Tokenizer:
            def __call__(self, text, **options):
                return {"input_ids": torch.tensor([[ids[c] for c in text]])}

            def decode(self, given, skip_special_tokens):
                return "".join(back[int(i)] for i in given)

        class Engine:
            async def generate(self, prompt_ids, params, multi_modal_data=None):
                out = SimpleNamespace(
                    token_ids=[ids[c] for c in said], finish_reason="stop", logprobs=None
                )
                return SimpleNamespace(outputs=[out])

        params = SimpleNamespace(max_tokens=8, logprobs=None)
        return asyncio.run(executor.execute(prompt, "label", params, 64, Tokenizer(), Engine()))

    def experience(self, found):
        """What its trainer makes of them."""
        return torch.tensor([found["reward"]]).reshape(-1), torch.tensor([found["scores"]]).reshape(
            -1
        )

    def test_over_http(self, served, executor):
        judge = Lengths()
        server = served(judge, token="a-token-of-twenty-ch")
        found = self.execute(
            executor(f"http://any:a-token-of-twenty-ch@127.0.0.1:{server.port}/score")
        )
        reward, score = self.experience(found)
        assert (
            reward.tolist() == [5]
            and score.tolist() == [5]
            and found["extra_logs"]["themis_calls"] == [0]
        )
        assert judge.batches == [["hello"]] and judge.examples == [{"label": "label"}]

    def test_more_servers_than_samples(self, served, executor):
        server = served(Lengths())
        found = self.execute(executor([f"{server.url}/score", f"{server.url}/score"]))
        assert self.experience(found)[0].tolist() == [5]

    def test_its_python_file(self, served, executor):
        served(Gives({"hello": 7.5}, [CALL]))
        found = self.execute(executor(adapter.__file__))
        reward, score = self.experience(found)
        assert (
            reward.tolist() == [5]
            and score.tolist() == [7.5]
            and float(found["extra_logs"]["calls"]) == 1
        )

    def test_no_reward(self, served, executor, monkeypatch):
        """OpenRLHF goes on without: then it wants a reward model of its own, unless told what is missing."""
        served(Crashes(RuntimeError("broken")))
        assert self.execute(executor(adapter.__file__), said="bad")["reward"] is None
        monkeypatch.setenv("TENFOLD_THEMIS_MISSING", "-1")
        found = self.execute(executor(adapter.__file__), said="bad")
        assert self.experience(found)[0].tolist() == [-1]


@pytest.mark.host_trl
class TestTrl:
    @pytest.fixture
    def rewarded(self, request, tmp_path):
        """A step of real GRPO with some reward; its logs."""
        words = request.getfixturevalue("tokenizer")
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        def go(reward):
            config = GRPOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=1,
                max_completion_length=8, report_to=[], use_cpu=True, bf16=False, logging_steps=1,
                save_strategy="no", disable_tqdm=True, seed=3,
            )  # fmt: skip
            rows = Dataset.from_dict({"prompt": ["a b c", "d e f"] * 4, "test_list": [["x"]] * 8})
            trainer = GRPOTrainer(
                tiny(), reward, args=config, train_dataset=rows, processing_class=words
            )
            trainer.train()
            return trainer.state.log_history[0]

        return go

    def test_in_process(self, rewarded):
        judge = Lengths()
        with Scorer(judge, batch_size=4, max_wait=1.0) as scorer:
            logs = rewarded(ThemisReward(scorer))
        assert [len(b) for b in judge.batches] == [4] and judge.examples[0]["test_list"] == ["x"]
        assert logs["rewards/themis/mean"] == pytest.approx(
            sum(min(len(a), 5) for a in judge.batches[0]) / 4
        )
        assert logs["themis/finish_rationale"] == 1

    def test_by_a_server(self, served, rewarded):
        judge = Lengths()
        served(judge)
        logs = rewarded(adapter.trl_reward)
        assert "rewards/trl_reward/mean" in logs and len(judge.examples) == 4
